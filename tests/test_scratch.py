"""A trial's working folder: it looks like the user's, and nothing of the user's is written to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unvanish import scratch
from unvanish.scratch import Guard, inside, mirror

LARGE = "x" * (scratch.COPIED_FILE + 1)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a project with small and large files, beside a folder of data."""
    folder = tmp_path / "home" / "project"
    (folder / "package").mkdir(parents=True)
    (folder / "package" / "part.py").write_text("PART = 1\n")
    (folder / "small.txt").write_text("small")
    (folder / "large.txt").write_text(LARGE)
    (folder / ".hidden").write_text("hidden")
    (tmp_path / "home" / "data").mkdir()
    (tmp_path / "home" / "data" / "table.csv").write_text("1,2\n")
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Return every file of a folder with what is in it."""
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_a_mirror_reads_like_the_original(project: Path, tmp_path: Path) -> None:
    """Every file is found under its relative path, also beside the folder and far up."""
    place = tmp_path / "place"
    mirror([project], place)
    copy = inside(place, project)
    assert contents(copy) == contents(project)
    assert (copy / ".." / "data" / "table.csv").read_text() == "1,2\n"
    assert (copy / "large.txt").is_symlink()
    assert not (copy / "small.txt").is_symlink()
    assert (place / "usr").exists()  # what lies beside the way down from the root


def test_what_is_written_by_a_relative_path_stays_in_the_mirror(project: Path, tmp_path: Path) -> None:
    """New files, overwritten ones and removed ones leave the original as it was."""
    before = contents(project)
    place = tmp_path / "place"
    mirror([project], place)
    copy = inside(place, project)
    (copy / "small.txt").write_text("changed")
    (copy / "package" / "new.txt").write_text("new")
    (copy / "large.txt").unlink()
    assert contents(project) == before


def test_what_is_left_out_is_not_there(project: Path, tmp_path: Path) -> None:
    """The folder of the trials is not copied into itself."""
    own = project / "runs" / "cure"
    own.mkdir(parents=True)
    (own / "record").write_text("a record")
    mirror([project], own / "place", without=[own])
    assert not (inside(own / "place", project) / "runs" / "cure").exists()
    assert (tmp_path / "home").exists()


def test_environments_are_linked_and_not_written_through(project: Path, tmp_path: Path) -> None:
    """A virtual environment is not copied; the guard refuses to write through the link to it."""
    (project / "env").mkdir()
    (project / "env" / "pyvenv.cfg").write_text("home = /usr/bin\n")
    own = tmp_path / "own"
    mirror([project], own / "mirror")
    link = inside(own / "mirror", project) / "env"
    assert link.is_symlink()
    assert guarded(project, own, str(link / "new.txt"), "w", str(link / "pyvenv.cfg"), "r") == ["refused", "done"]
    assert not (project / "env" / "new.txt").exists()


def test_one_of_two_folders_in_the_other_is_copied_once(project: Path, tmp_path: Path) -> None:
    """The script's folder inside of the working folder is part of its copy."""
    mirror([project / "package", project], tmp_path / "place")
    assert contents(inside(tmp_path / "place", project)) == contents(project)


def test_pipes_and_broken_links_are_no_obstacle(project: Path, tmp_path: Path) -> None:
    """A named pipe would wait for ever when it is opened; a link may lead nowhere."""
    os.mkfifo(project / "pipe")
    (project / "broken").symlink_to(project / "nowhere")
    mirror([project], tmp_path / "place")
    assert not (inside(tmp_path / "place", project) / "pipe").exists()


GUARDED = """
import sys
from pathlib import Path
from unvanish.scratch import Guard
Guard([Path(sys.argv[1])], Path(sys.argv[2])).attach()
for path, mode in zip(sys.argv[3::2], sys.argv[4::2]):
    try:
        with open(path, mode) as file:
            if mode == "r":
                file.read()
            else:
                file.write("changed")
        print("done")
    except PermissionError as error:
        print("refused")
"""


def guarded(project: Path, own: Path, *opened: str) -> list[str]:
    """Open files in a process of its own: an audit hook stays until the process ends."""
    command = [sys.executable, "-c", GUARDED, str(project), str(own), *opened]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_a_linked_file_becomes_a_copy_when_it_is_written(project: Path, tmp_path: Path) -> None:
    """Overwriting and appending change the copy only; appending begins from what was there."""
    own = tmp_path / "own"
    mirror([project], own / "mirror")
    link = inside(own / "mirror", project) / "large.txt"
    assert guarded(project, own, str(link), "a") == ["done"]
    assert link.read_text() == LARGE + "changed"
    assert (project / "large.txt").read_text() == LARGE


def test_writing_to_the_original_by_its_absolute_path_is_refused(project: Path, tmp_path: Path) -> None:
    """Reading it is not, nor is writing anywhere else."""
    target, elsewhere = project / "small.txt", tmp_path / "elsewhere.txt"
    opened = [str(target), "w", str(project / "new.txt"), "w", str(target), "r", str(elsewhere), "w"]
    assert guarded(project, tmp_path / "own", *opened) == ["refused", "refused", "done", "done"]
    assert target.read_text() == "small"
    assert not (project / "new.txt").exists()


def test_a_refusal_says_what_was_expected(project: Path, tmp_path: Path) -> None:
    """The message names the path and what to do."""
    with pytest.raises(PermissionError, match=r"found '.*small\.txt', expected a path relative to"):
        Guard([project], tmp_path / "own").before_writing(str(project / "small.txt"))

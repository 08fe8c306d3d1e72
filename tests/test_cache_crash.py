"""Killed at any line, out of space, or two at once: a cache never holds a wrong row, and the work goes on."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_cache import all_rows, data, frozen_mlp, quiet, truth
from unvanish import cache_features
from unvanish.reuse.cache import fill, store

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many shards from few rows."""
    monkeypatch.setattr(store, "SHARD_BYTES", 200)


def compute(folder: Path, tell: Callable[[str], object] = quiet) -> Any:
    return cache_features(frozen_mlp(), data(), folder, batch_size=8, tell=tell)


def in_child(function: Callable[[], object]) -> int:
    """Run a function in a process of its own; return its number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def killed(child: int) -> bool:
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def dies_at_line(number: int) -> Callable[..., Any]:
    """Return a trace function that kills the process at the n-th line that it runs in the files of the cache."""
    count = 0
    files = {store.__file__, fill.__file__}

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def lines_of(folder: Path) -> int:
    """Count the lines that a whole run passes."""
    total = 0
    files = {store.__file__, fill.__file__}

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal total
        if frame.f_code.co_filename not in files:
            return None
        total += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        compute(folder)
    finally:
        sys.settrace(before)
    return total


def assert_true(folder: Path) -> None:
    """Open a folder, and compare every row with the truth."""
    x, y = all_rows(compute(folder))
    assert torch.equal(x, truth(frozen_mlp(), data()))
    assert torch.equal(y, data().tensors[1])


def kill_often(folder: Path, kills: int, seed: int) -> None:
    """Kill runs at random lines; what they leave is whole, and what is opened after is the truth."""
    chooser = random.Random(seed)
    total = lines_of(folder / "once")
    place, finished, deaths = 0, 0, 0
    while deaths < kills:
        here = folder / str(place)
        line = chooser.randrange(1, total)

        def run(here: Path = here, line: int = line) -> None:
            sys.settrace(dies_at_line(line))
            compute(here)

        died = killed(in_child(run))
        deaths += died
        manifest = store.load_manifest(here)
        assert manifest is None or store.damaged(here, manifest) == []
        if not died or chooser.random() < 0.2:  # go on where it ended, or open it now
            assert_true(here)
            finished += 1
            place += 1
    assert_true(folder / str(place))
    assert finished


def test_a_killed_run_leaves_no_wrong_row(tmp_path: Path) -> None:
    """A few of what the longer test does a hundred times."""
    kill_often(tmp_path, 8, seed=1)


@pytest.mark.slow
def test_a_hundred_kills_leave_no_wrong_row(tmp_path: Path) -> None:
    """A hundred runs that are killed with SIGKILL at random lines while they compute, write or check."""
    kill_often(tmp_path, 100, seed=2)


def test_a_killed_run_goes_on_where_it_ended(tmp_path: Path) -> None:
    """Shards that are finished are not computed again."""

    def run() -> None:
        save = fill.save_manifest

        def save_and_die(folder: Path, manifest: store.Manifest) -> None:
            save(folder, manifest)
            if len(manifest.shards) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        fill.save_manifest = save_and_die
        compute(tmp_path)

    assert killed(in_child(run))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    assert len(before) == 6
    assert_true(tmp_path)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    assert before.items() <= after.items()
    assert len(after) == 14


def test_two_at_once(tmp_path: Path) -> None:
    """One process computes, the other waits and reads the same rows."""

    def run() -> None:
        said: list[str] = []
        x, _ = all_rows(compute(tmp_path, said.append))
        assert torch.equal(x, truth(frozen_mlp(), data()))
        (tmp_path / f"{os.getpid()}.said").write_text("\n".join(said))

    children = [in_child(run) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    said = "".join(path.read_text() for path in tmp_path.glob("*.said"))
    assert said.count("rows computed and written") == 1


def test_files_that_cannot_grow(tmp_path: Path) -> None:
    """When the system refuses to write, nothing torn is left; with room again, the work goes on."""

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        with pytest.raises(OSError, match="File too large"):
            compute(tmp_path)

    assert os.waitpid(in_child(run), 0)[1] == 0
    assert not list(tmp_path.glob("*.new"))
    assert_true(tmp_path)

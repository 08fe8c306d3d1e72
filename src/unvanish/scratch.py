"""A working folder for a trial: it looks like the user's, and takes what the trial writes.

Small files are copied, large ones and everything around the folder linked. Python's `open` of a linked file for writing
first turns the link into a copy; writing into the user's own folder is refused, be it by an absolute path or through a
linked folder.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COPIED_BYTES = 50_000_000  # all copied files together
COPIED_FILE = 1_000_000  # a larger file is linked
ENTRIES = 5_000  # files and folders that are entered; what is left then is linked as it is
NEIGHBOURS = 500  # linked beside each folder on the way down


@dataclass
class _Left:
    """What may still be copied."""

    bytes: int = COPIED_BYTES
    entries: int = ENTRIES


def mirror(folders: Iterable[Path], place: Path, *, without: Sequence[Path] = ()) -> None:
    """Make ``place`` look like the root of the file system, with these folders copied.

    Args:
        folders: What a script may write to: the working folder and that of the script.
        place: A folder that does not exist yet.
        without: Folders that are left out.

    Afterwards `inside` gives the path of a copy; relative paths from there, ``../data`` among them, lead to
    what they led to before.
    """
    roots = _outermost(folder.resolve() for folder in folders)
    left_out = {path.resolve() for path in (*without, place)}
    place.mkdir(parents=True)
    for anchor in {Path(root.anchor) for root in roots}:
        _descend(anchor, place, roots, left_out, _Left())


def inside(place: Path, path: Path) -> Path:
    """Return where a path of the file system is found in its mirror.

    Example:
        >>> inside(Path("/tmp/mirror"), Path("/home/me/project"))
        PosixPath('/tmp/mirror/home/me/project')
    """
    return place / path.resolve().relative_to(path.resolve().anchor)


def _outermost(folders: Iterable[Path]) -> list[Path]:
    """Return the folders that lie in none of the others."""
    known = sorted(set(folders), key=lambda folder: len(folder.parts))
    kept: list[Path] = []
    for folder in known:
        if not any(folder.is_relative_to(outer) for outer in kept):
            kept.append(folder)
    return kept


def _descend(source: Path, target: Path, roots: list[Path], left_out: set[Path], left: _Left) -> None:
    """Go down to the folders that are copied, and link what lies beside the way."""
    if source in roots:
        _copy(source, target, left_out, left)
        return
    on_the_way = {root.relative_to(source).parts[0] for root in roots if root.is_relative_to(source)}
    for name in on_the_way:
        (target / name).mkdir()
        _descend(source / name, target / name, roots, left_out, left)
    for item in _entries(source)[:NEIGHBOURS]:
        if item.name not in on_the_way:
            _link(Path(item.path), target / item.name)


def _copy(source: Path, target: Path, left_out: set[Path], left: _Left) -> None:
    """Copy what is small, link what is large or hidden; folders are real, so that new files land here."""
    for item in _entries(source):
        path, new = Path(item.path), target / item.name
        if path in left_out or item.name == "__pycache__":
            continue
        left.entries -= 1
        try:
            if item.is_dir(follow_symlinks=False) and left.entries > 0 and not _is_installed(path):
                new.mkdir()
                _copy(path, new, left_out, left)
            elif item.is_file(follow_symlinks=False) and _affords(item.stat().st_size, left):
                shutil.copy2(path, new)
                left.bytes -= item.stat().st_size
            elif not item.is_file() and not item.is_dir():
                continue  # a socket or a pipe: opening it could wait for ever
            else:
                _link(path, new)
        except OSError:
            continue


def _is_installed(folder: Path) -> bool:
    """Say whether a folder holds what no script writes to: hidden ones, virtual environments, packages of npm."""
    return folder.name.startswith(".") or folder.name == "node_modules" or (folder / "pyvenv.cfg").exists()


def _affords(size: int, left: _Left) -> bool:
    return left.entries > 0 and size <= min(COPIED_FILE, left.bytes)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda item: item.name)
    except OSError:
        return []


def _link(source: Path, target: Path) -> None:
    if not target.is_symlink() and not target.exists():
        target.symlink_to(source.resolve())


class Guard:
    """Keeps a trial from writing to the user's files; asked before every `open` of Python's.

    Args:
        folders: The user's folders, which stay as they are.
        own: The trial's folder, where its mirror and its record lie.
    """

    def __init__(self, folders: Iterable[Path], own: Path) -> None:
        self._kept = [os.path.realpath(folder) for folder in folders]
        self._own = os.path.realpath(own)
        self._is_busy = False

    def attach(self) -> None:
        """Begin to look at what is opened, until the process ends."""
        sys.addaudithook(self._hear)

    def _hear(self, event: str, details: tuple[Any, ...]) -> None:
        if event != "open" or self._is_busy or not isinstance(details[0], (str, bytes)):
            return
        if details[2] is not None and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            self._is_busy = True
            try:
                self.before_writing(os.fsdecode(details[0]))
            finally:
                self._is_busy = False

    def before_writing(self, path: str) -> None:
        """Make a linked file a copy of its own.

        Raises:
            PermissionError: if the path leads into a folder of the user's.
        """
        absolute = os.path.abspath(path)
        folder = os.path.realpath(os.path.dirname(absolute))
        if _is_within(folder, self._own):
            link = os.path.join(folder, os.path.basename(absolute))
            if os.path.islink(link):
                _detach(link)
            return
        if any(_is_within(folder, kept) for kept in self._kept):
            raise PermissionError(
                f"a trial must not write to the user's files: found {path!r}, expected a path relative to the working "
                "folder or to the script. Nothing was written."
            )


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _detach(link: str) -> None:
    """Put a copy of a file in the place of the link to it."""
    source = os.path.realpath(link)
    os.unlink(link)
    if os.path.isfile(source):
        shutil.copy2(source, link)

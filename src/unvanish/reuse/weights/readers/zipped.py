"""Archives whose members are read in place, never unpacked to disk."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .guard import Budget, refused

_END_SEARCHED = (1 << 16) + 22  # the last record, and the longest comment behind it
_SMALLEST_ENTRY = 46 + 1  # of the directory: its fixed part, and a name


class Archive:
    """A zip file whose members are counted before they are read.

    Args:
        opened: The archive.
        budget: What it may ask for.
    """

    def __init__(self, opened: zipfile.ZipFile, budget: Budget) -> None:
        self._opened = opened
        self.budget = budget
        members = opened.infolist()
        budget.entries(len(members))
        self.members = {member.filename: member for member in members}
        if len(self.members) < len(members):
            raise refused(budget.file, "two members of one name", "names that differ", "Do not trust this file")

    def read(self, name: str) -> bytes:
        """Return a member, whose declared size was taken from the budget; a longer one is cut off and refused."""
        member = self.members.get(name)
        if member is None:
            raise refused(self.budget.file, f"no member {name!r}", "one", "Save it anew")
        self.budget.bytes(member.file_size)
        with self._opened.open(member) as opened:
            content = opened.read(member.file_size + 1)
        if len(content) != member.file_size:
            raise refused(
                self.budget.file, f"member {name!r} of another size than declared", "equal ones", "Save it anew"
            )
        return content


def entries_of(path: Path) -> int:
    """Return how many members an archive can have, by the size of its directory; before that is read."""
    with path.open("rb") as opened:
        size = opened.seek(0, 2)
        opened.seek(max(0, size - _END_SEARCHED))
        end = opened.read()
    place = end.rfind(b"PK\x05\x06")
    if place < 0 or len(end) < place + 22:
        return 0
    (directory,) = struct.unpack_from("<L", end, place + 12)
    return 0 if directory == 0xFFFFFFFF else int(directory) // _SMALLEST_ENTRY


@contextmanager
def archive(path: Path, budget: Budget) -> Iterator[Archive]:
    """Open a zip file for reading."""
    with zipfile.ZipFile(path) as opened:
        yield Archive(opened, budget)

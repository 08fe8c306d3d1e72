"""HDF5 files, of which only what lies in them is read.

The library follows links to other files, raw data elsewhere and virtual data sets, so a file of a few kilobytes can
bring the bytes of any other file as weights, or declare terabytes that are not stored. Each is looked for and refused
before a byte is read.

Source: CVE-2026-1669 and CVE-2025-9905 (Keras), which name these ways.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import h5py
from torch import Tensor

from .guard import Budget, natural, refused, tensor_of

_KNOWN_FILTERS = {1, 2, 3, 4, 5, 6, 32000}  # deflate, shuffle, fletcher32, szip, nbit, scale-offset, lzf
_MOST_TEXT = 1 << 16


class SafeFile:
    """A file of HDF5 whose links and sizes are checked before they are followed.

    Args:
        opened: The file.
        budget: What it may ask for.
    """

    def __init__(self, opened: h5py.File, budget: Budget) -> None:
        self.root: h5py.Group = opened
        self.budget = budget
        self._seen: set[Any] = set()

    def children(self, group: h5py.Group, depth: int = 0) -> dict[str, Any]:
        """Return what a group holds, numbers sorted by size; a group is opened once only."""
        self.budget.level(depth)
        self._once(group)
        self.budget.entries(group.id.get_num_objs())
        found = {}
        for name in sorted(group, key=natural):
            self._check_link(group, name)
            found[name] = group[name]
        return found

    def child(self, group: h5py.Group, name: str) -> Any:
        """Return one entry of a group by its path, each part of which is checked."""
        here: Any = group
        self.budget.entries()
        parts = [part for part in name.split("/") if part not in ("", ".")]
        self.budget.level(len(parts))
        for part in parts:
            if not isinstance(here, h5py.Group) or part not in here:
                raise self._refused(f"no entry {name!r}", "one, because the file's own list names it")
            self._check_link(here, part)
            here = here[part]
        return here

    def text(self, entry: Any, name: str) -> list[str]:
        """Return an attribute of texts, also one that was cut in numbered parts; empty if there is none."""
        if name in entry.attrs:
            return self._texts(entry, name)
        found: list[str] = []
        number = 0
        while f"{name}{number}" in entry.attrs:
            found += self._texts(entry, f"{name}{number}")
            number += 1
        return found

    def _texts(self, entry: Any, name: str) -> list[str]:
        attribute = entry.attrs.get_id(name)
        self.budget.entries(math.prod(attribute.shape))
        value = entry.attrs[name]
        values = [value] if isinstance(value, (str, bytes)) else list(getattr(value, "flat", ()))
        return [item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in values]

    def array(self, entry: Any) -> Tensor:
        """Read a data set, after it was seen to lie in the file."""
        if not isinstance(entry, h5py.Dataset):
            raise self._refused("a group", "an array")
        plist = entry.id.get_create_plist()
        if entry.external is not None or plist.get_external_count():
            raise self._refused(f"array {entry.name!r} with its data in another file", "data in the file itself")
        if entry.is_virtual:
            raise self._refused(f"array {entry.name!r} that is a view of other files", "data in the file itself")
        if any(plist.get_filter(number)[0] not in _KNOWN_FILTERS for number in range(plist.get_nfilters())):
            raise self._refused(f"array {entry.name!r} with a filter of its own", "the filters that HDF5 brings")
        if entry.dtype.kind not in "fiubV" or entry.dtype.hasobject:
            raise self._refused(f"array {entry.name!r} of type {entry.dtype}", "numbers")
        size = math.prod(entry.shape) * entry.dtype.itemsize
        if size and not entry.id.get_storage_size():
            raise self._refused(f"array {entry.name!r} that declares {size:,} bytes and stores none", "stored data")
        self.budget.bytes(size)
        dtype = entry.attrs.get("dtype", "") if "dtype" in entry.attrs else ""
        dtype = dtype.decode() if isinstance(dtype, bytes) else str(dtype)
        return tensor_of(entry[()], "bfloat16" if dtype == "bfloat16" else "")

    def _check_link(self, group: h5py.Group, name: str) -> None:
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise self._refused(
                f"entry {name!r} that links elsewhere ({type(link).__name__})", "data in the file itself"
            )

    def _once(self, group: h5py.Group) -> None:
        address = h5py.h5o.get_info(group.id).addr
        if address in self._seen:
            raise self._refused(f"group {group.name!r} met twice", "a tree")
        self._seen.add(address)

    def _refused(self, found: str, expected: str) -> Exception:
        return refused(self.budget.file, found, expected, "Do not trust this file")


@contextmanager
def opened(source: Path | IO[bytes], budget: Budget) -> Iterator[SafeFile]:
    """Open a file, or what was read of an archive, for reading."""
    with h5py.File(source, "r") as file:
        yield SafeFile(file, budget)

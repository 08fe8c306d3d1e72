"""Check a file of HDF5, and read what lies in it; `dump` runs this in a process of its own.

Links to other files, raw data elsewhere and virtual data sets are followed by the library, so a file of a few kilobytes
can bring the bytes of any other file as weights, or declare terabytes that are not stored. Each is looked for and
refused before a byte is read.

Source: CVE-2026-1669 (Keras), which names these ways; the merged answer to it in tf-keras (#921).
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

if TYPE_CHECKING:
    from .dump import Allowance, Content, Source

_KNOWN_FILTERS = {1, 2, 3, 4, 5, 6, 32000}  # deflate, shuffle, fletcher32, szip, nbit, scale-offset, lzf
_NOT_WEIGHTS = {"optimizer", "optimizer_weights"}  # at the root: three times the weights, and of no use here
_INSIDE = "data in the file itself"


def read(source: Source, allowance: Allowance) -> Content:
    """Yield the tree of a file, given by its path or its bytes, then the bytes of each array."""
    with h5py.File(io.BytesIO(source) if isinstance(source, bytes) else source, "r") as file:
        walk = _Walk(allowance)
        yield walk.group(file)
        for array in walk.arrays:
            yield np.ascontiguousarray(array[()]).astype(array.dtype.newbyteorder("<")).tobytes()


class _Walk:
    """Walks a file once."""

    def __init__(self, allowance: Allowance) -> None:
        self.arrays: list[h5py.Dataset] = []
        self._allowance = allowance
        self._seen: set[Any] = set()

    def group(self, group: h5py.Group, depth: int = 0) -> dict[str, Any]:
        """Return a group as plain data."""
        self._allowance.level(depth)
        address = h5py.h5o.get_info(group.id).addr
        if address in self._seen:
            raise self._allowance.distrust(f"group {group.name!r} met twice", "a tree")
        self._seen.add(address)
        self._allowance.entries(group.id.get_num_objs())
        found: dict[str, Any] = {}
        for name in group:
            if depth == 0 and name in _NOT_WEIGHTS:
                continue
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                kind = type(link).__name__
                raise self._allowance.distrust(f"entry {name!r} that links elsewhere ({kind})", _INSIDE)
            entry = group[name]
            found[name] = self.group(entry, depth + 1) if isinstance(entry, h5py.Group) else self._array(entry)
        return {"texts": self._texts(group), "entries": found}

    def _texts(self, entry: Any) -> dict[str, list[str]]:
        """Return the attributes that are texts."""
        found = {}
        self._allowance.entries(len(entry.attrs))
        for name in entry.attrs:
            attribute = entry.attrs.get_id(name)
            if attribute.dtype.kind in "OS" and attribute.dtype.metadata != {"ref": h5py.Reference}:
                self._allowance.entries(math.prod(attribute.shape or ()))
                value = entry.attrs[name]
                values = [value] if isinstance(value, (str, bytes)) else list(getattr(value, "flat", ()))
                found[name] = [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values]
        return found

    def _array(self, entry: Any) -> dict[str, Any]:
        distrust = self._allowance.distrust
        if not isinstance(entry, h5py.Dataset):
            raise distrust(f"entry {entry.name!r} that is no array", "arrays")
        plist = entry.id.get_create_plist()
        if entry.external is not None or plist.get_external_count():
            raise distrust(f"array {entry.name!r} with its data in another file", _INSIDE)
        if entry.is_virtual:
            raise distrust(f"array {entry.name!r} that is a view of other files", _INSIDE)
        if any(plist.get_filter(number)[0] not in _KNOWN_FILTERS for number in range(plist.get_nfilters())):
            raise distrust(f"array {entry.name!r} with a filter of its own", "those that HDF5 brings")
        if entry.dtype.kind not in "fiubV" or entry.dtype.hasobject:
            raise distrust(f"array {entry.name!r} of type {entry.dtype}", "numbers")
        size = math.prod(entry.shape) * entry.dtype.itemsize
        if size and not entry.id.get_storage_size():
            raise distrust(f"array {entry.name!r} that declares {size:,} bytes and stores none", _INSIDE)
        self._allowance.bytes(size)
        self.arrays.append(entry)
        return {"shape": entry.shape, "dtype": entry.dtype.newbyteorder("<").str, "texts": self._texts(entry)}

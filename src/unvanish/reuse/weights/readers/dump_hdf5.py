"""Run in a process of its own: check a file of HDF5, and write what lies in it to standard output.

Links to other files, raw data elsewhere and virtual data sets are followed by the library, so a file of a few kilobytes
can bring the bytes of any other file as weights, or declare terabytes that are not stored. Each is looked for and
refused before a byte is read.

Written is the length of a document, the document, and the bytes of all arrays in their order. This file imports nothing
of its package: it starts in a fraction of a second, without torch.

Source: CVE-2026-1669 (Keras), which names these ways; the merged answer to it in tf-keras (#921).
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from typing import Any, BinaryIO

import h5py
import numpy as np

_KNOWN_FILTERS = {1, 2, 3, 4, 5, 6, 32000}  # deflate, shuffle, fletcher32, szip, nbit, scale-offset, lzf
_NOT_WEIGHTS = {"optimizer", "optimizer_weights"}  # at the root: three times the weights, and of no use here
_MEMORY = 4 << 30  # addresses, of which most are never used
_UNTRUSTED = "Do not trust this file"


class RefusedError(Exception):
    """What was found, what was expected, what to do."""


class Dump:
    """Walks a file; what it may take is counted.

    Args:
        entries: Groups, arrays and texts allowed.
        size: Bytes of arrays allowed.
        levels: Of groups in groups.
    """

    def __init__(self, entries: int, size: int, levels: int) -> None:
        self.entries, self.size, self.levels = entries, size, levels
        self.arrays: list[h5py.Dataset] = []
        self._seen: set[Any] = set()

    def group(self, group: h5py.Group, depth: int = 0) -> dict[str, Any]:
        """Return a group as plain data."""
        if depth > self.levels:
            raise RefusedError("parts nested too deeply", f"at most {self.levels} levels", "Save it anew")
        address = h5py.h5o.get_info(group.id).addr
        if address in self._seen:
            raise RefusedError(f"group {group.name!r} met twice", "a tree", _UNTRUSTED)
        self._seen.add(address)
        self._count(group.id.get_num_objs())
        found: dict[str, Any] = {}
        for name in group:
            if depth == 0 and name in _NOT_WEIGHTS:
                continue
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                kind = type(link).__name__
                raise RefusedError(
                    f"entry {name!r} that links elsewhere ({kind})", "data in the file itself", _UNTRUSTED
                )
            entry = group[name]
            found[name] = self.group(entry, depth + 1) if isinstance(entry, h5py.Group) else self._array(entry)
        return {"texts": self._texts(group), "entries": found}

    def _texts(self, entry: Any) -> dict[str, list[str]]:
        """Return the attributes that are texts."""
        found = {}
        self._count(len(entry.attrs))
        for name in entry.attrs:
            attribute = entry.attrs.get_id(name)
            if attribute.dtype.kind in "OS" and attribute.dtype.metadata != {"ref": h5py.Reference}:
                self._count(math.prod(attribute.shape or ()))
                value = entry.attrs[name]
                values = [value] if isinstance(value, (str, bytes)) else list(getattr(value, "flat", ()))
                found[name] = [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values]
        return found

    def _array(self, entry: Any) -> dict[str, Any]:
        if not isinstance(entry, h5py.Dataset):
            raise RefusedError(f"entry {entry.name!r} that is no array", "arrays", _UNTRUSTED)
        plist = entry.id.get_create_plist()
        inside = "data in the file itself"
        if entry.external is not None or plist.get_external_count():
            raise RefusedError(f"array {entry.name!r} with its data in another file", inside, _UNTRUSTED)
        if entry.is_virtual:
            raise RefusedError(f"array {entry.name!r} that is a view of other files", inside, _UNTRUSTED)
        if any(plist.get_filter(number)[0] not in _KNOWN_FILTERS for number in range(plist.get_nfilters())):
            raise RefusedError(f"array {entry.name!r} with a filter of its own", "those that HDF5 brings", _UNTRUSTED)
        if entry.dtype.kind not in "fiubV" or entry.dtype.hasobject:
            raise RefusedError(f"array {entry.name!r} of type {entry.dtype}", "numbers", _UNTRUSTED)
        size = math.prod(entry.shape) * entry.dtype.itemsize
        if size and not entry.id.get_storage_size():
            raise RefusedError(f"array {entry.name!r} that declares {size:,} bytes and stores none", inside, _UNTRUSTED)
        self.size -= size
        if self.size < 0:
            raise RefusedError("arrays that declare far more than the file stores", "about its size", _UNTRUSTED)
        self.arrays.append(entry)
        return {"shape": entry.shape, "dtype": entry.dtype.newbyteorder("<").str, "texts": self._texts(entry)}

    def _count(self, entries: int) -> None:
        self.entries -= entries
        if self.entries < 0:
            raise RefusedError("too many entries", "fewer", "Save the weights alone")


def main(source: str | BinaryIO, limits: dict[str, int], output: BinaryIO) -> None:
    """Write the content of a file."""
    try:
        with h5py.File(source, "r") as file:
            dump = Dump(**limits)
            _write(output, {"tree": dump.group(file)})
            for array in dump.arrays:
                output.write(np.ascontiguousarray(array[()]).astype(array.dtype.newbyteorder("<")).tobytes())
    except RefusedError as error:
        _write(output, {"refused": error.args})
    except Exception as error:  # the library raises whatever it meets in a damaged file
        _write(output, {"damaged": f"{type(error).__name__}: {error}"[:300]})


def _write(output: BinaryIO, document: dict[str, Any]) -> None:
    content = json.dumps(document).encode()
    output.write(len(content).to_bytes(8, "little") + content)


def limit(seconds: int, size: int) -> None:
    """Let the system end this process when it computes for longer, or takes far more memory than the arrays need."""
    try:
        import resource
    except ImportError:  # not every system can; the parent has a clock
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY + 2 * size, _MEMORY + 2 * size))


if __name__ == "__main__":
    limit(int(sys.argv[3]), json.loads(sys.argv[2])["size"])
    given = io.BytesIO(sys.stdin.buffer.read()) if sys.argv[1] == "-" else sys.argv[1]
    main(given, json.loads(sys.argv[2]), sys.stdout.buffer)

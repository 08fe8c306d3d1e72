"""Check a folder that orbax wrote, and read what lies in it; `dump` runs this in a process of its own.

tensorstore opens what a description names, also elsewhere on the disk or the network; so only the list of names is
taken from the folder, and each array is opened by a description of our own. It makes room for whole chunks, however
large the folder says they are, and ends the process where there is none; so chunks are counted before they are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorstore

if TYPE_CHECKING:
    from .dump import Allowance, Content, Source

_CACHED = 100_000_000  # bytes; without a cache each array would read the list of all arrays anew


def read(source: Source, allowance: Allowance) -> Content:
    """Yield the tree of arrays of a folder, given by its path, then the bytes of each."""
    folder = Path(str(source)).resolve()  # the library takes no ".."
    metadata = json.loads((folder / "_METADATA").read_bytes())
    allowance.entries(len(metadata["tree_metadata"]))
    describe = _descriptions(folder, metadata)
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHED}})
    opened: dict[str, Any] = {}
    for keys in _names(metadata):
        name = ".".join(keys)
        allowance.level(len(keys))
        if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name:
            raise allowance.distrust(f"an array named {name!r}", "a name without a path")
        array = tensorstore.open(describe(name), open=True, read=True, context=context).result()
        _count(array, allowance)
        _put(opened, keys, array)
    yield _told(opened)
    for array in _in_order(opened):
        yield np.ascontiguousarray(array.read().result()).tobytes()


def _names(metadata: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the names of the arrays; texts, and what is empty, are stored elsewhere or not at all."""
    for entry in metadata["tree_metadata"].values():
        told = entry["value_metadata"]
        keys = [str(key["key"]) for key in entry["key_metadata"]]
        if keys and not told.get("skip_deserialize") and told.get("value_type") != "string":
            yield keys


def _descriptions(folder: Path, metadata: Mapping[str, Any]) -> Any:
    """Return a function that describes an array to tensorstore by its name."""
    is_database = (folder / "manifest.ocdbt").is_file()
    told = {
        "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
        # With this mark zeros are stored too, and what is missing is lost.
        "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value"),
    }

    def describe(name: str) -> dict[str, Any]:
        if not is_database:
            return {**told, "kvstore": {"driver": "file", "path": f"{folder}/{name}/"}}
        base = {"driver": "file", "path": f"{folder}/"}
        return {**told, "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}

    return describe


def _count(array: Any, allowance: Allowance) -> None:
    """Take an array's chunks from what is allowed: their number, and the room for all of them as a whole."""
    layout = array.chunk_layout
    read, written = (
        math.prod(-(-length // step) for length, step in zip(array.shape, chunk or (), strict=True))
        for chunk in (layout.read_chunk.shape, layout.write_chunk.shape)  # None for a single number
    )
    allowance.bytes(written * math.prod(layout.write_chunk.shape or ()) * array.dtype.numpy_dtype.itemsize)
    allowance.entries(read + written)


def _put(tree: dict[str, Any], keys: list[str], array: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    if keys[-1] in tree:
        raise ValueError(f"two entries named {keys[-1]!r}")
    tree[keys[-1]] = array


def _told(entry: Any) -> dict[str, Any]:
    """Return the tree that tells what the bytes are which follow it."""
    if isinstance(entry, dict):
        return {"texts": {}, "entries": {name: _told(inner) for name, inner in entry.items()}}
    if entry.dtype.name == "bfloat16":
        return {"shape": entry.shape, "dtype": "<u2", "texts": {"dtype": ["bfloat16"]}}
    return {"shape": entry.shape, "dtype": entry.dtype.numpy_dtype.str, "texts": {}}


def _in_order(entry: Any) -> Iterator[Any]:
    """Yield the arrays in the order of the tree."""
    if isinstance(entry, dict):
        for inner in entry.values():
            yield from _in_order(inner)
    else:
        yield entry

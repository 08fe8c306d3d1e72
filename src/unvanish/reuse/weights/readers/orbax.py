"""Folders that orbax wrote, read with tensorstore alone.

tensorstore opens what a description names, also elsewhere on the disk or the network; so only the list of names is
taken from the folder, and each array is opened by a description of our own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..foreign import Family, Foreign
from .flax_tree import foreign_of
from .guard import Budget, extra, refused, tensor_of


def read_orbax(path: Path, budget: Budget, part: str, layout: Family | None) -> Foreign:
    """Read the arrays of a checkpoint of orbax."""
    tensorstore = extra("tensorstore", "tensorstore", path)
    listed = path / "_METADATA"
    if not listed.is_file():
        inner = [entry for entry in path.iterdir() if (entry / "_METADATA").is_file()]
        if len(inner) != 1:
            raise refused(path, "no '_METADATA' in it", "a folder as orbax writes it", "Name the folder of one step")
        path, listed = inner[0], inner[0] / "_METADATA"
    if any(entry.is_symlink() for entry in path.rglob("*")):
        raise refused(path, "links in it", "files", "Do not trust this folder")
    metadata = json.loads(listed.read_bytes())
    tree: dict[str, Any] = {}
    for keys in _names(metadata):
        budget.entries()
        _put(tree, keys, _array(tensorstore, path, metadata, ".".join(keys), budget))
    return foreign_of(path, "orbax", tree, part, layout)


def _names(metadata: Mapping[str, Any]) -> Iterator[list[str]]:
    for entry in metadata["tree_metadata"].values():
        if not entry["value_metadata"].get("skip_deserialize"):
            keys = [str(key["key"]) for key in entry["key_metadata"]]
            if keys:
                yield keys


def _array(tensorstore: Any, path: Path, metadata: Mapping[str, Any], name: str, budget: Budget) -> Any:
    if any(part in ("", "..") or "/" in part or "\\" in part for part in name.split(".")):
        raise refused(path, f"an array named {name!r}", "a name without a path", "Do not trust this folder")
    base: dict[str, Any] = {"driver": "file", "path": f"{path.absolute()}/"}
    if (path / "manifest.ocdbt").is_file():
        store: dict[str, Any] = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    else:
        store = {"driver": "file", "path": f"{path.absolute()}/{name}/"}
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    opened = tensorstore.open({"driver": driver, "kvstore": store}, open=True, read=True).result()
    dtype = str(opened.dtype.name)
    size = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
    budget.bytes(math.prod(opened.shape) * size)
    return tensor_of(opened.read().result(), dtype)


def _put(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = value

"""Flax: nested dicts in msgpack, of linen and of nnx.

An array is an extension of code 1 that holds shape, name of the dtype and bytes; a large one is a dict of chunks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..foreign import Family, Foreign
from .guard import MOST_ENTRIES, Budget, extra, refused, tensor_of
from .loose import walk
from .named_arrays import layers_of

_ARRAY, _NUMBER = 1, 3  # 2 is a complex number
_CHUNKED = "__msgpack_chunked_array__"
_PARTS = ("params", "batch_stats")


def read_msgpack(path: Path, budget: Budget, part: str, layout: Family | None) -> Foreign:
    """Read what `flax.serialization` wrote."""
    msgpack = extra("msgpack", "flax", path)

    def array(code: int, data: bytes) -> Any:
        if code not in (_ARRAY, _NUMBER):
            raise refused(path, f"an extension of code {code}", "arrays", "Save the parameters alone")
        budget.entries()
        shape, dtype, content = msgpack.unpackb(data, raw=True, max_array_len=64, max_map_len=0, max_ext_len=0)
        return _array(path, tuple(shape), dtype.decode(), content, budget)

    def pairs(items: list[tuple[Any, Any]]) -> Any:
        budget.entries()
        tree = dict(items)
        return _joined(path, tree, budget) if _CHUNKED in tree else tree

    def listed(items: list[Any]) -> list[Any]:
        budget.entries(1 + len(items))
        return items

    tree = msgpack.unpackb(
        path.read_bytes(),
        ext_hook=array,
        object_pairs_hook=pairs,
        list_hook=listed,
        strict_map_key=False,
        raw=False,
        max_array_len=MOST_ENTRIES,
        max_map_len=MOST_ENTRIES,
    )
    if not isinstance(tree, Mapping):
        raise refused(path, f"a {type(tree).__name__}", "a dict of parameters", "Save variables, or a pure dict of nnx")
    return foreign_of(path, "Flax (.msgpack)", tree, part, layout)


def foreign_of(path: Path, form: str, tree: Mapping[Any, Any], part: str, layout: Family | None) -> Foreign:
    """List the layers of a tree of arrays; states of an optimiser beside them are left out."""
    if part:
        if not isinstance(tree.get(part), Mapping):
            raise refused(path, f"no part {part!r}", f"one of {[str(key) for key in tree][:8]}", "Write part=...")
        tree = tree[part]
    elif "opt_state" in tree and "params" in tree:  # a TrainState
        tree = {key: value for key, value in tree.items() if key in _PARTS}
    arrays = {name: value for name, value in walk(tree) if isinstance(value, Tensor)}
    family, layers = layers_of(arrays, layout or "flax")
    return Foreign(str(path), form, family, tuple(layers))


def _array(path: Path, shape: tuple[Any, ...], dtype: str, content: bytes, budget: Budget) -> Tensor:
    kind = np.dtype(np.uint16) if dtype == "bfloat16" else np.dtype(dtype)
    if kind.hasobject or kind.kind not in "fiub":
        raise refused(path, f"an array of type {dtype!r}", "numbers", "Do not trust this file")
    if any(not isinstance(size, int) or size < 0 for size in shape) or math.prod(shape) * kind.itemsize != len(content):
        raise refused(path, "an array whose size is not the declared one", "equal sizes", "Save it anew")
    budget.bytes(len(content))
    return tensor_of(np.frombuffer(content, kind).reshape(shape), dtype)


def _joined(path: Path, tree: Mapping[Any, Any], budget: Budget) -> Tensor:
    """Put the chunks of a large array together."""
    shape, chunks = (_listed(tree.get(key)) for key in ("shape", "chunks"))
    if not chunks or not all(isinstance(chunk, Tensor) for chunk in chunks):
        raise refused(path, "chunks that are no arrays", "arrays", "Save it anew")
    budget.bytes(sum(chunk.numel() * chunk.element_size() for chunk in chunks))
    joined = torch.cat([chunk.reshape(-1) for chunk in chunks])
    if any(not isinstance(size, int) or size < 0 for size in shape) or math.prod(shape) != joined.numel():
        raise refused(path, "chunks whose size is not the declared one", "equal sizes", "Save it anew")
    return joined.reshape(shape)


def _listed(value: Any) -> list[Any]:
    """Return a list that flax may have written as a dict by place."""
    if isinstance(value, Mapping):
        return [value[key] for key in sorted(value, key=lambda key: int(key))]
    return list(value) if isinstance(value, (list, tuple)) else []

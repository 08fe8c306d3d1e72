"""Arrays under names, with nothing said of layers: `.safetensors`, `.npz`, and `.pt` without running its code."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..foreign import Family, Foreign
from .guard import Budget, refused, tensor_of
from .named_arrays import layers_of
from .zipped import archive

_LONGEST_HEADER = 100 << 20  # what the library reads
_PARTS = ("state_dict", "model_state_dict", "model", "module", "net", "params", "weights")


def read_safetensors(path: Path, budget: Budget, part: str, layout: Family | None) -> Foreign:
    """Read a `.safetensors` file; the library checks that no array reaches beyond the file."""
    arrays: dict[str, Tensor] = {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, _LONGEST_HEADER))
    budget.entries(header.count(b"data_offsets"))  # the library would first make them all
    with safe_open(path, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - no dict
            array = opened.get_tensor(name)
            budget.bytes(array.numel() * array.element_size())
            arrays[name] = array
    return _foreign(path, "safetensors", arrays, layout)


def read_npz(path: Path, budget: Budget, part: str, layout: Family | None) -> Foreign:
    """Read an `.npz` archive; arrays of objects, which would be unpickled, are refused."""
    arrays: dict[str, Tensor] = {}
    with archive(path, budget) as members:
        for name in members.members:
            if name.endswith(".npy"):
                arrays[name.removesuffix(".npy")] = _npy(path, name, members.read(name))
    return _foreign(path, "NumPy (.npz)", arrays, layout)


def _npy(path: Path, name: str, content: bytes) -> Tensor:
    """Read one array without the reader that knows pickles."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(stream, max_header_size=10_000)
    if dtype.hasobject or dtype.kind not in "fiubV":
        raise refused(path, f"array {name!r} of type {dtype}", "numbers", "Do not trust this file")
    count = math.prod(shape)
    if min((*shape, 0)) < 0 or count * dtype.itemsize != len(content) - stream.tell():
        raise refused(path, f"array {name!r} whose size is not the declared one", "equal sizes", "Save it anew")
    array = np.frombuffer(content, dtype, count, stream.tell())
    array = array.reshape(shape[::-1]).T if is_fortran else array.reshape(shape)
    return tensor_of(array, "bfloat16" if dtype.kind == "V" and dtype.itemsize == 2 else "")


def read_torch(path: Path, budget: Budget, part: str, layout: Family | None) -> Foreign:
    """Read a state dict of torch; a file that names code is refused, and no code is run."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as opened:
            members = opened.infolist()
        budget.entries(len(members))
        budget.bytes(sum(member.file_size for member in members))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise refused(
            path,
            f"what only running its code could read ({reason})",
            "tensors alone",
            "Where it was made, write torch.save(model.state_dict(), file)",
        ) from error
    arrays = _chosen(path, content, part, budget)
    for name, array in arrays.items():
        _check_tensor(path, name, array)
    return _foreign(path, "torch (.pt)", arrays, layout or "torch")


def _chosen(path: Path, content: Any, part: str, budget: Budget) -> dict[str, Tensor]:
    """Find the weights in a checkpoint, which may hold the state of an optimiser and more."""
    if not isinstance(content, Mapping):
        raise refused(path, f"a {type(content).__name__}", "a state dict", "Save model.state_dict()")
    budget.entries(len(content))
    if part:
        if not isinstance(content.get(part), Mapping):
            parts = [str(key) for key, value in content.items() if isinstance(value, Mapping)]
            raise refused(path, f"no part {part!r}", f"one of {parts[:8]}", "Write part=... with one of them")
        content = content[part]
    elif not any(isinstance(value, Tensor) for value in content.values()):
        inner = [key for key in _PARTS if isinstance(content.get(key), Mapping)]
        if len(inner) != 1:
            parts = [str(key) for key, value in content.items() if isinstance(value, Mapping)]
            raise refused(path, f"the parts {parts[:8]}", "a state dict, or one known part", "Write part=... with one")
        content = content[inner[0]]
    budget.entries(len(content))
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _check_tensor(path: Path, name: str, array: Tensor) -> None:
    """Refuse what is no plain tensor, or shows a few stored numbers as very many."""
    is_plain = type(array) in (Tensor, torch.nn.Parameter) and array.layout == torch.strided
    if not is_plain or array.is_quantized or array.is_meta:
        raise refused(path, f"{name!r}, a {type(array).__name__} of {array.layout}", "a plain tensor", "Save it dense")
    if array.numel() * array.element_size() > array.untyped_storage().nbytes():
        raise refused(
            path, f"{name!r}, that shows more numbers than are stored", "all of them", "Do not trust this file"
        )


def _foreign(path: Path, form: str, arrays: Mapping[str, Tensor], layout: Family | None) -> Foreign:
    family, layers = layers_of({name: array.detach() for name, array in arrays.items()}, layout)
    return Foreign(str(path), form, family, tuple(layers))


def walk(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts with their paths."""
    for key, value in tree.items():
        name = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from walk(value, name)
        else:
            yield name, value

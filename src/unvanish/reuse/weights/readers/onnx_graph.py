"""ONNX: the graph is walked, so an array is known by the node that it enters, not by its name alone.

Source: the ONNX operator specification for the layouts and defaults of each node.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..foreign import Family, Foreign, ForeignLayer
from .guard import Budget, extra, refused, tensor_of

_GATED = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}


class _Graph:
    """The nodes of a graph, and the arrays that enter them.

    Args:
        graph: As the file has it.
        arrays: Initialisers and constants by name.
        path: Named in errors.
    """

    def __init__(self, graph: Any, arrays: dict[str, Tensor], path: Path) -> None:
        self.nodes = list(graph.node)
        self.arrays = arrays
        self.path = path
        self.users: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
            if node.op_type == "Identity" and node.input[0] in arrays:
                arrays[node.output[0]] = arrays[node.input[0]]
            if node.op_type == "Transpose" and node.input[0] in arrays:
                axes = attributes(node).get("perm") or list(reversed(range(arrays[node.input[0]].dim())))
                arrays[node.output[0]] = arrays[node.input[0]].permute(axes)

    def array(self, node: Any, place: int) -> Tensor | None:
        """Return an input of a node if it is an array of the file."""
        return self.arrays.get(node.input[place]) if place < len(node.input) else None

    def name(self, node: Any, place: int) -> str:
        """Return the name of a layer: that of its weight without its last part, or of the node."""
        weight = node.input[place]
        holder, dot, last = weight.rpartition(".")
        return str(holder if dot and last in ("weight", "bias") else node.name or weight)


def read_onnx(path: Path, budget: Budget, part: str, layout: Family | None) -> Foreign:
    """Read the layers of an ONNX graph in the order in which it computes them."""
    onnx = extra("onnx", "onnx", path)
    model = onnx.load_model(str(path), load_external_data=False)
    budget.entries(len(model.graph.node) + len(model.graph.initializer))
    arrays = {tensor.name: _tensor(onnx, path, tensor, budget) for tensor in model.graph.initializer}
    for node in model.graph.node:
        value = attributes(node).get("value") if node.op_type == "Constant" else None
        if value is not None and hasattr(value, "dims"):
            arrays[node.output[0]] = _tensor(onnx, path, value, budget)
    graph = _Graph(model.graph, arrays, path)
    layers = [layer for node in graph.nodes if node.op_type in _LAYERS for layer in _LAYERS[node.op_type](graph, node)]
    return Foreign(str(path), "ONNX", "onnx", tuple(layers), is_ordered=True)


def attributes(node: Any) -> dict[str, Any]:
    """Return the attributes of a node as plain values."""
    found = {}
    for entry in node.attribute:
        kind = entry.type
        if kind == 1:
            found[entry.name] = entry.f
        elif kind == 2:
            found[entry.name] = entry.i
        elif kind == 3:
            found[entry.name] = entry.s.decode("utf-8", "replace")
        elif kind == 4:
            found[entry.name] = entry.t
        elif kind == 7:
            found[entry.name] = list(entry.ints)
        elif kind == 8:
            found[entry.name] = [item.decode("utf-8", "replace") for item in entry.strings]
    return found


def _tensor(onnx: Any, path: Path, tensor: Any, budget: Budget) -> Tensor:
    """Read an array whose size was compared with what is stored, from a file beside this one if it says so."""
    shape = tuple(tensor.dims)
    if min((*shape, 0)) < 0:
        raise refused(path, f"array {tensor.name!r} of shape {shape}", "sizes from 0 on", "Do not trust this file")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if dtype.hasobject:
        raise refused(path, f"array {tensor.name!r} of texts", "numbers", "Do not trust this file")
    count = math.prod(shape)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        tensor = _with_outer_data(onnx, path, tensor, count * dtype.itemsize)
    else:
        budget.bytes(count * dtype.itemsize)
    stored = len(tensor.raw_data) / dtype.itemsize if tensor.raw_data else _stored(tensor)
    if stored < count:
        raise refused(
            path, f"array {tensor.name!r} that declares {count:,} numbers and stores fewer", "all", "Save anew"
        )
    return tensor_of(onnx.numpy_helper.to_array(tensor), str(dtype) if str(dtype) == "bfloat16" else "")


def _stored(tensor: Any) -> int:
    return max(
        len(getattr(tensor, name)) for name in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
    )


def _with_outer_data(onnx: Any, path: Path, tensor: Any, size: int) -> Any:
    """Return a tensor with its data, from a plain file in the folder of the model and nowhere else.

    Raises:
        WeightsError: if it names another place, or more bytes than that file has.
    """
    told = {entry.key: entry.value for entry in tensor.external_data}
    name = told.get("location", "")
    file = path.parent / name
    if not name or Path(name).name != name or name in (".", "..") or "\\" in name or file.is_symlink():
        raise refused(path, f"data in {name!r}", "a plain file in the same folder", "Do not trust this file")
    if not file.is_file():
        raise refused(path, f"no file {name!r} beside it", "the data of its arrays", "Copy both files")
    start, length = int(told.get("offset", 0)), int(told.get("length", size))
    if start < 0 or length != size or start + length > file.stat().st_size:
        raise refused(path, f"data outside of {name!r}", "an array that lies in it", "Do not trust this file")
    with file.open("rb") as opened:
        opened.seek(start)
        found = onnx.TensorProto()
        found.CopyFrom(tensor)
        found.data_location = onnx.TensorProto.DEFAULT
        found.raw_data = opened.read(length)
    return found


def _conv(graph: _Graph, node: Any) -> Iterator[ForeignLayer]:
    kernel, bias = graph.array(node, 1), graph.array(node, 2)
    if kernel is None:
        return
    told = attributes(node)
    space = kernel.dim() - 2
    padding: Any = told.get("pads", [0] * (2 * space))
    if told.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        padding = "same"
    settings = {
        "strides": told.get("strides", [1] * space),
        "dilation": told.get("dilations", [1] * space),
        "groups": told.get("group", 1),
        "padding": padding,
        "output_padding": told.get("output_padding"),
    }
    kind = "Conv" if node.op_type == "Conv" else "ConvTranspose"
    yield ForeignLayer(graph.name(node, 1), kind, _present(kernel=kernel, bias=bias), settings)


def _gemm(graph: _Graph, node: Any) -> Iterator[ForeignLayer]:
    kernel, bias = graph.array(node, 1), graph.array(node, 2)
    told = attributes(node)
    if kernel is None:
        return
    if told.get("transA") or told.get("alpha", 1.0) != 1.0 or told.get("beta", 1.0) != 1.0:
        raise refused(graph.path, f"node {node.name!r} with transA, alpha or beta", "a plain product", "Export it anew")
    bias = bias.reshape(-1) if bias is not None and bias.dim() == 2 and bias.shape[0] == 1 else bias
    settings = {"is_transposed": bool(told.get("transB"))}
    yield ForeignLayer(graph.name(node, 1), "Dense", _present(kernel=kernel, bias=bias), settings)


def _matmul(graph: _Graph, node: Any) -> Iterator[ForeignLayer]:
    kernel = graph.array(node, 1)
    if kernel is None or kernel.dim() != 2:
        return
    users = graph.users.get(node.output[0], [])
    bias = None
    name = graph.name(node, 1)
    if len(users) == 1 and users[0].op_type == "Add":
        for place in (0, 1):
            found = graph.array(users[0], place)
            if found is not None and tuple(found.shape) == (kernel.shape[1],):
                bias, name = found, graph.name(users[0], place)
    yield ForeignLayer(name, "Dense", _present(kernel=kernel, bias=bias), {"is_transposed": False})


def _norm(graph: _Graph, node: Any) -> Iterator[ForeignLayer]:
    kind = {"BatchNormalization": "BatchNorm", "LayerNormalization": "LayerNorm", "GroupNormalization": "GroupNorm"}
    gamma = graph.array(node, 1)
    if gamma is None:
        return
    parts = _present(gamma=gamma, beta=graph.array(node, 2), mean=graph.array(node, 3), variance=graph.array(node, 4))
    told = attributes(node)
    settings = {"epsilon": told.get("epsilon", 1e-5)}
    if "num_groups" in told:
        settings["groups"] = told["num_groups"]
    yield ForeignLayer(graph.name(node, 1), kind[node.op_type], parts, settings)


def _recurrent(graph: _Graph, node: Any) -> Iterator[ForeignLayer]:
    told = attributes(node)
    weights = [graph.array(node, place) for place in (1, 2)]
    if weights[0] is None or weights[1] is None:
        return
    usual = _GATED[node.op_type]
    directions = weights[0].shape[0]
    given = told.get("activations", list(usual) * directions)
    if graph.array(node, 7) is not None or told.get("clip") or told.get("input_forget"):
        raise refused(graph.path, f"node {node.name!r} with peepholes, clip or input_forget", "none", "Train it anew")
    settings = {
        "is_bidirectional": told.get("direction") == "bidirectional",
        "go_backwards": told.get("direction") == "reverse",
        "activation": given[-1].lower(),
        "recurrent_activation": given[0].lower(),
    }
    if node.op_type == "GRU":
        settings["linear_before_reset"] = told.get("linear_before_reset", 0)
    parts = _present(W=weights[0], R=weights[1], B=graph.array(node, 3))
    yield ForeignLayer(graph.name(node, 1), node.op_type, parts, settings)


def _gather(graph: _Graph, node: Any) -> Iterator[ForeignLayer]:
    table = graph.array(node, 0)
    if table is not None and table.dim() == 2 and table.is_floating_point() and not attributes(node).get("axis"):
        yield ForeignLayer(graph.name(node, 0), "Embedding", {"embeddings": table})


def _prelu(graph: _Graph, node: Any) -> Iterator[ForeignLayer]:
    slopes = graph.array(node, 1)
    if slopes is not None:
        yield ForeignLayer(graph.name(node, 1), "PReLU", {"alpha": slopes})


def _present(**arrays: Tensor | None) -> dict[str, Tensor]:
    return {role: array for role, array in arrays.items() if array is not None}


_LAYERS: Mapping[str, Callable[[_Graph, Any], Iterator[ForeignLayer]]] = {
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _norm,
    "LayerNormalization": _norm,
    "GroupNormalization": _norm,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "Gather": _gather,
    "PRelu": _prelu,
}

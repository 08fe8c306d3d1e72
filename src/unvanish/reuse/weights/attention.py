"""Attention with several heads: one kernel for each of query, key and value, or one for all three."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from .foreign import Family, Foreign, ForeignLayer
from .moves import Move, refuse
from .operations import Fill, Join, Operation, Permute, Reshape
from .targets import Target

PARTS = ("query", "key", "value")


def split_attention(foreign: Foreign, targets: Sequence[Target]) -> Foreign:
    """Make four layers of each layer of attention, for a model that has `nn.Linear` in its place."""
    if any(isinstance(target.module, nn.MultiheadAttention) for target in targets):
        return foreign
    layers: list[ForeignLayer] = []
    for layer in foreign.layers:
        layers += _projections(layer) if layer.kind == "MultiHeadAttention" else [layer]
    return replace(foreign, layers=tuple(layers))


def _projections(source: ForeignLayer) -> Iterator[ForeignLayer]:
    for part in (*PARTS, "output"):
        roles = [role for role in source.arrays if role.startswith(f"{part}/")]
        arrays = {role.removeprefix(f"{part}/"): source.arrays[role] for role in roles}
        if arrays:
            yield ForeignLayer(source.place(part), "Projection", arrays, source.settings)


def projection(source: ForeignLayer, target: Target, family: Family, flat: object) -> list[Move]:
    """Return the moves of one of the four kernels of attention to an `nn.Linear`."""
    kernel = tuple(source.arrays["kernel"].shape)
    is_output = source.name.endswith("output")
    rows = kernel[0] * kernel[1] if is_output else kernel[0]
    matrix = (rows, kernel[2] if is_output else kernel[1] * kernel[2])
    found = [Move(("kernel",), ("weight",), (Reshape(kernel, matrix), Permute((1, 0))))]
    if "bias" in source.arrays and "bias" in target.tensors:
        shape = tuple(source.arrays["bias"].shape)
        return [*found, Move(("bias",), ("bias",), (Reshape(shape, (matrix[1],)),))]
    if "bias" in source.arrays:
        raise refuse(source, target, "found a bias in the file, expected none", "Build the layer with bias=True.")
    if "bias" in target.tensors:
        found.append(Move((), ("bias",), (Fill(0.0, (matrix[1],)),)))
    return found


def attention(source: ForeignLayer, target: Target, family: Family, flat: object) -> list[Move]:
    """Return the moves of a layer of attention.

    Kernels of query, key and value are ``(width, heads, width of a head)``, of the output ``(heads, width of a head,
    width)``; torch has matrices, and stacks the three where they are equally wide.

    Raises:
        WeightsError: if the number of heads differs: every shape would fit.
    """
    module = target.module
    assert isinstance(module, nn.MultiheadAttention)
    heads = source.arrays["query/kernel"].shape[1]
    if heads != module.num_heads:
        raise refuse(
            source,
            target,
            f"found {heads} heads in the file, expected {module.num_heads}. All shapes would fit, and the outputs be "
            "others",
            f"Build nn.MultiheadAttention({module.embed_dim}, num_heads={heads}).",
        )
    if module.bias_k is not None:
        raise refuse(source, target, "found add_bias_kv=True, expected False", "No other framework has it.")
    return [*_kernels(source, target), *_biases(source, target), *_output(source, target)]


def _matrix(shape: tuple[int, ...]) -> tuple[Operation, ...]:
    """Turn (in, heads, size) into torch's (heads x size, in)."""
    return (Reshape(shape, (shape[0], shape[1] * shape[2])), Permute((1, 0)))


def _kernels(source: ForeignLayer, target: Target) -> list[Move]:
    roles = tuple(f"{part}/kernel" for part in PARTS)
    shapes = [tuple(source.arrays[role].shape) for role in roles]
    if "in_proj_weight" in target.tensors:
        if len(set(shapes)) > 1:
            raise refuse(source, target, f"found kernels of shapes {shapes}, expected equal ones", "Set kdim and vdim.")
        rows = shapes[0][1] * shapes[0][2]
        return [Move(roles, ("in_proj_weight",), (*_matrix(shapes[0]), Join((rows,) * 3)))]
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return [Move((role,), (name,), _matrix(shape)) for role, name, shape in zip(roles, names, shapes, strict=True)]


def _biases(source: ForeignLayer, target: Target) -> list[Move]:
    roles = tuple(f"{part}/bias" for part in PARTS)
    if not any(role in source.arrays for role in roles):
        shape = target.tensors["in_proj_bias"].shape if "in_proj_bias" in target.tensors else None
        return [] if shape is None else [Move((), ("in_proj_bias",), (Fill(0.0, tuple(shape)),))]
    if "in_proj_bias" not in target.tensors:
        raise refuse(source, target, "found biases in the file, expected none", "Build the layer with bias=True.")
    heads, size = source.arrays[roles[0]].shape
    return [Move(roles, ("in_proj_bias",), (Reshape((heads, size), (heads * size,)), Join((heads * size,) * 3)))]


def _output(source: ForeignLayer, target: Target) -> list[Move]:
    heads, size, width = source.arrays["output/kernel"].shape
    weight = (Reshape((heads, size, width), (heads * size, width)), Permute((1, 0)))
    found = [Move(("output/kernel",), ("out_proj.weight",), weight)]
    if "output/bias" in source.arrays:
        return [*found, Move(("output/bias",), ("out_proj.bias",), ())]
    if "out_proj.bias" in target.tensors:
        shape = tuple(target.tensors["out_proj.bias"].shape)
        found.append(Move((), ("out_proj.bias",), (Fill(0.0, shape),)))
    return found

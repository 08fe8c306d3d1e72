"""How the arrays of a foreign layer become the tensors of a layer of torch.

The kind of the source and the class of the target choose the rule; shapes are only compared with its result. Where
a file does not name the kind of a layer, the class of the target decides among the kinds that it can be.

Source: the layouts were read from files that the frameworks wrote, and are held to their own outputs by
`tests/test_weights_golden.py`; ONNX operator specification (Gemm, Conv, LSTM, GRU).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .attention import attention, projection
from .foreign import Family, ForeignLayer
from .moves import Move, refuse
from .operations import Fill, Flip, Operation, Permute, Reshape, channels_first, flatten_rows
from .recurrent import recurrent
from .targets import BATCH_NORM, CONV, CONV_TRANSPOSE, Target

_AXES_OF_GATES = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)


@dataclass(frozen=True)
class Flat:
    """Which ends of a layer count positions and channels of a map in one axis.

    Args:
        channels_in: Of the map that was flattened in front of it; 0: none was.
        channels_out: Of the map that its output is made into; 0: none.
    """

    channels_in: int = 0
    channels_out: int = 0


Rule = Callable[[ForeignLayer, Target, Family, Flat], list[Move]]


def fits(source: ForeignLayer, target: Target) -> bool:
    """Say whether the kinds go together; nothing is said about sizes."""
    if source.kind == "Raw":
        return source.arrays.keys() == target.tensors.keys()
    return any(
        isinstance(target.module, types) and source.kind in kinds and _can_hold(source, target)
        for types, kinds, _ in RULES
    )


def moves_for(source: ForeignLayer, target: Target, family: Family, flat: Flat) -> list[Move]:
    """Return what fills the tensors of a target from the arrays of a source.

    Raises:
        WeightsError: if there is no rule for these kinds, or the rule cannot represent the source.
    """
    if family == "torch" or source.kind == "Raw":
        return [Move((role,), (role,), ()) for role in source.arrays if role in target.tensors]
    for types, kinds, rule in RULES:
        if isinstance(target.module, types) and source.kind in kinds and _can_hold(source, target):
            return rule(source, target, family, flat)
    raise refuse(
        source,
        target,
        f"found the kind {source.kind}, expected one that a {target.kind} can hold",
        "Say which belong together with names={'layer of the model': 'layer of the file'}.",
    )


def _can_hold(source: ForeignLayer, target: Target) -> bool:
    """Say whether a kernel has as many axes as the module wants, and both or neither go channel by channel."""
    kernel = source.arrays.get("kernel")
    if kernel is None or isinstance(target.module, _AXES_OF_GATES):
        return True
    rank = kernel.dim()
    if isinstance(target.module, nn.Linear):
        return rank == (3 if source.kind == "Projection" else 2)
    for number, types in enumerate(zip(CONV, CONV_TRANSPOSE, strict=True), start=1):
        if isinstance(target.module, types):
            module: Any = target.module
            is_depthwise = 1 < module.groups == module.in_channels or module.in_channels == 1
            return rank == number + 2 and (source.kind != "DepthwiseConv" or is_depthwise)
    return True


def vector(source: ForeignLayer, target: Target, role: str, name: str, fill: float, size: int = 0) -> list[Move]:
    """Return the move of a bias or gain; where the file has none, a constant that does the same.

    Args:
        source: Has the role, or not.
        target: Has the tensor, or not.
        role: In the file.
        name: In the module.
        fill: What stands for a missing one.
        size: Channels of the map whose positions the vector counts, too; 0: none.
    """
    if role not in source.arrays:
        if name not in target.tensors:
            return []
        return [Move((), (name,), (Fill(fill, tuple(target.tensors[name].shape)),))]
    if name not in target.tensors:
        raise refuse(
            source,
            target,
            f"found {role!r} in the file, expected none, because the {target.kind} has no {name!r}",
            "Build the layer with it.",
        )
    array = source.arrays[role]
    return [Move((role,), (name,), channels_first(array.shape[0], size) if size and array.dim() == 1 else ())]


def _dense(source: ForeignLayer, target: Target, family: Family, flat: Flat) -> list[Move]:
    kernel = source.arrays["kernel"]
    operations: tuple[Operation, ...]
    if family == "onnx":  # made by a framework with channels first: as it stands
        operations = () if source.settings.get("is_transposed") else (Permute((1, 0)),)
        return [Move(("kernel",), ("weight",), operations), *vector(source, target, "bias", "bias", 0.0)]
    size, outputs = kernel.shape
    operations = flatten_rows(size, flat.channels_in, outputs) if flat.channels_in else (Permute((1, 0)),)
    if flat.channels_out:
        operations += channels_first(outputs, flat.channels_out)
    return [
        Move(("kernel",), ("weight",), operations),
        *vector(source, target, "bias", "bias", 0.0, flat.channels_out),
    ]


def _conv(source: ForeignLayer, target: Target, family: Family, flat: Flat) -> list[Move]:
    kernel = source.arrays["kernel"]
    space = kernel.dim() - 2
    operations: tuple[Operation, ...] = ()
    if source.kind == "DepthwiseConv":
        shape = tuple(kernel.shape)
        swapped = (shape[space], shape[space + 1], *shape[:space])
        joined = (shape[space] * shape[space + 1], 1, *shape[:space])
        operations = (Permute((space, space + 1, *range(space))), Reshape(swapped, joined))
    elif family != "onnx":
        operations = (Permute((space + 1, space, *range(space))),)
    return [Move(("kernel",), ("weight",), operations), *vector(source, target, "bias", "bias", 0.0)]


def _conv_transpose(source: ForeignLayer, target: Target, family: Family, flat: Flat) -> list[Move]:
    space = source.arrays["kernel"].dim() - 2
    operations: tuple[Operation, ...] = ()
    if source.settings.get("is_guessed"):
        raise refuse(
            source,
            target,
            "found names that Keras and Flax share, expected to know which it was, because they lay out transposed "
            "convolutions differently",
            "Write layout='keras' or layout='flax'.",
        )
    if family == "keras":  # [..., out, in]
        operations = (Permute((space + 1, space, *range(space))),)
    elif family == "flax":  # [..., in, out], and it slides the kernel as it stands, where torch turns it round
        operations = (Permute((space, space + 1, *range(space))), Flip(tuple(range(2, space + 2))))
    return [Move(("kernel",), ("weight",), operations), *vector(source, target, "bias", "bias", 0.0)]


def _norm(source: ForeignLayer, target: Target, family: Family, flat: Flat) -> list[Move]:
    if "gamma or beta" in source.arrays:
        raise refuse(
            source,
            target,
            "found three arrays, expected two or four: one of gamma and beta is missing, and the file does not say "
            "which",
            "Save the model as .keras, which says it.",
        )
    found = [
        *vector(source, target, "gamma", "weight", 1.0, flat.channels_in),
        *vector(source, target, "beta", "bias", 0.0, flat.channels_in),
    ]
    for role, name in (("mean", "running_mean"), ("variance", "running_var")):
        if role in source.arrays:
            found += vector(source, target, role, name, 0.0, flat.channels_in)
    return found


def _folded(source: ForeignLayer, target: Target, family: Family, flat: Flat) -> list[Move]:
    """Set a batch norm to do nothing but add what is left of the bias."""
    module: Any = target.module
    size = (module.num_features,)
    fills = (("running_mean", 0.0), ("running_var", 1.0 - module.eps), ("weight", 1.0))
    constants = [Move((), (name,), (Fill(value, size),)) for name, value in fills if name in target.tensors]
    return [*constants, *vector(source, target, "bias", "bias", 0.0)]


def _embedding(source: ForeignLayer, target: Target, family: Family, flat: Flat) -> list[Move]:
    return [Move(("embeddings",), ("weight",), ())]


def _prelu(source: ForeignLayer, target: Target, family: Family, flat: Flat) -> list[Move]:
    before, after = tuple(source.arrays["alpha"].shape), tuple(target.tensors["weight"].shape)
    count = source.arrays["alpha"].numel()
    if count != after[0] or max((*before, 1)) != count:  # a slope for each position has no place in torch
        raise refuse(
            source,
            target,
            f"found slopes of shape {before}, expected {after[0]}, one for each channel",
            "Build nn.PReLU(num_parameters=CHANNELS); slopes for each position cannot be loaded.",
        )
    return [Move(("alpha",), ("weight",), () if before == after else (Reshape(before, after),))]


# (classes of torch, kinds that they can hold, the rule); the first that fits is taken
RULES: tuple[tuple[tuple[type[nn.Module], ...], tuple[str, ...], Rule], ...] = (
    ((nn.Linear,), ("Dense", "Kernel"), _dense),
    ((nn.Linear,), ("Projection",), projection),
    (CONV, ("Conv", "DepthwiseConv", "Kernel"), _conv),
    (CONV_TRANSPOSE, ("ConvTranspose", "Kernel"), _conv_transpose),
    (BATCH_NORM, ("BatchNorm",), _norm),
    (BATCH_NORM, ("FoldedNorm",), _folded),
    ((nn.LayerNorm,), ("LayerNorm", "Norm"), _norm),
    ((nn.GroupNorm,), ("GroupNorm", "Norm"), _norm),
    ((nn.Embedding, nn.EmbeddingBag), ("Embedding",), _embedding),
    ((nn.PReLU,), ("PReLU",), _prelu),
    ((nn.LSTM, nn.LSTMCell), ("LSTM", "Recurrent"), recurrent),
    ((nn.GRU, nn.GRUCell), ("GRU", "Recurrent"), recurrent),
    ((nn.RNN, nn.RNNCell), ("RNN", "Recurrent"), recurrent),
    ((nn.MultiheadAttention,), ("MultiHeadAttention",), attention),
)

"""From the arrays of one Keras layer, in their order or by their names, to a layer as it is listed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..foreign import ForeignLayer

_ROLES = {
    "moving_mean": "mean",
    "moving_variance": "variance",
    "depthwise_kernel": "kernel",
    "attention_output": "output",
}
_GATED = ("kernel", "recurrent_kernel", "bias")


def positional(name: str, kind: str, arrays: Sequence[Tensor], settings: Mapping[str, Any]) -> list[ForeignLayer]:
    """Name arrays that come in the order in which the layer made them."""
    if kind == "SeparableConv":
        return _separable(name, arrays, settings)
    if kind in ("BatchNorm", "LayerNorm", "GroupNorm"):
        roles = _norm_roles(kind, len(arrays), settings)
    elif kind in ("LSTM", "GRU", "RNN", "Recurrent"):
        roles = _GATED
    elif kind == "Embedding":
        roles = ("embeddings",)
    elif kind == "PReLU":
        roles = ("alpha",)
    else:
        roles = ("kernel", "bias")
    if len(arrays) > len(roles):
        return [ForeignLayer(name, "Raw", {str(i): array for i, array in enumerate(arrays)}, settings)]
    return [ForeignLayer(name, kind, dict(zip(roles, arrays, strict=False)), settings)]


def untyped(name: str, arrays: Sequence[Tensor]) -> list[ForeignLayer]:
    """Tell what can be told of the arrays of a layer whose kind the file does not name."""
    ranks = [array.dim() for array in arrays]
    if ranks and ranks[0] >= 2 and ranks[1:] in ([], [1]):
        return positional(name, "Kernel", arrays, {})
    if len(arrays) == 4 and set(ranks) == {1}:
        return positional(name, "BatchNorm", arrays, {})
    return [ForeignLayer(name, "Raw", {str(i): array for i, array in enumerate(arrays)})]


def named(name: str, kind: str, arrays: Mapping[str, Tensor], settings: Mapping[str, Any]) -> list[ForeignLayer]:
    """List a layer whose arrays have names, as in the older files; the kind is told by them if it is unknown."""
    roles = {"/".join(_ROLES.get(part, part) for part in role.split("/")): array for role, array in arrays.items()}
    if kind == "SeparableConv" or "pointwise_kernel" in roles:
        parts = [roles[role] for role in ("kernel", "pointwise_kernel", "bias") if role in roles]
        return _separable(name, parts, settings)
    if not kind:
        kind = _kind_of_roles(arrays, roles)
    return [ForeignLayer(name, kind, roles, settings)]


def _kind_of_roles(arrays: Mapping[str, Tensor], roles: Mapping[str, Tensor]) -> str:
    if "query/kernel" in roles:
        return "MultiHeadAttention"
    if "depthwise_kernel" in arrays:
        return "DepthwiseConv"
    for role, kind in (
        ("recurrent_kernel", "Recurrent"),
        ("embeddings", "Embedding"),
        ("alpha", "PReLU"),
        ("mean", "BatchNorm"),
        ("kernel", "Kernel"),
    ):
        if role in roles:
            return kind
    return "Norm" if roles and set(roles) <= {"gamma", "beta"} else "Raw"


def _norm_roles(kind: str, count: int, settings: Mapping[str, Any]) -> tuple[str, ...]:
    statistics = ("mean", "variance") if kind == "BatchNorm" else ()
    learnt = count - len(statistics)
    if learnt == 1:
        if "scale" not in settings:
            return ("gamma or beta", *statistics)
        return (("gamma" if settings["scale"] else "beta"), *statistics)
    return ("gamma", "beta", *statistics) if learnt == 2 else statistics


def _separable(name: str, arrays: Sequence[Tensor], settings: Mapping[str, Any]) -> list[ForeignLayer]:
    """Make two layers of one: torch has no class for both."""
    depthwise, pointwise, *bias = arrays
    end = {"bias": bias[0]} if bias else {}
    plain = {key: value for key, value in settings.items() if key in ("is_told", "activation", "data_format")}
    first = {key: value for key, value in settings.items() if key != "activation"}
    return [
        ForeignLayer(f"{name}/depthwise", "DepthwiseConv", {"kernel": depthwise}, first),
        ForeignLayer(f"{name}/pointwise", "Conv", {"kernel": pointwise, **end}, plain),
    ]

"""Recurrent layers: the order of their gates, their two biases, their directions.

torch stacks the gates i, f, g, o (LSTM) and r, z, n (GRU) along the first axis.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import WeightsError
from .foreign import Family, ForeignLayer
from .moves import Move, refuse
from .operations import Fill, Gates, Join, Operation, Permute, Split, Unstack
from .targets import Target

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_KERAS_GRU = Gates((1, 0, 2))  # z, r, h
_ONNX = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}  # i, o, f, c and z, r, h
_FLAX = {"LSTM": ("i", "f", "g", "o"), "GRU": ("r", "z", "n")}


def recurrent(source: ForeignLayer, target: Target, family: Family, flat: object) -> list[Move]:
    """Return the moves of an LSTM, GRU or plain recurrent layer.

    Raises:
        WeightsError: if the layer computes what torch's does not.
    """
    kind = target.kind.removesuffix("Cell")
    module: Any = target.module
    if getattr(module, "proj_size", 0):
        raise refuse(source, target, f"found proj_size={module.proj_size}, expected 0", "No file format has it.")
    _check_kind(source, target, kind)
    suffix = "" if isinstance(module, nn.RNNCellBase) else f"_l{target.level}"
    is_bidirectional = bool(getattr(module, "bidirectional", False))
    if is_bidirectional != bool(source.settings.get("is_bidirectional")):
        raise refuse(
            source,
            target,
            f"found {'one direction' if is_bidirectional else 'two directions'} in the file, expected "
            f"{'two' if is_bidirectional else 'one'}",
            f"Build the layer with bidirectional={not is_bidirectional}.",
        )
    if family == "onnx":
        return _onnx(source, target, kind, suffix, is_bidirectional)
    found = []
    for prefix, end in (("", suffix), ("backward_", f"{suffix}_reverse"))[: 1 + is_bidirectional]:
        found += (_keras if family == "keras" else _flax)(source, target, kind, prefix, end)
    return found


def _check_kind(source: ForeignLayer, target: Target, kind: str) -> None:
    """Compare the number of gates where the file does not name the kind."""
    kernels = [source.arrays[role] for role in ("kernel", "recurrent_kernel") if role in source.arrays]
    if source.kind == "Recurrent" and len(kernels) == 2:
        gates = kernels[1].shape[-1] / kernels[1].shape[0]
        if gates != _GATES[kind]:
            raise refuse(
                source,
                target,
                f"found {gates:g} gates, expected {_GATES[kind]}",
                "Build the class of the file's layer.",
            )


def _keras(source: ForeignLayer, target: Target, kind: str, prefix: str, end: str) -> list[Move]:
    gates: tuple[Operation, ...] = (_KERAS_GRU,) if kind == "GRU" else ()
    turned = (Permute((1, 0)), *gates)
    found = [
        Move((f"{prefix}kernel",), (f"weight_ih{end}",), turned),
        Move((f"{prefix}recurrent_kernel",), (f"weight_hh{end}",), turned),
    ]
    names = (f"bias_ih{end}", f"bias_hh{end}")
    bias = source.arrays.get(f"{prefix}bias")
    if bias is None:
        if kind == "GRU" and source.settings.get("reset_after") is None:
            raise _form_unknown(source, target)
        return found + _no_bias(target, names)
    if names[0] not in target.tensors:
        raise _bias_without_place(source, target)
    if kind == "GRU":
        if bias.dim() != 2:
            raise _reset_before(source, target, "reset_after=False", "reset_after=True")
        return [*found, Move((f"{prefix}bias",), names, (Unstack(), *gates))]
    return [*found, Move((f"{prefix}bias",), names, (Fill(0.0, tuple(bias.shape)),))]


def _form_unknown(source: ForeignLayer, target: Target) -> WeightsError:
    return refuse(
        source,
        target,
        "found a GRU without bias, and no word whether its reset gate acts after the product (reset_after=True), "
        "expected a file that says it",
        "Save the model as .keras.",
    )


def _reset_before(source: ForeignLayer, target: Target, found: str, expected: str) -> WeightsError:
    return refuse(
        source,
        target,
        f"found {found}, expected {expected}. torch's GRU applies the reset gate after the product with the state, and "
        "has no form for the other",
        "Write this layer by hand, or train it anew.",
    )


def check_form(source: ForeignLayer, target: Target) -> None:
    """Refuse a GRU whose reset gate acts before the product.

    Raises:
        WeightsError: if it does.
    """
    if target.kind.startswith("GRU"):
        if source.settings.get("reset_after") is False:
            raise _reset_before(source, target, "reset_after=False", "reset_after=True")
        if source.settings.get("linear_before_reset") == 0:
            raise _reset_before(source, target, "linear_before_reset=0", "linear_before_reset=1")


def _no_bias(target: Target, names: tuple[str, ...]) -> list[Move]:
    present = [name for name in names if name in target.tensors]
    return [Move((), (name,), (Fill(0.0, tuple(target.tensors[name].shape)),)) for name in present]


def _bias_without_place(source: ForeignLayer, target: Target) -> WeightsError:
    return refuse(
        source,
        target,
        "found a bias in the file, expected none, because the layer has none",
        "Build it with bias=True.",
    )


def _onnx(source: ForeignLayer, target: Target, kind: str, suffix: str, is_bidirectional: bool) -> list[Move]:
    """W and R are (directions, gates x hidden, ...), B is (directions, 2 x gates x hidden)."""
    order = _ONNX[kind]
    ends = (suffix, f"{suffix}_reverse")[: 1 + is_bidirectional]
    found = [
        Move((role,), tuple(f"{name}{end}" for end in ends), (Unstack(), Gates(order)))
        for role, name in (("W", "weight_ih"), ("R", "weight_hh"))
    ]
    names = tuple(f"{name}{end}" for end in ends for name in ("bias_ih", "bias_hh"))
    bias = source.arrays.get("B")
    if bias is None:
        return found + _no_bias(target, names)
    if names[0] not in target.tensors:
        raise _bias_without_place(source, target)
    half = bias.shape[1] // 2
    cut = Split((half,) * (2 * bias.shape[0]))  # of all directions laid behind one another
    flat = (Unstack(), Join((2 * half,) * bias.shape[0])) if bias.shape[0] > 1 else (Unstack(),)
    return [*found, Move(("B",), names, (*flat, cut, Gates(order)))]


def _flax(source: ForeignLayer, target: Target, kind: str, prefix: str, end: str) -> list[Move]:
    if kind == "RNN":
        return _flax_joined(source, target, kind, prefix, end, ("i", "h"))
    if f"{prefix}dense_i/kernel" in source.arrays:
        return _flax_joined(source, target, kind, prefix, end, ("dense_i", "dense_h"))
    found: list[Move] = []
    for side, name in (("i", "weight_ih"), ("h", "weight_hh")):
        roles = tuple(f"{prefix}{side}{gate}/kernel" for gate in _FLAX[kind])
        sizes = tuple(source.arrays[role].shape[1] for role in roles)
        found.append(Move(roles, (f"{name}{end}",), (Permute((1, 0)), Join(sizes))))
    for side, name in (("i", "bias_ih"), ("h", "bias_hh")):
        found += _flax_bias(source, target, tuple(f"{prefix}{side}{gate}/bias" for gate in _FLAX[kind]), f"{name}{end}")
    return found


def _flax_bias(source: ForeignLayer, target: Target, roles: tuple[str, ...], name: str) -> list[Move]:
    """Join the biases of the gates; gates in front that have none get zeros."""
    present = tuple(role for role in roles if role in source.arrays)
    if not present:
        return _no_bias(target, (name,))
    if name not in target.tensors:
        raise _bias_without_place(source, target)
    size = source.arrays[present[0]].shape[0]
    if present != roles[-len(present) :]:
        raise refuse(source, target, f"found biases {present}, expected those of the last gates", "Name another layer.")
    missing = len(roles) - len(present)
    fill: tuple[Operation, ...] = (Fill(0.0, (missing * size,), is_first=True),) if missing else ()
    sizes = (*((missing * size,) if missing else ()), *(size,) * len(present))
    return [Move(present, (name,), (*fill, Join(sizes)))]


def _flax_joined(
    source: ForeignLayer, target: Target, kind: str, prefix: str, end: str, sides: tuple[str, str]
) -> list[Move]:
    """Return the moves of a cell whose gates stand in one kernel already."""
    found = []
    for side, weight, bias in ((sides[0], "weight_ih", "bias_ih"), (sides[1], "weight_hh", "bias_hh")):
        found.append(Move((f"{prefix}{side}/kernel",), (f"{weight}{end}",), (Permute((1, 0)),)))
        found += _flax_bias(source, target, (f"{prefix}{side}/bias",), f"{bias}{end}")
    return found

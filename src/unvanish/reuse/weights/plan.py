"""The plan of a load: what becomes what, by which steps, and why; and what stays over on either side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ...errors import WeightsError
from .foreign import Foreign, ForeignLayer
from .layouts import Flat, moves_for
from .matching import Pair
from .moves import Move, refuse
from .operations import back, forward
from .settings import Change, compare_settings
from .targets import COUNTER
from .wiring import flats


@dataclass(frozen=True, eq=False)
class Step:
    """One or more tensors of the model, and what they are made of.

    Args:
        names: Of the tensors in the model.
        sources: Of the arrays in the file; none: constants.
        move: The roles, names and operations.
        before: Shapes in the file.
        values: What the tensors become, in their dtype.
        dtype: Of the arrays in the file.
        why: These two belong together.
        layer: In the file.
        tensors: What is written to.
    """

    names: tuple[str, ...]
    sources: tuple[str, ...]
    move: Move
    before: tuple[tuple[int, ...], ...]
    values: tuple[Tensor, ...]
    dtype: str
    why: str
    layer: str
    tensors: tuple[Tensor, ...] = field(repr=False, default=())

    @property
    def operations(self) -> tuple[str, ...]:
        """What is done, in words."""
        cast = plain_dtype(self.values[0].dtype)
        return (*map(str, self.move.operations), *((f"{self.dtype} → {cast}",) if self.dtype != cast else ()))


@dataclass
class Plan:
    """What a load does; it can be read before it is done.

    Args:
        model: What is loaded into.
        foreign: The content of the file.
        steps: Tensor by tensor.
        changes: Settings that the file has otherwise.
        unused: Arrays of the file that go nowhere.
        unfilled: Tensors of the model that nothing fills.
        kept: Tensors of the model that stay by the word of the user.
        doubts: What the file does not tell, and could make the outputs others.
    """

    model: nn.Module = field(repr=False)
    foreign: Foreign = field(repr=False)
    steps: tuple[Step, ...]
    changes: tuple[Change, ...] = ()
    unused: tuple[str, ...] = ()
    unfilled: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    partners: dict[str, str] = field(default_factory=dict, repr=False)
    verification: Any = None
    is_loaded: bool = False

    def reverse(self, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the arrays of the file as the tensors of the model would be written there.

        Right after a load they are the file's own, byte for byte, unless the dtype was changed.

        Args:
            state: A state dict of the model; by default its present one.
        """
        found: dict[str, Tensor] = {}
        for step in self.steps:
            now = [
                tensor.detach() if state is None else state[name]
                for name, tensor in zip(step.names, step.tensors, strict=True)
            ]
            arrays = back(step.move.operations, [tensor.cpu() for tensor in now])
            for name, array in zip(step.sources, arrays, strict=True):
                found[name] = array.to(getattr(torch, step.dtype))
        return found

    def forget(self) -> None:
        """Keep shapes and dtypes of the converted arrays, and give their memory back."""
        self.steps = tuple(
            replace(step, values=tuple(value.to("meta") for value in step.values)) for step in self.steps
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, for JSON."""
        return {
            "schema_version": 1,
            "file": self.foreign.file,
            "format": self.foreign.form,
            "tensors": [
                {
                    "tensor": name,
                    "shape": list(value.shape),
                    "dtype": plain_dtype(value.dtype),
                    "sources": list(step.sources),
                    "source_shapes": [list(shape) for shape in step.before],
                    "source_dtype": step.dtype,
                    "operations": list(step.operations),
                    "why": step.why,
                }
                for step in self.steps
                for name, value in zip(step.names, step.values, strict=True)
            ],
            "settings": [str(change) for change in self.changes],
            "unused": list(self.unused),
            "unfilled": list(self.unfilled),
            "kept": list(self.kept),
            "doubts": list(self.doubts),
            "faults": list(self.faults),
            "verified": None if self.verification is None else self.verification.to_dict(),
            "is_loaded": self.is_loaded,
        }

    def __str__(self) -> str:
        from .show import plan_text

        return plan_text(self)


def plain_dtype(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module.

    Example:
        >>> plain_dtype(torch.float32)
        'float32'
    """
    return str(dtype).removeprefix("torch.")


def make_plan(
    model: nn.Module,
    foreign: Foreign,
    pairs: Sequence[Pair],
    *,
    epsilon: float | None,
    is_flatten_kept: bool,
) -> Plan:
    """Convert all arrays, and compare them with the tensors that they are for; nothing is changed.

    Args:
        model: What is loaded into.
        foreign: The content of the file.
        pairs: Which layers belong together.
        epsilon: What normalisations of the file had, where it does not tell.
        is_flatten_kept: The model flattens channels last, as the file's does.
    """
    steps: list[Step] = []
    changes: list[Change] = []
    faults: list[str] = []
    doubts = [pair.doubt for pair in pairs if pair.doubt]
    family = foreign.family
    flat = flats([(pair.target, pair.source) for pair in pairs], family)
    for pair, ends in zip(pairs, flat, strict=True):
        if pair.source is None:
            continue
        try:
            verdict = compare_settings(pair.source, pair.target, family, epsilon)
            faults += verdict.faults
            doubts += verdict.doubts
            changes += verdict.changes
            moves = _moves(pair, family, Flat() if is_flatten_kept else ends)
            steps += [_step(pair, pair.source, move) for move in moves]
        except WeightsError as error:
            faults.append(str(error).removeprefix("load_weights(): "))
    filled = {name for step in steps for name in step.names}
    used = {source for step in steps for source in step.sources}
    return Plan(
        model,
        foreign,
        tuple(steps),
        tuple(changes),
        tuple(layer.place(role) for layer in foreign.layers for role in layer.arrays if layer.place(role) not in used),
        tuple(_rest(pairs, filled, is_kept=False)),
        tuple(_rest(pairs, filled, is_kept=True)),
        tuple(dict.fromkeys([*doubts, *_tie_doubts(steps)])),
        tuple(faults),
        {pair.source.name: pair.target.name for pair in pairs if pair.source},
    )


def _moves(pair: Pair, family: Any, flat: Flat) -> list[Move]:
    assert pair.source is not None
    try:
        return moves_for(pair.source, pair.target, family, flat)
    except (LookupError, ValueError, RuntimeError) as error:
        if isinstance(error, WeightsError):
            raise
        roles = {role: tuple(array.shape) for role, array in pair.source.arrays.items()}
        raise refuse(
            pair.source,
            pair.target,
            f"found the arrays {roles}, expected those of a {pair.source.kind}",
            "The file may be damaged; say otherwise what belongs together with names={...}.",
        ) from error


def _step(pair: Pair, source: ForeignLayer, move: Move) -> Step:
    arrays = [source.arrays[role] for role in move.sources]
    tensors = tuple(pair.target.tensors[name] for name in move.targets)
    try:
        converted = forward(move.operations, arrays)
    except RuntimeError as error:
        raise _misfit(pair, source, move, [tuple(array.shape) for array in arrays]) from error
    if len(converted) != len(tensors) or any(
        isinstance(t, UninitializedParameter) or value.shape != t.shape
        for value, t in zip(converted, tensors, strict=False)
    ):
        raise _misfit(pair, source, move, [tuple(value.shape) for value in converted])
    values = tuple(
        _cast(value, tensor.dtype, f"{pair.target.full_name(name)!r} from {source.name!r}")
        for value, tensor, name in zip(converted, tensors, move.targets, strict=True)
    )
    return Step(
        tuple(map(pair.target.full_name, move.targets)),
        tuple(map(source.place, move.sources)),
        move,
        tuple(tuple(array.shape) for array in arrays),
        values,
        plain_dtype(arrays[0].dtype if arrays else values[0].dtype),
        pair.why,
        source.name,
        tensors,
    )


def _misfit(pair: Pair, source: ForeignLayer, move: Move, shapes: list[tuple[int, ...]]) -> WeightsError:
    wanted = [
        "not yet known" if isinstance(tensor, UninitializedParameter) else tuple(tensor.shape)
        for tensor in (pair.target.tensors[name] for name in move.targets)
    ]
    return refuse(
        source,
        pair.target,
        f"found {', '.join(map(str, shapes))} for {', '.join(move.targets)} ({pair.why}), expected "
        f"{', '.join(map(str, wanted))}",
        f"A layer of another size starts anew with keep=[{pair.target.name!r}]; other partners are named with "
        "names={...}.",
    )


def _cast(value: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """Change the dtype if nothing is lost but precision.

    Raises:
        WeightsError: if a number would become infinite, or a fraction a whole number.
    """
    if value.dtype == dtype:
        return value
    if value.is_floating_point() != dtype.is_floating_point:
        raise WeightsError(
            f"load_weights(): {where}: found {plain_dtype(value.dtype)}, expected {plain_dtype(dtype)}. "
            "Quantised weights cannot be loaded; save them as floating point."
        )
    cast = value.to(dtype)
    if bool((cast.isinf() & ~value.isinf()).any()):
        raise WeightsError(
            f"load_weights(): {where}: found {float(value.abs().max()):g}, expected at most "
            f"{torch.finfo(dtype).max:g}, the largest {plain_dtype(dtype)}. Load it in float32 first."
        )
    return cast


def _rest(pairs: Sequence[Pair], filled: set[str], *, is_kept: bool) -> Iterator[str]:
    """Yield the tensors that nothing fills; a tensor counts as filled under each of its names."""
    done = {id(t) for pair in pairs for name, t in pair.target.tensors.items() if pair.target.full_name(name) in filled}
    for pair in pairs:
        for name, tensor in pair.target.tensors.items():
            if (pair.why == "kept") == is_kept and id(tensor) not in done and name != COUNTER:
                yield pair.target.full_name(name)


def _tie_doubts(steps: Sequence[Step]) -> Iterator[str]:
    """Compare what is written to one tensor under two names.

    Raises:
        WeightsError: if the two differ.
    """
    written: dict[int, tuple[str, Tensor]] = {}
    for step in steps:
        for name, tensor, value in zip(step.names, step.tensors, step.values, strict=True):
            first = written.setdefault(id(tensor), (name, value))
            if first[0] != name and not torch.equal(first[1], value):
                raise WeightsError(
                    f"load_weights(): {name!r} from {step.layer!r}: found values other than those for {first[0]!r}, "
                    "expected equal ones, because the model ties the two. Untie them, or keep one with keep=[...]."
                )
            if not bool(torch.isfinite(value).all()):
                yield f"{name!r} from {step.layer!r} gets values that are not finite"

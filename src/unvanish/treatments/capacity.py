"""Limit how many units a hidden layer has, without changing a shape."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import TreatmentError
from ..records import Change
from .treatment import Patient, Steps, Treatment
from .units import Entries, Pair, check_outputs, observed

IDLE = 2.0**-20  # of the next layer's output: a few roundings of float32


def limit_units(share: float | None = None) -> Treatment:
    """Silence hidden units: those that do nothing on the batch, or all but a ``share`` of each layer.

    A unit is silent when its weights, those that make it and those that read it, are zero, and are zero again after
    each step of the optimiser. Nothing changes its shape, so the optimiser, its state and a checkpoint still fit;
    that also means that nothing becomes faster. Where you build the network, make the layers narrower instead.

    Without a value the units go that are dead on the batch (zero for every example), and idle ones, which move no
    output of the next layer by more than a rounding; the outputs on this batch stay, which is checked before anything
    is kept. On other data a unit may have been awake. A layer that is dead as a whole is left: it needs a new start.

    With a value the units with the largest effect stay, max |activation| * max |outgoing weight|, and the function
    changes.

    Only units that one layer makes and one other reads are touched, linear or convolutional, with activations,
    norms, dropout, pooling and flattening between them; a skip connection has two readers.

    Args:
        share: Share of the units of each such layer that stays, rounded up. In (0, 1); None: see above.

    Raises:
        TreatmentError: if ``share`` is not in (0, 1).

    Cost: two forward passes; at each step the silent weights are written once.

    Source: Hu et al. 2016, section 3 (units whose activations are zero are redundant). Ours: the bound for idle
    units, the order by effect, and the masked form.

    Example:
        >>> import unvanish
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.tensor([[1.0], [-1.0]])), model[0].bias.zero_()
        >>> with unvanish.treat(model, None, "limit-units", inputs=(torch.ones(4, 1),)) as changes:
        ...     print(next(iter(changes)).what, model[0].weight.tolist())
        1 of 2 hidden units are silent [[1.0], [0.0]]
    """
    if share is not None and not (isinstance(share, (int, float)) and 0 < share < 1):
        raise TreatmentError(
            f"treat(): 'limit-units': found {share!r}, expected a share of the units in (0, 1). Nothing was changed. "
            "Without a value only units that do nothing are silenced."
        )

    def apply(patient: Patient) -> Steps:
        before, pairs = observed(patient, "limit-units")
        silent = [(pair, units) for pair in pairs if len(units := _chosen(pair, share))]
        if not silent:
            raise TreatmentError(_nothing_to_do(len(pairs)))
        entries = [part for pair, units in silent for part in (*pair.incoming(units), pair.outgoing(units))]
        with _held_at_zero(entries, patient.optimizers):
            if share is None:
                check_outputs(patient, before, "limit-units")
            count, of = sum(len(units) for _, units in silent), sum(pair.units for pair in pairs)
            names = tuple(pair.name for pair, _ in silent)
            yield Change("limit-units", f"{count} of {of} hidden units are silent", names, share is None)

    return Treatment(
        "limit-units", apply, "" if share is None else f"{share:g}", preserves_function=share is None,
        code="# build the hidden layers narrower: nn.Linear(a, b) with a smaller b, and the next with as many inputs",
    )  # fmt: skip


def _chosen(pair: Pair, share: float | None) -> Tensor:
    """Return the numbers of the units to silence."""
    if share is not None:
        return pair.effect.argsort(descending=True)[math.ceil(share * pair.units) :]
    idle = (pair.effect <= IDLE * pair.scale).nonzero().flatten()
    return idle if len(idle) < pair.units else idle[:0]


def _nothing_to_do(pairs: int) -> str:
    if not pairs:
        return (
            "treat(): 'limit-units': found no linear or convolutional layer whose units one other such layer reads, "
            "with activations, norms or pooling between them, expected at least one. Nothing was changed."
        )
    return (
        f"treat(): 'limit-units': found no unit to silence in {pairs} hidden layer{'s' if pairs > 1 else ''}, expected "
        "one that is dead or idle on the batch. Nothing was changed. Name a share that stays: 'limit-units=0.5'."
    )


@contextmanager
def _held_at_zero(entries: list[Entries], optimizers: tuple[torch.optim.Optimizer, ...]) -> Iterator[None]:
    """Silence units until the end; momentum and decay would wake them at a step."""

    def after(*_: Any) -> None:
        for part in entries:
            part.fill(0)

    after()
    handles = [optimizer.register_step_post_hook(after) for optimizer in optimizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for part in reversed(entries):
            part.restore()

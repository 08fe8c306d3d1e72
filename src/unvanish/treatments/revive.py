"""Start anew the units that are dead on a batch, and leave all others as they are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..errors import TreatmentError
from ..records import Change
from .treatment import Patient, Steps
from .units import Entries, Pair, check_outputs, observed

DEAD = "dead"  # the value of an initialisation that starts only dead units anew
ROUNDS = 10  # of draws for a unit that is dead again
Draw = Callable[[nn.Module], Tensor]


def revive(identifier: str, draw: Draw) -> Callable[[Patient], Steps]:
    """Return how a treatment starts dead units anew, and undoes it.

    A unit is dead when it is zero for every example of the batch. Its incoming weights are drawn anew, its bias is 0,
    a batch norm between it and its reader is as at the start for it; its outgoing weights are zero, so that the
    outputs on the batch stay, which is checked. What an optimiser remembers of these weights (entries of their shape,
    such as momentum and squares) is zero. A unit that is dead again after its draw is drawn again, `ROUNDS` times at
    most. From then on it learns like any other.

    Frozen layers are left. Of the others those units are touched that one layer makes and one other reads.

    Undoing brings back what was replaced, and nothing else: what the other weights have learnt meanwhile stays.

    Cost: at least three forward passes.

    Source: Sokar et al. 2023 (ReDo: incoming weights drawn anew, outgoing ones zero, moments zero). Ours: a batch
    instead of a running mean of activations, exactly dead units only, batch norms, and the repeated draw.
    """
    name = f"{identifier}={DEAD}"

    def apply(patient: Patient) -> Steps:
        before, pairs = observed(patient, name)
        pairs = [pair for pair in pairs if pair.maker.weight.requires_grad and pair.reader.weight.requires_grad]
        dead = {pair.name: (pair, units) for pair in pairs if len(units := _dead(pair))}
        if not dead:
            raise TreatmentError(_nothing_to_do(name, len(pairs)))
        with ExitStack() as undo:
            for pair, units in dead.values():  # first: what one layer reads another may draw
                _set(pair.outgoing(units), 0, patient.optimizers, undo)
            for pair, units in dead.values():
                for part in pair.incoming(units):
                    _set(part, 0, patient.optimizers, undo)
                _start_norms(pair, units, patient.optimizers, undo)
            asleep = {key: units for key, (_, units) in dead.items()}
            for _ in range(ROUNDS):
                for key, units in asleep.items():
                    _draw(dead[key][0].maker, units, draw)
                asleep = {pair.name: _dead(pair) for pair in observed(patient, name)[1] if pair.name in dead}
                asleep = {key: units for key, units in asleep.items() if len(units)}
                if not asleep:
                    break
            check_outputs(patient, before, name)
            count = sum(len(units) for _, units in dead.values())
            awake = count - sum(map(len, asleep.values()))
            yield Change(identifier, f"{awake} of {count} dead units are awake again", tuple(dead), True)

    return apply


def _dead(pair: Pair) -> Tensor:
    return (pair.loudest == 0).nonzero().flatten()


def _set(part: Entries, value: float, optimizers: tuple[torch.optim.Optimizer, ...], undo: ExitStack) -> None:
    """Give entries one value, and make an optimiser forget them, until it is undone."""
    undo.callback(part.restore)
    part.fill(value)
    for optimizer in optimizers:
        state = optimizer.state.get(part.tensor, {})
        for kept in state.values():
            if isinstance(kept, Tensor) and kept.shape == part.tensor.shape and kept.dim():
                memory = Entries(kept, part.dim, part.index)
                undo.callback(memory.restore)
                memory.fill(0)


def _start_norms(pair: Pair, units: Tensor, optimizers: tuple[torch.optim.Optimizer, ...], undo: ExitStack) -> None:
    """Give units the batch norm of a new net: it may be what keeps them dead."""
    for norm in pair.norms:
        if not all(parameter.requires_grad for parameter in norm.parameters()):
            continue
        at_start = ((norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0), (norm.running_var, 1))
        for tensor, value in at_start:
            if tensor is not None:
                _set(Entries(tensor, 0, pair.places(units, len(tensor))), value, optimizers, undo)


@torch.no_grad()
def _draw(maker: nn.Module, units: Tensor, draw: Draw) -> None:
    weight = maker.weight
    assert isinstance(weight, Tensor)
    units = units.to(weight.device)
    weight.index_copy_(0, units, draw(maker).index_select(0, units))


def _nothing_to_do(name: str, pairs: int) -> str:
    if not pairs:
        return (
            f"treat(): {name!r}: found no trained linear or convolutional layer whose units one other such layer "
            "reads, with activations, norms or pooling between them, expected at least one. Nothing was changed."
        )
    return (
        f"treat(): {name!r}: found no dead unit in {pairs} hidden layer{'s' if pairs > 1 else ''}, expected one that "
        f"is zero for every example of the batch. Nothing was changed. To start all weights anew: "
        f"{name.partition('=')[0]!r}."
    )

"""One optimiser under watch: when it is sampled, what its steps left behind, and its losses."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .recomputed import Fronts
from .roster import Member
from .trace import Stream

DENSE_STEPS = 10  # the first steps of each optimiser are all sampled
FULL_SAMPLES = 4  # of so many samples one looks at the forward pass too; the others at gradients and updates
FULL_STEPS = 40  # samples at least so many steps apart all do
CHECKED_STEPS = 100  # for which it is looked whether gradients were cleared; then every tenth
CHECKED_EVERY = 10


def _nothing() -> None:
    """Stand for the reference to a parameter when there is none."""


@dataclass
class Player:
    """One optimiser under watch; neither it nor its parameters are kept alive."""

    reference: weakref.ref[torch.optim.Optimizer]
    stream: Stream
    owned: frozenset[int]
    groups: int  # of parameters; more may be added on the way
    columns: list[Member] = field(default_factory=list)  # the layers of the trace
    roster_version: int = -1  # of the roster, when the columns were last looked up
    steps: int = 0
    last_seen: int = 0  # count of steps of all optimisers
    uncleared: int = 0  # steps whose gradient still held that of the step before
    checked: int = 0  # steps for which that was looked at
    is_checked: bool = False  # the coming step is one of them
    is_cleared: bool = True
    backward_calls: int = 0  # of the whole run, when this one last stepped
    skipped: int = 0
    takeovers: int = 0  # how often another optimiser stepped between two steps of this one
    root: int = -1
    marked: Callable[[], Tensor | None] = _nothing  # the parameter whose gradient shows if it was cleared
    mark: tuple[Tensor, int] | None = None  # its gradient after the step, and that gradient's version
    loss_kind: str = ""
    fronts: Fronts = field(default_factory=Fronts)  # frozen layers that its steps computed again
    has_found_inf: bool = False  # it takes the loss scale itself, and leaves out bad steps

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimiser, as long as the training holds it."""
        return self.reference()

    def is_due(self, every: int) -> bool:
        """Say whether the next step is to be sampled."""
        stride = self.stream.sample_stride
        return self.steps % (every * stride) == 0 or (self.steps < DENSE_STEPS and stride == 1)

    def is_fully_due(self, every: int) -> bool:
        """Say whether the next sample is to look at the forward pass and the backward flow as well."""
        if not self.is_due(every):
            return False
        if self.steps < DENSE_STEPS:
            return True
        distance = every * self.stream.sample_stride
        return (self.steps // distance) % min(FULL_SAMPLES, -(-FULL_STEPS // distance)) == 0


@dataclass
class Pending:
    """Losses whose step has not come yet, and those that wait for a flush."""

    values: list[float | Tensor] = field(default_factory=list)
    before_step: int = 0  # how many were there when the running step began
    last: list[float | Tensor] = field(default_factory=list)
    stepped: list[tuple[Stream, int, list[float | Tensor]]] = field(default_factory=list)


def player_facts(player: Player) -> dict[str, Any]:
    """Return the plain settings of an optimiser and what happened around its steps."""
    optimizer = player.optimizer
    settings: dict[str, Any] = {}
    if optimizer is not None:
        group = optimizer.param_groups[0]
        settings = {
            "optimizer": type(optimizer).__name__,
            **{
                key: float(group[key])
                for key in ("lr", "momentum", "weight_decay", "eps", "alpha")
                if isinstance(group.get(key), (int, float))
            },
            "maximize": bool(group.get("maximize", False)),
        }
    return {
        **settings,
        "uncleared_steps": player.uncleared,
        "checked_steps": player.checked,
        "skipped_steps": player.skipped,
        "takeovers": player.takeovers,
        "loss_kind": player.loss_kind,
        **player.fronts.facts(),
    }


def fetch_losses(
    stepped: Sequence[tuple[Stream, int, list[float | Tensor]]],
) -> list[tuple[Stream, int, float]]:
    """Return the loss of each step as a number, with one transfer for all that lie on a device."""
    tensors = [value for _, _, values in stepped for value in values if isinstance(value, Tensor)]
    numbers = iter(torch.stack([t.to(tensors[0].device) for t in tensors]).cpu().tolist() if tensors else [])
    result = []
    for stream, step, values in stepped:
        total = sum(next(numbers) if isinstance(value, Tensor) else value for value in values)
        result.append((stream, step, float(total) if values else math.nan))
    return result


def mark_gradient(player: Player, optimizer: torch.optim.Optimizer) -> None:
    """Remember a small gradient of an optimiser, to see whether it is cleared before the next step."""
    marked = player.marked()
    if marked is None or marked.grad is None:
        held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        marked = min(held, key=lambda p: p.numel(), default=None)
        player.marked = _nothing if marked is None else weakref.ref(marked)
    grad = None if marked is None else marked.grad
    player.is_cleared = grad is None
    player.mark = None if grad is None else (grad, grad._version)


def look_whether_cleared(player: Player) -> None:
    """Note whether the gradient was emptied since the last step: gone, replaced, or written to."""
    if player.mark is None:
        return
    grad, version = player.mark
    marked = player.marked()
    if marked is None or marked.grad is not grad or grad._version != version:
        player.is_cleared = True
        player.mark = None

"""What each force does to the replicas: functions of their weights and of what the coupling remembers.

A force gets the weights by name, each with a leading axis of replicas, and moves them in place. To add one: its
function, a line in `FORCES`, and what it has to remember in `Memory`.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .binary import Levels, discrete
from .kicks import Form, kick

Force = Literal["elastic", "tanh", "leader", "centre", "outer", "binary"]
Weights = Mapping[str, Tensor]  # each (replicas, *shape)


@dataclass
class Memory:
    """What a coupling remembers between two pulls."""

    scale: float = 1.0  # of tanh, in units of the weights
    centre: dict[str, Tensor] = field(default_factory=dict)  # of its own; empty where the mean is the centre
    outer: torch.optim.Optimizer | None = None  # moves that centre
    losses: list[float] = field(default_factory=list)  # of each replica, summed since the last pull
    rows: Sequence[int] = ()  # which replicas the weights are of: the finite ones
    means: dict[str, Tensor] = field(default_factory=dict)  # of the weights, over these; (1, *shape)
    levels: dict[str, Levels] = field(default_factory=dict)  # of the weights that are latent
    gamma: float = 0.05  # of the kick, at this pull
    form: Form = "simple"  # of the kick


def elastic(weights: Weights, strength: float, memory: Memory) -> None:
    """Close a share of the gap to the mean: the move is ``s (c - W_a)``."""
    for name, each in weights.items():
        each.lerp_(memory.means[name], strength)


def tanh(weights: Weights, strength: float, memory: Memory) -> None:
    """Close the gap to the mean as the linear pull does, but by no more than a share of the scale."""
    for name, each in weights.items():
        each.add_(memory.scale * torch.tanh((memory.means[name] - each) / memory.scale), alpha=strength)


def leader(weights: Weights, strength: float, memory: Memory) -> None:
    """Close a share of the gap to the replica that lost least since the last pull."""
    losses = [memory.losses[row] for row in memory.rows]
    best = min(range(len(losses)), key=lambda place: math.inf if math.isnan(losses[place]) else losses[place])
    for each in weights.values():
        each.lerp_(each[best : best + 1].clone(), strength)


def centre(weights: Weights, strength: float, memory: Memory) -> None:
    """Let the replicas meet a centre of its own in turns: each closes a share of the gap, the centre as much of it."""
    for name, each in weights.items():
        for replica in each.unbind(0):
            gap = replica - memory.centre[name]
            replica.sub_(gap, alpha=strength)
            memory.centre[name].add_(gap, alpha=strength)


def outer(weights: Weights, strength: float, memory: Memory) -> None:
    """Move the centre by the outer optimiser, with its distance to the mean as gradient; then pull to it."""
    assert memory.outer is not None
    for name in weights:
        memory.centre[name].grad = memory.centre[name] - memory.means[name][0]
    memory.outer.step()
    memory.outer.zero_grad()
    for name, each in weights.items():
        each.lerp_(memory.centre[name].detach(), strength)


def binary(weights: Weights, strength: float, memory: Memory) -> None:
    """Kick latent weights by what the discrete weights of all replicas say; pull all others linearly."""
    for name, each in weights.items():
        if name in memory.levels:
            levels = memory.levels[name]
            # an output of a replica is an output: thresholds are taken for each
            values = discrete(each.flatten(0, 1), levels).view_as(each)
            each.add_(kick(values, memory.gamma, memory.form, levels=levels), alpha=strength)
        else:
            each.lerp_(memory.means[name], strength)


FORCES: Mapping[Force, Callable[[Weights, float, Memory], None]] = {
    "elastic": elastic,
    "tanh": tanh,
    "leader": leader,
    "centre": centre,
    "outer": outer,
    "binary": binary,
}
OWN_CENTRE: tuple[Force, ...] = ("centre", "outer")  # these pull one replica alone, too


def finite_replicas(weights: Weights, n: int, means: Weights) -> list[int]:
    """Return the replicas without nan or infinity.

    A mean over replicas is finite only if all of them are.

    Args:
        weights: Of all replicas.
        n: Replicas.
        means: Of the weights, over the replicas.

    Cost: one pass over the means and one synchronisation; a pass over the weights where something is not finite.
    """
    sums = [_total(each) for each in means.values()]
    if not sums or cmath.isfinite(torch.stack([each.to(sums[0].device) for each in sums]).sum().item()):
        return list(range(n))
    finite = torch.stack([each.isfinite().flatten(1).all(1).cpu() for each in weights.values()]).all(0)
    return [i for i in range(n) if finite[i]]


def _total(weights: Tensor) -> Tensor:
    """Return the sum, which is finite only if every weight is; half precision would overflow."""
    return weights.sum(dtype=torch.float32 if weights.dtype in (torch.float16, torch.bfloat16) else None)

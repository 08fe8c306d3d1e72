"""The strength of a coupling at each step: a number, a schedule, or measured at the first pull."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .precautions import warn_of_late_merging
from .schedules import Automatic, Strength, check_strength
from .stack import mean

Survey = tuple[Mapping[str, Tensor], Sequence[int]]  # the weights, and which replicas are finite


class Scoping:
    """Knows how strong the pull is at a step, and the first strength there was.

    Args:
        strength: As in `Coupling`.
        every: As in `Coupling`.
        compound: As in `Coupling`.
        weights: Of all replicas, where they start.
        started_apart: Whether they differ there.
    """

    def __init__(
        self, strength: Strength, *, every: int, compound: bool, weights: Mapping[str, Tensor], started_apart: bool
    ) -> None:
        self.strength = strength
        self._every = every
        self._compound = compound
        self._started_apart = started_apart
        self._first: float | None = None
        self._start: dict[str, Tensor] = {}  # weights from which an automatic first strength is measured
        if isinstance(strength, Automatic):
            self._start = {name: each.detach().clone() for name, each in weights.items()}

    def at(self, step: int, *, is_due: bool, survey: Callable[[], Survey]) -> float:
        """Return the strength after so many steps, and note the first there was.

        Args:
            step: Steps done before this one.
            is_due: Whether there is a pull at this step.
            survey: Returns the weights as they are.

        Raises:
            OptionError: if a schedule returns no share.
        """
        if isinstance(self.strength, Automatic):
            if self._first is None:
                return self._measure(self.strength.share, *survey()) if is_due else 0.0
            return self.strength.after(self._first, step)
        if not callable(self.strength):
            return self.strength
        strength = check_strength(self.strength(step))
        if self._first is None:
            self._first = strength
        elif strength > self._first and self._started_apart:
            self._started_apart = False  # said once
            warn_of_late_merging()
        return strength

    @torch.no_grad()
    def _measure(self, share: float, weights: Mapping[str, Tensor], rows: Sequence[int]) -> float:
        """Return by how much to pull now, and note what that is a step; 0 as long as all replicas are one."""
        way = math.hypot(*(float((each - self._start[name])[rows].norm()) for name, each in weights.items()))
        gap = math.hypot(*(float((each[rows] - mean(each[rows])).norm()) for each in weights.values() if rows))
        if gap == 0:
            self._start = {name: each.detach().clone() for name, each in weights.items()}
            return 0.0
        strength = min(share * way / gap, 1.0)
        self._first = 1 - (1 - strength) ** (1 / self._every) if self._compound else strength
        self._start = {}
        return strength

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        start = {name: tensor.clone() for name, tensor in self._start.items()}
        return {"first": self._first, "start": start, "started_apart": self._started_apart}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken."""
        self._first, self._started_apart = state["first"], state["started_apart"]
        self._start = {name: tensor.clone() for name, tensor in state["start"].items()}

"""What pulls replicas together, outside of their optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import OptionError
from .replicas import Replicas
from .stack import mean

Force = Literal["elastic", "tanh"]


class Coupling:
    """Pull replicas towards their mean after each step of the optimiser.

    ``elastic``: ``W_a += s (c - W_a)``, with ``c`` the mean of all replicas before any of them moves. The centre does
    not move by it. ``tanh``: ``W_a += s L tanh((c - W_a) / L)``, which is the elastic pull for gaps far below L and
    at most ``s L`` for one replica that is far away; it does move the centre of three or more replicas.

    The pull is no gradient: it is not scaled by the learning rate, so as that falls, the pull gains on it. Frozen
    parameters and buffers are not pulled.

    Args:
        replicas: What to couple.
        strength: s, the share of the gap that is closed in one step, from 0 (none) to 1 (all become the mean); or a
            function of the number of steps done that returns it.
        every: Pull at each such step only, by what the skipped steps add up to: with a constant strength
            ``1 - (1 - s)**every``. For the elastic force this is what those pulls would have done in a row; for
            ``tanh`` so only while gaps are small.
        force: ``"elastic"``, ``"tanh"`` or None.
        scale: L, the gap at which ``tanh`` levels off, in units of the weights.

    Raises:
        OptionError: if an argument cannot be used.

    Source: elastic: Zhang, Choromanska & LeCun 2015, without its explicit centre; to couple replicas for wide minima:
    Baldassi et al. 2016.  Ours: compounding.

    Example:
        >>> replicas = Replicas(torch.nn.Linear(1, 1, bias=False), n=2)
        >>> with torch.no_grad():
        ...     replicas.stacked.weight[:] = torch.tensor([[[0.0]], [[2.0]]])
        >>> Coupling(replicas, strength=0.25).step()
        >>> replicas.stacked.weight.flatten().tolist()
        [0.25, 1.75]
    """

    def __init__(
        self,
        replicas: Replicas,
        strength: float | Callable[[int], float] = 0.01,
        every: int = 1,
        force: Force | None = "elastic",
        *,
        scale: float = 1.0,
    ) -> None:
        if not isinstance(replicas, Replicas):
            raise OptionError(
                f"Coupling(): replicas: found {type(replicas).__name__}, expected Replicas. "
                "Write Coupling(Replicas(model, n=3))."
            )
        if not callable(strength):
            _check_strength(strength)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise OptionError(f"Coupling(): every: found {every!r}, expected a whole number from 1 on. Write every=10.")
        if force is not None and force not in get_args(Force):
            raise OptionError(
                f"Coupling(): force: found {force!r}, expected 'elastic', 'tanh' or None. Write force='elastic'."
            )
        if not 0 < scale < math.inf:
            raise OptionError(f"Coupling(): scale: found {scale!r}, expected a finite number above 0. Write scale=1.0.")
        self.replicas = replicas
        self.strength = strength
        self.every = every
        self.force = force
        self.scale = scale
        self._steps = 0
        self._gathered = 0.0  # of the gap, by the steps since the last pull

    def step(self) -> None:
        """Count a step, and pull if it is time. Call it after the step of the optimiser."""
        strength = _check_strength(self.strength(self._steps)) if callable(self.strength) else self.strength
        self._gathered += strength * (1 - self._gathered)
        self._steps += 1
        if self._steps % self.every == 0:
            self.pull(self._gathered)
            self._gathered = 0.0

    @torch.no_grad()
    def pull(self, strength: float) -> None:
        """Pull now, by a strength of your own, and count nothing."""
        strength = _check_strength(strength)
        if strength == 0 or self.force is None:
            return
        for weights in self.replicas.stacked.parameters():
            if weights.requires_grad:
                centre = mean(weights)
                if self.force == "elastic":
                    weights.lerp_(centre, strength)
                else:
                    weights.add_(_tanh_force(weights, centre, self.scale), alpha=strength)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: steps done, and what the skipped ones gathered."""
        return {"steps": self._steps, "gathered": self._gathered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken."""
        self._steps, self._gathered = int(state["steps"]), float(state["gathered"])

    def __repr__(self) -> str:
        return f"Coupling(strength={self.strength!r}, every={self.every}, force={self.force!r}, scale={self.scale})"


def exponential(start: float, end: float, steps: int) -> Callable[[int], float]:
    """Return a strength that goes from ``start`` to ``end`` by equal factors within ``steps``, and then stays.

    Raises:
        OptionError: if a strength is outside of (0, 1], or ``steps`` is below 1.

    Example:
        >>> strength = exponential(0.001, 0.1, steps=100)
        >>> [round(strength(step), 6) for step in (0, 50, 100, 1000)]
        [0.001, 0.01, 0.1, 0.1]
    """
    if not (0 < start <= 1 and 0 < end <= 1 and steps >= 1):
        raise OptionError(
            f"exponential(): found {start!r} to {end!r} in {steps!r} steps, expected strengths above 0 up to 1 and at "
            "least one step. Write exponential(0.001, 0.1, steps=1000)."
        )
    return lambda step: start * (end / start) ** min(step / steps, 1.0)


def _tanh_force(weights: Tensor, centre: Tensor, scale: float) -> Tensor:
    return scale * torch.tanh((centre - weights) / scale)


def _check_strength(strength: Any) -> float:
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
        raise OptionError(
            f"Coupling(): strength: found {strength!r}, expected a number from 0 to 1, the share of the gap to the "
            "mean that one step closes. Write strength=0.01."
        )
    return strength

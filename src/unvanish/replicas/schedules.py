"""How strong the pull is, as training goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError


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


@dataclass(frozen=True)
class Automatic:
    """A strength whose first value is measured: the first pull is a stated share of what the optimiser moved.

    The first pull that finds replicas apart is made ``share`` times as long as the way that the optimiser took since
    the pull before (both over all replicas and layers together), at most the whole gap. From there the strength grows
    by ``growth`` within ``steps`` steps, and then stays.

    Why the step and not the loss over the squared distance: a strength is a share of a distance, and the step is a
    distance too, so the rule needs no loss and no learning rate and holds for optimisers that rescale gradients.

    Args:
        share: Pull over step at the first pull, above 0.
        growth: By which factor the strength grows, above 0; it never exceeds 1.
        steps: Within so many steps.

    Raises:
        OptionError: if an argument cannot be used.

    Source: Pittorino et al. 2021 start from the loss over the squared distance and let the coupling grow.  Ours: the
    share of the step instead.

    Example:
        >>> scoping = Automatic(share=0.1, growth=100.0, steps=10)
        >>> [round(scoping.after(0.002, step), 6) for step in (0, 5, 10, 1000)]
        [0.002, 0.02, 0.2, 0.2]
    """

    share: float = 0.1
    growth: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.share < math.inf and 0 < self.growth < math.inf and self.steps >= 1):
            raise OptionError(
                f"Automatic(): found share={self.share!r}, growth={self.growth!r}, steps={self.steps!r}, expected "
                "finite numbers above 0 and at least one step. Write Automatic(share=0.1, growth=100, steps=1000)."
            )

    def after(self, first: float, step: int) -> float:
        """Return the strength after so many steps, if ``first`` was measured."""
        return float(min(first * self.growth ** min(step / self.steps, 1.0), 1.0))


Strength = float | Callable[[int], float] | Automatic


def check_strength(strength: Any) -> float:
    """Return the strength if it is a share.

    Raises:
        OptionError: if it is no number from 0 to 1.
    """
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
        raise OptionError(
            f"Coupling(): strength: found {strength!r}, expected a number from 0 to 1, the share of the gap to the "
            "mean that one step closes. Write strength=0.01."
        )
    return strength

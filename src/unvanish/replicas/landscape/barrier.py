"""The straight way from one model to another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...terrain import Path
from .surface import Height, Surface, Weights


def between(one: Weights, other: Weights, t: float) -> Weights:
    """Return the weights at a share t of the way; its ends, and whole numbers, are exact.

    Example:
        >>> import torch
        >>> between({"w": torch.tensor([0.0])}, {"w": torch.tensor([2.0])}, 0.25)["w"].item()
        0.5
    """
    return {name: _between(value, other[name], t) for name, value in one.items()}


def _between(one: Tensor, other: Tensor, t: float) -> Tensor:
    return one.lerp(other, t) if one.is_floating_point() else one


def walk(
    surface: Surface,
    start: tuple[str, Weights, Height],
    end: tuple[str, Weights, Height],
    points: int,
    *,
    aligned: bool,
) -> Path:
    """Return the losses along the straight way between two places whose heights are known.

    Cost: ``points - 2`` looks at the data.
    """
    t: Sequence[float] = [number / (points - 1) for number in range(points)]
    inside = [surface.height(between(start[1], end[1], share)) for share in t[1:-1]]
    heights = [start[2], *inside, end[2]]
    mistakes = tuple(height.mistakes for height in heights)
    return Path(start[0], end[0], aligned, tuple(t), tuple(height.loss for height in heights), mistakes)

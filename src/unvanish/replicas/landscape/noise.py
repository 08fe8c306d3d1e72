"""Local energy: how much the loss rises when all weights are changed by a random share of themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ...terrain import Energy
from .surface import Height, Surface, Weights


def local_energy(
    surface: Surface, weights: Weights, at: Height, sigmas: Sequence[float], draws: int, seed: int
) -> tuple[Energy, ...]:
    """Return ``E_z[E(w + sigma z w)] - E(w)`` for each sigma, z standard normal for each weight.

    A share of each weight, so that it stays the same when a layer is multiplied and the next one divided, which a
    ReLU network does not notice. The same z serve for all places and all sigmas: their differences are then less noisy
    than each is.

    Args:
        surface: The loss.
        weights: Where.
        at: The height there.
        sigmas: Strengths of the noise.
        draws: Of z, for each strength.
        seed: Of z.

    Returns:
        Means over the draws with their standard errors.

    Cost: ``draws * len(sigmas)`` looks at the data.

    Source: Pittorino et al. 2022.
    """
    found: list[list[Height]] = [[] for _ in sigmas]
    source = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        z = normal(surface, source)
        for heights, sigma in zip(found, sigmas, strict=True):
            noisy = {name: weights[name] * (1 + sigma * z[name]) for name in z}
            heights.append(surface.height({**weights, **noisy}))
    return tuple(_energy(sigma, heights, at) for sigma, heights in zip(sigmas, found, strict=True))


def normal(surface: Surface, source: torch.Generator) -> Weights:
    """Return standard normal numbers, one a trained parameter; drawn on the CPU, so equal on all devices."""
    return {
        name: torch.randn(p.shape, generator=source).to(p.device, p.dtype) for name, p in surface.parameters.items()
    }


def _energy(sigma: float, heights: Sequence[Height], at: Height) -> Energy:
    losses = _mean([height.loss - at.loss for height in heights])
    return Energy(sigma, *losses, *_mean([height.mistakes - at.mistakes for height in heights]))


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Return a mean and its standard error."""
    count = len(values)
    mean = math.fsum(values) / count if all(map(math.isfinite, values)) else math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)

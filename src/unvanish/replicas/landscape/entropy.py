"""Local entropy: how much of the neighbourhood of some weights fits the data, and how well."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from ...terrain import Entropy
from .noise import normal
from .overlap import layers_of, norm
from .surface import Surface, Weights

STEPS = 50  # of each chain
_POWER = 4  # of the schedule: small steps while the loss still varies much
_FASTER, _SLOWER = 1.1, 0.93  # in balance where 43 % of all steps are accepted


def local_entropy(surface: Surface, weights: Weights, loss: float, width: float, chains: int, seed: int) -> Entropy:
    """Return ``log E_u[exp(-b E(w + s u))]``, u standard normal for each weight.

    It is the local entropy ``log int exp(-b E(w') - |w' - w|^2 / (2 s^2)) dw'``, without the volume of the
    neighbourhood, which does not depend on the loss. s is ``width`` times the rms of each layer's weights, b the number
    of examples, so that ``b E`` is the loss summed over all of them. At a minimum with Hessian H it is
    ``-b E(w) - 1/2 log det(1 + b s H s)``: the higher the lower and the wider the minimum; 0 is the most for losses
    that are not negative.

    Chains go from the Gaussian neighbourhood to its part of low loss by small steps of b, and the change in weight
    on the way is the result. A step keeps ``sqrt(1 - r^2)`` of u and adds r times a new one; as this keeps the
    Gaussian, only losses say whether it is accepted. A first chain finds how long steps may be and is not counted.

    Args:
        surface: The loss.
        weights: Where.
        loss: The loss there.
        width: s, in units of the rms of each layer's weights.
        chains: That are counted.
        seed: Of the chains.

    Returns:
        The estimate, in nats, and its standard error over the chains. With few chains it tends to be too low, by
        about the square of that error over two.

    Cost: ``(chains + 1) * (STEPS + 1)`` looks at the data.

    Source: local entropy: Baldassi et al. 2016; Chaudhari et al. 2017. Annealed importance sampling: Neal 2001.
    Ours: these steps instead of Langevin's, and widths by layer.
    """
    scales = _scales(surface, weights, width)

    def rise(u: Weights) -> float:
        moved = {name: weights[name] + scales[name] * u[name] for name in u}
        return surface.height({**weights, **moved}).loss - loss

    source = torch.Generator().manual_seed(seed)
    inverse = float(surface.examples)
    schedule = [inverse * (step / STEPS) ** _POWER for step in range(STEPS + 1)]
    _, lengths = _chain(surface, rise, schedule, None, source)
    weights_of_chains = [_chain(surface, rise, schedule, lengths, source)[0] for _ in range(chains)]
    value, uncertainty = _log_mean(weights_of_chains)
    return Entropy(value - inverse * loss, uncertainty, width, inverse)


def _chain(
    surface: Surface,
    rise: Callable[[Weights], float],
    schedule: Sequence[float],
    lengths: Sequence[float] | None,
    source: torch.Generator,
) -> tuple[float, list[float]]:
    """Return the logarithm of a chain's weight, and how long its steps were; without lengths it finds them."""
    u = normal(surface, source)
    height = rise(u)
    total, length = 0.0, 1.0
    used: list[float] = []
    for step, (b, after) in enumerate(pairwise(schedule)):
        total -= (after - b) * height
        length = length if lengths is None else lengths[step]
        used.append(length)
        fresh = normal(surface, source)
        moved = {name: math.sqrt(1 - length**2) * u[name] + length * fresh[name] for name in u}
        there = rise(moved)
        chance = float(torch.rand((), generator=source, dtype=torch.float64))
        is_accepted = math.log(max(chance, 1e-300)) < after * (height - there)  # False for nan
        if is_accepted:
            u, height = moved, there
        length = min(1.0, length * (_FASTER if is_accepted else _SLOWER))
    return total, used


def _scales(surface: Surface, weights: Weights, width: float) -> dict[str, float]:
    """Return how far each parameter is moved: its layer's rms, times the width."""
    scales: dict[str, float] = {}
    for owned in layers_of(surface.model, surface.parameters).values():
        count = sum(weights[name].numel() for name in owned)
        scales |= dict.fromkeys(owned, width * norm(weights, owned) / math.sqrt(count))
    return scales


def _log_mean(logs: Sequence[float]) -> tuple[float, float]:
    """Return the logarithm of the mean of exponentials, and its standard error.

    Where the exponentials differ by orders of magnitude, their own standard error is too small: that of the
    logarithms is taken then.
    """
    count, highest = len(logs), max(logs)
    if not all(map(math.isfinite, logs)):
        return math.nan, math.nan
    values = [math.exp(value - highest) for value in logs]
    mean = math.fsum(values) / count
    return highest + math.log(mean), max(_deviation(values) / mean, _deviation(logs)) / math.sqrt(count)


def _deviation(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))

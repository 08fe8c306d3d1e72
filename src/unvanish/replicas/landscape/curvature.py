"""The sharpest direction of the loss: the largest eigenvalue of its Hessian."""

from __future__ import annotations

import math

import numpy as np
import torch

from ...terrain import Curvature
from .noise import normal
from .overlap import norm
from .surface import Surface, Weights

STEPS = 30  # products with the Hessian, at most
_TOLERANCE = 1e-3  # of the eigenvalue


def curvature(surface: Surface, weights: Weights, seed: int) -> Curvature:
    """Return the largest eigenvalue of the Hessian of the loss by the method of Lanczos.

    It finds the largest eigenvalue, not that of largest size, in fewer products with the Hessian than the power
    iteration, and stops when the residual is below 0.1 % of it. Vectors are not kept, so none is made orthogonal to
    those long before; that repeats eigenvalues that were found, but does not move them. The statistics of batch norms
    stand still.

    Args:
        surface: The loss.
        weights: Where.
        seed: Of the first vector.

    Returns:
        The eigenvalue with its residual: some eigenvalue lies as near; and its product with the squared norm of the
        weights, which does not depend on their scale where the loss does not.

    Cost: at most ``STEPS`` looks at the data, each with two backward passes.

    Source: Lanczos's method as in Bai et al. 2000, section 4.4.  Ours: the stopping rule.
    """
    surface.place(weights)
    vector = normal(surface, torch.Generator().manual_seed(seed))
    names = list(vector)
    _divide(vector, norm(vector, names))
    before, beta = {name: torch.zeros_like(value) for name, value in vector.items()}, 0.0
    diagonal: list[float] = []
    beside: list[float] = []
    top = residual = math.nan
    limit = min(STEPS, sum(value.numel() for value in vector.values()))
    while len(diagonal) < limit:
        product = surface.curve(vector)
        alpha = math.fsum(float((product[name].double() * vector[name].double()).sum()) for name in names)
        for name in names:
            product[name] -= alpha * vector[name] + beta * before[name]
        beta = norm(product, names)
        diagonal.append(alpha)
        if not (math.isfinite(alpha) and math.isfinite(beta)):
            return Curvature(math.nan, math.nan, math.nan, len(diagonal))
        top, residual = _top(diagonal, beside, beta)
        if residual <= _TOLERANCE * abs(top):
            break
        beside.append(beta)
        before, vector = vector, product
        _divide(vector, beta)
    return Curvature(top, residual, top * norm(weights, names) ** 2, len(diagonal))


def _top(diagonal: list[float], beside: list[float], beta: float) -> tuple[float, float]:
    """Return the largest eigenvalue of the projected Hessian, and its residual in the whole space."""
    matrix = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    values, vectors = np.linalg.eigh(matrix)
    return float(values[-1]), abs(beta * float(vectors[-1, -1]))


def _divide(vector: Weights, by: float) -> None:
    for value in vector.values():
        value.div_(by)

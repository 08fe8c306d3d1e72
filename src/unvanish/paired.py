"""The test that a treatment has to pass: do pairs of levels, untreated and treated, differ by more than chance?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

import numpy as np


def paired_test(untreated: Sequence[float], treated: Sequence[float]) -> tuple[float, float, float]:
    """Return gain, its spread over seeds, and the p value that the treated level is not lower.

    One-sided paired t-test on the differences of log levels (of levels, where their signs vary). A treated level
    that is not finite counts against it; an untreated one that is not finite is as bad as any. Levels below 0 are those
    of a metric that is to grow, negated.

    Example:
        >>> gain, spread, p = paired_test((1.0, 1.1, 0.9), (0.1, 0.12, 0.1))
        >>> round(gain, 2), p < 0.05
        (0.89, True)
        >>> paired_test((1.0, 1.1, 0.9), (1.0, 1.1, 0.9))[2]
        1.0
        >>> round(paired_test((-0.5, -0.52), (-1.0, -1.03))[0], 2)  # an accuracy that doubles
        0.99
    """
    pairs = list(zip(untreated, treated, strict=False))
    if len(pairs) < 2 or not all(math.isfinite(b) for _, b in pairs):
        return 0.0, 0.0, 1.0
    if any(not math.isfinite(a) for a, _ in pairs):
        worst = max([a for a, _ in pairs if math.isfinite(a)] + [b for _, b in pairs]) * 10 + 1
        pairs = [(a if math.isfinite(a) else worst, b) for a, b in pairs]
    signs = {math.copysign(1, value) if value else 0 for pair in pairs for value in pair}
    is_ratio = signs in ({1}, {-1})
    differences = [_log_gain(a, b) if is_ratio else a - b for a, b in pairs]
    centre, spread = fmean(differences), stdev(differences)
    if spread == 0:
        p = 0.0 if centre > 0 else 1.0
    else:
        p = _t_tail(centre / (spread / math.sqrt(len(pairs))), len(pairs) - 1)
    if not is_ratio:
        return centre, spread, p
    return (math.expm1(centre) if signs == {-1} else -math.expm1(-centre)), spread, p


def _log_gain(untreated: float, treated: float) -> float:
    """Return the logarithm of the factor by which a level of one sign got better."""
    return math.log(treated / untreated if treated < 0 else untreated / treated)


def _t_tail(t: float, freedom: int) -> float:
    """Return P(T > t) of Student's t with 1 or 2 degrees of freedom in closed form, else by integration."""
    if freedom == 1:
        return 0.5 - math.atan(t) / math.pi
    if freedom == 2:
        return 0.5 * (1 - t / math.sqrt(2 + t * t))
    grid = np.linspace(0, abs(t), 20_001)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    density = np.exp(log_scale - (freedom + 1) / 2 * np.log1p(grid**2 / freedom))
    body = float(np.trapezoid(density, grid))
    return 0.5 - math.copysign(body, t)

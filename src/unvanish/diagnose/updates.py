"""The size of what the optimiser does to the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..records import Finding, Severity, Trace
from .progress import progress
from .reading import (
    at_start,
    is_stepping_in_place,
    late,
    late_half,
    median_of,
    names,
    scalar,
    trained_layers,
)

HIGH_UPDATE = 0.1  # of the weights' size in one step, by the typical layer
RESTLESS = 0.02  # still moving so much in the second half
LOW_UPDATE = 1e-4
STILL = 1e-6  # 10,000 steps would change the weights by 1 %
GROWN = 10.0
SHRUNK = 0.1


def _weights_layers(trace: Trace) -> list[int]:
    return trained_layers(trace)


def learning_rate_too_high(trace: Trace) -> Iterator[Finding]:
    """Steps as large as the weights themselves, and a loss that suffers for it."""
    learned, layers = progress(trace), _weights_layers(trace)
    if not layers or trace.total_steps < 5:
        return
    ratios = _against_start(trace, layers)
    typical = np.array([median_of(row) for row in ratios])
    high = np.nan_to_num(typical, nan=0.0) > HIGH_UPDATE
    early = float(np.nanmax(np.append(typical[1:10], 0.0)))  # step 0 may start from zero weights
    restless = median_of(typical[len(typical) // 2 :])
    is_wild = high[1:].sum() >= 3 or (not learned.is_finite and high.any())
    is_hurt = learned.is_poor or learned.peak > 10
    is_restless = restless > RESTLESS and learned.noise > 0.5 and learned.remaining > 0.1
    if not ((is_wild and is_hurt) or is_restless):
        return
    places = [place for i, place in enumerate(layers) if np.nanmax(np.append(ratios[1:, i], 0.0)) > HIGH_UPDATE]
    first = np.flatnonzero(high)
    yield Finding(
        "learning-rate-too-high",
        "critical" if is_wild and learned.is_poor else "warning",
        f"A step changed the typical layer by up to {early:.0%} of its size (1e-3 is usual), and the loss went from "
        f"{learned.start:.3g} over {learned.peak:.3g} times the baseline to {learned.end:.3g}.",
        "Bengio 2012, section 3.1.1; update/weight ratio: DeepDiagnosis 2022 (0.1), TheDeepChecker 2022 (1e-1)",
        layers=names(trace, places),
        step=int(trace.steps[first[0]]) if len(first) else 0,
        share_of_run=float(high.mean()),
        evidence={"update_ratio": early, "update_ratio_late": restless, "lr": float(trace.facts.get("lr", math.nan))},
        treatments=("lower-lr", "warm-up", "clip-norm"),
    )


def _against_start(trace: Trace, layers: list[int]) -> NDArray[np.float64]:
    """Return updates relative to the weights, or to what they were at the start where they have shrunk."""
    weights = trace.measures["weight_rms"][:, layers].astype(float)
    first = at_start(trace, "weight_rms")[layers]
    with np.errstate(all="ignore"):
        shrunk = np.minimum(np.nan_to_num(weights / first, nan=1.0), 1.0)
    return np.asarray(trace.measures["update_ratio"][:, layers] * shrunk, dtype=np.float64)


def learning_rate_too_low(trace: Trace) -> Iterator[Finding]:
    """The weights hardly move although there is much left to learn."""
    learned, layers = progress(trace), _weights_layers(trace)
    if not layers or not learned.is_judgeable or not learned.is_finite or is_stepping_in_place(trace):
        return
    if learned.is_blind:
        return  # no rate helps where there is no gradient
    ratios = np.array([median_of(row) for row in trace.measures["update_ratio"][:, layers].astype(float)])
    lr = trace.scalars["lr"]
    peak_lr = float(np.nanmax(np.append(lr, 0.0)))
    gone = float(np.mean(lr < 1e-3 * peak_lr)) if peak_lr > 0 else 0.0
    level = median_of(ratios)
    has_flow = np.nanmin(np.append(late(trace, "log2_flow")[layers], 0.0)) > -13
    has_more = learned.is_poor or (learned.has_floor and learned.remaining > 0.2)
    is_slow = level < LOW_UPDATE and learned.is_falling and has_more
    is_still = level < STILL and learned.is_poor and learned.end > 0.5 * learned.start
    is_gone = gone > 0.3 and learned.is_poor
    if not (is_gone or ((is_slow or is_still) and has_flow)):
        return
    decay = f" The schedule takes it below a thousandth of its peak for {gone:.0%} of the run." if is_gone else ""
    severity: Severity = "critical" if learned.is_poor else "warning"
    yield Finding(
        "learning-rate-too-low",
        severity,
        f"A step changes the typical layer by {level:.1g} of its size (1e-3 is usual) while {learned.remaining:.0%} of "
        f"the baseline's loss is left.{decay}",
        "Bengio 2012, section 3.1.1; DeepDiagnosis 2022 (1e-5), TheDeepChecker 2022 (1e-4)",
        layers=names(trace, layers),
        share_of_run=float(np.mean(np.nan_to_num(ratios) < LOW_UPDATE)),
        evidence={"update_ratio": level, "lr": peak_lr, "late_fall": learned.late_fall, "share_without_rate": gone},
        treatments=("raise-lr",),
    )


def weights_exploding(trace: Trace) -> Iterator[Finding]:
    """Weights that grow without end while nothing gets better."""
    learned, layers = progress(trace), _weights_layers(trace)
    first, last = at_start(trace, "weight_rms"), late(trace, "weight_rms")
    with np.errstate(all="ignore"):
        grown = {p: last[p] / first[p] for p in layers if first[p] > 1e-3 and np.isfinite(last[p] / first[p])}
    worst = [place for place, ratio in grown.items() if ratio > GROWN]
    if not worst or not (learned.is_poor or learned.end < 0):
        return
    place = max(worst, key=lambda p: grown[p])
    yield Finding(
        "weights-exploding",
        "critical",
        f"The weights of {trace.layers[place].name!r} grew {grown[place]:.3g} times, and the loss did not profit.",
        "TheDeepChecker 2022 (diverging weights); avalanche learning: larger weights, larger gradients",
        layer=trace.layers[place].name,
        layers=names(trace, worst),
        evidence={"growth": grown[place], "weight_rms": float(last[place])},
        treatments=("lower-lr", "weight-decay", "clip-norm"),
    )


def weights_collapsing(trace: Trace) -> Iterator[Finding]:
    """Weights that shrink towards zero and take the outputs with them."""
    learned, layers = progress(trace), _weights_layers(trace)
    # a loss that holds a penalty falls with the weights: then the outputs tell
    spreads = scalar(trace, "output_unit_std", slice(0, 3)), scalar(trace, "output_unit_std", late_half(trace))
    if not (learned.is_poor or spreads[1] < SHRUNK * spreads[0]):
        return
    first, last = at_start(trace, "weight_rms"), late(trace, "weight_rms")
    worst = [place for place in layers if first[place] > 0 and last[place] / first[place] < SHRUNK]
    if not worst or len(worst) * 2 < len(layers):
        return
    place = min(worst, key=lambda p: float(last[p] / first[p]))
    decay = float(trace.facts.get("weight_decay", 0.0))
    why = f" Weight decay is {decay:g}." if decay > 0 else ""
    yield Finding(
        "weights-collapsing",
        "critical",
        f"The weights of {len(worst)} of {len(layers)} layers shrank below a tenth; those of "
        f"{trace.layers[place].name!r} to {last[place] / first[place]:.2g} of their size.{why}",
        "Krogh & Hertz 1991 (decay shrinks a weight by 1 - lr * decay a step unless the gradient holds it)",
        layer=trace.layers[place].name,
        layers=names(trace, worst),
        evidence={"shrinkage": float(last[place] / first[place]), "weight_decay": decay},
        treatments=("weight-decay",),
    )

"""Faults of what is fed in: scale of inputs and targets, labels that carry nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..records import Finding, Severity, Trace
from .loss_graph import REGRESSION
from .progress import constant_answer_loss, pooled_target_std, progress
from .reading import late, late_half, median_of, running_layers, scalar, trained_layers

LARGE_INPUT = 10.0  # rms; curvature grows with its square: 100 times that of standardised inputs
SMALL_INPUT = 0.01  # spread of the widest feature; the same factor the other way round, with room for sparse data
UNEQUAL_INPUT = 1e3  # widest to narrowest feature: a condition number of 1e6
LARGE_TARGET = 10.0  # rms, in units of what a freshly initialised network puts out (about 1)
SLOW_TARGET = 0.05  # share of the run in which the mean answer is a spread away from the mean target
UNLEARNT = 0.7  # of the constant answer's loss that is left
MOVED = 1e-4  # update/weight ratio a step: weights have moved by their size after 10,000 such steps


def unscaled_inputs(trace: Trace) -> Iterator[Finding]:
    """Inputs far from unit scale, or features of very different scale."""
    layers = running_layers(trace)
    if not layers or trace.layers[layers[0]].is_normalisation:
        return  # a normalisation at the input takes the scale out
    rms, widest, narrowest = (scalar(trace, f"input_{name}") for name in ("rms", "std_max", "std_min"))
    offset = scalar(trace, "input_offset")
    ratio = widest / narrowest if narrowest > 0 else 1.0
    if rms > LARGE_INPUT:
        what = f"Inputs have a root mean square of {rms:.3g}, expected about 1"
        what += f", and features differ {ratio:.3g} times in spread" if ratio > UNEQUAL_INPUT else ""
    elif 0 < widest < SMALL_INPUT and rms < SMALL_INPUT:
        what = f"Inputs hardly vary: the widest feature has a spread of {widest:.3g}, expected about 1"
    elif ratio > UNEQUAL_INPUT:
        what = f"Input features differ {ratio:.3g} times in spread ({narrowest:.3g} to {widest:.3g})"
    else:
        return
    learned = progress(trace)
    severity: Severity = "critical" if learned.is_poor else "warning"
    yield Finding(
        "unscaled-inputs",
        severity,
        f"{what}: the first layer's gradients scale with the inputs, so one learning rate cannot suit all weights.",
        "LeCun, Bottou, Orr & Mueller 1998, Efficient BackProp, section 4.3",
        layer=trace.layers[layers[0]].name,
        evidence={"input_rms": rms, "spread_ratio": ratio, "input_offset": offset, "remaining": learned.remaining},
        treatments=("standardise-inputs", "batch-norm"),
    )


def unscaled_targets(trace: Trace) -> Iterator[Finding]:
    """Regression targets so large that the output needs much of the run to get there."""
    if trace.facts.get("loss_kind") not in REGRESSION:
        return
    mean, spread = scalar(trace, "target_mean"), pooled_target_std(trace)
    rms = math.hypot(mean, spread)
    started = scalar(trace, "output_rms", slice(0, 3))
    if not rms > LARGE_TARGET or not spread > 0 or not (started < 0.1 * rms):
        return
    error = np.abs(trace.scalars["error_mean"])
    is_away = error > spread
    share = float(np.mean(is_away[np.isfinite(error)])) if np.isfinite(error).any() else 0.0
    learned = progress(trace)
    if share < SLOW_TARGET and not learned.is_poor:
        return
    yield Finding(
        "unscaled-targets",
        "critical" if share > 0.5 or learned.is_poor else "warning",
        f"Targets are around {mean:.3g} with a spread of {spread:.3g}, while the untrained network puts out "
        f"{started:.2g}: for {share:.0%} of the samples the mean answer was more than a spread off.",
        "LeCun 1998, Efficient BackProp, section 4.5; Kingma & Ba 2015, section 2.1 (a step moves a weight by "
        "about the learning rate)",
        share_of_run=share,
        evidence={"target_mean": mean, "target_std": spread, "output_rms_start": started, "share_away": share},
        treatments=("standardise-targets",),
    )


def constant_targets(trace: Trace) -> Iterator[Finding]:
    """Every target is the same."""
    spread, kind = trace.scalars["target_std"], trace.facts.get("loss_kind", "")
    known = spread[np.isfinite(spread)]
    lowest, highest = trace.scalars["target_min"], trace.scalars["target_max"]
    if not kind or len(known) < 5 or trace.facts.get("takeovers", 0) or scalar(trace, "batch") < 2:
        return
    if np.nanmax(highest) > np.nanmin(lowest):
        return
    if len({tuple(path) for path in map(_names, trace.loss_paths)}) != 1 or len(trace.loss_paths) > 1:
        return  # one term of several may well have a constant target
    yield Finding(
        "constant-targets",
        "critical",
        f"All targets seen are {float(np.nanmin(lowest)):.4g}: there is nothing to learn but this number.",
        "exact: smallest and largest target over all samples",
        evidence={"target": float(np.nanmin(lowest)), "samples": len(known)},
    )


def _names(path: tuple[object, ...]) -> Iterator[str]:
    return (getattr(op, "name", "") for op in path)


def unlearnable_labels(trace: Trace) -> Iterator[Finding]:
    """Everything flows, the weights move, and yet the loss stays near that of a constant answer."""
    learned = progress(trace)
    layers = trained_layers(trace)
    if not learned.is_judgeable or not learned.is_finite or trace.total_steps < 200 or not layers:
        return
    if not (UNLEARNT < learned.remaining < 1.3) or not math.isfinite(constant_answer_loss(trace)):
        return
    update = median_of(late(trace, "update_ratio")[layers])
    varies = scalar(trace, "output_unit_std", late_half(trace))
    spread = pooled_target_std(trace) if trace.facts.get("loss_kind") in REGRESSION else 1.0
    flow = np.nanmin(np.append(late(trace, "log2_flow")[layers], 0.0))
    if not update > MOVED or not varies > 0.05 * spread or flow < -13 or learned.noise > 0.8:
        return
    yield Finding(
        "unlearnable-labels",
        "warning",
        f"Gradients flow, weights move by {update:.1g} of their size a step and the outputs differ between inputs, "
        f"yet the loss is {learned.remaining:.0%} of what a constant answer gets: the targets look unrelated to "
        "the inputs. Check that both are shuffled together.",
        "Zhang et al. 2017 (random labels are fitted slowly and do not generalise); loss against the constant answer",
        evidence={"remaining": learned.remaining, "update_ratio": update, "output_unit_std": varies},
    )

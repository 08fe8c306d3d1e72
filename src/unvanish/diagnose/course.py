"""The course of loss and outputs: symptoms, reported where no cause explains them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..records import Finding, Trace
from .progress import HAMPERED, Progress, pooled_target_std, progress, targets_between_batches
from .reading import late_half, scalar

SAME_OUTPUT = 0.01  # spread over examples, relative to what the targets (or the outputs) spread
RESTLESS_NOISE = 1.0
DOUBLED = 1.0  # rise of the held-out loss over its minimum: worse than a run of half the length
UNMIXED = 0.5  # of the targets' variance lies between batches
MIXABLE = 8  # examples a batch: by chance an eighth of the variance lies between batches
STILL_FALLING = 0.1  # of the loss, from one tenth of the run to the last one


def constant_output(trace: Trace) -> Iterator[Finding]:
    """The network answers the same whatever it is asked."""
    learned = progress(trace)
    if not learned.has_failed or not scalar(trace, "batch") > 1:
        return
    spread = scalar(trace, "output_unit_std", late_half(trace))
    level = scalar(trace, "output_rms", late_half(trace))
    regression = trace.facts.get("loss_kind") in ("mse", "l1", "smooth-l1", "huber")
    target = pooled_target_std(trace) if regression else math.nan
    reference = target if target > 0 else max(level, 0.1)
    if not spread < SAME_OUTPUT * reference:
        return
    yield Finding(
        "constant-output",
        "critical",
        f"Outputs differ by {spread:.2g} between examples, at a level of {level:.2g}: the network ignores its input "
        f"and keeps {learned.remaining:.0%} of the baseline's loss.",
        "TheDeepChecker 2022 (unvarying outputs); spread over the examples of a batch",
        evidence={"output_unit_std": spread, "output_rms": level, "remaining": learned.remaining},
        treatments=("he-init", "batch-norm", "lower-lr"),
    )


def stagnation(trace: Trace) -> Iterator[Finding]:
    """The loss stays where it began."""
    learned = progress(trace)
    if not learned.has_failed or not learned.is_finite or learned.steps < 50:
        return
    if learned.best < 0.9 * learned.baseline:
        return
    yield Finding(
        "stagnation",
        "warning",
        f"After {learned.steps} steps the loss is {learned.end:.3g}, {learned.remaining:.0%} of what a constant "
        "answer gets.",
        "loss against the constant answer; TheDeepChecker 2022 (stagnation)",
        evidence={"loss_start": learned.start, "loss_end": learned.end, "remaining": learned.remaining},
        treatments=("raise-lr", "he-init", "batch-norm"),
    )


def oscillating_loss(trace: Trace) -> Iterator[Finding]:
    """The loss jumps up and down instead of settling."""
    learned = progress(trace)
    if not learned.is_judgeable or not learned.is_finite or learned.steps < 50:
        return
    between = targets_between_batches(trace)
    if between > UNMIXED and _is_one_classification(trace):
        yield from _unmixed(trace, learned, between)
        return
    if not learned.is_poor:
        return
    if learned.noise < RESTLESS_NOISE and not learned.end > 3 * learned.best > 0:
        return
    yield Finding(
        "oscillating-loss",
        "warning",
        f"The late loss varies by {learned.noise:.0%} around its trend and ends at {learned.end:.3g}, "
        f"{learned.end / max(learned.best, 1e-30):.3g} times its best level.",
        "AutoTrainer 2021 (oscillation), on the loss instead of the accuracy",
        evidence={"noise": learned.noise, "loss_best": learned.best, "loss_end": learned.end},
        treatments=("lower-lr", "warm-up"),
    )


def _is_one_classification(trace: Trace) -> bool:
    """Say whether a plain cross-entropy of batches of some size is all there is: series and games have an order."""
    return trace.facts.get("loss_kind") == "nll" and len(trace.loss_paths) == 1 and scalar(trace, "batch") >= MIXABLE


def _unmixed(trace: Trace, learned: Progress, between: float) -> Iterator[Finding]:
    """Each batch holds classes of its own: the loss falls within a class and jumps with the next."""
    late = float(np.mean(trace.losses[len(trace.losses) // 2 :])) / learned.baseline  # over all classes, not the last
    if late < HAMPERED:
        return
    batch = scalar(trace, "batch")
    yield Finding(
        "oscillating-loss",
        "critical" if learned.is_poor else "warning",
        f"The batches are not mixed: {between:.0%} of the variance of the targets lies between batches (mixed: "
        f"{1 / batch:.0%}). The network learns class after class and forgets those before; over all of them "
        f"{late:.0%} of the baseline's loss is left. Shuffle the training data.",
        "LeCun, Bottou, Orr & Mueller 1998, Efficient BackProp, section 4.2 (shuffling the examples)",
        evidence={"targets_between_batches": between, "batch": batch, "remaining_late": late},
    )


def slow_convergence(trace: Trace) -> Iterator[Finding]:
    """The run ends while the loss still falls and most of it is left."""
    learned = progress(trace)
    if not learned.is_judgeable or not learned.is_finite or learned.steps < 100:
        return
    if not (learned.is_poor and learned.is_falling and learned.late_fall > STILL_FALLING):
        return
    yield Finding(
        "slow-convergence",
        "warning",
        f"The run ends with {learned.remaining:.0%} of the baseline's loss left, still falling by "
        f"{learned.late_fall:.0%} from the last tenth but one to the last.",
        "AutoTrainer 2021 (slow convergence), on the loss instead of the accuracy",
        evidence={"remaining": learned.remaining, "late_fall": learned.late_fall},
        treatments=("raise-lr", "batch-norm"),
    )


def overfitting(trace: Trace) -> Iterator[Finding]:
    """The loss on held-out data rises while the training loss goes on falling."""
    points = [(event.step, event.details.get("loss")) for event in trace.events if event.kind == "validation-loss"]
    values = np.array([value for _, value in points if isinstance(value, (int, float)) and math.isfinite(value)])
    if len(values) < 4:
        return
    learned = progress(trace)
    best = int(np.argmin(values))
    rise = float(np.median(values[-3:]) / values[best] - 1) if values[best] > 0 else 0.0
    if rise < 0.2 or best > 0.7 * len(values) or not learned.end < 0.7 * float(values[-1]):
        return
    yield Finding(
        "overfitting",
        "warning" if rise > DOUBLED else "info",  # a shallow minimum passed is usual and mild
        f"The held-out loss was lowest, {values[best]:.3g}, at step {points[best][0]} and has risen by {rise:.0%} "
        f"since, while the training loss fell to {learned.end:.3g}.",
        "Prechelt 1998, criterion GL (generalisation loss)",
        step=points[best][0],
        evidence={"validation_rise": rise, "validation_best": float(values[best]), "loss_end": learned.end},
        treatments=("early-stopping", "dropout", "weight-decay"),
    )

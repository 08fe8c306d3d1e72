"""Has the run learned? The question that separates an illness from a harmless oddity.

No ratio of gradients is a detector by itself: a gradient is also tiny when everything is learnt. Each rule
therefore combines its own evidence with what is read here from the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..records import Op, Trace
from .reading import ignores_input

MIN_STEPS = 20  # below it nothing can be said about progress
FEW = 4  # batches whose means tell whether they are mixed: by chance half of the variance with p < 1e-6
HAMPERED = 0.1  # of the baseline left: learnt, but not well


@dataclass(frozen=True, slots=True)
class Progress:
    """What the loss did, in one place.

    ``baseline`` is the loss of the best constant answer where it can be told: ln K for the cross-entropy of K
    classes, the variance of the target for squared error. That needs a plain mean of one known term; a sum, a
    weight or a second term gives the loss another scale, and the loss at the start stands in. ``remaining`` is
    the end level as a share of the baseline: 1 = nothing learnt, 0 = loss zero; nan if losses are negative.
    """

    steps: int
    start: float
    best: float
    end: float
    baseline: float
    remaining: float
    has_floor: bool  # zero is within reach, so that half of the baseline is a poor result
    is_finite: bool
    is_judgeable: bool  # the loss measures success: known kind, one optimiser, enough steps
    is_blind: bool  # the outputs do not depend on the inputs, and no gradient can change that: whatever the loss says
    late_fall: float  # relative fall over the last fifth of the run
    noise: float  # spread of the late losses around their trend, relative to their level
    peak: float  # largest level after the start, relative to the baseline

    @property
    def is_falling(self) -> bool:
        """Say whether the late fall stands out of the noise: two standard errors of the medians' difference."""
        # of a fifth of the run, in two halves; the median's error is 1.25 that of the mean
        error = 1.25 * self.noise * math.sqrt(2 / max(self.steps / 10, 1))
        return self.late_fall > 0.02 and self.late_fall > 2 * error

    @property
    def has_failed(self) -> bool:
        """Say whether nothing, or next to nothing, was learnt."""
        return not self.is_finite or self.is_blind or (self.is_judgeable and self.remaining > 0.9)

    @property
    def is_poor(self) -> bool:
        """Say whether less than half of the baseline's loss was removed; of unknown losses, next to nothing."""
        limit = 0.5 if self.has_floor else 0.9
        return not self.is_finite or self.is_blind or (self.is_judgeable and self.remaining > limit)


def progress(trace: Trace) -> Progress:
    """Read the course of the loss of one trace."""
    losses = trace.losses
    finite = losses[np.isfinite(losses)]
    is_finite = len(finite) > 0 and len(finite) == len(losses)
    if not len(finite):
        nan = math.nan
        return Progress(trace.total_steps, nan, nan, nan, nan, nan, False, False, False, False, nan, nan, nan)
    levels = _levels(finite)
    start = float(np.median(finite[: max(3, min(10, len(finite) // 20))]))
    end, best = float(levels[-1]), float(levels.min())
    constant = terms_of_one_mean(trace) * constant_answer_loss(trace)
    has_floor = constant > 0 and not _has_soft_targets(trace)
    baseline = constant if constant > 0 and start > 0.3 * constant else start
    known = baseline > 0 and finite.min() >= -1e-6 * abs(start)
    is_alone = trace.facts.get("takeovers", 0) < 0.2 * max(trace.total_steps, 1)
    tail = finite[-max(len(finite) // 5, 4) :]
    halves = np.array_split(tail, 2)
    middle = [float(np.median(half if len(half) else tail)) for half in halves]
    return Progress(
        steps=trace.total_steps,
        start=start,
        best=best,
        end=end,
        baseline=baseline,
        remaining=end / baseline if known else math.nan,
        has_floor=has_floor,
        is_finite=is_finite,
        is_judgeable=bool(known and is_alone and trace.total_steps >= MIN_STEPS),
        is_blind=end != 0 and trace.total_steps >= MIN_STEPS and ignores_input(trace),
        late_fall=(middle[0] - middle[1]) / abs(middle[0]) if middle[0] else 0.0,
        noise=float(
            np.std(tail - np.linspace(middle[0], middle[1], len(tail))) / (abs(float(np.median(tail))) + 1e-30)
        ),
        peak=float(levels.max() / baseline) if baseline > 0 else math.nan,
    )


def _levels(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the median loss of up to 20 windows over the run."""
    windows = np.array_split(losses, min(20, max(len(losses) // 5, 1)))
    return np.array([np.median(window) for window in windows])


def _has_soft_targets(trace: Trace) -> bool:
    """Say whether binary targets lie between 0 and 1: their cross-entropy cannot reach zero."""
    if not str(trace.facts.get("loss_kind", "")).startswith("bce"):
        return False
    mean, std = _median(trace.scalars["target_mean"]), _median(trace.scalars["target_std"])
    return std**2 < 0.9 * mean * (1 - mean)


_FUSED = frozenset(("MseLoss", "NllLoss", "NllLoss2D", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits"))
_MEAN_REDUCTION = 1  # torch's number for reduction="mean"


def terms_of_one_mean(trace: Trace) -> float:
    """Return of how many means over examples, each of one known term, the loss is the sum; nan if of others.

    1 for an ordinary loss, the number of replicas for the sum of theirs.
    """
    paths = [path for path in trace.loss_paths if path]
    replicas = max((layer.replicas for layer in trace.layers), default=0)
    factor = 1.0
    if replicas and all(len(path) > 2 and path[1].name == "Stack" for path in paths):
        reductions = {path[0].name for path in paths}
        factor = float(replicas) if reductions == {"Sum"} else 1.0 if reductions == {"Mean"} else math.nan
        paths = [path[2:] for path in paths]
    if len({tuple(op.name for op in path[:2]) for path in paths}) != 1:
        return math.nan
    return factor if _is_plain_mean(paths[0]) else math.nan


def _is_plain_mean(path: tuple[Op, ...]) -> bool:
    """Say whether the loss is the mean over examples of one known term."""
    if path[0].name in _FUSED:
        return bool(path[0].details.get("reduction", _MEAN_REDUCTION) == _MEAN_REDUCTION)
    return len(path) > 1 and path[0].name == "Mean" and path[1].name in ("Pow", "Mul", "BinaryCrossEntropy")


def constant_answer_loss(trace: Trace) -> float:
    """Return the mean loss of the best answer that ignores the input; nan if unknown."""
    kind = trace.facts.get("loss_kind", "")
    if kind == "nll":
        classes = class_count(trace)
        return math.log(classes) if classes > 1 else math.nan
    if kind in ("bce", "bce-with-logits"):
        return math.log(2.0)
    std = _median(trace.scalars["target_std"])
    if kind == "mse" and std > 0:
        return pooled_target_std(trace) ** 2
    return math.nan


def class_count(trace: Trace) -> int:
    """Return over how many classes the loss normalises; 0 if it does not."""
    for path in trace.loss_paths:
        for op in path:
            if op.name in ("LogSoftmax", "Softmax") and op.shape:
                return op.shape[int(op.details.get("dim", -1))]
    return 0


def pooled_target_std(trace: Trace) -> float:
    """Return the spread of the targets over all samples, not only within one batch."""
    mean, std = trace.scalars["target_mean"], trace.scalars["target_std"]
    known = np.isfinite(mean) & np.isfinite(std)
    if not known.any():
        return math.nan
    square = np.mean(std[known] ** 2 + mean[known] ** 2) - np.mean(mean[known]) ** 2
    return math.sqrt(max(float(square), 0.0))


def targets_between_batches(trace: Trace) -> float:
    """Return the share of the targets' variance that lies between batches; 1/n for mixed batches of n.

    Of the second half of the steps, because two phases of training, each mixed, are not an order of the data. But
    if the batches there hold one class each, of all: where an epoch is as long as the distance of the samples, they
    show the same class again and again.
    """
    mean, std = trace.scalars["target_mean"], trace.scalars["target_std"]
    known = np.isfinite(mean) & np.isfinite(std)
    is_late = known & (trace.steps >= trace.total_steps / 2)
    part = known if _median(std[is_late]) == 0 else is_late
    if part.sum() < FEW:
        return math.nan
    between, within = float(np.var(mean[part])), float(np.mean(std[part] ** 2))
    return between / (between + within) if between + within > 0 else math.nan


def _median(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else math.nan

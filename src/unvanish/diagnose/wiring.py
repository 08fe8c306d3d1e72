"""Faults in how the parts are connected: exact facts, so they come before anything statistical."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from ..records import Finding, Layer, Op, Severity, Trace
from .loss_graph import REGRESSION, range_of_output
from .progress import Progress, class_count, pooled_target_std, progress
from .reading import always, is_stepping_in_place, median_of, names, running_layers, scalar, trained_layers

UNCLEARED_SHARE = 0.5  # deliberate accumulation clears after each step; half the steps is no accident
SMALL_NORM = 4  # sqrt(2 / (n - 1)) = 0.8: the variance estimate is off by its own size
SHAKY_NORM = 8
OUT_OF_RANGE = 0.5  # of the targets' spread: a quarter of the variance is then out of reach


def missing_zero_grad(trace: Trace) -> Iterator[Finding]:
    """Gradients of earlier steps were still there when the next backward pass added to them."""
    uncleared = int(trace.facts.get("uncleared_steps", 0))
    checked = int(trace.facts.get("checked_steps", trace.total_steps - 1))
    share = uncleared / max(checked, 1)
    if trace.total_steps < 4 or share < UNCLEARED_SHARE:
        return
    learned = progress(trace)
    yield Finding(
        "missing-zero-grad",
        "critical" if not learned.is_judgeable or learned.remaining > 0.1 or not learned.is_finite else "warning",
        f"{uncleared} of {checked} steps that were checked used a gradient that still held those of the steps "
        "before: it is the sum of all batches so far, and old directions never leave it.",
        "PyTorch documentation, Optimizer.zero_grad; exact: gradients were the same tensors, unwritten",
        share_of_run=share,
        step=1,
        evidence={"uncleared_steps": uncleared, "uncleared_share": share},
        treatments=("zero-grad",),
    )


def frozen_parameters(trace: Trace) -> Iterator[Finding]:
    """Layers that run, still as initialisation left them, and that nothing trains."""
    unowned = [layer for layer in trace.layers if _is_forgotten(layer) and layer.is_trainable]
    frozen = [layer for layer in trace.layers if _is_forgotten(layer) and not layer.is_trainable]
    if unowned:
        hidden = [layer for layer in unowned if not layer.is_registered]
        reason = (
            "They sit in a plain Python list or dict, so parameters() does not list them."
            if hidden
            else "Their parameters require gradients, but no optimiser holds them."
        )
        yield _frozen(trace, unowned, "critical", reason, ("add-to-optimizer",))
    if frozen:
        learned = progress(trace)
        severity: Severity = "critical" if learned.is_poor else "warning"
        reason = "requires_grad is off for weights that were never learnt: they are still random."
        yield _frozen(trace, frozen, severity, reason, ("unfreeze",))
    if is_stepping_in_place(trace):
        yield Finding(
            "frozen-parameters",
            "critical",
            "The optimiser steps, but no weight changes although each layer got a gradient: the gradients are cleared "
            "between backward() and step(), or lie elsewhere than the optimiser looks.",
            "exact: gradients after backward(), weights before and after step()",
            layers=names(trace, trained_layers(trace)),
            evidence={
                "lr": median_of(trace.scalars["lr"]),
                "grad_rms": median_of(trace.measures["grad_rms"][:, trained_layers(trace)].astype(np.float64)),
            },
            treatments=("zero-grad",),
        )
        return
    stuck = _stuck(trace)
    if stuck and not unowned and not frozen:
        reason = "The optimiser holds them, but no gradient ever reaches them: something detaches the graph."
        yield _frozen(trace, stuck, "critical" if progress(trace).is_poor else "warning", reason, ())


def _is_forgotten(layer: Layer) -> bool:
    untrained = not layer.is_optimised or not layer.is_trainable
    is_hidden_away = layer.is_trainable and not layer.is_registered  # no parameters() call can find it
    is_forgotten = layer.is_fresh or is_hidden_away
    return layer.position >= 0 and untrained and not layer.is_optimised_elsewhere and is_forgotten


def _stuck(trace: Trace) -> list[Layer]:
    """Return layers that ran and are owned, of which no gradient was ever seen while others had one."""
    grads = trace.measures["grad_rms"]
    weights = trace.measures["weight_rms"]  # only of layers that own what they use: tied weights have one owner
    places = [place for place in trained_layers(trace) if np.isfinite(weights[:, place]).any()]
    seen = {place for place in places if np.isfinite(grads[:, place]).any() or np.isinf(grads[:, place]).any()}
    if not seen or len(trace.steps) < 5:
        return []
    return [trace.layers[place] for place in places if place not in seen]


def _frozen(trace: Trace, layers: list[Layer], severity: Severity, reason: str, treatments: tuple[str, ...]) -> Finding:
    total = sum(layer.parameters for layer in trace.layers if layer.position >= 0)
    share = sum(layer.parameters for layer in layers) / max(total, 1)
    return Finding(
        "frozen-parameters",
        severity,
        f"{len(layers)} layer{'s' if len(layers) > 1 else ''} with {share:.0%} of the parameters run but never "
        f"change. {reason}",
        "exact: parameters of the optimisers; the untouched initialisation is recognised by its distribution",
        layer=layers[0].name,
        layers=tuple(layer.name for layer in layers),
        evidence={"parameter_share": share, "layers": len(layers)},
        treatments=treatments,
    )


def batch_norm_small_batch(trace: Trace) -> Iterator[Finding]:
    """Batch normalisation that takes its statistics from a handful of values."""
    small = [layer for layer in trace.layers if 0 < layer.norm_values <= SHAKY_NORM and layer.position >= 0]
    if not small:
        return
    values = min(layer.norm_values for layer in small)
    error = math.sqrt(2 / max(values - 1, 1))
    yield Finding(
        "batch-norm-small-batch",
        "critical" if values <= SMALL_NORM else "warning",
        f"Batch normalisation averages over {values} values a channel: its variance is wrong by "
        f"{error:.0%} from batch to batch, and training and prediction see different networks.",
        "Wu & He 2018, figure 1; standard error of a variance, sqrt(2 / (n - 1))",
        layer=small[0].name,
        layers=tuple(layer.name for layer in small),
        evidence={"values_per_channel": values, "variance_error": error},
        treatments=("layer-norm",),
    )


def broadcast_loss(trace: Trace) -> Iterator[Finding]:
    """Prediction and target of different shape: every prediction is compared with every target."""
    for path in trace.loss_paths:
        for above, below in pairwise(path):
            batch = _broadcast_batch(above, below)
            if not batch:
                continue
            yield Finding(
                "broadcast-loss",
                "critical",
                f"The loss compares a prediction of shape {below.shape} with targets that broadcast it to "
                f"{above.shape}: every prediction is pulled to every target, so the best answer is their mean.",
                "exact: shapes in the graph of the loss; NumPy broadcasting rules",
                layer=path[-1].layer,
                evidence={"prediction_entries": math.prod(below.shape), "compared_entries": math.prod(above.shape)},
                treatments=("match-target-shape",),
            )
            return


_PAIRWISE_OPS = frozenset(("Sub", "Rsub", "Add", "Mul", "Div", "Maximum", "Minimum", "Expand"))


def _broadcast_batch(above: Op, below: Op) -> int:
    """Return the batch size if ``above`` blew a column or row of predictions up to a square; else 0."""
    if above.name not in _PAIRWISE_OPS or len(above.shape) < 2:
        return 0
    if above.name != "Expand" and not above.details.get("constant_inputs"):
        return 0  # both sides come from the network: meant to be all pairs
    batch = above.shape[-1]
    is_square = batch > 1 and above.shape[-2] == batch
    was_line = below.shape in ((batch, 1), (batch,), (1, batch))
    return batch if is_square and was_line and math.prod(above.shape) == batch * batch else 0


def gradient_ascent(trace: Trace) -> Iterator[Finding]:
    """The updates make the loss worse: it is maximised, or its sign is flipped."""
    learned = progress(trace)
    if trace.facts.get("takeovers", 0) > 0.2 * trace.total_steps or trace.total_steps < 5:
        return  # two players may well pull in opposite directions
    alignment = median_of(_best_alignment(trace))
    flipped = any(_is_flipped(path) for path in trace.loss_paths)
    maximised = bool(trace.facts.get("maximize", False))
    falls_for_ever = learned.end < 0 and learned.end < learned.start - 10 * (abs(learned.start) + 1e-12)
    rises = learned.end > 1.5 * abs(learned.start) and alignment < -0.3
    if not ((flipped and learned.end < 0) or (maximised and learned.end >= learned.start) or rises or falls_for_ever):
        return
    if falls_for_ever and not flipped and any(op.name == "NllLoss" for path in trace.loss_paths for op in path):
        return  # a likelihood of raw scores has no floor either: output-loss-mismatch says so
    cause = "The optimiser maximises." if maximised else "The loss is the negative of an error." if flipped else ""
    yield Finding(
        "gradient-ascent",
        "critical",
        f"{cause or 'The error grows without bound.'} The loss went from {learned.start:.3g} to {learned.end:.3g}: "
        "training drives the network away from its targets.",
        "exact: sign in the graph of the loss or of the optimiser; Cauchy 1847 (descent needs -gradient)",
        evidence={"loss_start": learned.start, "loss_end": learned.end, "alignment": alignment},
        treatments=("descend",),
    )


def _best_alignment(trace: Trace) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    values = trace.measures["alignment"][:, trained_layers(trace)]
    return np.asarray(values, dtype=np.float64).ravel()


_NON_NEGATIVE = frozenset(
    "MseLoss L1Loss SmoothL1Loss HuberLoss NllLoss NllLoss2D BinaryCrossEntropy BinaryCrossEntropyWithLogits "
    "Pow Abs LinalgVectorNorm Norm".split()
)


def _is_flipped(path: tuple[Op, ...]) -> bool:
    """Say whether a loss that cannot be negative is negated on its way to `backward`."""
    flips = 0
    for op in path:
        if op.name == "Neg":
            flips += 1
        elif op.name in _NON_NEGATIVE:
            return flips % 2 == 1
        elif op.name not in ("Mean", "Sum", "Mul", "Div"):
            return False
    return False


def output_loss_mismatch(trace: Trace) -> Iterator[Finding]:
    """What the network puts out is not what the loss expects."""
    learned = progress(trace)
    for path in trace.loss_paths:
        found = _mismatch(path, trace, learned)
        if found is not None:
            why, severity, evidence, layer = found
            yield Finding(
                "output-loss-mismatch",
                severity,
                why,
                "exact: operations in the graph of the loss; PyTorch documentation of the loss",
                layer=layer or path[-1].layer,
                layers=tuple(dict.fromkeys(name for name in (layer, path[-1].layer) if name)),
                evidence={**evidence, "remaining": learned.remaining},
                treatments=("logits-loss",) if "logits" in why else (),
            )
            return


_Mismatch = tuple[str, Severity, dict[str, float], str]


def _mismatch(path: tuple[Op, ...], trace: Trace, learned: Progress) -> _Mismatch | None:
    from .loss_graph import below, find, raw_log

    classes = class_count(trace)
    poor: Severity = "critical" if learned.is_poor or not learned.is_judgeable else "warning"
    for place, op in enumerate(path):
        under = below(path, place)
        if op.name == "LogSoftmax" and under is not None and under.name in ("Softmax", "Sigmoid", "Tanh"):
            floor = _squashed_floor(classes, under.name)
            why = (
                f"Cross-entropy takes logits, but gets the output of {under.name.lower()}: squashed twice, the loss "
                f"cannot go below {floor:.3g} for {classes} classes and its gradient stays small."
            )
            severity: Severity = "critical" if floor > 0.1 else "warning"
            return why, severity, {"loss_floor": floor, "classes": classes}, under.layer
        if op.name == "BinaryCrossEntropyWithLogits" and under is not None and under.name in ("Sigmoid", "Softmax"):
            why = (
                f"The with-logits loss applies the sigmoid itself, but gets the output of {under.name.lower()}: "
                "predicted probabilities stay between 0.5 and 0.73."
            )
            return why, "critical", {"loss_floor": math.log1p(math.exp(-1.0))}, under.layer
        if op.name in ("Softmax", "LogSoftmax") and op.shape:
            dim = int(op.details.get("dim", -1)) % len(op.shape)
            if op.shape[dim] == 1:
                why = f"{op.name} runs over a single output: its result is constant, whatever the network says."
                return why, "critical", {"classes": 1}, op.layer
            if dim == 0 and len(op.shape) == 2:
                why = f"{op.name} normalises over dimension 0, the batch, not over the {op.shape[1]} classes."
                return why, "critical", {"classes": op.shape[1], "dim": 0}, op.layer
        if op.name in ("NllLoss", "NllLoss2D") and not find(path[place:], ("LogSoftmax", "Log", "LogSigmoid")):
            why = (
                "NLLLoss takes log-probabilities, but gets raw outputs: the loss falls without bound by scaling "
                "the outputs, not by learning. Put log_softmax before it or use cross-entropy on the logits."
            )
            return why, "critical", {}, path[-1].layer
        if op.name == "KlDiv" and under is not None and under.name in ("Softmax", "Sigmoid"):
            why = "KLDivLoss takes log-probabilities, but gets probabilities."
            return why, poor, {}, under.layer
        if raw_log(path, place):
            why = (
                "The loss takes the logarithm of a raw output that nothing keeps positive: where it leaves the "
                "clamp, or reaches 0, there is no gradient. For regression use mse; for classes use logits."
            )
            return why, "critical", {}, op.layer
    return _out_of_range(path, trace, poor)


def _squashed_floor(classes: int, squash: str) -> float:
    """Return the least cross-entropy of logits confined to [0, 1] (tanh: [-1, 1])."""
    width = 2.0 if squash == "Tanh" else 1.0
    return math.log(1 + max(classes - 1, 1) * math.exp(-width))


def _out_of_range(path: tuple[Op, ...], trace: Trace, severity: Severity) -> _Mismatch | None:
    """The last activation cannot reach the targets."""
    if trace.facts.get("loss_kind") not in REGRESSION:
        return None
    bounds = range_of_output(path)
    spread = pooled_target_std(trace)
    low, high = scalar_extremes(trace)
    if bounds is None or not spread > 0:
        return None
    beyond = max(bounds[0] - low, high - bounds[1]) / spread
    if not beyond > OUT_OF_RANGE:
        return None
    name, layer = bounds[2], bounds[3]
    why = (
        f"The output passes {name.lower()}, which gives values from {bounds[0]:g} to {bounds[1]:g}, but the targets "
        f"run from {low:.3g} to {high:.3g}: part of them can never be reached."
    )
    return why, severity, {"target_min": low, "target_max": high, "beyond_in_std": beyond}, layer


def scalar_extremes(trace: Trace) -> tuple[float, float]:
    """Return a typical smallest and largest target of a batch."""
    return scalar(trace, "target_min"), scalar(trace, "target_max")


def symmetric_units(trace: Trace) -> Iterator[Finding]:
    """All units of a hidden layer are copies of each other, and stay so."""
    layers = [
        place
        for place in trained_layers(trace)
        if trace.layers[place].is_symmetric and trace.layers[place].path_depth > 0
    ]
    if layers and not progress(trace).is_poor:
        layers = [place for place in layers if not _is_idle(trace, place)]
    if not layers:
        return
    yield Finding(
        "poor-initialisation",
        "critical",
        f"All units of {len(layers)} hidden layer{'s' if len(layers) > 1 else ''} started with the same weights and "
        "still have the same: they get the same gradient, so each layer works as a single unit.",
        "Goodfellow, Bengio & Courville 2016, section 8.4: initialisation must break symmetry",
        layer=trace.layers[layers[0]].name,
        layers=names(trace, layers),
        evidence={"layers": len(layers), "units": trace.layers[layers[0]].units},
        treatments=("he-init", "xavier-init"),
    )


def _is_idle(trace: Trace, place: int) -> bool:
    """Say whether a layer had no part in the run: no gradient ever came, or nothing but zeros from the layer before."""
    before = [p for p in running_layers(trace) if trace.layers[p].position < trace.layers[place].position]
    grads, dead = trace.measures["grad_rms"][:, [place]], trace.measures["dead_share"][:, before[-1:]]
    return bool(always(grads, grads == 0).all() or (before and always(dead, dead == 1).all()))

"""How rules read a trace: medians over parts of the run, and which layers count."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ..records import Layer, Op, Trace

START_SAMPLES = 3
SHOWS = 1e-6  # of a weight; rounding in float32 hides steps of less than 6e-8
EQUAL = 1e-6  # spread over the examples, of the level: 32 equal float32 numbers have one of about 1e-7 by rounding
SILENT = -24.0  # log2 of the precision of float32: the share of the output's gradient that a layer gets


def at_start(trace: Trace, measure: str) -> NDArray[np.float64]:
    """Return each layer's median over the first samples: the state that initialisation left. (L,)."""
    return _median(trace.measures[measure][:START_SAMPLES])


def late(trace: Trace, measure: str) -> NDArray[np.float64]:
    """Return each layer's median over the second half of the samples. (L,)."""
    values = trace.measures[measure]
    return _median(values[len(values) // 2 :])


def throughout(trace: Trace, measure: str) -> NDArray[np.float64]:
    """Return each layer's median over all samples. (L,)."""
    return _median(trace.measures[measure])


def column(trace: Trace, measure: str, place: int) -> NDArray[np.float64]:
    """Return the course of one layer's measure. (T,)."""
    values: NDArray[np.float64] = trace.measures[measure][:, place].astype(np.float64)
    return values


def scalar(trace: Trace, name: str, part: slice = slice(None)) -> float:
    """Return the median of a scalar over a part of the samples; nan if never seen."""
    values = trace.scalars[name][part]
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


def late_half(trace: Trace) -> slice:
    """Return the second half of the samples."""
    return slice(len(trace.steps) // 2, None)


def trained_layers(trace: Trace, *, with_norms: bool = False) -> list[int]:
    """Return the places of the layers that ran and that this optimiser trains, input first."""
    places = [
        place
        for place, layer in enumerate(trace.layers)
        if layer.position >= 0
        and layer.is_optimised
        and layer.is_trainable
        and (with_norms or not layer.is_normalisation)
    ]
    return sorted(places, key=lambda place: trace.layers[place].position)


def running_layers(trace: Trace) -> list[int]:
    """Return the places of all layers that ran, input first."""
    places = [place for place, layer in enumerate(trace.layers) if layer.position >= 0]
    return sorted(places, key=lambda place: trace.layers[place].position)


def first_step(trace: Trace, condition: NDArray[np.bool_]) -> int:
    """Return the first sampled step at which a condition holds; 0 if never."""
    hits = np.flatnonzero(condition)
    return int(trace.steps[hits[0]]) if len(hits) else 0


def share_of_run(condition: NDArray[np.bool_], values: NDArray[np.float64]) -> float:
    """Return the share of the samples at which a condition on a layer's values holds, of those that saw them."""
    seen = ~np.isnan(values)
    return float(np.mean(condition[seen])) if seen.any() else 0.0


def always(values: NDArray[np.float32], condition: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Say of each layer whether a condition on its values holds at every sample that saw them, and at one at least."""
    seen = ~np.isnan(values)
    return np.asarray(seen.any(axis=0) & (condition | ~seen).all(axis=0))


def names(trace: Trace, places: Iterable[int]) -> tuple[str, ...]:
    """Return the names of layers."""
    return tuple(trace.layers[place].name for place in places)


def is_hidden(layer: Layer) -> bool:
    """Say whether another layer stands between this one and the loss."""
    return layer.path_depth > 0


def paths(trace: Trace) -> Iterable[tuple[Op, ...]]:
    """Return the ways from the loss to the network."""
    return trace.loss_paths


def _median(values: NDArray[np.float32]) -> NDArray[np.float64]:
    if not len(values):
        return np.full(values.shape[1:], np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all-nan columns stay nan
        return np.nanmedian(values.astype(np.float64), axis=0)


def median_of(values: NDArray[np.float64]) -> float:
    """Return the median of what is finite; nan if nothing is."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def is_stepping_in_place(trace: Trace) -> bool:
    """Say whether steps that are large enough to show in float32 change nothing at all."""
    trained, lr = trained_layers(trace), median_of(trace.scalars["lr"])
    updates, gradients, weights = (
        trace.measures[name][:, trained].astype(np.float64) for name in ("update_ratio", "grad_rms", "weight_rms")
    )
    if len(trace.steps) < 5 or not np.isfinite(updates).any() or np.nanmax(updates) > 0:
        return False
    with np.errstate(all="ignore"):
        return median_of(lr * gradients / weights) > SHOWS


def ignores_input(trace: Trace) -> bool:
    """Say whether nothing of the input reaches the output, and no gradient comes back, in the whole second half.

    Inputs that differ go in, outputs that are the same come out, and each trained layer that still tells examples
    apart gets no gradient. Such a network fits a constant at most: no loss, of whatever scale, makes that learning.
    Each of the three alone is harmless: a head of constant answers, equal inputs, a gradient of zero after a fit.
    """
    half = late_half(trace)
    spread, level = (trace.measures[name][half] for name in ("unit_std", "activation_rms"))
    seen = np.isfinite(spread)
    is_same = (seen.sum(axis=0) >= START_SAMPLES) & always(spread, (spread <= EQUAL * level) & (level < np.inf))
    telling = [place for place in trained_layers(trace, with_norms=True) if not is_same[place]]
    if not seen[:, telling].any() or not _gives_one_answer(trace, half, is_same):
        return False
    grads, flow = (trace.measures[name][half][:, telling] for name in ("grad_rms", "log2_flow"))
    return bool(np.all(always(grads, grads == 0) | always(flow, flow < SILENT)))


def _gives_one_answer(trace: Trace, half: slice, is_same: NDArray[np.bool_]) -> bool:
    """Say whether the output of the model, or that of each layer next to the loss, is one for all examples."""
    spread, level = trace.scalars["output_unit_std"][half], trace.scalars["output_rms"][half]
    seen = np.isfinite(spread)
    if np.any(trace.scalars["batch"][half][seen] <= 1):
        return False  # one example is all examples
    last = [place for place in running_layers(trace) if not is_hidden(trace.layers[place])]
    is_one = seen.sum() >= START_SAMPLES and bool(np.all(spread[seen] <= EQUAL * level[seen]))
    return is_one or (bool(last) and bool(is_same[last].all()))

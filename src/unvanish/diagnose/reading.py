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

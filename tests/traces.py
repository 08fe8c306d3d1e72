"""Traces made by hand: a healthy run, and what is changed about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from unvanish.records import MEASURES, SCALARS, Event, Layer, Op, Trace

HEALTHY_MEASURES = {
    "grad_rms": 1e-2,
    "grad_zero_share": 0.0,
    "weight_rms": 0.1,
    "update_ratio": 1e-3,
    "alignment": 0.5,
    "log2_gain": 0.0,
    "log2_flow": 0.0,
    "delta_norm": 1.0,
    "activation_mean": 0.1,
    "activation_std": 1.0,
    "activation_rms": 1.0,
    "unit_std": 1.0,
    "dead_share": 0.1,
    "zero_share": 0.5,
    "saturated_share": 0.0,
    "nonfinite": 0.0,
}
HEALTHY_SCALARS = {
    "lr": 1e-3,
    "batch": 32.0,
    "input_rms": 1.0,
    "input_std_max": 1.2,
    "input_std_min": 0.8,
    "input_offset": 0.5,
    "output_mean": 0.0,
    "output_std": 1.0,
    "output_rms": 1.0,
    "output_unit_std": 1.0,
    "target_mean": 0.0,
    "target_std": 1.0,
    "target_min": -2.0,
    "target_max": 2.0,
    "error_mean": 0.01,
}
MSE_PATH = (Op("MseLoss"), Op("Addmm", (32, 1), "out"))
CROSS_ENTROPY_PATH = (Op("NllLoss"), Op("LogSoftmax", (32, 10), "", {"dim": 1}), Op("Addmm", (32, 10), "out"))


def layers(activation: str = "relu", names: tuple[str, ...] = ("first", "middle", "out")) -> tuple[Layer, ...]:
    """Return a chain of linear layers, each but the last followed by an activation."""
    last = len(names) - 1
    return tuple(
        Layer(name, "Linear", 100, place, "" if place == last else activation, 10, 10, path_depth=last - place)
        for place, name in enumerate(names)
    )


def make_trace(
    losses: Any = None,
    *,
    steps: int = 400,
    samples: int = 40,
    chain: tuple[Layer, ...] | None = None,
    measures: Mapping[str, Any] | None = None,
    scalars: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    loss_paths: tuple[tuple[Op, ...], ...] = (MSE_PATH,),
    events: tuple[Event, ...] = (),
) -> Trace:
    """Return the trace of a healthy regression, with what is given put in its place.

    Measures are broadcast to (samples, layers), scalars to (samples,).
    """
    chain = layers() if chain is None else chain
    if losses is None:
        losses = np.geomspace(1.0, 0.01, steps)
    losses = np.broadcast_to(np.asarray(losses, dtype=float), (steps,)).copy()
    shape = (samples, len(chain))
    named = {**HEALTHY_MEASURES, **(measures or {})}
    single = dict.fromkeys(SCALARS, np.nan) | HEALTHY_SCALARS | dict(scalars or {})
    return Trace(
        name="SGD",
        layers=chain,
        steps=np.linspace(0, steps - 1, samples).astype(np.int64),
        measures={name: np.broadcast_to(np.asarray(named[name], np.float32), shape).copy() for name in MEASURES},
        scalars={name: np.broadcast_to(np.asarray(single[name], float), (samples,)).copy() for name in SCALARS},
        loss_steps=np.arange(steps),
        losses=losses,
        loss_paths=loss_paths,
        events=events,
        total_steps=steps,
        facts={"loss_kind": "mse", "lr": 1e-3, **(facts or {})},
    )


def with_layer(chain: tuple[Layer, ...], place: int, **facts: Any) -> tuple[Layer, ...]:
    """Return the chain with some facts of one layer changed."""
    return tuple(replace(layer, **facts) if i == place else layer for i, layer in enumerate(chain))

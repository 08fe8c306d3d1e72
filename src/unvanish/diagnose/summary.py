"""One line a layer: what the report's table and the JSON document show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..records import SEVERITIES, Finding, Recording, Trace
from .reading import late, median_of, running_layers

_SHOWN = (
    "grad_rms",
    "update_ratio",
    "dead_share",
    "saturated_share",
    "log2_flow",
    "log2_gain",
    "weight_rms",
    "activation_rms",
    "activation_mean",
    "activation_std",
)


def layer_rows(recording: Recording, findings: Iterable[Finding]) -> tuple[Mapping[str, Any], ...]:
    """Return one row a layer, from input to output, as medians over the second half of the run.

    A layer is shown from the trace of the optimiser that trains it.
    """
    rows: dict[str, dict[str, Any]] = {}
    for trace in sorted(recording.traces, key=lambda trace: -len(trace.steps)):
        for name, row in _rows_of(trace).items():
            if name not in rows or (row["is_optimised"] and not rows[name]["is_optimised"]):
                rows[name] = row
    worst = {name: f.severity for f in sorted(findings, key=_mildness) for name in (*f.layers, f.layer) if name}
    for name, row in rows.items():
        row["severity"] = worst.get(name, "")
    ordered = sorted(rows.values(), key=lambda row: row.pop("position"))
    return tuple(ordered)


def _mildness(finding: Finding) -> int:
    return -SEVERITIES.index(finding.severity)


def _rows_of(trace: Trace) -> dict[str, dict[str, Any]]:
    values = {name: late(trace, name) for name in _SHOWN}
    rows = {}
    for place in running_layers(trace):
        layer = trace.layers[place]
        rows[layer.name] = {
            "name": layer.name,
            "kind": layer.kind,
            "activation": layer.activation,
            "parameters": layer.parameters,
            "position": layer.position,
            "is_trainable": layer.is_trainable,
            "is_optimised": layer.is_optimised,
            **{name: float(column[place]) for name, column in values.items()},
        }
    for name, speeds in _speeds_of(trace).items():
        if name in rows:
            rows[name]["learning_speed"] = speeds
    return rows


def _speeds_of(trace: Trace) -> dict[str, dict[str, float]]:
    """Return how fast layers of coupled replicas learn, as medians over the second half of the pulls."""
    if trace.speeds is None:
        return {}
    half = len(trace.speeds.steps) // 2
    return {
        name: {
            measure: median_of(np.asarray(values[half:, place], dtype=np.float64))
            for measure, values in trace.speeds.values.items()
        }
        for place, name in enumerate(trace.speeds.layers)
    }


def notes(recording: Recording) -> tuple[str, ...]:
    """Say what the layers of stacked replicas show."""
    counts = [max((layer.replicas for layer in trace.layers), default=0) for trace in recording.traces]
    return tuple(
        dict.fromkeys(
            f"{count} replicas: gradients, weights and updates are those of all together; "
            "activations and the flow of the gradient are those of one."
            for count in counts
            if count
        )
    )

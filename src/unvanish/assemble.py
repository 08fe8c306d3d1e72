"""From the numbers of one sample to the measures of its layers: plain arithmetic on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .measures import BLOCK_COLUMNS, ROW, ROW_COLUMNS
from .records import MEASURES, SCALARS
from .staging import Fetched, ParameterRow

_M = {name: i for i, name in enumerate(MEASURES)}
_R = {name: i for i, name in enumerate(ROW_COLUMNS)}
_B = {name: i for i, name in enumerate(BLOCK_COLUMNS)}
_S = {name: i for i, name in enumerate(SCALARS)}


def layer_measures(
    fetched: Fetched,
    rows: Sequence[ParameterRow],
    block_rows: Mapping[tuple[int, str], int],
    order: Sequence[int],
    layers: int,
) -> NDArray[np.float32]:
    """Return the (layers, measures) block of one sample.

    Args:
        fetched: The sample's numbers.
        rows: What each parameter row is; a layer's figures pool its parameters.
        block_rows: (layer, "output" or "activation") -> block row.
        order: Numbers of the layers in the order of their calls, input first.
        layers: How many layers there are.
    """
    out = np.full((layers, len(MEASURES)), np.nan)
    _put_parameters(out, fetched, rows)
    for (layer, what), row in block_rows.items():
        if 0 <= layer < layers and row < len(fetched.blocks):
            _put_block(out[layer], what, fetched.blocks[row])
    _put_flow(out, fetched.deltas, order)
    return out.astype(np.float32)


def _put_parameters(out: NDArray[np.float64], fetched: Fetched, rows: Sequence[ParameterRow]) -> None:
    count = len(fetched.rows)
    if not count:
        return
    owner = np.array([row.layer for row in rows[:count]])
    numel = np.array([row.numel for row in rows[:count]], dtype=float)
    sampled = np.array([row.sampled for row in rows[:count]], dtype=float)
    scale = numel / sampled
    norm_square = fetched.grad_norms[:count] ** 2
    has_grad = ~np.isnan(fetched.rows[:, _R["grad_zeros"]])
    zeros = (fetched.rows[:, _R["grad_zeros"]] - (ROW - sampled)) * scale
    weight = _pooled(owner, fetched.rows[:, _R["weight_square"]] * scale, len(out))
    update = _pooled(owner, fetched.rows[:, _R["update_square"]] * scale, len(out))
    dot = _pooled(owner, fetched.rows[:, _R["alignment_dot"]] * scale, len(out))
    sampled_grad = _pooled(owner, fetched.rows[:, _R["grad_square"]] * scale, len(out))
    # nan is what a bad gradient looks like, so "not seen" must be told apart from it
    grad = _pooled(owner, np.where(has_grad, np.nan_to_num(norm_square, nan=np.inf), np.nan), len(out))
    grad_numel = _pooled(owner, np.where(has_grad, numel, np.nan), len(out))
    size = _pooled(owner, numel, len(out))
    with np.errstate(all="ignore"):
        out[:, _M["grad_rms"]] = np.sqrt(grad / grad_numel)
        out[:, _M["grad_zero_share"]] = _pooled(owner, zeros, len(out)) / grad_numel
        seen = ~np.isnan(update)
        out[:, _M["weight_rms"]] = np.where(seen, np.sqrt(weight / size), np.nan)
        out[:, _M["update_ratio"]] = np.where(
            weight > 0, np.sqrt(update / weight), np.where(update == 0, 0.0, np.nan)
        )
        out[:, _M["alignment"]] = np.clip(-dot / np.sqrt(update * sampled_grad), -1, 1)
        bad = np.isinf(grad).astype(float) + (seen & ~np.isfinite(weight + update))
        out[:, _M["nonfinite"]] = np.where(np.isnan(grad) & ~seen, np.nan, bad)


def _pooled(owner: NDArray[np.int64], values: NDArray[np.float64], layers: int) -> NDArray[np.float64]:
    """Sum the values of each layer's rows; nan where no row has any."""
    known = ~np.isnan(values)
    total = np.bincount(owner[known], weights=values[known], minlength=layers)
    count = np.bincount(owner[known], minlength=layers)
    result: NDArray[np.float64] = np.where(count > 0, total, np.nan)[:layers]
    return result


def _put_block(out: NDArray[np.float64], what: str, block: NDArray[np.float64]) -> None:
    if np.isnan(block[_B["mean"]]):
        return
    if what == "output":
        square = block[_B["square"]]
        out[_M["activation_mean"]] = block[_B["mean"]]
        out[_M["activation_rms"]] = np.sqrt(square)
        out[_M["activation_std"]] = np.sqrt(max(square - block[_B["mean"]] ** 2, 0.0))
        out[_M["unit_std"]] = np.sqrt(block[_B["unit_variance"]])
        bad = float(block[_B["nonfinite"]] > 0)
        out[_M["nonfinite"]] = bad if np.isnan(out[_M["nonfinite"]]) else out[_M["nonfinite"]] + bad
    else:
        out[_M["dead_share"]] = block[_B["dead_units"]]
        out[_M["zero_share"]] = block[_B["dead_entries"]]
        out[_M["saturated_share"]] = block[_B["saturated_entries"]]


def _put_flow(out: NDArray[np.float64], deltas: NDArray[np.float64], order: Sequence[int]) -> None:
    """Fill the backward norms, the gain of each layer and the product from the output down."""
    out[: len(deltas), _M["delta_norm"]] = deltas[: len(out)]
    seen = [layer for layer in order if layer < len(deltas) and np.isfinite(deltas[layer])]
    if not seen:
        return
    reference = deltas[seen[-1]]
    with np.errstate(all="ignore"):
        for before, layer in zip([None, *seen[:-1]], seen, strict=True):
            out[layer, _M["log2_flow"]] = np.log2(deltas[layer] / reference) if reference > 0 else np.nan
            if before is not None:
                gain = np.log2(deltas[before] / deltas[layer]) if deltas[layer] > 0 else np.nan
                out[layer, _M["log2_gain"]] = gain
    flow = out[:, [_M["log2_flow"], _M["log2_gain"]]]
    out[:, [_M["log2_flow"], _M["log2_gain"]]] = np.clip(flow, -300, 300)


def step_scalars(fetched: Fetched, special: Mapping[str, int]) -> NDArray[np.float64]:
    """Return the scalars of one sample, in the order of `SCALARS`.

    Args:
        fetched: The sample's numbers.
        special: Block rows of ``input``, ``output``, ``prediction`` and ``target`` for this optimiser.
    """
    out = np.full(len(SCALARS), np.nan)
    for name, value in fetched.slot.facts.items():
        out[_S[name]] = value
    blocks = {name: fetched.blocks[row] for name, row in special.items() if row < len(fetched.blocks)}
    _put_scale(out, "input", blocks.get("input"))
    _put_scale(out, "output", blocks.get("output"))
    _put_scale(out, "target", blocks.get("target"))
    prediction, target = blocks.get("prediction"), blocks.get("target")
    if prediction is not None and target is not None:
        out[_S["error_mean"]] = prediction[_B["mean"]] - target[_B["mean"]]
    return out


def _put_scale(out: NDArray[np.float64], name: str, block: Any) -> None:
    if block is None or np.isnan(block[_B["mean"]]):
        return
    mean, square = block[_B["mean"]], block[_B["square"]]
    values = {
        f"{name}_mean": mean,
        f"{name}_rms": np.sqrt(square),
        f"{name}_std": np.sqrt(max(square - mean**2, 0.0)),
        f"{name}_unit_std": np.sqrt(block[_B["unit_variance"]]),
        f"{name}_std_max": np.sqrt(block[_B["unit_variance_max"]]),
        f"{name}_std_min": np.sqrt(block[_B["unit_variance_min"]]),
        f"{name}_offset": block[_B["offset_max"]],
        f"{name}_min": block[_B["minimum"]],
        f"{name}_max": block[_B["maximum"]],
    }
    for key, value in values.items():
        if key in _S:
            out[_S[key]] = value

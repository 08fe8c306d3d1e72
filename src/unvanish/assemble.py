"""From the numbers of one sample to the measures of its layers: plain arithmetic on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .measures import BLOCK_COLUMNS, ROW, ROW_COLUMNS
from .records import MEASURES, SCALARS
from .roster import Member
from .staging import SPECIAL, Fetched, ParameterRow, Stage

_M = {name: i for i, name in enumerate(MEASURES)}
_R = {name: i for i, name in enumerate(ROW_COLUMNS)}
_B = {name: i for i, name in enumerate(BLOCK_COLUMNS)}
_S = {name: i for i, name in enumerate(SCALARS)}
_OF_PARAMETERS = [_M[name] for name in ("grad_rms", "grad_zero_share", "weight_rms", "update_ratio", "alignment")]


def layer_measures(
    fetched: Fetched,
    rows: Sequence[ParameterRow],
    block_rows: Mapping[tuple[int, str], int],
    order: Sequence[int],
    layers: int,
) -> NDArray[np.float32]:
    """Return the measures of the layers, (samples, layers, measures).

    Args:
        fetched: The numbers of some samples.
        rows: What each parameter row is; a layer's figures pool its parameters.
        block_rows: (layer, "output" or "activation") -> block row.
        order: Numbers of the layers in the order of their calls, input first.
        layers: How many layers there are.
    """
    out = np.full((len(fetched.slots), layers, len(MEASURES)), np.nan)
    with np.errstate(all="ignore"):
        _put_parameters(out, fetched, rows[: fetched.rows.shape[1]])
        _put_outputs(out, fetched, block_rows)
        _put_activations(out, fetched, block_rows)
        for sample, deltas in zip(out, fetched.deltas, strict=True):
            _put_flow(sample, deltas[:layers], order)
        return out.astype(np.float32)


def _put_parameters(out: NDArray[np.float64], fetched: Fetched, rows: Sequence[ParameterRow]) -> None:
    if not rows:
        return
    owner = np.array([row.layer for row in rows])
    numel = np.array([row.numel for row in rows], dtype=float)
    sampled = np.array([row.sampled for row in rows], dtype=float)
    columns = {name: fetched.rows[:, :, i] for name, i in _R.items()}
    scale = numel / sampled
    has_grad = fetched.has_grad
    zeros = (columns["grad_zeros"] - (ROW - sampled)) * scale
    # nan is what a bad gradient looks like, so "not seen" must be told apart from it
    norm_square = np.where(has_grad, np.nan_to_num(fetched.grad_norms**2, nan=np.inf), np.nan)
    weight, update, dot, sampled_grad, zeros, grad, grad_numel, size = (
        _pooled(owner, values, out.shape[1])
        for values in (
            columns["weight_square"] * scale,
            columns["update_square"] * scale,
            columns["alignment_dot"] * scale,
            columns["grad_square"] * scale,
            zeros,
            norm_square,
            np.where(has_grad, numel, np.nan),
            np.broadcast_to(numel, has_grad.shape),
        )
    )
    out[..., _M["grad_rms"]] = np.sqrt(grad / grad_numel)
    out[..., _M["grad_zero_share"]] = zeros / grad_numel
    seen = ~np.isnan(update)
    out[..., _M["weight_rms"]] = np.where(seen, np.sqrt(weight / size), np.nan)
    ratio = np.where(weight > 0, np.sqrt(update / weight), np.where(update == 0, 0.0, np.nan))
    out[..., _M["update_ratio"]] = ratio
    out[..., _M["alignment"]] = np.clip(-dot / np.sqrt(update * sampled_grad), -1, 1)
    bad = np.isinf(grad).astype(float) + (seen & ~np.isfinite(weight + update))
    out[..., _M["nonfinite"]] = np.where(np.isnan(grad) & ~seen, np.nan, bad)


def _pooled(owner: NDArray[np.int64], values: NDArray[np.float64], layers: int) -> NDArray[np.float64]:
    """Sum over the rows of each layer, which stand together; nan where no row has a value."""
    holders, starts = np.unique(owner, return_index=True)
    known = ~np.isnan(values)
    total = np.add.reduceat(np.where(known, values, 0.0), starts, axis=1)
    is_known = np.logical_or.reduceat(known, starts, axis=1)
    result = np.full((len(values), layers), np.nan)
    result[:, holders] = np.where(is_known, total, np.nan)
    return result


def _blocks_of(
    what: str, fetched: Fetched, block_rows: Mapping[tuple[int, str], int], layers: int
) -> tuple[list[int], dict[str, NDArray[np.float64]]]:
    """Return the layers that have such a block, and the columns of these blocks, (samples, layers)."""
    pairs = [(layer, row) for (layer, kind), row in block_rows.items() if kind == what and 0 <= layer < layers]
    blocks = fetched.blocks[:, [row for _, row in pairs]]
    return [layer for layer, _ in pairs], {name: blocks[:, :, i] for name, i in _B.items()}


def _put_outputs(out: NDArray[np.float64], fetched: Fetched, block_rows: Mapping[tuple[int, str], int]) -> None:
    layers, block = _blocks_of("output", fetched, block_rows, out.shape[1])
    out[:, layers, _M["activation_mean"]] = block["mean"]
    out[:, layers, _M["activation_rms"]] = np.sqrt(block["square"])
    out[:, layers, _M["activation_std"]] = np.sqrt(np.maximum(block["square"] - block["mean"] ** 2, 0.0))
    out[:, layers, _M["unit_std"]] = np.sqrt(block["unit_variance"])
    bad = np.where(np.isnan(block["mean"]), np.nan, block["nonfinite"] > 0)
    known = out[:, layers, _M["nonfinite"]]
    both = np.where(np.isnan(known), bad, known + np.nan_to_num(bad))
    out[:, layers, _M["nonfinite"]] = both


def _put_activations(out: NDArray[np.float64], fetched: Fetched, block_rows: Mapping[tuple[int, str], int]) -> None:
    layers, block = _blocks_of("activation", fetched, block_rows, out.shape[1])
    out[:, layers, _M["dead_share"]] = block["dead_units"]
    out[:, layers, _M["zero_share"]] = block["dead_entries"]
    out[:, layers, _M["saturated_share"]] = block["saturated_entries"]


def _put_flow(out: NDArray[np.float64], deltas: NDArray[np.float64], order: Sequence[int]) -> None:
    """Fill the backward norms, the gain of each layer and the product from the output down."""
    out[: len(deltas), _M["delta_norm"]] = deltas
    seen = np.array([layer for layer in order if layer < len(deltas) and np.isfinite(deltas[layer])], dtype=int)
    if not len(seen):
        return
    norms = deltas[seen]
    flow = np.log2(norms / norms[-1]) if norms[-1] > 0 else np.full(len(seen), np.nan)
    gain = np.where(norms[1:] > 0, np.log2(norms[:-1] / norms[1:]), np.nan)
    out[seen, _M["log2_flow"]] = np.clip(flow, -300, 300)
    out[seen[1:], _M["log2_gain"]] = np.clip(gain, -300, 300)


def step_scalars(fetched: Fetched, sample: int, special: Mapping[str, int]) -> NDArray[np.float64]:
    """Return the scalars of one sample, in the order of `SCALARS`.

    Args:
        fetched: The numbers of some samples.
        sample: Which of them.
        special: Block rows of ``input``, ``output``, ``prediction`` and ``target`` for this optimiser.
    """
    out = np.full(len(SCALARS), np.nan)
    for name, value in fetched.slots[sample].facts.items():
        out[_S[name]] = value
    seen = {name: row for name, row in special.items() if row < fetched.blocks.shape[1]}
    blocks = {name: fetched.blocks[sample, row].tolist() for name, row in seen.items()}
    _put_scale(out, "input", blocks.get("input"))
    _put_scale(out, "output", blocks.get("output"))
    _put_scale(out, "target", blocks.get("target"))
    prediction, target = blocks.get("prediction"), blocks.get("target")
    if prediction is not None and target is not None:
        out[_S["error_mean"]] = prediction[_B["mean"]] - target[_B["mean"]]
    return out


def _put_scale(out: NDArray[np.float64], name: str, block: list[float] | None) -> None:
    if block is None or math.isnan(block[_B["mean"]]):
        return
    mean, square = block[_B["mean"]], block[_B["square"]]
    values = {
        f"{name}_mean": mean,
        f"{name}_rms": math.sqrt(square),
        f"{name}_std": math.sqrt(max(square - mean**2, 0.0)),
        f"{name}_unit_std": math.sqrt(block[_B["unit_variance"]]),
        f"{name}_std_max": math.sqrt(block[_B["unit_variance_max"]]),
        f"{name}_std_min": math.sqrt(block[_B["unit_variance_min"]]),
        f"{name}_offset": block[_B["offset_max"]],
        f"{name}_min": block[_B["minimum"]],
        f"{name}_max": block[_B["maximum"]],
    }
    for key, value in values.items():
        if key in _S:
            out[_S[key]] = value


def sample_rows(
    fetched: Fetched, stage: Stage, members: Sequence[Member], loss_at: Mapping[tuple[int, int], float]
) -> list[tuple[Any, int, NDArray[np.float64], NDArray[np.float32]]]:
    """Return the rows of the record that some samples make: stream, step, scalars, measures of the stream's layers.

    Args:
        fetched: The numbers of the samples.
        stage: Where they waited.
        members: The layers that are known.
        loss_at: The losses by (id of the stream, step).
    """
    order = [member.number for member in sorted(members, key=lambda m: m.position) if member.position >= 0]
    blocks = layer_measures(fetched, stage.rows, stage.block_rows, order, len(members))
    for member in members:
        if member.twin >= 0:
            blocks[:, member.number, _OF_PARAMETERS] = blocks[:, member.twin, _OF_PARAMETERS]
    rows = []
    for number, slot in enumerate(fetched.slots):
        player, step = slot.owner, slot.step
        slot.facts["loss"] = loss_at.get((id(player.stream), step), math.nan)
        special = {what: stage.block_rows[SPECIAL, what] for what in ("prediction", "target")}
        for what in ("input", "output"):
            key = (SPECIAL - 1 - max(player.root, 0), what)
            if key in stage.block_rows:
                special[what] = stage.block_rows[key]
        rows.append(
            (player.stream, step, step_scalars(fetched, number, special), _columns(blocks[number], player.columns))
        )
    return rows


def _columns(block: NDArray[np.float32], members: Sequence[Member]) -> NDArray[np.float32]:
    """Return the measures of these layers; nan for one that was freed before."""
    numbers = np.array([member.number for member in members], dtype=int)
    columns: NDArray[np.float32] = block[numbers]
    columns[numbers < 0] = np.nan
    return columns

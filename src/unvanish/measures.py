"""Tensors in, numbers out: the statistics of all watched tensors, in batched device work.

A watched tensor leaves a small evenly spread *sample* behind: parameters a row of up to 1024 entries,
activations a block of up to 32 examples by 32 units. The functions here turn a stack of such rows into
numbers with a handful of operations, whatever the number of layers, without synchronising.

Which operators are cheap matters more than anything else: sum, product and compare run at memory speed,
`var_mean`, `std` and the infinity norm ten to eighty times slower (PyTorch issue #122191).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROW = 1024  # entries sampled of one parameter
RUN = 16  # neighbours taken together: one cache line
SIDE = 32  # examples and units sampled of one activation

# Columns of `row_statistics` and `block_statistics`.
ROW_COLUMNS = ("weight_square", "update_square", "grad_square", "alignment_dot", "grad_zeros")
BLOCK_COLUMNS = (
    "mean",
    "square",
    "unit_variance",
    "unit_variance_max",
    "unit_variance_min",
    "offset_max",
    "dead_units",
    "dead_entries",
    "saturated_entries",
    "minimum",
    "maximum",
    "nonfinite",
)


def parameter_sample_layout(numel: int, row_length: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return sizes and strides that sample up to `ROW` entries of a dense tensor, and how many.

    Runs of `RUN` neighbours, evenly spread. The distance between runs is coprime with the length of
    a weight row: otherwise every run would fall on the same columns (up to 100 % error, measured).

    Example:
        >>> parameter_sample_layout(10, 5)
        ((10,), (1,), 10)
        >>> parameter_sample_layout(512 * 512, 512)
        ((64, 16), (4095, 1), 1024)
    """
    if numel <= ROW:
        return (numel,), (1,), numel
    runs = ROW // RUN
    distance = (numel - RUN) // (runs - 1) if numel < ROW * 2 else numel // runs
    while distance > RUN and math.gcd(distance, max(row_length, 1)) != 1:
        distance -= 1
    return (runs, RUN), (distance, 1), ROW


def block_layout(
    shape: tuple[int, ...], stride: tuple[int, ...], unit_dim: int
) -> tuple[tuple[int, ...], tuple[int, ...], int, int, int]:
    """Return sizes, strides and offset that view a block of a tensor, and its examples and units.

    The last dimension of the view runs over units, the others over examples and positions.

    Example:
        >>> block_layout((128, 512), (512, 1), 1)
        ((32, 32), (2048, 16), 1032, 32, 32)
    """
    others = [dim for dim in range(len(shape)) if dim != unit_dim]
    sizes, strides, offset, left = [], [], 0, SIDE
    for place, dim in enumerate(others):
        count = min(shape[dim], left if place == len(others) - 1 or len(others) == 1 else max(left // 2, 1))
        left = max(left // max(count, 1), 1)
        step = max(shape[dim] // max(count, 1), 1)
        sizes.append(count)
        strides.append(step * stride[dim])
        offset += (step // 2) * stride[dim]
    units = min(shape[unit_dim], SIDE)
    step = max(shape[unit_dim] // max(units, 1), 1)
    sizes.append(units)
    strides.append(step * stride[unit_dim])
    offset += (step // 2) * stride[unit_dim]
    return tuple(sizes), tuple(strides), offset, math.prod(sizes[:-1]), units


def row_statistics(before: Tensor, after: Tensor, grads: Tensor) -> Tensor:
    """Return sums over the sampled entries of each parameter.

    Args:
        before: Weights before the step. (samples, rows, entries), padded with 0.
        after: Weights after the step, same shape.
        grads: Gradient of the loss, same shape and positions.

    Returns:
        (samples, rows, columns of `ROW_COLUMNS`); padding counts as a zero gradient.

    Cost: eight passes over the samples, no synchronisation.

    Example:
        >>> one = torch.ones(1, 1, 4)
        >>> row_statistics(one, one * 0.5, one).tolist()
        [[[4.0, 1.0, 4.0, -2.0, 0.0]]]
    """
    update = after - before
    return torch.stack(
        (
            (before * before).sum(-1),
            (update * update).sum(-1),
            (grads * grads).sum(-1),
            (update * grads).sum(-1),
            (grads == 0).sum(-1).to(before.dtype),
        ),
        dim=-1,
    )


def block_statistics(blocks: Tensor, counts: Tensor, bounds: Tensor) -> Tensor:
    """Return the statistics of activation blocks.

    Args:
        blocks: (samples, rows, examples, units), anything outside ``counts`` is ignored.
        counts: How many examples and units are real. (samples, rows, 2)
        bounds: Per row: an entry at or below the first is *dead*, outside of second and third
            *saturated*. (rows, 3)

    Returns:
        (samples, rows, columns of `BLOCK_COLUMNS`). *Dead units* are dead for every example.

    Cost: about fifteen passes over the samples, no synchronisation.
    """
    index = torch.arange(blocks.shape[-1], device=blocks.device)
    is_example = index < counts[..., 0:1]  # (samples, rows, examples)
    is_unit = index < counts[..., 1:2]  # (samples, rows, units)
    mask = is_example.unsqueeze(-1) & is_unit.unsqueeze(-2)
    examples = counts[..., 0].clamp(min=1)
    units = counts[..., 1].clamp(min=1)
    total = (examples * units).to(blocks.dtype)
    bad = (~torch.isfinite(blocks) & mask).sum((-1, -2))
    values = torch.where(mask, torch.nan_to_num(blocks, nan=0.0, posinf=1e18, neginf=-1e18), 0.0)

    unit_mean = values.sum(-2) / examples.unsqueeze(-1)  # (samples, rows, units)
    centred = torch.where(mask, values - unit_mean.unsqueeze(-2), 0.0)
    unit_variance = (centred * centred).sum(-2) / (examples - 1).clamp(min=1).unsqueeze(-1)
    # A spread below the rounding of the mean is no spread.
    varies = is_unit & (unit_variance > (unit_mean * 1e-6) ** 2)
    offset = torch.where(varies, unit_mean.abs() / unit_variance.clamp(min=1e-30).sqrt(), 0.0)
    lowest = torch.where(varies, unit_variance, torch.inf).amin(-1)

    dead_at, low, high = (bounds[:, i].view(1, -1, 1, 1) for i in range(3))
    dead = (blocks <= dead_at) & mask  # nan is neither dead nor saturated
    saturated = ((blocks <= low) | (blocks >= high)) & mask
    all_dead = (dead | ~is_example.unsqueeze(-1)).all(-2) & is_unit
    return torch.stack(
        (
            values.sum((-1, -2)) / total,
            (values * values).sum((-1, -2)) / total,
            torch.where(is_unit, unit_variance, 0.0).sum(-1) / units,
            torch.where(is_unit, unit_variance, 0.0).amax(-1),
            torch.where(torch.isfinite(lowest), lowest, 0.0),
            offset.amax(-1),
            all_dead.sum(-1) / units,
            dead.sum((-1, -2)) / total,
            saturated.sum((-1, -2)) / total,
            torch.where(mask, values, torch.inf).amin((-1, -2)),
            torch.where(mask, values, -torch.inf).amax((-1, -2)),
            bad / total,
        ),
        dim=-1,
    )

"""Tensors in, numbers out: the statistics of all watched tensors, in batched device work.

A watched tensor leaves a small evenly spread *sample* behind: parameters a row of up to 1024 entries,
activations a block of up to 32 examples by 32 units. The functions here turn a stack of such rows into
numbers with a handful of operations, whatever the number of layers, without synchronising.

Which operators are cheap matters more than anything else: sum, product and sign run at memory speed,
comparisons, `where` and `isfinite` five to ten times slower, `var_mean`, `std` and the infinity norm ten to
eighty times (PyTorch issue #122191).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

ROW = 1024  # entries sampled of one parameter
RUN = 16  # neighbours taken together: one cache line
SIDE = 32  # examples and units sampled of one activation
UNIT_RUN = 8  # neighbouring units taken together
_LONG = 1 << 18  # entries from which the gradient at an output is sampled
_LARGE = 1e18  # stands for infinity; its square is still a float

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
    return (runs, RUN), (spread(numel, RUN, runs, row_length), 1), ROW


def spread(numel: int, run: int, runs: int, row_length: int) -> int:
    """Return the distance between evenly spread runs, coprime with the length of a row.

    Example:
        >>> spread(512 * 512, 16, 64, 512)
        4095
    """
    distance = (numel - run) // (runs - 1) if numel < run * runs * 2 else numel // runs
    while distance > run and math.gcd(distance, max(row_length, 1)) != 1:
        distance -= 1
    return distance


@functools.lru_cache(maxsize=4096)
def block_layout(
    shape: tuple[int, ...], stride: tuple[int, ...], unit_dim: int
) -> tuple[tuple[int, ...], tuple[int, ...], int, int, int]:
    """Return sizes, strides and offset that view a block of a tensor, and its examples and units.

    The last dimensions of the view run over units, the others over examples and positions. Of many units that
    lie side by side four runs of eight are taken: each entry by itself would cost a cache line.

    Example:
        >>> block_layout((128, 512), (512, 1), 1)
        ((32, 4, 8), (2048, 128, 1), 1084, 32, 32)
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
    examples, units = math.prod(sizes), min(shape[unit_dim], SIDE)
    run = UNIT_RUN if shape[unit_dim] > SIDE and stride[unit_dim] == 1 else 1
    step = max(shape[unit_dim] // max(units // run, 1), 1)
    sizes += [units // run, run] if run > 1 else [units]
    strides += [step * stride[unit_dim], 1] if run > 1 else [step * stride[unit_dim]]
    offset += ((step - run + 1) // 2) * stride[unit_dim]
    return tuple(sizes), tuple(strides), offset, examples, units


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the Euclidean norm of each tensor, exact to float32, as scalars on its device.

    Example:
        >>> norms([torch.tensor([3.0, 4.0])])
        [tensor(5.)]
    """
    # A norm in half precision would overflow at 65504.
    is_half = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)
    return list(torch._foreach_norm(list(tensors), 2, dtype=torch.float32 if is_half else None))


def delta_norm(grad: Tensor) -> Tensor:
    """Return the Euclidean norm of the gradient at a layer's output, as a scalar on its device.

    From `_LONG` entries on it is estimated from 1024 evenly spread runs of 64 neighbours (1 % error where
    entries are alike): an exact norm of all outputs would read as much memory as the backward pass writes.

    Example:
        >>> delta_norm(torch.tensor([3.0, 4.0]))
        tensor(5.)
    """
    dtype = torch.float32 if grad.dtype in (torch.float16, torch.bfloat16) else None
    count = grad.numel()
    if count < _LONG or not grad.is_contiguous():
        norm: Tensor = torch.linalg.vector_norm(grad, dtype=dtype)
        return norm
    distance = spread(count, 64, 1024, grad.shape[-1])
    sample = grad.as_strided((1024, 64), (distance, 1)).contiguous()  # a strided norm is not vectorised
    norm = torch.linalg.vector_norm(sample, dtype=dtype)
    return norm * math.sqrt(count / sample.numel())


def largest(tensor: Tensor) -> float:
    """Return the largest size of a finite number in a tensor; 0 if there is none.

    Example:
        >>> largest(torch.tensor([1.0, -3.0, float("inf"), float("nan")]))
        3.0
    """
    finite = tensor[torch.isfinite(tensor)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def row_statistics(before: Tensor, after: Tensor, grads: Tensor) -> Tensor:
    """Return sums over the sampled entries of each parameter.

    Args:
        before: Weights before the step. (..., entries), padded with 0.
        after: Weights after the step, same shape.
        grads: Gradient of the loss, same shape and positions.

    Returns:
        (..., columns of `ROW_COLUMNS`); padding counts as a zero gradient.

    Cost: eight passes over the samples, no synchronisation.

    Example:
        >>> one = torch.ones(1, 4)
        >>> row_statistics(one, one * 0.5, one).tolist()
        [[4.0, 1.0, 4.0, -2.0, 0.0]]
    """
    update = after - before
    work = torch.empty_like(update)  # one piece of memory for all products: fresh pages cost more than they do
    return torch.stack(
        (
            torch.mul(before, before, out=work).sum(-1),
            torch.mul(update, update, out=work).sum(-1),
            torch.mul(grads, grads, out=work).sum(-1),
            torch.mul(update, grads, out=work).sum(-1),
            (grads == 0).sum(-1).to(before.dtype),
        ),
        dim=-1,
    )


def block_statistics(blocks: Tensor, counts: Tensor, bounds: Tensor) -> Tensor:
    """Return the statistics of activation blocks.

    Args:
        blocks: (..., examples, units), anything outside ``counts`` is ignored.
        counts: How many examples and units are real. (..., 2)
        bounds: Per block: an entry at or below the first is *dead*, outside of second and third
            *saturated*; an entry that is not finite is neither. (..., 3)

    Returns:
        (..., columns of `BLOCK_COLUMNS`). *Dead units* are dead for every example.

    Cost: about thirty vectorised passes over the samples, no synchronisation.
    """
    index = torch.arange(blocks.shape[-1], device=blocks.device)
    is_example, is_unit = (index < counts.unsqueeze(-1)).to(blocks.dtype).unbind(-2)  # (..., examples), (..., units)
    examples, units = counts.clamp(min=1).to(blocks.dtype).unbind(-1)
    total = examples * units
    mask = is_example.unsqueeze(-1) * is_unit.unsqueeze(-2)
    values = torch.nan_to_num(blocks, nan=0.0, posinf=_LARGE, neginf=-_LARGE).mul_(mask)
    work = torch.empty_like(values)  # one piece of memory for all passes: fresh pages cost more than a pass

    unit_sum = values.sum(-2)
    unit_mean = unit_sum / examples.unsqueeze(-1)  # (..., units)
    square = torch.mul(values, values, out=work).sum((-1, -2)) / total
    centred = torch.sub(values, unit_mean.unsqueeze(-2), out=work).mul_(mask)
    unit_variance = centred.square_().sum(-2) / (examples - 1).clamp(min=1).unsqueeze(-1)
    # A spread below the rounding of the mean is no spread.
    varies = (is_unit > 0) & (unit_variance > (unit_mean * 1e-6) ** 2)
    offset = torch.where(varies, unit_mean.abs() / unit_variance.clamp(min=1e-30).sqrt(), 0.0)
    lowest = torch.where(varies, unit_variance, torch.inf).amin(-1)
    # What lies outside of the counts is moved out of the way.
    minimum = torch.mul(mask, -2 * _LARGE, out=work).add_(2 * _LARGE).add_(values).amin((-1, -2))
    maximum = torch.mul(mask, 2 * _LARGE, out=work).sub_(2 * _LARGE).add_(values).amax((-1, -2))

    # x - x is nan where x is not finite, else 0
    finite = mask.mul_(torch.sub(blocks, blocks, out=work).nan_to_num_(nan=-1.0).add_(1.0))
    finite_units = finite.sum(-2)
    dead_at, low, high = (bounds[..., i, None, None] for i in range(3))
    # The sign is faster than a comparison, which makes booleans: 1 where the unit is alive, else 0.
    alive = torch.sub(values, dead_at, out=work).sign_().clamp_(min=0.0).mul_(finite)
    dead = finite_units - alive.sum(-2)  # (..., units)
    above_low = torch.sub(values, low, out=work)
    below_high = values.neg_().add_(high)
    inside = torch.minimum(above_low, below_high, out=work).sign_().clamp_(min=0.0).mul_(finite)
    return torch.stack(
        (
            unit_sum.sum(-1) / total,
            square,
            unit_variance.sum(-1) / units,
            unit_variance.amax(-1),
            torch.where(torch.isfinite(lowest), lowest, 0.0),
            offset.amax(-1),
            ((dead == examples.unsqueeze(-1)) * is_unit).sum(-1) / units,
            dead.sum(-1) / total,
            (finite_units.sum(-1) - inside.sum((-1, -2))) / total,
            minimum,
            maximum,
            1 - finite_units.sum(-1) / total,
        ),
        dim=-1,
    )

"""Tensors in, numbers out: against plain float64 numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unvanish.measures import (
    BLOCK_COLUMNS,
    ROW,
    ROW_COLUMNS,
    SIDE,
    block_layout,
    block_statistics,
    delta_norm,
    norms,
    parameter_sample_layout,
    row_statistics,
)

seeds = st.integers(0, 2**31 - 1)


def row_reference(before, after, grads):
    """One parameter's sums, in float64."""
    update = after - before
    return {
        "weight_square": (before**2).sum(),
        "update_square": (update**2).sum(),
        "grad_square": (grads**2).sum(),
        "alignment_dot": (update * grads).sum(),
        "grad_zeros": float((grads == 0).sum()),
    }


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.integers(0, 9))
def test_row_statistics_are_plain_sums(seed, samples, rows, entries, padding):
    """The sums of a padded row are those of its entries; padding counts only as zero gradients."""
    rng = np.random.default_rng(seed)
    before, after, grads = rng.normal(size=(3, samples, rows, entries))
    grads[rng.random(grads.shape) < 0.3] = 0.0
    padded = [np.pad(x, ((0, 0), (0, 0), (0, padding))) for x in (before, after, grads)]
    found = row_statistics(*(torch.tensor(x, dtype=torch.float32) for x in padded)).numpy()
    for s in range(samples):
        for r in range(rows):
            expected = row_reference(before[s, r], after[s, r], grads[s, r])
            expected["grad_zeros"] += padding
            for i, name in enumerate(ROW_COLUMNS):
                assert found[s, r, i] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name


def block_reference(block, dead_at, low, high):
    """The statistics of one block of (examples, units), in float64."""
    finite = np.isfinite(block)
    x = np.nan_to_num(block, nan=0.0, posinf=1e18, neginf=-1e18)
    variance = x.var(axis=0, ddof=1) if len(x) > 1 else np.zeros(x.shape[1])
    varies = variance > (x.mean(axis=0) * 1e-6) ** 2
    dead = (x <= dead_at) & finite
    return {
        "mean": x.mean(),
        "square": (x**2).mean(),
        "unit_variance": variance.mean(),
        "unit_variance_max": variance.max(),
        "unit_variance_min": variance[varies].min() if varies.any() else 0.0,
        "offset_max": (np.abs(x.mean(axis=0))[varies] / np.sqrt(variance[varies])).max() if varies.any() else 0.0,
        "dead_units": dead.all(axis=0).mean(),
        "dead_entries": dead.mean(),
        "saturated_entries": (((x <= low) | (x >= high)) & finite).mean(),
        "minimum": x.min(),
        "maximum": x.max(),
        "nonfinite": 1 - finite.mean(),
    }


sizes = st.tuples(st.integers(1, SIDE), st.integers(1, SIDE))
bounds = st.sampled_from([(-math.inf, -math.inf, math.inf), (0.0, -math.inf, math.inf), (-math.inf, -0.5, 0.75)])


@settings(max_examples=60, deadline=None)
@given(seeds, sizes, bounds, st.booleans())
def test_block_statistics_are_plain_statistics(seed, size, bound, has_rubbish):
    """The statistics of a block are those of its real entries, whatever lies around them."""
    rng = np.random.default_rng(seed)
    block = np.maximum(rng.normal(size=size), -0.25 if seed % 2 else -9).astype(np.float32)
    block[:, rng.random(size[1]) < 0.2] = 0.0
    around = np.full((SIDE, SIDE), np.nan if has_rubbish else 0.0, dtype=np.float32)
    around[: size[0], : size[1]] = block
    blocks = torch.from_numpy(around).expand(2, 3, SIDE, SIDE)
    counts = torch.tensor(size).expand(2, 3, 2)
    found = block_statistics(blocks, counts, torch.tensor([bound] * 3)).numpy()
    assert (found == found[:1, :1]).all()
    expected = block_reference(block.astype(np.float64), *bound)
    for name, value in zip(BLOCK_COLUMNS, found[0, 0], strict=True):
        assert value == pytest.approx(expected[name], rel=2e-4, abs=1e-5), name


def test_an_entry_that_is_not_finite_is_counted_and_is_neither_dead_nor_saturated():
    """What is nan or inf shows in `nonfinite` alone; the smallest and largest value stay numbers."""
    block = torch.zeros(1, 1, SIDE, SIDE)
    block[0, 0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    found = block_statistics(block, torch.tensor([[[4, 4]]]), torch.tensor([[0.0, -1.0, 1.0]]))[0, 0]
    numbers = dict(zip(BLOCK_COLUMNS, found.tolist(), strict=True))
    assert numbers["nonfinite"] == pytest.approx(3 / 16)
    assert numbers["dead_entries"] == pytest.approx(13 / 16)
    assert numbers["dead_units"] == pytest.approx(1 / 4)
    assert numbers["saturated_entries"] == 0.0
    assert all(math.isfinite(value) for value in numbers.values())


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3_000_000), st.integers(1, 5_000))
def test_a_parameter_sample_stays_in_bounds_and_off_the_columns(numel, row_length):
    """A sample never leaves its tensor, takes no entry twice, and its distance shares no factor with the rows."""
    shape, strides, sampled = parameter_sample_layout(numel, row_length)
    assert math.prod(shape) == sampled == min(numel, ROW)
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    assert last < numel
    if numel <= ROW:
        assert (shape, strides) == ((numel,), (1,))
    else:
        assert strides[0] >= shape[1]
        assert strides[0] == shape[1] or math.gcd(strides[0], row_length) == 1


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=2, max_size=4), st.integers(0, 3), st.booleans())
def test_a_block_is_a_view_of_distinct_entries_with_units_last(shape, unit_dim, is_transposed):
    """A block holds distinct entries of the tensor, one unit a column, and all of a small tensor."""
    unit_dim %= len(shape)
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    if is_transposed:
        tensor = tensor.transpose(0, 1)
        shape = list(tensor.shape)
    layout, strides, offset, examples, units = block_layout(tuple(tensor.shape), tensor.stride(), unit_dim)
    entries = tensor.as_strided(layout, strides, offset)  # raises if out of bounds
    assert entries.numel() == examples * units == entries.unique().numel()
    assert examples <= SIDE
    assert units == min(shape[unit_dim], SIDE)
    unit_of = torch.arange(shape[unit_dim]).reshape([-1 if d == unit_dim else 1 for d in range(len(shape))])
    unit_at = torch.empty(math.prod(shape), dtype=torch.long)
    unit_at[tensor.reshape(-1)] = unit_of.expand(tensor.shape).reshape(-1)
    columns = unit_at[entries].reshape(examples, units)
    assert (columns == columns[:1]).all()
    if len(shape) == 2 and max(shape) <= SIDE:
        assert entries.numel() == tensor.numel()


def test_norms_are_exact_also_in_half_precision():
    """Norms agree with float64, and a half precision gradient beyond 65504 is not called infinite."""
    tensors = [torch.randn(300, 7), torch.full((1000,), 6e4, dtype=torch.float16)]
    expected = [float(np.linalg.norm(t.numpy().astype(np.float64))) for t in tensors]
    assert [float(norm) for norm in norms(tensors)] == pytest.approx(expected, rel=1e-5)


def test_the_norm_at_a_long_output_is_within_a_few_percent():
    """The sampled norm of a long gradient is near the exact one, also where few positions have any."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(64, 128, 256, generator=generator)
    few = dense * (torch.rand(64, 128, 1, generator=generator) < 0.2)
    for grad in (dense, few):
        assert float(delta_norm(grad)) == pytest.approx(float(grad.norm()), rel=0.1)
    short = dense[0]
    assert float(delta_norm(short)) == pytest.approx(float(short.norm()), rel=1e-6)

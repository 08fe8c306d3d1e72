"""The staging ring: samples of watched tensors wait here, then become numbers together.

During a sampled step only small copies are made; every few samples one flush computes all statistics of all
layers in one batch and fetches them with one transfer. That keeps synchronisation off the training's path and
the number of small operations, which is what a watcher really costs, low.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .layers import own_parameters
from .measures import (
    BLOCK_COLUMNS,
    ROW,
    ROW_COLUMNS,
    SIDE,
    block_layout,
    block_statistics,
    parameter_sample_layout,
    row_statistics,
)

SLOTS = 8  # samples that wait for one flush
MAX_ROWS = 4096  # parameters with samples; more are counted but not sampled
_MAX_WAITING = 4096  # rows times slots: bounds the rings to 16 MB each
_NO_BOUNDS = (-math.inf, -math.inf, math.inf)


@dataclass(slots=True)
class ParameterRow:
    """Where the samples of one parameter go."""

    parameter: nn.Parameter
    layer: int
    numel: int
    sampled: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    view: Tensor | None = None
    pointer: int = 0

    def sample(self) -> Tensor:
        """Return a view of the entries that are sampled; remade when the storage was replaced."""
        pointer = self.parameter.data_ptr()
        if self.view is None or pointer != self.pointer:
            view = _entries(self.parameter.detach(), self.sizes, self.strides)
            if view.data_ptr() != pointer:  # a copy of a tensor with holes is no view to keep
                return view
            self.view, self.pointer = view, pointer
        return self.view


def _entries(tensor: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """View the sampled entries of a dense tensor; copy first if it has holes."""
    tensor = _local(tensor)
    if not _is_dense(tensor):
        tensor = tensor.contiguous()
    return tensor.as_strided(sizes, strides)


def _is_dense(tensor: Tensor) -> bool:
    """Say whether the entries fill their storage without holes, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _local(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this process holds."""
    local = getattr(tensor, "to_local", None)
    return local() if local is not None else tensor


@dataclass(slots=True)
class Slot:
    """What is known on the host about one waiting sample."""

    owner: Any = None  # who closed it
    step: int = 0
    facts: dict[str, float] = field(default_factory=dict)
    counts: dict[int, tuple[int, int]] = field(default_factory=dict)  # block row -> examples, units
    delta_rows: set[int] = field(default_factory=set)
    has_update: set[int] = field(default_factory=set)  # parameter rows with before and after
    has_grad: set[int] = field(default_factory=set)
    scale: Tensor | None = None  # of the loss under mixed precision


@dataclass(frozen=True, slots=True)
class Fetched:
    """The numbers of one sample, on the host."""

    slot: Slot
    rows: NDArray[np.float64]  # (parameter rows, ROW_COLUMNS)
    grad_norms: NDArray[np.float64]  # (parameter rows,)
    blocks: NDArray[np.float64]  # (block rows, BLOCK_COLUMNS); nan where nothing was seen
    deltas: NDArray[np.float64]  # (layers,)


class Stage:
    """Rings for parameters, activation blocks and backward norms; rows are added as layers are met."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rows: list[ParameterRow] = []
        self.row_of: dict[int, int] = {}  # id of a parameter -> row
        self.block_rows: dict[tuple[int, str], int] = {}
        self.bounds: list[tuple[float, float, float]] = []
        self.layer_count = 0
        self.slots = [Slot()]
        self.filled = 0
        self._last = 0
        self._capacity = (0, 0, 0)

    @property
    def slot(self) -> Slot:
        """The sample being taken."""
        return self.slots[self.filled]

    def add_layer(self, module: nn.Module) -> int:
        """Give rows to a layer and its parameters; return its number."""
        number = self.layer_count
        self.layer_count += 1
        for _, parameter in own_parameters(module):
            local = _local(parameter)
            if id(parameter) in self.row_of or not parameter.is_floating_point() or local.numel() == 0:
                continue
            if (
                len(self.rows) == MAX_ROWS
                or local.is_meta
                or isinstance(parameter, nn.parameter.UninitializedParameter)
            ):
                continue
            sizes, strides, sampled = parameter_sample_layout(
                local.numel(), local.shape[-1] if local.dim() else 1
            )
            self.row_of[id(parameter)] = len(self.rows)
            self.rows.append(ParameterRow(parameter, number, local.numel(), sampled, sizes, strides))
        return number

    def block_row(self, layer: int, what: str, bounds: tuple[float, float, float] = _NO_BOUNDS) -> int:
        """Return the row of a layer's ``output`` or ``activation``, making it if needed."""
        row = self.block_rows.setdefault((layer, what), len(self.bounds))
        if row == len(self.bounds):
            self.bounds.append(bounds)
        elif bounds != _NO_BOUNDS:
            self.bounds[row] = bounds
        return row

    def needs_room(self) -> bool:
        """Say whether rows were added that the rings do not have."""
        need = (len(self.rows), len(self.bounds), self.layer_count)
        return any(n > c for n, c in zip(need, self._capacity, strict=True))

    def make_room(self) -> None:
        """Make the rings larger, keeping the samples that wait."""
        rows, blocks, layers = (_grown(n) for n in (len(self.rows), len(self.bounds) + 4, self.layer_count))
        old = self._rings() if any(self._capacity) else None
        count = max(len(self.slots), min(SLOTS, _MAX_WAITING // max(rows, blocks, 1)), 1)
        self.slots += [Slot() for _ in range(count - len(self.slots))]
        self.before = torch.zeros(count, rows, ROW, device=self.device)
        self.after = torch.zeros_like(self.before)
        self.grads = torch.zeros_like(self.before)
        self.blocks = torch.zeros(count, blocks, SIDE, SIDE, device=self.device)
        self.grad_norms = torch.full((count, rows), torch.nan, device=self.device)
        self.deltas = torch.full((count, layers), torch.nan, device=self.device)
        self._capacity = (rows, blocks, layers)
        for new, previous in zip(self._rings(), old or (), strict=False):
            new[: previous.shape[0], : previous.shape[1]] = previous
        self._targets: dict[tuple[int, int, int], Tensor] = {}

    def _rings(self) -> tuple[Tensor, ...]:
        return (self.before, self.after, self.grads, self.blocks, self.grad_norms, self.deltas)

    def _target(self, which: int, row: int) -> Tensor:
        """Return the place of a parameter's sample in a ring, shaped as the sample."""
        key = (which, self.filled, row)
        target = self._targets.get(key)
        if target is None:
            ring = (self.before, self.after, self.grads)[which]
            entry = self.rows[row]
            target = ring[self.filled, row, : entry.sampled].view(entry.sizes)
            self._targets[key] = target
        return target

    def take_weights(self, rows: Sequence[int], *, after: bool) -> None:
        """Copy the samples of these parameters, before or after the update."""
        if not rows:
            return
        targets = [self._target(1 if after else 0, row) for row in rows]
        torch._foreach_copy_(targets, [self.rows[row].sample() for row in rows])
        if after:
            self.slot.has_update.update(rows)

    def take_grads(self, rows: Sequence[int]) -> None:
        """Copy samples and exact norms of the gradients these parameters hold now."""
        held, sources, dense = [], [], []
        for row in rows:
            entry = self.rows[row]
            grad = entry.parameter.grad
            if grad is None:
                continue
            grad = grad.detach()
            if grad.is_sparse:
                grad = grad.coalesce().values()
                dense.append(grad)
                held.append(row)
                continue
            grad = _local(grad)
            if grad.numel() != entry.numel:
                continue
            held.append(row)
            dense.append(grad)
            sources.append((row, _entries(grad, entry.sizes, entry.strides)))
        if not held:
            return
        torch._foreach_copy_([self._target(2, row) for row, _ in sources], [grad for _, grad in sources])
        norms = [norm.to(self.device, torch.float32) for norm in torch._foreach_norm(dense)]
        if len(held) == len(self.rows):
            self.grad_norms[self.filled, : len(held)] = torch.stack(norms)
        else:
            index = torch.tensor(held, device=self.device)
            self.grad_norms[self.filled].index_copy_(0, index, torch.stack(norms))
        self.slot.has_grad.update(held)

    def take_block(self, row: int, tensor: Tensor, unit_dim: int) -> None:
        """Copy a block of an activation: up to 32 examples by 32 units."""
        if tensor.dim() == 0 or tensor.numel() == 0:
            return
        if tensor.dim() == 1:
            tensor, unit_dim = tensor.unsqueeze(1), 1
        sizes, strides, offset, examples, units = block_layout(
            tuple(tensor.shape), tensor.stride(), unit_dim % tensor.dim()
        )
        source = tensor.as_strided(sizes, strides, tensor.storage_offset() + offset)
        target = self.blocks[self.filled, row, :examples, :units].view(sizes)
        target.copy_(source)
        self.slot.counts[row] = (examples, units)

    def take_deltas(self, deltas: Mapping[int, Tensor]) -> None:
        """Store the norms of the gradients at the layers' outputs."""
        if not deltas:
            return
        index = torch.tensor(list(deltas), device=self.device)
        values = torch.stack([norm.to(self.device, torch.float32) for norm in deltas.values()])
        self.deltas[self.filled].index_copy_(0, index, values)
        self.slot.delta_rows.update(deltas)

    def close_slot(self) -> bool:
        """Keep the sample; say whether the ring is full and has to be flushed."""
        self._last = self.filled
        self.filled += 1
        return self.filled == len(self.slots)

    def carry_over(self, counts: Mapping[int, tuple[int, int]]) -> None:
        """Give the newly begun sample the blocks of the one before, for another optimiser's step."""
        if self.filled != self._last:
            self.blocks[self.filled].copy_(self.blocks[self._last])
        self.slot.counts.update(counts)

    def flush(self) -> list[Fetched]:
        """Compute the statistics of all waiting samples and fetch them with one transfer."""
        if not self.filled:
            return []
        n, rows, blocks = self.filled, len(self.rows), len(self.bounds)
        row_stats = row_statistics(self.before[:n, :rows], self.after[:n, :rows], self.grads[:n, :rows])
        counts = np.zeros((n, blocks, 2), dtype=np.int64)
        for number, slot in enumerate(self.slots[:n]):
            for row, pair in slot.counts.items():
                counts[number, row] = pair
        block_stats = block_statistics(
            self.blocks[:n, :blocks],
            torch.from_numpy(counts).to(self.device),
            torch.tensor(self.bounds, device=self.device).reshape(-1, 3),
        )
        scales = [1.0 if slot.scale is None else slot.scale for slot in self.slots[:n]]
        scale = torch.stack([torch.as_tensor(s, device=self.device).float().reshape(()) for s in scales])
        parts = (
            row_stats,
            self.grad_norms[:n, :rows],
            block_stats,
            self.deltas[:n, : self.layer_count],
            scale,
        )
        flat = torch.cat([part.reshape(-1) for part in parts]).double().cpu().numpy()
        sizes = np.cumsum([part.numel() for part in parts])[:-1]
        r, g, b, d, s = np.split(flat, sizes)
        r3, g2 = r.reshape(n, rows, len(ROW_COLUMNS)), g.reshape(n, rows)
        b3, d2 = b.reshape(n, blocks, len(BLOCK_COLUMNS)), d.reshape(n, self.layer_count)
        fetched = [self._fetched(i, (r3[i], g2[i], b3[i], d2[i]), float(s[i]), counts[i]) for i in range(n)]
        self.reset()
        return fetched

    def _fetched(self, number: int, numbers: tuple[Any, Any, Any, Any], scale: float, counts: Any) -> Fetched:
        """Blank what was not seen at this sample, and take out the loss scale."""
        rows, norms, blocks, deltas = numbers
        slot = self.slots[number]
        blocks[counts[:, 0] == 0] = np.nan
        few = counts[:, 0] == 1  # one example has no spread
        blocks[np.ix_(few, [BLOCK_COLUMNS.index(c) for c in ("unit_variance", "unit_variance_max")])] = np.nan
        no_grad = [row for row in range(len(self.rows)) if row not in slot.has_grad]
        no_update = [row for row in range(len(self.rows)) if row not in slot.has_update]
        names = {name: i for i, name in enumerate(ROW_COLUMNS)}
        rows[np.ix_(no_grad, [names["grad_square"], names["grad_zeros"], names["alignment_dot"]])] = np.nan
        rows[np.ix_(no_update, [names["update_square"], names["alignment_dot"]])] = np.nan
        norms[no_grad] = np.nan
        deltas[[i for i in range(len(deltas)) if i not in slot.delta_rows]] = np.nan
        if scale not in (0.0, 1.0):
            norms, deltas = norms / scale, deltas / scale
            rows[:, names["grad_square"]] /= scale**2
            rows[:, names["alignment_dot"]] /= scale
        return Fetched(slot, rows, norms, blocks, deltas)

    def reset(self) -> None:
        """Forget the waiting samples."""
        self.slots = [Slot() for _ in self.slots]
        self.filled = 0


def _grown(count: int) -> int:
    """Return a capacity with some room, so that new layers do not make new rings each time."""
    return count if count > 64 else count + 4

"""The staging ring: samples of watched tensors wait here, then become numbers together.

During a sampled step only small copies are made; every few samples one flush computes all statistics of all
layers in one batch and fetches them with one transfer. That keeps synchronisation off the training's path and
the number of small operations, which is what a watcher really costs, low.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    norms,
    parameter_sample_layout,
    row_statistics,
)

SLOTS = 8  # samples that wait for one flush
MAX_ROWS = 4096  # parameters with samples; more are counted but not sampled
_MAX_WAITING = 4096  # rows times slots: bounds the rings to 16 MB each
_NO_BOUNDS = (-math.inf, -math.inf, math.inf)
SPECIAL = -1  # the "layer" of the block rows of prediction and target


@dataclass(slots=True)
class ParameterRow:
    """Where the samples of one parameter go; the parameter itself is not kept alive."""

    reference: Callable[[], nn.Parameter | None]
    layer: int
    numel: int
    sampled: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    view: Tensor | None = None
    pointer: int = 0

    @classmethod
    def of(cls, parameter: nn.Parameter, layer: int, local: Tensor) -> ParameterRow:
        """Return the row of a parameter, of which this process holds ``local``."""
        sizes, strides, sampled = parameter_sample_layout(local.numel(), local.shape[-1] if local.dim() else 1)
        entry = cls(lambda: None, layer, local.numel(), sampled, sizes, strides)
        entry.reference = weakref.ref(parameter, lambda _: setattr(entry, "view", None))  # it holds the storage
        return entry

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter, as long as the training holds it."""
        return self.reference()

    def sample(self, parameter: nn.Parameter) -> Tensor:
        """Return a view of the entries that are sampled; remade when the storage was replaced."""
        pointer = parameter.data_ptr()
        if self.view is None or pointer != self.pointer:
            view = _entries(_local(parameter.detach()), self.sizes, self.strides)
            if view.data_ptr() != pointer:  # a copy of a tensor with holes is no view to keep
                return view
            self.view, self.pointer = view, pointer
        return self.view


def _entries(tensor: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """View the sampled entries of a dense tensor; copy first if it has holes."""
    if not tensor.is_contiguous() and not _is_dense(tensor):
        tensor = tensor.contiguous()
    return tensor.as_strided(sizes, strides)


def _is_dense(tensor: Tensor) -> bool:
    """Say whether the entries fill their storage without holes, in whatever order."""
    if tensor.is_contiguous():
        return True
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
    updated: set[int] = field(default_factory=set)  # parameter rows with before and after
    sampled_grads: set[int] = field(default_factory=set)  # parameter rows with entries of the gradient
    # Parameter rows with their exact gradient norms, and layers with the norms at their outputs.
    grad_norms: list[tuple[list[int], Tensor]] = field(default_factory=list)
    deltas: list[tuple[list[int], Tensor]] = field(default_factory=list)
    scale: Tensor | None = None  # of the loss under mixed precision
    carried: set[int] = field(default_factory=set)  # block rows from the sample before, unless a call comes


@dataclass(frozen=True, slots=True)
class Fetched:
    """The numbers of the samples of one flush, on the host; nan where nothing was seen."""

    slots: list[Slot]
    rows: NDArray[np.float64]  # (samples, parameter rows, ROW_COLUMNS)
    grad_norms: NDArray[np.float64]  # (samples, parameter rows)
    has_grad: NDArray[np.bool_]  # (samples, parameter rows): the norm was taken, if only to find nan
    blocks: NDArray[np.float64]  # (samples, block rows, BLOCK_COLUMNS)
    deltas: NDArray[np.float64]  # (samples, layers)


class Stage:
    """Rings for the samples of parameters and activations; rows are added as layers are met."""

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
        self._capacity = (0, 0)

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
            known = self.row_of.get(id(parameter))
            if known is not None and self.rows[known].parameter is parameter:
                continue
            if not parameter.is_floating_point() or local.numel() == 0:
                continue
            if (
                len(self.rows) == MAX_ROWS
                or local.is_meta
                or isinstance(parameter, nn.parameter.UninitializedParameter)
            ):
                continue
            self.row_of[id(parameter)] = len(self.rows)
            self.rows.append(ParameterRow.of(parameter, number, local))
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
        return len(self.rows) > self._capacity[0] or len(self.bounds) > self._capacity[1]

    def make_room(self) -> None:
        """Make the rings larger if they are too small, keeping the samples that wait."""
        if not self.needs_room():
            return
        rows, blocks = (_grown(len(held)) for held in (self.rows, self.bounds))
        old = self._rings() if any(self._capacity) else ()
        count = max(len(self.slots), min(SLOTS, _MAX_WAITING // max(rows, blocks)), 1)
        self.slots += [Slot() for _ in range(count - len(self.slots))]
        self.before = torch.zeros(count, rows, ROW, device=self.device)
        self.after = torch.zeros_like(self.before)
        self.grads = torch.zeros_like(self.before)
        self.blocks = torch.zeros(count, blocks, SIDE, SIDE, device=self.device)
        self._capacity = (rows, blocks)
        for new, previous in zip(self._rings(), old, strict=False):
            new[: previous.shape[0], : previous.shape[1]] = previous
        self._targets: dict[tuple[int, int], list[Tensor]] = {}
        self._block_targets: dict[tuple[int, int, tuple[int, ...]], Tensor] = {}

    def _rings(self) -> tuple[Tensor, ...]:
        return (self.before, self.after, self.grads, self.blocks)

    def _places(self, which: int, rows: Sequence[int]) -> list[Tensor]:
        """Return where the samples of these parameters go in a ring, shaped as the samples."""
        places = self._targets.get((which, self.filled), [])
        if len(places) != len(self.rows):
            ring = self._rings()[which][self.filled]
            places = [ring[row, : e.sampled].view(e.sizes) for row, e in enumerate(self.rows)]
            self._targets[which, self.filled] = places
        return places if len(rows) == len(places) else [places[row] for row in rows]

    def take_weights(self, rows: Sequence[int], *, after: bool) -> None:
        """Copy the samples of these parameters, before or after the update."""
        held = [(row, p) for row in rows if (p := self.rows[row].parameter) is not None]
        rows = [row for row, _ in held]
        if not rows:
            return
        torch._foreach_copy_(self._places(1 if after else 0, rows), [self.rows[row].sample(p) for row, p in held])
        if after:
            self.slot.updated.update(rows)

    def take_grads(self, *, with_samples: bool = True) -> None:
        """Keep exact norms of the gradients that the parameters hold now, and samples of their entries if asked."""
        held, dense, sampled, sources = [], [], [], []
        for row, entry in enumerate(self.rows):
            parameter = entry.parameter
            grad = None if parameter is None else parameter.grad
            if grad is None:
                continue
            if grad.is_sparse:
                held.append(row)
                dense.append(grad.coalesce().values())
                continue
            grad = _local(grad)
            if grad.numel() == entry.numel:
                held.append(row)
                dense.append(grad)
                if with_samples:
                    sampled.append(row)
                    sources.append(_entries(grad, entry.sizes, entry.strides))
        if not held:
            return
        if sampled:
            torch._foreach_copy_(self._places(2, sampled), sources)
            self.slot.sampled_grads.update(sampled)
        self.slot.grad_norms.append((held, torch.stack(norms(dense))))

    def take_deltas(self, deltas: Mapping[int, Tensor]) -> None:
        """Keep the norms of the gradients at the layers' outputs, by layer."""
        if deltas:
            values = [norm.to(self.device) for norm in deltas.values()]
            self.slot.deltas.append((list(deltas), torch.stack(values)))

    def take_block(self, row: int, tensor: Tensor, unit_dim: int) -> None:
        """Copy a block of an activation: up to 32 examples by 32 units."""
        self.take_blocks([(row, tensor, unit_dim)])

    def take_blocks(self, wanted: Iterable[tuple[int, Tensor, int]]) -> None:
        """Copy the blocks of several activations at once: row, tensor, and the dimension that runs over units."""
        pairs = [pair for item in wanted if (pair := self._block_pair(*item)) is not None]
        if len(pairs) == 1:
            pairs[0][0].copy_(pairs[0][1])
        elif pairs:
            torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])

    def _block_pair(self, row: int, tensor: Tensor, unit_dim: int) -> tuple[Tensor, Tensor] | None:
        """Return where a block goes and the view that it comes from."""
        if tensor.dim() == 0 or tensor.numel() == 0:
            return None
        if tensor.dim() == 1:
            tensor, unit_dim = tensor.unsqueeze(1), 1
        sizes, strides, offset, examples, units = block_layout(
            tuple(tensor.shape), tensor.stride(), unit_dim % tensor.dim()
        )
        source = tensor.as_strided(sizes, strides, tensor.storage_offset() + offset)
        key = (self.filled, row, sizes)
        target = self._block_targets.get(key)
        if target is None:
            target = self.blocks[self.filled, row, :examples, :units].view(sizes)
            self._block_targets[key] = target
        self.slot.counts[row] = (examples, units)
        self.slot.carried.discard(row)
        return target, source

    def wants(self, row: int) -> bool:
        """Say whether this sample still lacks the block of a row: the first call of a step counts."""
        return row not in self.slot.counts or row in self.slot.carried

    def close_slot(self) -> bool:
        """Keep the sample; say whether the ring is full and has to be flushed."""
        self._last = self.filled
        self.filled += 1
        return self.filled == len(self.slots)

    def carry_over(self, counts: Mapping[int, tuple[int, int]]) -> None:
        """Give the newly begun sample the blocks of the one before, for another optimiser's step."""
        if self.filled != self._last:
            self.blocks[self.filled].copy_(self.blocks[self._last])
            self.grads[self.filled].copy_(self.grads[self._last])
        self.slot.counts.update(counts)
        self.slot.carried.update(counts)

    def flush(self) -> Fetched | None:
        """Compute the statistics of all waiting samples and fetch them with one transfer."""
        if not self.filled:
            return None
        n, rows, blocks = self.filled, len(self.rows), len(self.bounds)
        slots = self.slots[:n]
        counts = np.zeros((n, blocks, 2), dtype=np.int64)
        for number, slot in enumerate(slots):
            for row, pair in slot.counts.items():
                counts[number, row] = pair
        bounds = torch.tensor(self.bounds, device=self.device).reshape(-1, 3)
        parts = (
            row_statistics(*(ring[:n, :rows] for ring in (self.before, self.after, self.grads))),
            self._block_statistics(counts, bounds),
            self._scalars(slots),
        )
        flat = torch.cat([part.reshape(-1) for part in parts]).double().cpu().numpy()
        of_rows, of_blocks, scalars = np.split(flat, np.cumsum([part.numel() for part in parts])[:-1])
        fetched = Fetched(
            slots,
            of_rows.reshape(n, rows, len(ROW_COLUMNS)),
            np.full((n, rows), np.nan),
            np.zeros((n, rows), dtype=bool),
            of_blocks.reshape(n, blocks, len(BLOCK_COLUMNS)),
            np.full((n, self.layer_count), np.nan),
        )
        fetched.blocks[counts[..., 0] == 0] = np.nan
        few = counts[..., 0] == 1  # one example has no spread
        for name in ("unit_variance", "unit_variance_max"):
            fetched.blocks[few, BLOCK_COLUMNS.index(name)] = np.nan
        _place_scalars(fetched, scalars)
        self.reset()
        return fetched

    def _block_statistics(self, counts: NDArray[np.int64], bounds: Tensor) -> Tensor:
        """Return the statistics of all blocks, computed only for the samples that have some."""
        n, blocks = counts.shape[:2]
        full = np.flatnonzero(counts.any(axis=(1, 2)))
        taken = self.blocks[:n, :blocks] if len(full) == n else self.blocks[full.tolist(), :blocks]
        found = block_statistics(taken, torch.from_numpy(counts[full]).to(self.device), bounds)
        result = found.new_zeros(n, blocks, found.shape[-1])
        result[full.tolist()] = found
        return result

    def _scalars(self, slots: Sequence[Slot]) -> Tensor:
        """Return the norms and the loss scale of each sample, one after the other."""
        one = torch.ones(1, device=self.device)
        parts = []
        for slot in slots:
            parts += [norms for _, norms in (*slot.grad_norms, *slot.deltas)]
            parts.append(one if slot.scale is None else slot.scale.reshape(1))
        return torch.cat([part.to(self.device, torch.float32) for part in parts])

    def reset(self) -> None:
        """Forget the waiting samples."""
        self.slots = [Slot() for _ in self.slots]
        self.filled = 0


def _place_scalars(fetched: Fetched, scalars: NDArray[np.float64]) -> None:
    """Put the norms in their places, blank what was not seen, and take out the loss scale."""
    names = {name: i for i, name in enumerate(ROW_COLUMNS)}
    has_samples, has_update = np.zeros((2, *fetched.grad_norms.shape), dtype=bool)
    place = 0
    for i, slot in enumerate(fetched.slots):
        has_update[i, list(slot.updated)] = True
        for target, parts in ((fetched.grad_norms, slot.grad_norms), (fetched.deltas, slot.deltas)):
            for index, _ in parts:
                target[i, index] = scalars[place : place + len(index)]
                place += len(index)
        for index, _ in slot.grad_norms:
            fetched.has_grad[i, index] = True
        has_samples[i, list(slot.sampled_grads)] = True
        scale = scalars[place]
        place += 1
        if scale not in (0.0, 1.0):
            fetched.grad_norms[i] /= scale
            fetched.deltas[i] /= scale
            fetched.rows[i, :, names["grad_square"]] /= scale**2
            fetched.rows[i, :, names["alignment_dot"]] /= scale
    for name in ("grad_square", "grad_zeros", "alignment_dot"):
        fetched.rows[~has_samples, names[name]] = np.nan
    for name in ("update_square", "alignment_dot"):
        fetched.rows[~has_update, names[name]] = np.nan


def _grown(count: int) -> int:
    """Return a capacity with some room, so that new layers do not make new rings each time."""
    return count + 4 + count // 8

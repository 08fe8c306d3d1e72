"""A frozen part in front of a model: which layers it has, how long it takes, and whether its rows come again.

Followed in sampled steps only. A forward pass is read from the start of the model to the first layer that learns;
what comes before it without a graph is the frozen front. Rows are known again by a number made of their bits; the
numbers stay in memory and are not part of the record.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .layers import is_batch_norm, own_parameters

MAX_ENTRIES = 1024  # of a row that its number is made of, spread evenly
MAX_ROWS = 256  # of a batch that get a number
MAX_KNOWN = 1 << 14  # numbers that are remembered
MAX_TIMES = 64  # the newest samples, of which times are kept
MAX_FRONTS = 8  # different frozen fronts of one optimiser
COMPARED = 8  # parameters of a front that are looked at for changes by hand


@dataclass
class Pass:
    """The frozen front of a forward pass, or of all that led to one step.

    Args:
        begin: When the model was called.
        end: When the last frozen call had ended.
        layers: Frozen layers in the order of their calls.
        modules: The same as modules.
        norms: Batch norms among them that use the statistics of the batch.
        is_random: Random numbers were drawn below a frozen layer.
        border: The lowest module that learns, as its model calls it; empty if one that learns is listed before it.
        is_apart: The front is a model of its own, and another one learns from its output.
        rows: Numbers of the rows that came in.
        batch: How many rows came in.
        step_seconds: Of the whole step.
    """

    begin: float
    end: float
    layers: list[str] = field(default_factory=list)
    modules: list[weakref.ref[nn.Module]] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    is_random: bool = False
    border: str = ""
    is_apart: bool = False
    rows: Tensor | None = None
    batch: int = 0
    step_seconds: float = 0.0


class FrozenFront:
    """Follows the forward passes of one sampled step at a time.

    Args:
        clock: Seconds that the training has taken; stands still while the watch works.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.is_open = False  # a model is being called, and nothing in it has learnt yet
        self._clock = clock
        self._start = 0.0
        self._state = torch.empty(0)  # of the random numbers, at the last frozen layer or before
        self.forget()

    def begin(self) -> None:
        """Begin with a new step."""
        self.forget()
        self._start = self._clock()

    def forget(self) -> None:
        """Forget the step."""
        self.is_open = False
        self._pass: Pass | None = None
        self._waiting: tuple[Pass, Tensor] | None = None  # of a model in which nothing learns, and its output
        self._taken: Pass | None = None

    def enter(self) -> None:
        """A model is called."""
        now = self._clock()
        self._pass, self._state, self.is_open = Pass(now, now), torch.get_rng_state(), True

    def called(self, module: nn.Module, name: str, output: Tensor | None, model: nn.Module) -> None:
        """Take in a call that has ended inside of the model, while it `is_open`."""
        front = self._pass
        if front is None or output is None:
            return
        parameters = [p for _, p in own_parameters(module)]
        if output.requires_grad or any(p.requires_grad for p in parameters) or not output.is_cpu:
            self.is_open = False
            if front.layers or self._waiting:
                front.border = _border(module, model)
            # the host does not wait for a device: its clock says nothing of it; without gradients it is an evaluation
            if not output.is_cpu or not torch.is_grad_enabled():
                self._pass = self._waiting = None
            return
        state = torch.get_rng_state()
        is_random = not torch.equal(state, self._state)
        if is_batch_norm(module) and (module.training or module.running_mean is None):
            front.norms.append(name)
        if parameters:
            front.layers.append(name)
            front.modules.append(weakref.ref(module))
            front.is_random |= is_random
            self._state = state
        if front.layers and (parameters or not is_random):  # a dropout on top is not part of the front
            front.end = self._clock()

    def leave(self, inputs: Tensor | None, output: Tensor | None) -> None:
        """The model has ended."""
        front, waiting, is_whole = self._pass, self._waiting, self.is_open
        self.is_open, self._pass, self._waiting = False, None, None
        if front is None:
            return
        if front.layers and inputs is not None:
            front.batch = inputs.shape[0] if inputs.dim() else 1
            front.rows = row_numbers(inputs) if self._taken is None else None
        if is_whole:
            self._waiting = (front, output) if front.layers and output is not None else None
        elif front.layers:
            self._take(front)
        elif waiting is not None and inputs is not None and _same_memory(waiting[1], inputs):
            waiting[0].border, waiting[0].is_apart = front.border, True
            self._take(waiting[0])

    def _take(self, front: Pass) -> None:
        if self._taken is None:
            self._taken = front
        else:  # gradients are accumulated
            self._taken.end += front.end - front.begin
            self._taken.batch += front.batch

    def take(self) -> Pass | None:
        """Return the passes of the step that has just ended, if it had a frozen front."""
        taken, self._taken = self._taken, None
        if taken is not None:
            taken.step_seconds = self._clock() - self._start
        return taken


@dataclass
class _Front:
    """What the passes through one frozen front have shown."""

    layers: tuple[str, ...]
    border: str
    is_apart: bool
    step: int
    weights: list[tuple[weakref.ref[nn.Parameter], Tensor]]
    last_step: int = 0
    samples: int = 0
    norms: set[str] = field(default_factory=set)
    is_random: bool = False
    is_changed: bool = False
    times: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=MAX_TIMES))
    known: set[int] = field(default_factory=set)  # numbers of rows of earlier steps
    pairs: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=MAX_TIMES))  # of rows, and equal ones
    rows: int = 0

    def add(self, one: Pass, step: int) -> None:
        self.last_step = step
        self.samples += 1
        self.norms.update(one.norms)
        self.is_random |= one.is_random
        self.rows += one.batch
        held = [(p, before) for ref, before in self.weights if (p := ref()) is not None]
        self.is_changed |= not all(torch.equal(_entries(p), before) for p, before in held)
        if 0 < one.end - one.begin < one.step_seconds:
            self.times.append((one.end - one.begin, one.step_seconds))
        rows = [] if one.rows is None else one.rows.tolist()
        self.pairs.append((len(rows) * len(self.known), sum(row in self.known for row in rows)))
        if len(self.known) < MAX_KNOWN:
            self.known.update(rows)

    def facts(self) -> dict[str, Any]:
        times = self.times
        late = list(self.pairs)[len(self.pairs) // 2 :]  # early on there was nothing to come again
        return {
            "layers": list(self.layers),
            "border": self.border,
            "is_apart": self.is_apart,
            "step": self.step,
            "last_step": self.last_step,
            "samples": self.samples,
            "seconds": median(own for own, _ in times) if times else None,
            "step_seconds": median(whole for _, whole in times) if times else None,
            "share_of_step": median(own / whole for own, whole in times) if times else None,
            "batch_norms": sorted(self.norms),
            "is_random": self.is_random,
            "is_changed": self.is_changed,
            "rows_a_step": self.rows / self.samples,
            "row_pairs": sum(pairs for pairs, _ in late),
            "equal_pairs": sum(equal for _, equal in late),
        }


class Fronts:
    """The frozen fronts in the steps of one optimiser; bounded."""

    def __init__(self) -> None:
        self._fronts: dict[tuple[str, ...], _Front] = {}

    def add(self, one: Pass | None, step: int) -> None:
        """Take in a sampled step."""
        if one is None:
            return
        layers = tuple(one.layers)
        if layers not in self._fronts and len(self._fronts) < MAX_FRONTS:
            self._fronts[layers] = _Front(layers, one.border, one.is_apart, step, _copies(one.modules))
        if layers in self._fronts:
            self._fronts[layers].add(one, step)

    def facts(self) -> dict[str, Any]:
        """Return what is known of the front that was there for most steps, as a fact of the trace."""
        longest = max(self._fronts.values(), key=lambda front: front.last_step - front.step, default=None)
        return {} if longest is None else {"frozen_front": longest.facts()}


def row_numbers(batch: Tensor) -> Tensor | None:
    """Return a number for each row of a batch: equal rows have equal numbers, others hardly ever.

    Whole numbers are added up, so it makes no difference where in its batch a row stands. None for what has no rows
    that can be read (sparse tensors, other devices).

    Example:
        >>> one, other = row_numbers(torch.tensor([[1.0, 2.0], [2.0, 1.0]])).tolist()
        >>> again = row_numbers(torch.tensor([[5.0, 5.0], [5.0, 5.0], [1.0, 2.0]])).tolist()
        >>> one == again[2], one == other
        (True, False)
    """
    if batch.layout is not torch.strided or not batch.is_cpu or batch.is_complex() or not batch.numel():
        return None
    rows = batch.detach()[:MAX_ROWS] if batch.dim() else batch.detach().reshape(1)
    rows = rows.reshape(len(rows), -1)
    rows = rows[:, :: -(-rows.shape[1] // MAX_ENTRIES)].contiguous()
    if rows.is_floating_point():
        rows = rows.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[rows.itemsize])
    bits = rows.to(torch.int64)
    bits = bits ^ (bits >> 33)  # round numbers have their ones in the upper half of a float64
    return (bits * _factors()[: bits.shape[1]]).sum(1)


@functools.cache
def _factors() -> Tensor:
    """Return fixed odd numbers; the training's random numbers are not touched."""
    own = torch.Generator().manual_seed(0)
    return torch.randint(-(1 << 62), 1 << 62, (MAX_ENTRIES,), generator=own, device="cpu") * 2 + 1


def _copies(modules: Iterable[weakref.ref[nn.Module]]) -> list[tuple[weakref.ref[nn.Parameter], Tensor]]:
    """Return copies of some entries of some parameters, to see whether they change."""
    alive = [module for ref in modules if (module := ref()) is not None]
    parameters = list(dict.fromkeys(p for module in alive for _, p in own_parameters(module)))
    chosen = parameters[:: max(-(-len(parameters) // COMPARED), 1)]
    return [(weakref.ref(p), _entries(p).clone()) for p in chosen]


def _entries(parameter: Tensor) -> Tensor:
    return parameter.detach().reshape(-1)[:MAX_ENTRIES]


def _border(module: nn.Module, model: nn.Module) -> str:
    """Return the name of a module if all that is listed before it is frozen, as `freeze_to` wants it."""
    for path, listed in model.named_modules():
        if listed is module:
            return str(path)
        if any(p.requires_grad for _, p in own_parameters(listed)):
            break
    return ""


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Say whether one tensor is the other, or a view of it."""
    return one.is_cpu and other.is_cpu and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()

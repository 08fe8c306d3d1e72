"""Attach to a training, sample on a schedule, leave no trace.

The clock is the optimiser's step; the loss is the scalar that `backward` is called on. Between sampled
steps the watch only counts steps and keeps the loss.
"""

from __future__ import annotations

import functools
import gc
import logging
import math
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .assemble import sample_rows
from .capture import Capture
from .errors import OptionError
from .mixed_precision import MixedPrecision
from .players import (
    CHECKED_EVERY,
    CHECKED_STEPS,
    DENSE_STEPS,
    Pending,
    Player,
    fetch_losses,
    look_whether_cleared,
    mark_gradient,
    player_facts,
)
from .records import Event, Recording
from .roster import Roster
from .staging import Slot, Stage
from .trace import Recorder, Stream
from .wraps import Wraps

FLUSH_LOSSES = 64  # so many steps apart it is looked whether losses have waited too long
FLUSH_SECONDS = 30.0
SETTLED = 3  # the step after which it shows whether units stay copies of each other
MAX_PENDING = 4096  # losses that wait for a step
DORMANT = 50  # steps of others after which an optimiser no longer asks for samples
log = logging.getLogger("unvanish")


class Watch:
    """Watches models and optimisers while it is attached.

    Args:
        models: Watch these and what runs inside; empty: every model that trains.
        optimizers: Watch these; empty: every optimiser that holds a watched parameter.
        every: Sample each so many steps; the first `DENSE_STEPS` are all sampled. >= 1
        folder: Where the record goes; None keeps it in memory.
        clock: Measures the time spent inside the watch.
    """

    def __init__(
        self,
        models: Sequence[nn.Module] = (),
        optimizers: Sequence[torch.optim.Optimizer] = (),
        *,
        every: int = 10,
        folder: Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise OptionError(f"watch(): every: found {every!r}, expected a whole number >= 1. Try every=10.")
        self.every = every
        self.inside = 0.0  # seconds spent in here, by ``clock``
        self.failure = ""
        self.recorder = Recorder(folder)
        self.roster = Roster(models)
        self._optimizers = tuple(getattr(o, "optimizer", o) for o in optimizers)
        self._clock = clock
        self._trained = 0.0  # seconds that the training had taken when the running callback began
        self._capture = Capture(self.roster, self.guard, lambda: self._trained)
        self._held_out = self._capture.held_out
        self._players: dict[int, Player] = {}  # by the id of the optimiser
        self._kinds: Counter[str] = Counter()
        self._last_player: Player | None = None
        self._all_steps = 0
        self._pending = Pending()
        self._events: list[tuple[int, Event]] = []
        self._speeds: list[tuple[Stream, int, NDArray[np.float32]]] = []  # of coupled replicas
        self._nonfinite_seen = False
        self._found: dict[str, Any] | None = None  # of a loss that was not finite, until a step follows
        self._backward_calls = 0
        self._has_marks = False  # whether an optimiser's gradient was there after its step
        self._reads_backward = True  # whether there is something to read after the running backward pass
        self._active = False
        self._was_attached = False
        self._sees_compiled = False
        self._sampling = True
        self._before_step = self.guard(self._prepare_step)
        self._handles: list[Any] = []
        self._wraps = Wraps()
        self._precision = MixedPrecision()
        self._start = time.perf_counter()
        self._described = (-1.0, 0)
        self._flushed = time.perf_counter()

    # Attaching -------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Install the hooks; nothing of the user's is changed.

        Raises:
            OptionError: if the watch was attached before: its record is finished.
        """
        if self._was_attached:
            raise OptionError(
                "watch(): found a watch that was entered before; a watch can be entered once, because leaving "
                "it finishes the record. Nothing was attached. Call watch(model, optimizer) again."
            )
        self._was_attached = self._active = True
        self._start = time.perf_counter()
        self.recorder.run.setdefault("torch", torch.__version__)
        self.recorder.run.setdefault("started", time.time())
        self._handles = [
            register_optimizer_step_pre_hook(self._step_begins),
            register_optimizer_step_post_hook(self.guard(self._after_step)),
        ]
        self._wraps.replace(torch.autograd, "backward", self._watched_backward)
        self._wraps.replace(torch.amp.GradScaler, "scale", self._watched_scale)
        self._wraps.replace(torch.amp.GradScaler, "step", self._watched_scaler_step)
        self._wraps.replace(torch, "compile", self._watched_compile)
        self._watch_compiled()
        for model in self.roster.models:
            self.guard(self._meet)(model)
        self.guard(self._capture.arm)()

    def _meet(self, model: nn.Module) -> None:
        if any(map(_is_compiled, model.modules())):
            self._capture.compiled = True
        self._capture.meet(model)

    def _watch_compiled(self) -> None:
        """Wrap the call of compiled models, once torch's compiler is loaded: it warns of global hooks."""
        compiler = sys.modules.get("torch._dynamo.eval_frame")
        if compiler is not None and not self._sees_compiled and self._active:
            self._sees_compiled = True
            self._wraps.replace(compiler.OptimizedModule, "__call__", self._watched_compiled_call)

    def _watched_compile(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            compiled = original(*args, **kwargs)
            self._watch_compiled()
            return compiled

        return wrapped

    def _watched_compiled_call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        before = self.guard(self._capture.before_compiled)

        @functools.wraps(original)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            before(module)
            return original(module, *args, **kwargs)

        return call

    def detach(self) -> None:
        """Remove every hook. What was recorded stays."""
        self._active = False
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._wraps.undo()
        self._capture.disarm()
        self._capture.held_out.remove()

    def close(self) -> None:
        """Detach and finish the record."""
        if self._active:
            self._timed(self.detach)
            if not self.failure:
                self._timed(self._finish)
        self._players, self._optimizers, self._last_player = {}, (), None
        self.roster.models, self._capture.stage = (), None

    def _finish(self) -> None:
        if self._found is not None:
            self._note_event("non-finite-loss", self._found)
        self._note_held_out()
        self._flush()
        self._describe()
        self.recorder.close()

    def recording(self) -> Recording:
        """Return what was recorded so far."""
        if self._active:
            self._timed(self._flush)
            self._timed(self._describe)
        return self.recorder.recording()

    # Callbacks -------------------------------------------------------------------------------------

    def guard(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """Time a callback, and switch watching off if it fails: training goes on."""
        clock = self._clock

        @functools.wraps(callback)
        def guarded(*args: Any, **kwargs: Any) -> None:
            if is_dynamo_compiling() or not self._active:  # first: nothing else may be traced
                return
            begin, inside = clock(), self.inside
            self._trained = begin - inside
            try:
                callback(*args, **kwargs)
            except Exception as error:
                self._fail(error)
            self.inside = inside + clock() - begin  # whatever ran guarded in the callback is part of it

        return guarded

    def _timed(self, action: Callable[[], None]) -> None:
        begin = self._clock()
        try:
            action()
        except Exception as error:
            self._fail(error)
        self.inside += self._clock() - begin

    def _fail(self, error: Exception) -> None:
        """Switch watching off and say so, once."""
        self._active = False
        self.failure = f"{type(error).__name__}: {error}"
        log.warning("watching stopped, training goes on: %s", self.failure, exc_info=log.isEnabledFor(logging.DEBUG))
        self.recorder.run["failure"] = self.failure
        for action in (self.detach, self._finish, self.recorder.close):
            try:
                action()
            except Exception:
                log.debug("%s failed too", action, exc_info=True)

    def _watched_backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        before, after = self.guard(self._before_backward), self.guard(self._after_backward)

        @functools.wraps(original)
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._active or torch._C._current_graph_task_id() != -1:
                return original(tensors, *args, **kwargs)
            before(tensors)
            result = original(tensors, *args, **kwargs)
            if self._reads_backward:
                after()
            return result

        return backward

    def _watched_scale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def scale(scaler: Any, outputs: Any) -> Any:
            scaled = original(scaler, outputs)
            if self._active:
                self._precision.note_scaled(scaler)
            return scaled

        return scale

    def _watched_scaler_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        note = self.guard(self._note_skipped)

        @functools.wraps(original)
        def step(scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            before = self._all_steps, self._skips()
            result = original(scaler, optimizer, *args, **kwargs)
            if (self._all_steps, self._skips()) == before and scaler.is_enabled():
                note(optimizer)
            return result

        return step

    def _skips(self) -> int:
        return sum(player.skipped for player in self._players.values())

    def _before_backward(self, tensors: Any) -> None:
        self._backward_calls += 1
        self._reads_backward = self._sampling
        if self._has_marks:
            self._look_at_marks()
        if type(tensors) is Tensor and self._precision.scaler is None and tensors.is_cpu and tensors.ndim == 0:
            loss, value = tensors, tensors.item()  # the usual case, kept short
        else:
            loss, value = self._read_loss(tensors)
        if value is None or isinstance(value, complex):
            return
        values = self._pending.values
        if len(values) >= MAX_PENDING:  # no optimiser of torch's steps here
            values.clear()
        values.append(value)
        if type(value) is float and not isfinite(value):
            self._note_nonfinite(loss, value)
        if self._sampling and (self._capture.is_armed or self._capture.compiled):
            self._capture.read_graph(loss)

    def _look_at_marks(self) -> None:
        """Note which optimisers' gradients were cleared; what was not has to be read after the backward pass."""
        for player in self._players.values():
            look_whether_cleared(player)
        self._has_marks = any(player.mark is not None for player in self._players.values())
        self._reads_backward |= self._has_marks

    def _read_loss(self, tensors: Any) -> tuple[Any, Any]:
        """Return the tensor that is the loss and its value; None for what is no single number."""
        if not isinstance(tensors, Tensor) and isinstance(tensors, Sequence):  # an iterator would be used up
            tensors = tensors[0] if tensors else None
        self._precision.begin_backward()
        if not isinstance(tensors, Tensor) or tensors.numel() != 1:
            return tensors, None
        return tensors, self._precision.value_of(tensors)

    def _note_nonfinite(self, loss: Tensor, value: float) -> None:
        """Find out where the first loss that is not finite came from."""
        if not self._nonfinite_seen:
            self._nonfinite_seen = True
            self._found = {"loss": value, **self._capture.locate_nonfinite(loss)}

    def _after_backward(self) -> None:
        capture = self._capture
        if self._sampling:
            capture.read_gradients()
            if capture.stage is not None:
                capture.stage.slot.scale = self._precision.copy_of_scale()
        for player in self._players.values():
            if player.mark is not None:
                player.mark = (player.mark[0], player.mark[0]._version)

    def _step_begins(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if is_dynamo_compiling():
            return
        self._pending.before_step = len(self._pending.values)
        if self._sampling or id(optimizer) not in self._players:  # else nothing is to be done: the quick way
            self._before_step(optimizer)

    def _prepare_step(self, optimizer: torch.optim.Optimizer) -> None:
        player = self._player(optimizer)
        if player is not None and self._is_sampling(player) and self._capture.stage is not None:
            self._capture.stage.take_weights(self._rows_of(player), after=False)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        player = self._players.get(id(optimizer))
        if player is None or player.reference() is not optimizer:
            return
        self._precision.waiting = 0
        if player.has_found_inf and self._was_left_out(player, optimizer):
            self._note_skipped(optimizer)
            return
        if self._held_out.waiting:
            self._note_held_out()
        if self._found is not None:
            self._place_event(player)
        if player.is_checked and self._backward_calls > player.backward_calls:
            player.checked += 1
            player.uncleared += not player.is_cleared
        player.backward_calls = self._backward_calls
        self._note_loss(player)
        if self._sampling and self._is_sampling(player):
            self._close_sample(player)
        self._count(player)
        player.is_checked = player.steps < CHECKED_STEPS or player.steps % CHECKED_EVERY == 0
        if player.is_checked:
            mark_gradient(player, optimizer)
            self._has_marks |= player.mark is not None
        elif player.mark is not None:
            player.mark = None
        if self._sampling or len(self._players) > 1 or player.is_due(self.every):
            self._plan_next()
        if len(self._pending.stepped) % FLUSH_LOSSES == 0 and time.perf_counter() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def _was_left_out(self, player: Player, optimizer: Any) -> bool:
        """Say whether a fused optimiser under mixed precision left its step out by itself."""
        found = getattr(optimizer, "found_inf", None)
        return found is not None and (found.device.type == "cpu" or self._is_sampling(player)) and bool(found)

    def _count(self, player: Player) -> None:
        if self._last_player is not None and self._last_player is not player:
            player.takeovers += 1
        self._last_player = player
        player.steps += 1
        player.stream.total_steps = player.steps
        self._all_steps += 1
        player.last_seen = self._all_steps

    def _plan_next(self) -> None:
        """Decide what is looked at until the next step."""
        due = self._due()
        self._sampling = bool(due) or not self._players
        if any(player.is_fully_due(self.every) for player in due):
            self._capture.arm()
        elif self._capture.is_armed:
            self._capture.disarm()

    def _note_skipped(self, optimizer: Any) -> None:
        """Count a step that mixed precision left out because a gradient was not finite."""
        player = self._player(optimizer)
        if player is not None:
            player.skipped += 1
            self._precision.waiting = 0
            self._place_event(player)
            self._pending.values.clear()
            self._capture.start_again()

    # Who steps -------------------------------------------------------------------------------------

    def _player(self, optimizer: torch.optim.Optimizer) -> Player | None:
        """Return the player of an optimiser, meeting it if it holds a watched parameter."""
        player = self._players.get(id(optimizer))
        if player is not None and player.optimizer is optimizer:
            if len(optimizer.param_groups) != player.groups:
                player.owned, player.groups = self.roster.owned([optimizer]), len(optimizer.param_groups)
                player.roster_version = -1
            return player
        if self._optimizers and all(optimizer is not known for known in self._optimizers):
            return None
        owned = self.roster.owned([optimizer])
        if self.roster.models and not any(owned & member.parameters for member in self.roster.members):
            return None
        if not any(owned & member.parameters for member in self.roster.members):
            for model in _models_of(owned):
                self._meet(model)
        self._retire()
        kind = type(optimizer).__name__
        number = self._kinds[kind]
        self._kinds[kind] += 1
        stream = self.recorder.stream(kind + (f"-{number + 1}" if number else ""))
        player = Player(weakref.ref(optimizer), stream, owned, len(optimizer.param_groups))
        player.has_found_inf = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self._players[id(optimizer)] = player
        return player

    def _retire(self) -> None:
        """Finish the traces of optimisers that were freed."""
        for key, player in list(self._players.items()):
            if player.optimizer is None:
                self._refresh(player)
                player.stream.is_done = True
                del self._players[key]

    def _due(self) -> list[Player]:
        """Return the optimisers whose next step is to be sampled, without those that stopped stepping."""
        return [
            player
            for player in self._players.values()
            if player.is_due(self.every)
            and self._all_steps - player.last_seen < DORMANT
            and player.optimizer is not None
        ]

    def _is_sampling(self, player: Player) -> bool:
        capture = self._capture
        return self._sampling and capture.stage is not None and player.is_due(self.every)

    def _rows_of(self, player: Player) -> list[int]:
        stage = self._capture.stage
        if stage is None:
            return []
        return [row for key, row in stage.row_of.items() if key in player.owned]

    # Samples and losses -----------------------------------------------------------------------------

    def _note_loss(self, player: Player) -> None:
        """Give the losses since the last step to this one: their sum, or the first a closure computed."""
        pending = self._pending
        values = pending.values
        if len(values) > pending.before_step:
            values = values[pending.before_step : pending.before_step + 1]
        values = values or pending.last
        pending.stepped.append((player.stream, player.steps, values))
        pending.last, pending.values = values, []

    def _close_sample(self, player: Player) -> None:
        stage, optimizer = self._capture.stage, player.optimizer
        if stage is None or optimizer is None:
            return
        stage.take_weights(self._rows_of(player), after=True)
        if self._capture.plan is not None and not player.stream.loss_paths:
            player.stream.loss_paths = self._capture.plan.loss_paths
        player.loss_kind = self._capture.loss_kind or player.loss_kind
        slot = stage.slot
        slot.owner, slot.step = player, player.steps
        slot.facts["seconds"] = time.perf_counter() - self._start
        slot.facts["lr"] = float(optimizer.param_groups[0].get("lr", math.nan))
        for member in self.roster.members:
            if member.parameters & player.owned:
                member.updates += member.is_trainable
                player.root = member.root
        if player.steps < DENSE_STEPS or player.roster_version != self.roster.version:
            self._look_up_layers(player, stage)
        player.fronts.add(self._capture.front.take(), player.steps)
        others = [other for other in self._due() if other is not player]
        counts = self._carried(slot.counts, player) if others or self._all_steps < 4 else {}
        self._capture.sample_ends()
        if stage.close_slot() or self.roster.has_gone:
            self._flush()
        if self.roster.has_gone:
            self._capture.release()
            counts = {}
        if counts:
            self._carry_gradients(slot, player, self._capture.stage)
            stage.carry_over(counts)
            self._capture.forget_gradients()
        else:
            self._capture.forget()

    def _look_up_layers(self, player: Player, stage: Stage) -> None:
        """Note which layers belong to a trace: those of the models its optimiser trains, and what ran with them."""
        roots = {m.root for m in self.roster.members if m.parameters & player.owned}
        ran = {
            layer for (layer, what), row in stage.block_rows.items() if what == "output" and row in stage.slot.counts
        }
        new = [m for m in self.roster.members if m.root in roots or m.number in ran]
        known = set(map(id, player.columns))
        player.columns += [member for member in new if id(member) not in known]
        player.roster_version = self.roster.version
        if len(player.columns) > len(known) or player.steps == SETTLED:
            self._refresh(player)

    def _refresh(self, player: Player) -> None:
        """Bring the facts of a trace up to date; what was freed keeps its last ones."""
        everyone = [p.optimizer for p in self._players.values() if p is not player]
        elsewhere = self.roster.owned(o for o in everyone if o is not None)
        stream = player.stream
        stream.layers = self.roster.layers(player.columns, stream.layers, player.owned, elsewhere)
        stream.facts.update(player_facts(player))

    def _carry_gradients(self, slot: Slot, player: Player, stage: Stage | None) -> None:
        """Give the newly begun sample what one backward pass left for the optimisers that step next."""
        if stage is None or stage.slot is slot:
            return
        own = {m.number for m in self.roster.members if m.parameters & player.owned}
        stage.slot.scale = slot.scale
        stage.slot.grad_norms += slot.grad_norms
        stage.slot.sampled_grads |= slot.sampled_grads
        stage.slot.deltas += [(layers, norms) for layers, norms in slot.deltas if not own.issuperset(layers)]

    def _carried(self, counts: dict[int, tuple[int, int]], player: Player) -> dict[int, tuple[int, int]]:
        """Return the blocks of layers that this player does not own: another one's step may follow."""
        stage = self._capture.stage
        if stage is None:
            return {}
        keep = {m.number for m in self.roster.members if not m.parameters & player.owned and m.is_trainable}
        return {row: counts[row] for (layer, _), row in stage.block_rows.items() if layer in keep and row in counts}

    def _flush(self) -> None:
        """Turn what waits into rows of the record."""
        self._flushed = time.perf_counter()
        stage, pending = self._capture.stage, self._pending
        fetched = stage.flush() if stage is not None else None
        losses = [(stream, step, value) for stream, step, value in fetch_losses(pending.stepped)]
        pending.stepped = []
        loss_at = {(id(stream), step): value for stream, step, value in losses}
        samples = [] if fetched is None or stage is None else sample_rows(fetched, stage, self.roster.members, loss_at)
        streams = self.recorder.streams
        events = [(streams[number], event) for number, event in self._events] if streams else []
        self._events = [] if streams else self._events
        if fetched:
            for player in self._players.values():
                if not player.stream.layers:
                    self._describe()
                    break
        self.recorder.write(samples, losses, events, self._speeds)
        self._speeds = []
        now = time.perf_counter()
        if now - self._described[0] > 1.0 or self._described[1] != len(self.roster.members):
            self._describe()

    def _note_held_out(self) -> None:
        """Keep the loss of an evaluation that ran since the last step."""
        value = self._capture.held_out.take()
        if value is not None:
            self._note_event("validation-loss", {"loss": value})

    def _place_event(self, player: Player) -> None:
        """Give a loss that was not finite to the optimiser whose step it led to."""
        if self._found is not None:
            self._events.append((player.stream.number, Event(player.steps, "non-finite-loss", self._found)))
            self._found = None

    def _note_event(self, kind: str, details: dict[str, Any]) -> None:
        """Keep a first occurrence for the optimiser that stepped last."""
        player = self._last_player or next(iter(self._players.values()), None)
        number = 0 if player is None else player.stream.number
        self._events.append((number, Event(0 if player is None else player.steps, kind, details)))

    def note_speeds(self, layers: Sequence[nn.Module], step: int, rows: NDArray[np.float32]) -> None:
        """Keep how fast layers of coupled replicas learn, for the optimiser that stepped last.

        Args:
            layers: These layers, in the same order each time.
            step: How many steps had been done.
            rows: (layers, `SPEEDS`)
        """
        if self._last_player is not None:
            stream = self._last_player.stream
            if not stream.speed_layers:
                stream.speed_layers = tuple(self.roster.names.get(layer, "") for layer in layers)
            self._speeds.append((stream, step, rows))

    def _describe(self) -> None:
        """Write the facts of the run so far."""
        for player in self._players.values():
            self._refresh(player)
        seconds = time.perf_counter() - self._start
        self.recorder.run.update(
            seconds=round(seconds, 3),
            steps=max((stream.total_steps for stream in self.recorder.streams), default=0),
            watch_share=round(self.inside / max(seconds, 1e-9), 5),
            backward_calls=self._backward_calls,
            every=self.every,
            seed=torch.initial_seed(),
            layers_left_out=self.roster.left_out,
            device=str(self._capture.stage.device) if self._capture.stage is not None else "none",
            is_compiled=self._capture.compiled,
        )
        self.recorder.describe()
        self._described = (time.perf_counter(), len(self.roster.members))


def _models_of(owned: frozenset[int]) -> list[nn.Module]:
    """Return the models that hold these parameters; for those whose calls no hook can see (compiled ones).

    Cost: one pass over the objects of the process; once for an optimiser of which no layer was seen.
    """
    modules = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
    children = {id(child) for module in modules for child in module._modules.values()}
    return [
        module for module in modules if id(module) not in children and any(id(p) in owned for p in module.parameters())
    ]


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None

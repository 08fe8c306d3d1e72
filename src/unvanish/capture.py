"""One sampled step: what the forward and the backward pass leave in the staging ring.

Global module hooks see every call, also of modules that no model registers; they are there only while a
step is sampled. Gradients are read at the end of `backward`: summed over devices, before any clipping.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from .graph import (
    MAX_NODES,
    GraphPlan,
    first_nonfinite,
    key,
    plan_graph,
    prediction_and_target,
    read_loss_paths,
    saved,
    walk,
)
from .held_out import HeldOut
from .layers import is_layer
from .measures import delta_norm
from .recomputed import FrozenFront
from .roster import Member, Roster
from .shown import VIEWERS, Pass
from .staging import SPECIAL, Slot, Stage

MAX_PLANS = 32
LEARNING = 8  # samples after a new model or kind of graph: several losses may come in turn
MAX_OUTPUT = 1 << 20  # entries of a model's output that is kept until the loss is known


class Capture:
    """Takes the samples of one step at a time.

    Args:
        roster: Learns the modules that run.
        guard: Wraps a callback so that its failure switches watching off instead of the training.
        clock: Seconds that the training has taken, without the watch.
    """

    def __init__(self, roster: Roster, guard: Any, clock: Callable[[], float]) -> None:
        self.roster = roster
        self.front = FrozenFront(clock)
        self.stage: Stage | None = None
        self.plan: GraphPlan | None = None
        self.loss_kind = ""
        self.compiled = False
        self.held_out = HeldOut(guard)
        self._before_model, self._after_layer = guard(self._enter_model), guard(self._read_call)
        self._at_output = guard(self._note_delta)
        self._at_losses = guard(self._scale_deltas)
        self.look = guard(self._look)
        self.is_paused = False
        self._shown: tuple[int, GraphPlan] | None = None  # the key of losses in the graph, and what is below them
        self._handles: list[Any] = []
        self._inside: nn.Module | None = None  # the model that is being called
        self._quiet: WeakSet[nn.Module] = WeakSet()  # modules of known models that are no layers
        self._learning = LEARNING  # samples for which the names of all modules are wanted
        self._outputs: dict[int, str] = {}  # by the key of the node: a node would keep its graph alive
        self._root_outputs: deque[tuple[int, Tensor]] = deque(maxlen=8)
        self._deltas: dict[int, Tensor] = {}
        self._plans: dict[tuple[frozenset[str], tuple[str, ...]], GraphPlan] = {}

    @property
    def is_armed(self) -> bool:
        """Say whether this step is being sampled."""
        return bool(self._handles)

    def arm(self) -> None:
        """Begin to sample: from now on forward calls leave blocks behind."""
        self.front.begin()
        if self._handles or self.compiled:
            return
        self._inside = None
        self._handles = [
            register_module_forward_pre_hook(self._before_call),
            register_module_forward_hook(self._after_call, with_kwargs=True, always_call=True),
        ]
        VIEWERS.add(self)

    def disarm(self) -> None:
        """Stop sampling and forget what is held of the step."""
        _remove(self._handles)
        self._handles = []
        VIEWERS.discard(self)
        self.front.forget()
        self.forget()

    def forget(self) -> None:
        """Forget the graph nodes and tensors of the step, so that their memory can go."""
        self._inside = self._shown = None
        self._outputs.clear()
        self._root_outputs.clear()
        self._deltas.clear()

    def sample_ends(self) -> None:
        """Count the samples for which all modules are named."""
        self._learning = max(self._learning - 1, 0)

    def forget_gradients(self) -> None:
        """Forget the backward norms, which belong to the step that has just ended."""
        self._deltas.clear()

    def start_again(self) -> None:
        """Forget the sample being taken: its step was left out."""
        self.forget()
        if self.stage is not None:
            self.stage.slots[self.stage.filled] = Slot()

    def _before_call(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or self._inside is not None or self.is_paused:
            return  # the quick way for all that runs inside of a model
        self._before_model(module)

    def _enter_model(self, module: nn.Module) -> None:
        if _is_transformed():
            return
        if _is_compiled(module):
            self.before_compiled(module)
            return
        if not self.roster.knows(module):
            self._enter(module)
        if self.roster.knows(module):
            self._inside = module
            self.front.enter()

    def before_compiled(self, module: nn.Module) -> None:
        """Take the hooks off before a compiled model runs; from now on only its parameters are sampled.

        A hook traced into a compiled graph would cost a compilation each time it comes or goes.
        """
        if self._inside is None and not self.compiled:
            self.compiled = True
            _remove(self._handles)
            self._enter(module)

    def _enter(self, model: nn.Module) -> None:
        """Meet a model for the first time; a lazy one at its second call, when it has weights."""
        if isinstance(model, nn.modules.loss._Loss):
            self.held_out.meet(model)
            return
        if next(model.parameters(), None) is None or _is_on_loan(model):
            return
        if self.roster.models and not any(model is m or self.roster.knows(model) for m in self.roster.models):
            return
        with torch.inference_mode(mode=False):  # rings made in there could not be written to later
            self.meet(model)

    def meet(self, model: nn.Module) -> None:
        """Name a model and make room for its layers."""
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
            return
        members = self.roster.enter(model)
        self._learning = LEARNING
        self._quiet.update(module for module in model.modules() if self.roster.member(module) is None)
        if self.stage is None:
            parameter = next((p for p in model.parameters()), None)
            device = torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device
            self.stage = Stage(device)
        self._seat(members, self.stage)

    def _seat(self, members: Sequence[Member], stage: Stage) -> None:
        """Give layers their rows."""
        for member in members:
            module = member.module
            stage.add_layer(nn.Identity() if module is None else module)
            member.twin = self._twin(member)
            stage.block_row(member.number, "output")
        for what in ("prediction", "target"):
            stage.block_row(SPECIAL, what)
        stage.make_room()

    def release(self) -> None:
        """Let go of layers that were freed: begin new rings for those that stay."""
        if self.stage is not None:
            self.roster.release()
            self.stage = Stage(self.stage.device)
            self._seat(self.roster.members, self.stage)
            self._plans.clear()
            self.plan = None

    def _twin(self, member: Member) -> int:
        """Return the layer that has all parameters of this one, if it came first; -1 if none has."""
        stage = self.stage
        rows = [] if stage is None else [stage.row_of.get(key, -1) for key in member.parameters]
        if stage is None or not rows or min(rows) < 0:
            return -1
        first = stage.rows[rows[0]].layer
        return first if first != member.number and all(stage.rows[r].layer == first for r in rows) else -1

    def _after_call(self, module: nn.Module, args: Any, *rest: Any) -> None:
        if torch.compiler.is_compiling() or self._inside is None:
            return
        if self._learning or self.front.is_open or module is self._inside or module not in self._quiet:
            self._after_layer(module, args, *rest)

    def _read_call(self, module: nn.Module, args: Any, *rest: Any) -> None:
        kwargs, output = rest if len(rest) == 2 else ({}, None)  # no kwargs from a call that raised
        is_model = module is self._inside
        owner, self._inside = self._inside, None if is_model else self._inside
        stage = self.stage
        if output is None or stage is None or owner is None or _in_backward() or _is_transformed():
            return
        if self.front.is_open:
            self.front.called(module, self.roster.names.get(module, ""), _first_tensor(output), owner)
        if is_model:
            self.front.leave(_first_tensor((args, kwargs)), _first_tensor(output))
        if not torch.is_grad_enabled():
            self._note_call(module, (args, kwargs), output)
            return
        if not self.roster.knows(module):
            self._adopt(module, owner)
        tensor = _first_tensor(output)
        if tensor is None:
            return
        if tensor.grad_fn is not None:
            if len(self._outputs) > MAX_NODES:  # calls without end and without a step
                self._outputs.clear()
            self._outputs.setdefault(key(tensor.grad_fn), self.roster.names.get(module, ""))
        member = self.roster.member(module)
        if member is not None:
            self._read_layer(member, tensor, (args, kwargs), stage)
        if is_model:
            self._leave(module, (args, kwargs), output)

    def _read_layer(self, member: Member, tensor: Tensor, inputs: Any, stage: Stage) -> None:
        if member.position < 0:
            self.roster.called(member, tensor, _first_tensor(inputs))
        row = stage.block_row(member.number, "output")
        if stage.wants(row):
            stage.take_block(row, tensor.detach(), member.unit_dim)
        if tensor.requires_grad and member.number not in self._deltas:
            tensor.register_hook(functools.partial(self._at_output, member.number))  # type: ignore[no-untyped-call]

    def _note_call(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Note the place of a layer in a training pass whose graph is built later (checkpointing)."""
        member, tensor = self.roster.member(module), _first_tensor(output)
        if member is not None and member.position < 0 and module.training and tensor is not None:
            self.roster.called(member, tensor, _first_tensor(inputs))

    def _adopt(self, module: nn.Module, owner: nn.Module) -> None:
        """Take in a layer that runs inside a model but that no model lists."""
        stage = self.stage
        if stage is not None and is_layer(module):
            self._seat(self.roster.adopt(module, list(owner.modules())), stage)

    def _note_delta(self, number: int, grad: Tensor) -> None:
        """Note the norm of the gradient at a layer's output as it comes by."""
        if number not in self._deltas:
            self._deltas[number] = delta_norm(grad.detach())

    def _leave(self, model: nn.Module, inputs: Any, output: Any) -> None:
        """Note input and output of a model."""
        stage, root = self.stage, self.roster.root_of(model)
        if stage is None or root < 0:
            return
        tensors = [t for t in _tensors(output) if t.is_floating_point() and t.numel() > 1]
        small = [t for t in tensors[:4] if t.grad_fn is not None and t.numel() <= MAX_OUTPUT]
        self._root_outputs.extend((key(t.grad_fn), t.detach()) for t in small)
        for what, tensor in (("input", _first_tensor(inputs)), ("output", tensors[0] if tensors else None)):
            if tensor is None or not tensor.is_floating_point():
                continue
            row = stage.block_row(SPECIAL - 1 - root, what)
            if stage.needs_room():
                stage.make_room()
            if stage.wants(row):
                stage.take_block(row, tensor.detach(), 1 if tensor.dim() == 4 else -1)
                if what == "input":
                    stage.slot.facts.setdefault("batch", float(tensor.shape[0]) if tensor.dim() else 1.0)

    def _look(self, compute: Pass, losses: Tensor) -> None:
        """See a pass that is computed for this capture alone: its calls, its graph, the gradients at its layers."""
        self._inside = self._shown = None
        self._outputs.clear()
        self._root_outputs.clear()
        before = set(self._deltas)
        loss, trained = compute()
        self.read_graph(loss)
        torch.autograd.grad(loss, trained, allow_unused=True)
        losses.register_hook(functools.partial(self._at_losses, self._deltas.keys() - before))  # type: ignore[no-untyped-call]
        if self.plan is not None and losses.grad_fn is not None:
            self._shown = key(losses.grad_fn), self.plan

    def _scale_deltas(self, shown: Collection[int], grad: Tensor) -> None:
        """Give gradients that were shown the size that they have in the training: its loss may be a mean of losses."""
        for number in shown:
            if number in self._deltas:
                self._deltas[number] = self._deltas[number] * grad[0].abs()

    def _read_above(self, loss: Tensor, losses: int, shown: GraphPlan) -> None:
        """Read the way from the loss down to the losses whose graph was shown."""
        assert loss.grad_fn is not None
        name = "losses"
        above = read_loss_paths(loss.grad_fn, {losses: name}, frozenset((name,)))
        ways = [path[:-1] for path in above if path[-1].layer == name]
        self.plan = replace(shown, loss_paths=tuple((*way, *path) for way in ways for path in shown.loss_paths))

    def read_graph(self, loss: Tensor) -> None:
        """Read activations, prediction and target from the graph of a loss, before it is freed."""
        stage = self.stage
        if stage is None or loss.grad_fn is None:
            return
        if self._shown is not None:
            self._read_above(loss, *self._shown)
            return
        nodes, signature = walk(loss.grad_fn)
        called = frozenset(self.roster.by_name.keys() & self._outputs.values())  # like models have like signatures
        plan = self._plans.get((called, signature))
        if plan is None and not self._learning:
            self._learning = LEARNING  # this sample knows the layers only; the next ones name all modules
            return
        if plan is None:
            plan = plan_graph(nodes, signature, self._outputs, frozenset(self.roster.by_name))
            if len(self._plans) < MAX_PLANS:
                self._plans[called, signature] = plan
            self._note(plan, stage)
        self.plan = plan
        blocks = []
        for place, layer, activation in plan.activations:
            member = self.roster.by_name[layer]
            row = stage.block_row(member.number, "activation", (activation.dead_at, activation.low, activation.high))
            value = saved(nodes[place], activation.saved) if stage.wants(row) else None
            if value is not None:
                blocks.append((row, value, member.unit_dim if value.dim() > 2 else -1))
        prediction, target, kind = prediction_and_target(nodes, self._root_outputs)
        self.loss_kind = kind or self.loss_kind
        for what, value in (("prediction", prediction), ("target", target)):
            if value is not None and value.numel() and not value.is_complex():
                blocks.append((stage.block_row(SPECIAL, what), value, -1))
        stage.take_blocks(blocks)

    def _note(self, plan: GraphPlan, stage: Stage) -> None:
        """Keep what a new kind of graph says of the layers."""
        for name, depth in plan.depths.items():
            self.roster.by_name[name].path_depth = depth
        for _, layer, activation in plan.activations:
            self.roster.by_name[layer].activation = activation.kind
            stage.block_row(self.roster.by_name[layer].number, "activation")
        stage.make_room()

    def read_gradients(self) -> None:
        """Read gradients and backward norms, at the end of a backward pass."""
        if self.stage is not None:
            with torch.no_grad():  # gradients carry a graph after ``create_graph=True``
                self.stage.take_grads(with_samples=self.is_armed or self.compiled)
                self.stage.take_deltas(self._deltas)

    def locate_nonfinite(self, loss: Tensor) -> dict[str, Any]:
        """Say where a loss that is not finite came from."""
        if loss.grad_fn is None:
            return {}
        nodes, signature = walk(loss.grad_fn)
        known = self.plan.names if self.plan is not None and self.plan.signature == signature else {}
        names = {place: self._outputs.get(key(node)) or known.get(place, "") for place, node in enumerate(nodes)}
        return first_nonfinite(nodes, {place: name for place, name in names.items() if name})


def _remove(handles: list[Any]) -> None:
    """Remove global module hooks, and the note of their keyword arguments that torch 2.13 leaves behind."""
    for handle in handles:
        handle.remove()
        nn.modules.module._global_forward_hooks_with_kwargs.pop(handle.id, None)


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None


def _is_on_loan(model: nn.Module) -> bool:
    """Say whether the model computes with tensors lent for this call; its optimiser's step shows its own."""
    return not all(isinstance(p, nn.Parameter) for p in model.parameters())


def _is_transformed() -> bool:
    """Say whether tensors are not what they seem: under `torch.func`, tracing, or a dispatch mode."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def _in_backward() -> bool:
    """Say whether autograd is running: activation checkpointing repeats the forward pass there."""
    return bool(torch._C._current_graph_task_id() != -1)


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors of a nested output, in order; at most a few levels deep."""
    found: list[Tensor] = []
    stack = [(value, 0)]
    while stack and len(found) < 16:
        item, depth = stack.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif depth < 4 and isinstance(item, Mapping):
            stack.extend((v, depth + 1) for v in reversed(list(item.values())))
        elif depth < 4 and isinstance(item, (tuple, list)):
            stack.extend((v, depth + 1) for v in reversed(item[:16]))
    return found


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    tensors = _tensors(value)
    return tensors[0] if tensors else None

"""What a treatment is: a generator that changes before its ``yield`` and undoes after it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TreatmentError
from ..records import Change

Steps = Generator[Change, None, None]


@dataclass
class Patient:
    """What a treatment may change.

    Args:
        model: The model.
        optimizers: Its optimisers; may be empty where a treatment does not need one.
        inputs: Positional arguments of a forward call, for treatments that look at data.
        facts: What an untreated run found, by name: ``target_mean``, ``target_std``.
    """

    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    inputs: tuple[Any, ...] = ()
    facts: dict[str, float] = field(default_factory=dict)

    def need_optimizer(self, treatment: str) -> tuple[torch.optim.Optimizer, ...]:
        """Return the optimisers.

        Raises:
            TreatmentError: if there is none.
        """
        if not self.optimizers:
            raise TreatmentError(
                f"treat(): {treatment!r} acts at the optimiser's step: found no optimizer, expected one. "
                f"Nothing was changed. Call treat(model, optimizer, {treatment!r})."
            )
        return self.optimizers


@dataclass(frozen=True, slots=True)
class Treatment:
    """One remedy, ready to be applied.

    ``preserves_function``: the network computes the same right after applying it. ``code``: what a user writes
    in the script to get the same.
    """

    id: str
    apply: Callable[[Patient], Steps]
    value: str = ""
    preserves_function: bool = False
    code: str = ""

    def __str__(self) -> str:
        return f"{self.id}={self.value}" if self.value else self.id


@contextmanager
def applied(treatment: Treatment, patient: Patient) -> Iterator[Change]:
    """Apply a treatment; leaving undoes it, also after an exception."""
    steps = treatment.apply(patient)
    change = next(steps)
    try:
        yield change
    finally:
        if next(steps, None) is not None:
            raise AssertionError(f"{treatment.id} yields twice")


@contextmanager
def saved_tensors(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put the values of some tensors back on leaving, bit for bit."""
    copies = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in copies:
                tensor.copy_(copy)


@contextmanager
def forgotten(optimizers: Iterable[torch.optim.Optimizer], tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let optimisers forget what they remember of tensors whose values are new; leaving brings it back."""
    kept = []
    for optimizer in optimizers:
        for tensor in tensors:
            if tensor in optimizer.state:
                kept.append((optimizer, tensor, optimizer.state.pop(tensor)))
    try:
        yield
    finally:
        for optimizer, tensor, memory in kept:
            optimizer.state[tensor] = memory


def around_forward(model: nn.Module, before: Callable[[], Any], after: Callable[[Any, Any], Any]) -> list[Any]:
    """Run ``before`` as the model is called and let ``after`` change its output; nested calls are left alone."""
    stack: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(before())

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        return after(stack.pop(), output)

    return [model.register_forward_pre_hook(enter), model.register_forward_hook(leave, always_call=True)]


def group_of(optimizers: Iterable[torch.optim.Optimizer], parameter: Tensor) -> dict[str, Any] | None:
    """Return the parameter group that holds a parameter; None if no optimiser does."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(held is parameter for held in group["params"]):
                return group
    return None


@contextmanager
def owned_by_optimizer(
    parameters: Iterable[nn.Parameter], optimizers: tuple[torch.optim.Optimizer, ...], like: Tensor | None = None
) -> Iterator[int]:
    """Give new parameters to the optimiser that holds ``like`` (else to the first), and take them back.

    They join a group that exists: schedulers hold one rate per group and would trip over a new one.
    """
    new = [p for p in parameters if group_of(optimizers, p) is None]
    group = group_of(optimizers, like) if like is not None else None
    if group is None and optimizers:
        group = optimizers[0].param_groups[0]
    if group is None:
        yield 0
        return
    group["params"].extend(new)
    try:
        yield len(new)
    finally:
        group["params"] = [p for p in group["params"] if all(p is not added for added in new)]
        for optimizer in optimizers:
            for parameter in new:
                optimizer.state.pop(parameter, None)

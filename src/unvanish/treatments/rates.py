"""Change the learning rate around each step, so that the user's scheduler stays the master of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..records import Change
from .gradients import _positive
from .treatment import Patient, Steps, Treatment

Factor = Callable[[int, dict[str, Any]], float]  # step, parameter group -> factor


def _scaled(identifier: str, factor: Factor, what: str) -> Callable[[Patient], Steps]:
    """Multiply the rate of each group during the step only."""

    def apply(patient: Patient) -> Steps:
        handles = []
        for optimizer in patient.need_optimizer(identifier):
            kept: list[Any] = []
            count = [0]

            def before(
                owner: torch.optim.Optimizer, args: Any, kwargs: Any, kept: list[Any] = kept, count: list[int] = count
            ) -> None:
                kept[:] = [group["lr"] for group in owner.param_groups]
                for group in owner.param_groups:
                    group["lr"] = group["lr"] * factor(count[0], group)
                count[0] += 1

            def after(owner: torch.optim.Optimizer, args: Any, kwargs: Any, kept: list[Any] = kept) -> None:
                for group, rate in zip(owner.param_groups, kept, strict=False):
                    group["lr"] = rate

            handles += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
        try:
            yield Change(identifier, what, preserves_function=True)
        finally:
            for handle in handles:
                handle.remove()

    return apply


def lower_lr(factor: float = 0.1) -> Treatment:
    """Multiply the learning rate by a factor below 1."""
    return _by("lower-lr", factor)


def raise_lr(factor: float | str = 10.0) -> Treatment:
    """Multiply the learning rate by a factor above 1; ``"hold"`` keeps the first rate whatever a schedule does."""
    return _hold_lr() if factor == "hold" else _by("raise-lr", float(factor))


def _by(identifier: str, factor: float) -> Treatment:
    _positive(factor, identifier)
    return Treatment(
        identifier,
        _scaled(identifier, lambda step, group: factor, f"learning rate times {factor:g}"),
        f"{factor:g}",
        preserves_function=True,
        code=f"for group in optimizer.param_groups:\n    group['lr'] *= {factor:g}",
    )


def warm_up(steps: int = 100) -> Treatment:
    """Raise the learning rate linearly from near 0 over the first steps.

    Source: Goyal et al. 2017, section 2.2.
    """
    _positive(steps, "warm-up")
    return Treatment(
        "warm-up",
        _scaled("warm-up", lambda step, group: min((step + 1) / steps, 1.0), f"rate rises over {steps:g} steps"),
        f"{steps:g}",
        preserves_function=True,
        code=f"scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / {steps:g}, 1.0, {steps:g})",
    )


def _hold_lr() -> Treatment:
    """Keep the first learning rate: for a schedule that takes it away too early."""

    def apply(patient: Patient) -> Steps:
        handles = []
        for optimizer in patient.need_optimizer("raise-lr"):
            first = [group["lr"] for group in optimizer.param_groups]

            def before(owner: torch.optim.Optimizer, args: Any, kwargs: Any, first: list[Any] = first) -> None:
                for group, rate in zip(owner.param_groups, first, strict=False):
                    group["lr"] = rate

            handles.append(optimizer.register_step_pre_hook(before))
        try:
            yield Change("raise-lr", "the first rate is kept", preserves_function=True)
        finally:
            for handle in handles:
                handle.remove()

    return Treatment(
        "raise-lr", apply, "hold", preserves_function=True, code="# call scheduler.step() once an epoch, or not at all"
    )

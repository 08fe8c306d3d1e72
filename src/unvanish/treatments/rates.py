"""Change the learning rate around each step, so that the user's scheduler stays the master of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TreatmentError
from ..layers import own_parameters
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


def layerwise_rates(factor: float = 0.8) -> Treatment:
    """Let each layer learn at ``factor`` times the rate of the layer above it, from the output to the input.

    Below 1 the first layers, which hold what is most general, keep it while a network is fine-tuned; above 1 they
    catch up where their gradients are small. Layers are counted by their weight matrices, in the order in which the
    model lists them; norms, biases and what else is no matrix go with the matrix before it.

    No group is split: after each step the move of a layer is scaled, p = p_old + factor**depth * (p_new - p_old).
    The move of nearly every optimiser is proportional to its rate, so this equals a rate per layer, and
    momentum, schedulers and the groups that they count stay as they are.

    Args:
        factor: Rate of a layer over that of the layer above it. Dimensionless, > 0

    Raises:
        TreatmentError: if ``factor`` is not a number > 0.

    Cost: one copy of the parameters below the last layer, during the step.

    Source: Howard & Ruder 2018, section 3.2 (a rate per layer; 1/2.6 for a net of a few layers); Clark et al. 2020
    (0.8 for a transformer of 12). Ours: the form without groups.

    Example:
        >>> import unvanish
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> with torch.no_grad():
        ...     _ = [p.fill_(2.0) for p in model.parameters()]
        >>> with unvanish.treat(model, optimizer, layerwise_rates(0.5)):
        ...     model(torch.ones(1, 1)).backward()
        ...     optimizer.step()
        >>> [p.item() for p in model.parameters()]  # both gradients are 2
        [1.0, 0.0]
    """
    _positive(factor, "layerwise-rates")

    def apply(patient: Patient) -> Steps:
        optimizers = patient.need_optimizer("layerwise-rates")
        factors = _factors(patient.model, factor)
        handles = [handle for optimizer in optimizers for handle in _scale_moves(optimizer, factors)]
        try:
            yield Change(
                "layerwise-rates", f"each layer learns at {factor:g} of the rate above", preserves_function=True
            )
        finally:
            for handle in handles:
                handle.remove()

    return Treatment(
        "layerwise-rates", apply, f"{factor:g}", preserves_function=True,
        code=f"layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]  # and what has weights\n"
        f"optimizer = torch.optim.AdamW([{{'params': m.parameters(), 'lr': lr * {factor:g}**i}}\n"
        "                               for i, m in enumerate(reversed(layers))])",
    )  # fmt: skip


def _factors(model: nn.Module, factor: float) -> dict[int, float]:
    """Return the factor of each parameter by its id; a shared one gets that of its last layer."""
    depth_of: dict[int, int] = {}
    depth = -1
    for module in model.modules():
        own = [p for _, p in own_parameters(module)]
        depth += any(p.dim() > 1 for p in own)
        depth_of.update({id(p): max(depth, 0) for p in own})
    if depth < 1:
        raise TreatmentError(
            f"treat(): 'layerwise-rates': found {depth + 1} layers with a weight matrix in {type(model).__name__}, "
            "expected at least two. Nothing was changed. For a single rate use 'lower-lr'."
        )
    return {key: factor ** (depth - place) for key, place in depth_of.items()}


def _scale_moves(optimizer: torch.optim.Optimizer, factors: dict[int, float]) -> list[Any]:
    """Scale by how far each step moves a parameter."""
    kept: list[tuple[Tensor, Tensor, float]] = []

    def before(owner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        kept.clear()
        for parameter in (p for group in owner.param_groups for p in group["params"]):
            factor = factors.get(id(parameter), 1.0)
            if factor != 1.0 and parameter.requires_grad:
                kept.append((parameter, parameter.detach().clone(), factor))

    @torch.no_grad()
    def after(owner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, old, factor in kept:
            parameter.copy_(torch.lerp(old, parameter, factor))
        kept.clear()

    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

"""Bound or rescale gradients just before the optimiser uses them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import TreatmentError
from ..records import Change
from .treatment import Patient, Steps, Treatment

Bound = Callable[[list[Tensor]], None]


def _before_each_step(identifier: str, make: Callable[[], Bound], what: str) -> Callable[[Patient], Steps]:
    """Apply ``bound`` to the parameters that hold a gradient, at the start of each optimiser step."""

    def apply(patient: Patient) -> Steps:
        handles = []
        for optimizer in patient.need_optimizer(identifier):
            bound = make()

            def before(owner: torch.optim.Optimizer, args: Any, kwargs: Any, bound: Bound = bound) -> None:
                held = [p for group in owner.param_groups for p in group["params"] if p.grad is not None]
                if held:
                    bound(held)

            handles.append(optimizer.register_step_pre_hook(before))
        try:
            yield Change(identifier, what, preserves_function=True)
        finally:
            for handle in handles:
                handle.remove()

    return apply


def _positive(value: float | str, identifier: str) -> float:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise TreatmentError(f"treat(): {identifier!r}: found {value!r}, expected a number > 0. Nothing was changed.")
    return float(value)


def clip_norm(limit: float | str = 1.0) -> Treatment:
    """Scale the whole gradient down to a norm of at most ``limit``; ``"auto"`` takes the limit from the history.

    ``"auto"``: at most the 10th percentile of the norms of the last steps, this one among them, so that the length of
    a step is nearly constant and the rate alone sets it. A step whose norm is nan or infinite never enters the
    history and is skipped as `torch.amp.GradScaler` skips it: its gradients are dropped, so that neither weights nor
    the state of the optimiser move.

    Raises:
        TreatmentError: if ``limit`` is neither a number > 0 nor ``"auto"``.

    Cost: ``"auto"`` waits for the device once a step.

    Source: Pascanu, Mikolov & Bengio 2013, algorithm 1; Seetharaman et al. 2020, section 3 (auto: percentile 10 of
    all norms). Ours: the last 1000 norms, so that the cost is bounded; steps that are not finite are skipped.

    Example:
        >>> str(clip_norm(0.5)), str(clip_norm("auto"))
        ('clip-norm=0.5', 'clip-norm=auto')
    """
    if limit == "auto":
        return _clip_by_history()
    limit = _positive(limit, "clip-norm")

    def bound(parameters: list[Tensor]) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, limit)

    return Treatment(
        "clip-norm",
        _before_each_step("clip-norm", lambda: bound, f"gradient norm at most {limit:g}"),
        f"{limit:g}",
        preserves_function=True,
        code=f"torch.nn.utils.clip_grad_norm_(model.parameters(), {limit:g})  # between backward() and step()",
    )


AUTO_HISTORY, AUTO_PERCENTILE = 1000, 10


def _clip_by_history() -> Treatment:
    """Clip to a low percentile of the norms seen so far."""

    def make() -> Bound:
        history: deque[float] = deque(maxlen=AUTO_HISTORY)

        def bound(parameters: list[Tensor]) -> None:
            norm = _whole_norm(parameters)
            if not math.isfinite(norm):
                for parameter in parameters:
                    parameter.grad = None  # optimisers leave out what has none, with its momentum
            elif norm > 0:  # a tenth of zeros would hold every later step at zero
                history.append(norm)
                torch.nn.utils.clip_grad_norm_(parameters, float(np.percentile(history, AUTO_PERCENTILE)))

        return bound

    return Treatment(
        "clip-norm",
        _before_each_step("clip-norm", make, "gradient norm at most the 10th percentile of its history"),
        "auto",
        preserves_function=True,
        code="changes = unvanish.treat(model, optimizer, 'clip-norm=auto'); changes.keep()",
    )


def _whole_norm(parameters: list[Tensor]) -> float:
    """Return the norm of all gradients together."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads))


def clip_value(limit: float = 1.0) -> Treatment:
    """Clamp each entry of the gradient to [-limit, limit].

    Source: Mikolov 2012 (element-wise clipping).
    """
    _positive(limit, "clip-value")

    def bound(parameters: list[Tensor]) -> None:
        torch.nn.utils.clip_grad_value_(parameters, limit)

    return Treatment(
        "clip-value",
        _before_each_step("clip-value", lambda: bound, f"gradient entries within {limit:g}"),
        f"{limit:g}",
        preserves_function=True,
        code=f"torch.nn.utils.clip_grad_value_(model.parameters(), {limit:g})  # between backward() and step()",
    )


HISTORY, QUANTILE = 200, 0.9


def adaptive_clip(ratio: float = 0.01) -> Treatment:
    """Bound each unit's gradient by a share of its weights, and the whole by what its history holds usual.

    A gradient that is not finite is set to zero and never enters the history.

    Source: Brock et al. 2021, equation 3 (per unit); Seetharaman et al. 2020 (quantile of the history).
    """
    _positive(ratio, "adaptive-clip")

    def make() -> Bound:
        history: deque[float] = deque(maxlen=HISTORY)

        def bound(parameters: list[Tensor]) -> None:
            norm = _whole_norm(parameters)
            if not math.isfinite(norm):
                torch._foreach_zero_([p.grad for p in parameters if p.grad is not None])
                return
            for parameter in parameters:
                _clip_units(parameter, ratio)
            if len(history) >= 20:
                usual = sorted(history)[int(QUANTILE * (len(history) - 1))]
                torch.nn.utils.clip_grad_norm_(parameters, max(usual, 1e-12))
            history.append(norm)

        return bound

    return Treatment(
        "adaptive-clip",
        _before_each_step("adaptive-clip", make, f"gradient of each unit at most {ratio:g} of its weights"),
        f"{ratio:g}",
        preserves_function=True,
        code=f"changes = unvanish.treat(model, optimizer, 'adaptive-clip={ratio:g}'); changes.keep()",
    )


def _clip_units(parameter: Tensor, ratio: float) -> None:
    """Scale rows of the gradient whose norm is above ``ratio`` times that of the weights' row."""
    grad = parameter.grad
    if grad is None or parameter.dim() < 2:
        return
    dims = tuple(range(1, parameter.dim()))
    weight_norm = torch.linalg.vector_norm(parameter.detach(), dim=dims, keepdim=True).clamp(min=1e-3)
    grad_norm = torch.linalg.vector_norm(grad, dim=dims, keepdim=True).clamp(min=1e-6)
    grad.mul_((ratio * weight_norm / grad_norm).clamp(max=1.0))


def normalise_layers(trust: float = 0.02) -> Treatment:
    """Give every weight matrix a gradient of ``trust`` times its own norm, so that no layer is left behind.

    Source: You, Gitman & Ginsburg 2017 (LARS), equation 6.
    """
    _positive(trust, "normalise-layers")

    def bound(parameters: list[Tensor]) -> None:
        for parameter in parameters:
            grad = parameter.grad
            if grad is None or parameter.dim() < 2:
                continue
            norm = torch.linalg.vector_norm(grad)
            scale = trust * torch.linalg.vector_norm(parameter.detach()) / norm.clamp(min=1e-30)
            grad.mul_(torch.where((norm > 0) & torch.isfinite(norm), scale, torch.zeros_like(scale)))

    return Treatment(
        "normalise-layers",
        _before_each_step("normalise-layers", lambda: bound, f"each layer's gradient is {trust:g} of its weights"),
        f"{trust:g}",
        preserves_function=True,
        code=f"changes = unvanish.treat(model, optimizer, 'normalise-layers={trust:g}'); changes.keep()",
    )

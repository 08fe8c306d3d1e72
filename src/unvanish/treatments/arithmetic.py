"""Keep a script's arithmetic off the points where it, or its slope, is infinite."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..records import Change
from .treatment import Patient, Steps, Treatment, around_forward

NEAREST = 1e-7  # to such a point; about the distance of two float32 numbers at 1
LARGEST_EXPONENT = 80.0  # e**80 = 6e34, and sums of such are finite, too

Guarded = Callable[..., Any]
_calls = [0]  # of treated models that are running


def safe_math() -> Treatment:
    """Compute log, sqrt, powers, quotients, exp, acos and asin of what is `NEAREST` to their edge, not at or past it.

    ``log(0)``, ``0 / 0``, the slope of ``sqrt`` at 0 and ``exp(100)`` are the usual ways of a loss to nan. This acts
    on tensors that the script computes with while gradients are on, and within calls of the model; optimisers are
    left alone. Past the edge the slope is zero. A function that was imported by name (``from torch import log``)
    before the treatment is not reached.

    Source: PyTorch documentation (`torch.autograd` mechanics: gradients of functions at the edge of their domain).
    Ours: the two numbers.

    Example:
        >>> import unvanish
        >>> model = torch.nn.Linear(1, 1)
        >>> count = torch.tensor([0.0, 1.0], requires_grad=True)
        >>> with unvanish.treat(model, None, "safe-math"):
        ...     (count * torch.log(count)).sum().backward()
        >>> bool(count.grad.isfinite().all())
        True
    """

    def apply(patient: Patient) -> Steps:
        def enter() -> None:
            _calls[0] += 1

        def leave(_: None, output: Any) -> Any:
            _calls[0] -= 1
            return output

        with ExitStack() as stack:
            for handle in around_forward(patient.model, enter, leave):
                stack.callback(handle.remove)
            if not hasattr(torch.log, "is_safe"):  # once, however many models are treated
                for owner, name, guard in _GUARDS:
                    original = getattr(owner, name)
                    setattr(owner, name, _guarded(original, guard))
                    stack.callback(setattr, owner, name, original)
            yield Change("safe-math", "log, sqrt, quotients and exp stay finite")

    return Treatment(
        "safe-math", apply,
        code=f"torch.log(x.clamp_min({NEAREST:g})), torch.sqrt(x.clamp_min({NEAREST:g})), a / b.clamp_min({NEAREST:g})"
        "\n# in your loss; better: a loss of torch that does it for you, such as nn.functional.cross_entropy",
    )  # fmt: skip


def _guarded(original: Guarded, guard: Callable[..., tuple[Any, ...]]) -> Guarded:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not (torch.is_grad_enabled() or _calls[0]):
            return original(*args, **kwargs)
        return original(*guard(*args), **kwargs)

    call.is_safe = True  # type: ignore[attr-defined]
    return call


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _at_least(least: float) -> Callable[..., tuple[Any, ...]]:
    return lambda x, *rest: (x.clamp_min(least) if _is_real(x) else x, *rest)


def _below(x: Any, *rest: Any) -> tuple[Any, ...]:
    return (x.clamp_max(LARGEST_EXPONENT) if _is_real(x) else x, *rest)


def _within_one(x: Any, *rest: Any) -> tuple[Any, ...]:
    return (x.clamp(NEAREST - 1, 1 - NEAREST) if _is_real(x) else x, *rest)


def _power(x: Any, exponent: Any = None, *rest: Any) -> tuple[Any, ...]:
    """A root has an infinite slope at 0, a negative power is infinite there; whole powers from 1 on are harmless."""
    if _is_real(x) and isinstance(exponent, (int, float)) and (exponent < 1 or exponent != int(exponent)):
        if exponent == int(exponent):
            return (_off_zero(x), exponent, *rest)
        return (x.clamp_min(NEAREST), exponent, *rest)
    return (x, *(() if exponent is None else (exponent,)), *rest)


def _quotient(x: Any, divisor: Any = None, *rest: Any) -> tuple[Any, ...]:
    return (x, *(() if divisor is None else (_off_zero(divisor),)), *rest)


def _reversed_quotient(divisor: Any, *rest: Any) -> tuple[Any, ...]:
    return (_off_zero(divisor), *rest)


def _off_zero(divisor: Any) -> Any:
    """Move what is nearer to zero than `NEAREST` away from it, and keep its sign."""
    if not _is_real(divisor):
        return divisor
    edge = torch.where(divisor < 0, -NEAREST, NEAREST).to(divisor.dtype)
    return torch.where(divisor.abs() < NEAREST, edge, divisor)


_ONE_NUMBER: tuple[tuple[str, Callable[..., tuple[Any, ...]]], ...] = (
    *((name, _at_least(NEAREST)) for name in ("log", "log2", "log10", "sqrt", "rsqrt")),
    ("log1p", _at_least(NEAREST - 1)),
    ("exp", _below),
    *((name, _within_one) for name in ("acos", "asin", "arccos", "arcsin")),
    ("reciprocal", _reversed_quotient),
    ("pow", _power),
    *((name, _quotient) for name in ("div", "divide", "true_divide")),
)
_GUARDS: tuple[tuple[Any, str, Callable[..., tuple[Any, ...]]], ...] = (
    *((owner, name, guard) for name, guard in _ONE_NUMBER for owner in (torch, torch.Tensor)),
    (torch.Tensor, "__pow__", _power),
    (torch.Tensor, "__truediv__", _quotient),
    (torch.Tensor, "__rtruediv__", _reversed_quotient),
)

"""Which back end computes: each candidate is tried, compared with the loop, and timed beside the others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..measures import largest
from ..shown import unseen
from ..untouched import untouched
from .backends import loop, vmapped
from .by_hand import Batched
from .stacked import NotUnderstood

Backend = Literal["loop", "vmap", "batched"]
Compute = Callable[..., Tensor]

_ROUNDS = 7  # of the measurement, in which all candidates take turns
_LONG = 2.0  # seconds after which no other round begins
_LOG = logging.getLogger("unvanish")


def backends() -> dict[Backend, Compute]:
    """Return all back ends; each module of replicas has its own, because plans are made for a model."""
    return {"loop": loop, "vmap": vmapped, "batched": Batched()}


def choose(
    stacked: nn.Module, losses: Callable[[Backend], Tensor], candidates: Sequence[Backend], *, measure: bool
) -> Backend:
    """Return the back end for a call, after trying the candidates; nothing of the trials remains.

    Args:
        stacked: The stacked model.
        losses: Computes the losses of the call, by the back end that is named.
        candidates: What to try beside the loop.
        measure: Take the fastest of those that work, the loop among them; otherwise the first that works.
    """
    expected = _try(stacked, losses, "loop")  # what is wrong with the call itself is raised here
    works: list[Backend] = []
    faults = []
    for name in candidates:
        why = _fault(stacked, expected, losses, name)
        if why:
            faults.append(f"{name} cannot run this model ({why})")
        else:
            works.append(name)
    if not works:
        _LOG.warning("Replicas: %s. The loop is used; with backend='loop' nothing is tried.", "; ".join(faults))
        return "loop"
    return _fastest(stacked, losses, ["loop", *works]) if measure else works[0]


def draws(stacked: nn.Module, losses: Callable[[Backend], Tensor]) -> bool:
    """Say whether the loop draws random numbers in a call; nothing of the trial remains."""
    return _try(stacked, losses, "loop").is_random


class _Outcome(NamedTuple):
    """What a forward and a backward pass left: losses, gradients, buffers."""

    tensors: list[Tensor]
    seconds: float
    is_random: bool


def _try(stacked: nn.Module, losses: Callable[[Backend], Tensor], name: Backend) -> _Outcome:
    with unseen(), untouched(stacked):
        before, start = _random_state(stacked), _now(stacked)
        found, grads = losses(name), []
        if found.requires_grad:  # no backward(), of which others may hear
            trained = [p for p in stacked.parameters() if p.requires_grad]
            grads = [g for g in torch.autograd.grad(found.sum(), trained, allow_unused=True) if g is not None]
        seconds = _now(stacked) - start
        is_random = not torch.equal(before, _random_state(stacked))
        return _Outcome([found.detach(), *grads, *(b.clone() for b in stacked.buffers())], seconds, is_random)


def _fault(stacked: nn.Module, expected: _Outcome, losses: Callable[[Backend], Tensor], name: Backend) -> str:
    """Return why a back end cannot be used for this call; nothing if it can."""
    try:
        found = _try(stacked, losses, name)
        if found.is_random:  # other numbers are drawn, so that only the rest of the network can be compared
            with _without_dropout(stacked):
                expected, found = _try(stacked, losses, "loop"), _try(stacked, losses, name)
    except NotUnderstood as error:
        return str(error)
    except Exception as error:  # whatever it is: the loop works
        return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
    agree = found.is_random or _agree(expected.tensors, found.tensors)
    return "" if agree else "it gives other numbers than separate models"


def _fastest(stacked: nn.Module, losses: Callable[[Backend], Tensor], names: Sequence[Backend]) -> Backend:
    best = dict.fromkeys(names, float("inf"))
    start = _now(stacked)
    for _ in range(_ROUNDS):
        for name in names:
            best[name] = min(best[name], _try(stacked, losses, name).seconds)
        if _now(stacked) - start > _LONG:
            break
    return min(best, key=best.__getitem__)


def _now(stacked: nn.Module) -> float:
    """Return seconds: those that the processor worked if one thread computes, because others may hold it up."""
    if next(stacked.parameters()).is_cuda:
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def _random_state(stacked: nn.Module) -> Tensor:
    device = next(stacked.parameters()).device
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _without_dropout(stacked: nn.Module) -> Iterator[None]:
    on = [module for module in stacked.modules() if isinstance(module, _DropoutNd) and module.training]
    for module in on:
        module.training = False
    try:
        yield
    finally:
        for module in on:
            module.training = True


def _autocast_eps(device: str) -> float:
    """Return the precision in which operations compute that mixed precision takes over; 0 where it is off."""
    return float(torch.finfo(torch.get_autocast_dtype(device)).eps) if torch.is_autocast_enabled(device) else 0.0


def _agree(expected: list[Tensor], found: list[Tensor]) -> bool:
    """Say whether two back ends did the same: to the root of the precision, relative to the largest finite number.

    Relative to the largest of all, because many gradients are zero but for rounding, those before a norm for one.
    """
    floats = [(a, b) for a, b in zip(expected, found, strict=False) if a.is_floating_point()]
    if len(expected) != len(found):
        return False
    scale = max(largest(a) for a, _ in floats)
    for a, b in floats:
        close = max(float(torch.finfo(a.dtype).eps), _autocast_eps(a.device.type)) ** 0.5
        if not torch.allclose(a, b, rtol=close, atol=close * scale, equal_nan=True):
            return False
    return True

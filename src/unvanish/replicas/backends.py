"""Ways to compute the losses of all replicas: one after the other, or all at once by ``vmap``.

A back end is a function of the stacked model, the loss function and the data; it returns one loss a replica.
Both leave the buffers of the replicas as their forward passes changed them.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map

from ..errors import OptionError
from ..untouched import untouched

Backend = Literal["loop", "vmap"]
LossFn = Callable[[Any, Any], Tensor]

_ALIGNMENT = 64  # bytes; torch allocates so
_LOG = logging.getLogger("unvanish")


def call(stacked: nn.Module, tensors: dict[str, Tensor], x: Any) -> Any:
    """Call the model with the tensors of one replica, on a tensor, a tuple of arguments or a mapping of them."""
    if isinstance(x, Mapping):
        return functional_call(stacked, tensors, (), dict(x))
    return functional_call(stacked, tensors, tuple(x) if isinstance(x, (tuple, list)) else (x,))


def one_of(stacked: nn.Module, n: int) -> list[dict[str, Tensor]]:
    """Return the tensors of each replica, through which gradients reach the stacked parameters."""
    replicas: list[dict[str, Tensor]] = [{} for _ in range(n)]
    for name, parameter in stacked.named_parameters():
        # unbind and not [i]: the gradient is then written once, not n times into zeros
        for replica, one in zip(replicas, parameter.unbind(0), strict=True):
            # matrix products of weights that lie elsewhere than torch allocates them may differ in the last bit
            replica[name] = one.clone() if one.data_ptr() % _ALIGNMENT else one
    for name, buffer in stacked.named_buffers():
        for replica, one in zip(replicas, buffer.unbind(0), strict=True):
            replica[name] = one.clone()  # changed in place by one replica, it would be new for all to autograd
    return replicas


def loop(stacked: nn.Module, n: int, loss_fn: LossFn, x: Any, y: Any, *, is_separate: bool) -> Tensor:
    """Return the loss of each replica, computed one after the other as plain models would."""
    losses = []
    for i, tensors in enumerate(one_of(stacked, n)):
        xi, yi = (part(x, i), part(y, i)) if is_separate else (x, y)
        losses.append(_scalar(loss_fn(call(stacked, tensors, xi), yi)))
        keep_buffers(stacked, tensors, i)
    return torch.stack(losses)  # (n,)


def batched(stacked: nn.Module, n: int, loss_fn: LossFn, x: Any, y: Any, *, is_separate: bool) -> Tensor:
    """Return the loss of each replica, computed for all at once; random numbers differ between replicas."""
    parameters: dict[str, Tensor] = dict(stacked.named_parameters())
    buffers = {name: buffer.clone() for name, buffer in stacked.named_buffers()}

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Any, y: Any) -> Any:
        tensors = {**parameters, **buffers}
        loss = _scalar(loss_fn(call(stacked, tensors, x), y))
        return loss, {name: tensors[name] for name in buffers}

    def axes(value: Any) -> Any:
        return tree_map(lambda leaf: 0 if is_separate and isinstance(leaf, Tensor) else None, value)

    x = dict(x) if isinstance(x, Mapping) else x
    mapped = vmap(one, in_dims=(0, 0, axes(x), axes(y)), randomness="different")
    with warnings.catch_warnings():  # of operations without a rule for batches: slower, not wrong; "auto" measures it
        warnings.filterwarnings("ignore", "There is a performance drop")
        losses, after = mapped(parameters, buffers, x, y)
    with torch.no_grad():
        for name, buffer in stacked.named_buffers():
            buffer.copy_(after[name])
    return losses  # type: ignore[no-any-return]  # (n,)


def part(value: Any, i: int) -> Any:
    """Return what replica ``i`` gets of data with a leading axis of replicas."""
    return tree_map(
        lambda leaf: leaf[i] if isinstance(leaf, Tensor) else leaf, dict(value) if isinstance(value, Mapping) else value
    )


@torch.no_grad()
def keep_buffers(stacked: nn.Module, tensors: dict[str, Tensor], i: int) -> None:
    """Write the buffers of replica ``i`` back, whether its forward pass changed or replaced them."""
    for name, buffer in stacked.named_buffers():
        if buffer[i].shape != tensors[name].shape:
            raise OptionError(
                f"Replicas.loss(): buffer {name!r}: found shape {tuple(tensors[name].shape)} after the forward pass, "
                f"expected {tuple(buffer[i].shape)} as before. Buffers that grow cannot be stacked."
            )
        buffer[i].copy_(tensors[name])


BACKENDS: dict[Backend, Callable[..., Tensor]] = {"loop": loop, "vmap": batched}


def choose(stacked: nn.Module, n: int, arguments: tuple[LossFn, Any, Any], *, is_separate: bool, must: bool) -> Backend:
    """Return the back end to use for such a call, after trying both; nothing of the trial remains.

    Args:
        stacked: The stacked model.
        n: Replicas.
        arguments: Loss function, x and y.
        is_separate: Whether each replica has a batch of its own.
        must: Take ``vmap`` wherever it works; otherwise only where it is also faster.
    """

    def run(backend: Backend) -> tuple[list[Tensor], float, bool]:
        with untouched(stacked):
            before = _random_state(stacked)
            start = _now(stacked)
            losses = BACKENDS[backend](stacked, n, *arguments, is_separate=is_separate)
            if losses.requires_grad:
                losses.sum().backward()  # type: ignore[no-untyped-call]
            seconds = _now(stacked) - start
            grads = [p.grad for p in stacked.parameters() if p.grad is not None]
            is_random = not torch.equal(before, _random_state(stacked))
            return [losses.detach(), *grads, *(b.clone() for b in stacked.buffers())], seconds, is_random

    expected, loop_seconds, is_random = run("loop")  # what is wrong with the call itself is raised here
    try:
        found, _, _ = run("vmap")
    except Exception as error:  # whatever it is: the loop works
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    else:
        why = "" if is_random or _agree(expected, found) else "it gives other numbers than separate models"
    if why:
        _LOG.warning("Replicas: vmap cannot run this model (%s). The loop is used; backend='loop' says so.", why)
        return "loop"
    if must:
        return "vmap"
    rounds = 1 if loop_seconds > _LONG else 3
    best = {backend: min(run(backend)[1] for _ in range(rounds)) for backend in BACKENDS}
    return "vmap" if best["vmap"] < best["loop"] else "loop"


_LONG = 0.5  # seconds; such a step is timed once


def _now(stacked: nn.Module) -> float:
    if next(stacked.parameters()).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _random_state(stacked: nn.Module) -> Tensor:
    device = next(stacked.parameters()).device
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _agree(expected: list[Tensor], found: list[Tensor]) -> bool:
    """Say whether two back ends did the same: to the root of the precision, relative to the largest number.

    Relative to the largest of all, because many gradients are zero but for rounding, those before a norm for one.
    """
    floats = [(a, b) for a, b in zip(expected, found, strict=False) if a.is_floating_point()]
    if len(expected) != len(found):
        return False
    largest = max(float(a.abs().max()) for a, _ in floats if a.numel())
    for a, b in floats:
        close = float(torch.finfo(a.dtype).eps) ** 0.5
        if not torch.allclose(a, b, rtol=close, atol=close * largest, equal_nan=True):
            return False
    return True


def _scalar(loss: Any) -> Tensor:
    if isinstance(loss, Tensor) and loss.dim() == 0:
        return loss
    found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise OptionError(
        f"Replicas.loss(): loss_fn: found {found}, expected one number for one replica, such as the mean over its "
        "batch. Write loss_fn=lambda output, y: ....mean()."
    )

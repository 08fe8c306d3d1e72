"""Ways to compute the losses of all replicas: one after the other, or all at once by ``vmap``.

A back end is a function of the stacked model, the loss function and the data; it returns one loss a replica.
All leave the buffers of the replicas as their forward passes changed them. The third one is in `by_hand`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map

from ..errors import OptionError
from ..untouched import same_random_state
from .losses import LossFn as LossFn
from .losses import part, scalar
from .streams import Streams

_ALIGNMENT = 64  # bytes; torch allocates so


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


def loop(
    stacked: nn.Module, n: int, loss_fn: LossFn, x: Any, y: Any, *, is_separate: bool, streams: Streams | None = None
) -> Tensor:
    """Return the loss of each replica, computed one after the other as plain models would."""
    losses = []
    for i, tensors in enumerate(one_of(stacked, n)):
        xi, yi = (part(x, i), part(y, i)) if is_separate else (x, y)
        with streams.of(i) if streams else nullcontext():
            losses.append(scalar(loss_fn(call(stacked, tensors, xi), yi)))
        keep_buffers(stacked, tensors, i)
    return torch.stack(losses)  # (n,)


def first_alone(
    stacked: nn.Module, loss_fn: LossFn, x: Any, y: Any, *, is_separate: bool, streams: Streams | None
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of the first replica, stacked as in the loop, and its parameters; nothing else is touched."""
    tensors = {name: p[0].detach().requires_grad_(p.requires_grad) for name, p in stacked.named_parameters()}
    trained = [tensor for tensor in tensors.values() if tensor.requires_grad]
    tensors |= {name: buffer[0].clone() for name, buffer in stacked.named_buffers()}
    xi, yi = (part(x, 0), part(y, 0)) if is_separate else (x, y)
    with same_random_state([stacked]), streams.aside(0) if streams else nullcontext():
        loss = torch.stack([scalar(loss_fn(call(stacked, tensors, xi), yi))])  # (1,)
    return loss, trained


def vmapped(
    stacked: nn.Module, n: int, loss_fn: LossFn, x: Any, y: Any, *, is_separate: bool, streams: Streams | None = None
) -> Tensor:
    """Return the loss of each replica, computed for all at once; random numbers differ between replicas."""
    assert streams is None  # Replicas() refuses: vmap draws the numbers of all replicas together
    parameters: dict[str, Tensor] = dict(stacked.named_parameters())
    buffers = {name: buffer.clone() for name, buffer in stacked.named_buffers()}

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Any, y: Any) -> Any:
        tensors = {**parameters, **buffers}
        loss = scalar(loss_fn(call(stacked, tensors, x), y))
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

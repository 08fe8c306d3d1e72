"""Layers with weights, for all replicas at once: weights have a leading axis of replicas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .binary import BinaryConv2d, BinaryLinear, discretise
from .stacked import NotUnderstood, Stacked, Where, aligned, channels_last, for_each


def linear(at: Where, module: nn.Linear, x: Any) -> Stacked:
    """Multiply by all weights in one product of stacked matrices."""
    return _product(at, x, module.weight, module.bias)


def binary_linear(at: Where, module: BinaryLinear, x: Any) -> Stacked:
    """Multiply by the discrete weights."""
    return _product(at, x, _discrete(module), module.bias)


def _product(at: Where, x: Any, weight: Tensor, bias: Tensor | None) -> Stacked:
    x = for_each(x, at.n)
    if len(x.shape) < 2:
        raise NotUnderstood("a linear layer without a batch")
    if len(x.shape) == 2:
        return Stacked(_times(weight, x.turned(), bias), at.n, "turned")
    rows = x.front()
    turned = rows.flatten(1, -2).transpose(1, 2)  # (n, inputs, rows)
    return Stacked(torch.unflatten(_times(weight, turned, bias).transpose(1, 2), 1, rows.shape[1:-1]), at.n)


def _times(weight: Tensor, turned: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``(n, outputs, rows)``; the weight comes first, so that its gradient lies in memory as the weight does."""
    return torch.bmm(weight, turned) if bias is None else torch.baddbmm(bias.unsqueeze(2), weight, turned)


def _discrete(module: BinaryLinear | BinaryConv2d) -> Tensor:
    outputs = module.weight.flatten(0, 1)  # an output of a replica is an output: thresholds and scales are its own
    return discretise(outputs, module.levels, is_scaled=module.is_scaled).view_as(module.weight)


def convolution(function: Callable[..., Tensor], *, is_discrete: bool = False) -> Callable[..., Stacked]:
    """Return the rule of a convolution: each replica is a group, or more if it has groups itself."""

    def rule(at: Where, module: Any, x: Any) -> Stacked:
        if module.padding_mode != "zeros":
            raise NotUnderstood(f"padding_mode={module.padding_mode!r}")
        groups = at.n * module.groups
        if isinstance(x, Stacked):
            images = x.folded()
        elif module.groups == 1:
            images, groups = channels_last(x), 1  # all filters of all replicas read the same channels
        else:
            images = for_each(x, at.n).folded()
        if images.dim() != module.weight.dim() - 1:
            raise NotUnderstood("a convolution without a batch")
        bias = None if module.bias is None else module.bias.flatten()
        weight = (_discrete(module) if is_discrete else module.weight).flatten(0, 1)
        return Stacked(
            function(images, weight, bias, module.stride, module.padding, module.dilation, groups), at.n, "folded"
        )

    return rule


def batch_norm(at: Where, module: Any, x: Any) -> Stacked:
    """Normalise the channels of all replicas beside each other; counts and statistics go on in place."""
    if module.momentum is None:
        raise NotUnderstood("a batch norm with momentum=None")
    images = for_each(x, at.n).folded()
    by_batch = module.training or module.running_mean is None
    if module.training and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
    mean, variance, weight, bias = (
        None if t is None else t.view(-1)  # a view: running statistics are written into
        for t in (module.running_mean, module.running_var, module.weight, module.bias)
    )
    normal = F.batch_norm(images, mean, variance, weight, bias, by_batch, module.momentum, module.eps)
    return Stacked(normal, at.n, "folded")


def group_norm(at: Where, module: nn.GroupNorm, x: Any) -> Stacked:
    """Normalise the groups of all replicas beside each other."""
    images = for_each(x, at.n).folded()
    weight, bias = (None if t is None else t.flatten() for t in (module.weight, module.bias))
    return Stacked(F.group_norm(images, at.n * module.num_groups, weight, bias, module.eps), at.n, "folded")


def layer_norm(at: Where, module: Any, x: Any) -> Stacked:
    """Normalise as one replica does, then scale and shift with the weights of each."""
    norm: Callable[..., Tensor] = F.rms_norm if isinstance(module, nn.RMSNorm) else F.layer_norm
    y = Stacked(norm(for_each(x, at.n).front(), module.normalized_shape, eps=module.eps), at.n)
    if module.weight is not None:
        y = aligned(torch.mul, at.n, (y, Stacked(module.weight, at.n)), {})
    if getattr(module, "bias", None) is not None:
        y = aligned(torch.add, at.n, (y, Stacked(module.bias, at.n)), {})
    return y


def embedding(at: Where, module: nn.Embedding, x: Any) -> Stacked:
    """Look up in the tables of all replicas below each other."""
    if module.padding_idx is not None or module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
        raise NotUnderstood("an embedding with padding_idx, max_norm, sparse or scale_grad_by_freq")
    words = for_each(x, at.n).front()
    rows = module.num_embeddings * torch.arange(at.n, device=words.device)
    places = words + rows.view(-1, *[1] * (words.dim() - 1))  # (n, ...)
    return Stacked(F.embedding(places, module.weight.flatten(0, 1)), at.n)

"""How one operation of a network is done for all replicas at once.

Three tables: by type of module, by function, and by name of a method of tensors. A rule takes where it runs and the
operands, of which those that differ between replicas are `Stacked`; all others are shared by the replicas. What has no
rule is `NotUnderstood`. The layers with weights are in `weighted`. Options are read from the modules when they run, so
that what is changed there counts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import weighted
from .binary import BinaryConv2d, BinaryLinear
from .recurrent import recurrence
from .stacked import NotUnderstood, Stacked, Where, aligned, for_each

Rule = Callable[..., Any]


def _elementwise(function: Callable[..., Any]) -> Rule:
    return lambda at, *values, **options: aligned(function, at.n, values, options)


def _elementwise_module(_: Where, module: nn.Module, x: Any) -> Any:
    return x.like(module(x.tensor)) if isinstance(x, Stacked) else module(x)


def relu_in_place(at: Where, module: nn.ReLU, x: Any) -> Any:
    """Work in the memory of an input that nobody else reads: on a processor, writing new memory takes longer."""
    if not isinstance(x, Stacked) or x.tensor._is_view():
        return _elementwise_module(at, module, x)
    return x.like(x.tensor.relu_())


def _over_images(function: Callable[..., Tensor]) -> Rule:
    """Return the rule of what treats each channel of each image alone, such as pooling."""

    def rule(_: Where, x: Any, *values: Any, **options: Any) -> Any:
        if not isinstance(x, Stacked):
            return function(x, *values, **options)
        if x.layout == "folded":
            return x.like(function(x.tensor, *values, **options))
        many = function(x.front().flatten(0, 1), *values, **options)
        return Stacked(torch.unflatten(many, 0, (x.n, -1)), x.n)

    return rule


def _image_module(at: Where, module: nn.Module, x: Any) -> Any:
    if getattr(module, "return_indices", False):
        raise NotUnderstood("pooling that returns indices")
    return _over_images(module)(at, x)


def _dropout(at: Where, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not training or p == 0.0:
        return x
    x = for_each(x, at.n)
    if at.streams is None:
        return x.like(F.dropout(x.tensor, p))
    return Stacked(x.front() * at.streams.kept(x.shape, p, like=x.tensor), at.n)


def _dropout_module(at: Where, module: nn.Dropout, x: Any) -> Any:
    return _dropout(at, x, module.p, module.training)


def _dropout_of_channels(at: Where, module: Any, x: Any) -> Any:
    if not module.training or module.p == 0.0:
        return x
    x = for_each(x, at.n)
    if at.streams is not None:
        batch, channels, *places = x.shape
        kept = at.streams.kept(torch.Size((batch, channels, *[1] * len(places))), module.p, like=x.tensor)
        return Stacked(x.front() * kept, at.n)
    return Stacked(F.dropout2d(x.folded(), module.p), at.n, "folded")


def _along(function: Callable[..., Any]) -> Rule:
    """Return the rule of what works along one axis and keeps the shape."""

    def rule(_: Where, x: Any, dim: int | None = None, **options: Any) -> Any:
        if not isinstance(x, Stacked):
            return function(x, dim=dim, **options)
        if dim is None:
            raise NotUnderstood(f"{function.__name__} without an axis")
        return Stacked(function(x.front(), dim=x.axis(dim), **options), x.n)

    return rule


def _along_module(function: Callable[..., Any]) -> Rule:
    return lambda at, module, x: _along(function)(at, x, module.dim)


def _reduction(function: Callable[..., Any]) -> Rule:
    def rule(_: Where, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
        if not isinstance(x, Stacked):
            return function(x) if dim is None else function(x, dim, keepdim)
        if dim is None:
            return Stacked(function(x.front().flatten(1), 1), x.n)
        dims = [x.axis(d) for d in ((dim,) if isinstance(dim, int) else dim)]
        return Stacked(function(x.front(), dims, keepdim), x.n)

    return rule


# Shapes


def _flatten(_: Where, x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    if not isinstance(x, Stacked):
        return x.flatten(start_dim, end_dim)
    return Stacked(x.front().flatten(x.axis(start_dim), x.axis(end_dim)), x.n)


def _flatten_module(at: Where, module: nn.Flatten, x: Any) -> Any:
    return _flatten(at, x, module.start_dim, module.end_dim)


def _unflatten_module(_: Where, module: nn.Unflatten, x: Any) -> Any:
    return Stacked(torch.unflatten(x.front(), x.axis(module.dim), module.unflattened_size), x.n)


def _reshape(_: Where, x: Any, *shape: Any) -> Any:
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    return Stacked(x.front().reshape(x.n, *sizes), x.n) if isinstance(x, Stacked) else x.reshape(sizes)


def _swap(_: Where, x: Any, one: int, other: int) -> Any:
    if not isinstance(x, Stacked):
        return x.transpose(one, other)
    return Stacked(x.front().transpose(x.axis(one), x.axis(other)), x.n)


def _permute(_: Where, x: Any, *dims: Any) -> Any:
    order = tuple(dims[0]) if len(dims) == 1 and not isinstance(dims[0], int) else dims
    if not isinstance(x, Stacked):
        return x.permute(order)
    rank = len(order)
    return Stacked(x.front().permute(0, *(dim % rank + 1 for dim in order)), x.n)


def _unsqueeze(_: Where, x: Any, dim: int) -> Any:
    if not isinstance(x, Stacked):
        return x.unsqueeze(dim)
    return Stacked(x.front().unsqueeze(dim + 1 if dim >= 0 else dim), x.n)


def _squeeze(_: Where, x: Any, dim: int) -> Any:
    return Stacked(x.front().squeeze(x.axis(dim)), x.n) if isinstance(x, Stacked) else x.squeeze(dim)


def _contiguous(_: Where, x: Any) -> Any:
    return x  # a promise about memory that no rule here needs


def _concatenate(at: Where, values: Any, dim: int = 0) -> Any:
    if not any(isinstance(value, Stacked) for value in values):
        return torch.cat(values, dim)
    stacked = [for_each(value, at.n) for value in values]
    return Stacked(torch.cat([s.front() for s in stacked], stacked[0].axis(dim)), at.n)


def _size(_: Where, x: Any, dim: int | None = None) -> Any:
    return x.shape if dim is None else x.shape[dim]


def _attribute(_: Where, x: Any, name: str) -> Any:
    if not isinstance(x, Stacked):
        return getattr(x, name)
    if name == "ndim":
        return len(x.shape)
    if name == "shape":
        return x.shape
    if name in ("dtype", "device"):
        return getattr(x.tensor, name)
    raise NotUnderstood(f"the attribute {name!r} of a tensor")


def _item(_: Where, x: Any, key: Any) -> Any:
    if not isinstance(x, Stacked):
        return x[key]
    keys = key if isinstance(key, tuple) else (key,)
    if not all(k is None or k is Ellipsis or isinstance(k, (int, slice)) for k in keys):
        raise NotUnderstood("indexing by a tensor")
    return Stacked(x.front()[(slice(None), *keys)], x.n)


def _matmul(at: Where, one: Any, other: Any) -> Any:
    one, other = for_each(one, at.n), for_each(other, at.n)
    if min(len(one.shape), len(other.shape)) < 2:
        raise NotUnderstood("a product with a vector")
    return aligned(torch.matmul, at.n, (Stacked(one.front(), at.n), Stacked(other.front(), at.n)), {})


def _attention(at: Where, query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> Any:
    if options.get("dropout_p") and at.streams is not None:
        raise NotUnderstood("dropout inside of attention from streams of random numbers")
    q, k, v = (for_each(each, at.n).front() for each in (query, key, value))
    mask = _mask(attn_mask, q.dim())
    return Stacked(F.scaled_dot_product_attention(q, k, v, mask, **options), at.n)


def _mask(mask: Any, rank: int) -> Any:
    if not isinstance(mask, Stacked):
        return mask
    front = mask.front()
    return front[(slice(None), *[None] * (rank - front.dim()))]


_ELEMENTWISE_MODULES = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
    nn.LogSigmoid, nn.Tanh, nn.Tanhshrink, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
    nn.Hardshrink, nn.Softshrink, nn.Threshold,
)  # fmt: skip
_IMAGE_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.ZeroPad2d, nn.Upsample,
)  # fmt: skip
_ELEMENTWISE = (
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow,
    operator.neg, operator.eq, operator.gt, operator.lt,
    torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.neg, torch.abs, torch.exp, torch.log, torch.sqrt,
    torch.square, torch.sin, torch.cos, torch.tanh, torch.sigmoid, torch.relu, torch.clamp, torch.maximum,
    torch.minimum, torch.where,
    F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.sigmoid, F.tanh, F.softplus,
    F.softsign, F.logsigmoid, F.hardtanh, F.hardswish, F.hardsigmoid,
)  # fmt: skip
_METHODS = (
    "add", "sub", "mul", "div", "pow", "neg", "abs", "exp", "log", "sqrt", "square", "sin", "cos", "tanh", "sigmoid",
    "relu", "clamp", "maximum", "minimum", "float", "double", "to", "masked_fill",
)  # fmt: skip
_OVER_IMAGES = (
    F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d,
)  # fmt: skip

# Their outputs are memory of their own, which their backward passes do not read.
FRESH = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
)  # fmt: skip
BY_MODULE: dict[type[nn.Module], Rule] = {
    nn.Linear: weighted.linear,
    BinaryLinear: weighted.binary_linear,
    nn.Conv1d: weighted.convolution(F.conv1d),
    nn.Conv2d: weighted.convolution(F.conv2d),
    BinaryConv2d: weighted.convolution(F.conv2d, is_discrete=True),
    nn.Conv3d: weighted.convolution(F.conv3d),
    nn.BatchNorm1d: weighted.batch_norm,
    nn.BatchNorm2d: weighted.batch_norm,
    nn.BatchNorm3d: weighted.batch_norm,
    nn.GroupNorm: weighted.group_norm,
    nn.LayerNorm: weighted.layer_norm,
    nn.RMSNorm: weighted.layer_norm,
    nn.Embedding: weighted.embedding,
    **dict.fromkeys((nn.LSTM, nn.GRU, nn.RNN), recurrence),
    nn.Dropout: _dropout_module,
    nn.Dropout1d: _dropout_of_channels,
    nn.Dropout2d: _dropout_of_channels,
    nn.Flatten: _flatten_module,
    nn.Unflatten: _unflatten_module,
    nn.Softmax: _along_module(torch.softmax),
    nn.LogSoftmax: _along_module(torch.log_softmax),
    **dict.fromkeys(_ELEMENTWISE_MODULES, _elementwise_module),
    **dict.fromkeys(_IMAGE_MODULES, _image_module),
}
BY_FUNCTION: dict[Any, Rule] = {
    **{function: _elementwise(function) for function in _ELEMENTWISE},
    operator.iadd: _elementwise(operator.add),  # of another tensor: nothing else may change by it
    operator.isub: _elementwise(operator.sub),
    operator.imul: _elementwise(operator.mul),
    **{function: _over_images(function) for function in _OVER_IMAGES},
    F.dropout: _dropout,
    F.softmax: _along(torch.softmax),
    F.log_softmax: _along(torch.log_softmax),
    torch.softmax: _along(torch.softmax),
    torch.log_softmax: _along(torch.log_softmax),
    torch.mean: _reduction(torch.mean),
    torch.sum: _reduction(torch.sum),
    torch.flatten: _flatten,
    torch.reshape: _reshape,
    torch.transpose: _swap,
    torch.unsqueeze: _unsqueeze,
    torch.squeeze: _squeeze,
    torch.cat: _concatenate,
    torch.matmul: _matmul,
    torch.bmm: _matmul,
    operator.matmul: _matmul,
    F.scaled_dot_product_attention: _attention,
    operator.getitem: _item,
    getattr: _attribute,
}
BY_METHOD: dict[str, Rule] = {
    **{name: _elementwise(getattr(Tensor, name)) for name in _METHODS},
    "add_": _elementwise(torch.add),
    "mul_": _elementwise(torch.mul),
    "relu_": _elementwise(torch.relu),
    "softmax": _along(torch.softmax),
    "log_softmax": _along(torch.log_softmax),
    "mean": _reduction(torch.mean),
    "sum": _reduction(torch.sum),
    "flatten": _flatten,
    "view": _reshape,
    "reshape": _reshape,
    "transpose": _swap,
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "contiguous": _contiguous,
    "matmul": _matmul,
    "size": _size,
    "dim": lambda at, x: len(x.shape),
}

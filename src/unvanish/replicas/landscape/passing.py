"""What each known operation does to hidden units: starts a group of them, or passes them on.

A rule returns the mark of the result. None says that it does not know; the operands are then held in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from .groups import Groups, Mark


@dataclass(frozen=True, slots=True)
class Passing:
    """One operation, and what is known when it is reached."""

    groups: Groups
    marks: Mapping[fx.Node, Mark | None]
    node: fx.Node

    @property
    def mark(self) -> Mark | None:
        """The mark of the first operand."""
        first = self.node.args[0]
        return self.marks[first] if isinstance(first, fx.Node) else None

    @property
    def before(self) -> torch.Size:
        """The shape of the first operand; empty if it is no tensor."""
        return shape_of(self.node.args[0]) or torch.Size()

    @property
    def after(self) -> torch.Size:
        """The shape of the result; empty if it is no tensor."""
        return shape_of(self.node) or torch.Size()

    def mixes(self, unit_dim: int, read: int, write: int) -> Mark | None:
        """Read the units of the input along one dimension of the weight, and start new ones along another."""
        name, mark, groups = str(self.node.target), self.mark, self.groups
        if mark is not None and mark.dim != unit_dim:  # the same weights for every unit, which lie elsewhere
            groups.hold(mark)
            mark = None
        weight = groups.tensors.get(f"{name}.weight")
        if weight is None:  # computed from others
            return None
        groups.lies(f"{name}.weight", read, mark)
        made = groups.lies(f"{name}.weight", write, groups.begin(weight.shape[write], unit_dim))
        return groups.lies(f"{name}.bias", 0, made) if f"{name}.bias" in groups.tensors else made

    def passes(self) -> Mark | None:
        """Pass units on; in all tensors of the layer that have a dimension they lie along the first."""
        mark = self.mark
        for name, tensor in self.groups.tensors.items():
            if name.rpartition(".")[0] == self.node.target and tensor.dim():
                mark = self.groups.lies(name, 0, mark)
        return mark


def shape_of(node: Any) -> torch.Size | None:
    """Return the shape of the tensor that a node makes; None if it makes none, or several."""
    found = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    shape = getattr(found, "shape", None)
    return shape if isinstance(shape, torch.Size) else None


def _linear(passing: Passing, _: nn.Linear) -> Mark | None:
    return passing.mixes(unit_dim=len(passing.before) - 1, read=1, write=0)


def _conv(passing: Passing, module: nn.Conv2d) -> Mark | None:
    mark = passing.mark
    if len(passing.before) != len(module.kernel_size) + 2:  # an example without a batch
        return None
    if module.groups == 1:
        return passing.mixes(unit_dim=1, read=1, write=0)
    is_alone = module.groups == module.in_channels == module.out_channels  # each channel by itself
    return passing.passes() if is_alone and mark is not None and mark.dim == 1 else None


def _transposed(passing: Passing, module: nn.ConvTranspose2d) -> Mark | None:
    is_plain = module.groups == 1 and len(passing.before) == len(module.kernel_size) + 2
    return passing.mixes(unit_dim=1, read=0, write=1) if is_plain else None


def _embedding(passing: Passing, module: nn.Embedding) -> Mark | None:
    if module.max_norm is not None:  # such a table is changed by looking things up
        return None
    made = passing.groups.begin(module.embedding_dim, len(passing.after) - 1)
    return passing.groups.lies(f"{passing.node.target}.weight", 1, made)


def _channel_norm(passing: Passing, module: nn.Module) -> Mark | None:
    is_even = not isinstance(module, nn.GroupNorm) or module.num_groups in (1, module.num_channels)
    return passing.passes() if is_even and passing.mark is not None and passing.mark.dim == 1 else None


def _last_norm(passing: Passing, module: nn.LayerNorm) -> Mark | None:
    is_last = passing.mark is not None and passing.mark.dim == len(passing.before) - 1
    return passing.passes() if is_last and len(module.normalized_shape) == 1 else None


def _prelu(passing: Passing, module: nn.PReLU) -> Mark | None:
    if module.num_parameters == 1:
        return passing.mark
    return passing.passes() if passing.mark is not None and passing.mark.dim == 1 else None


def _each(passing: Passing, _: Any = None) -> Mark | None:
    """Pass on what works on each number alone."""
    is_alone = len(passing.node.all_input_nodes) == 1 and passing.before == passing.after
    return passing.mark if is_alone else None


def _space(passing: Passing, _: Any = None) -> Mark | None:
    """Pass channels on where something happens in each alone, such as pooling."""
    mark, before, after = passing.mark, passing.before, passing.after
    is_kept = mark is not None and mark.dim == 1 and len(before) == len(after) >= 3 and before[:2] == after[:2]
    return mark if is_kept else None


def _shape(passing: Passing, _: Any = None) -> Mark | None:
    """Follow units through a flattening, or another change of shape that leaves all numbers in order."""
    mark, before, after = passing.mark, passing.before, passing.after
    if mark is None or before == after:
        return mark
    if mark.dim == len(before) - 1 and before[-1] == after[-1]:  # only what stands before the units
        return Mark(mark.group, len(after) - 1, mark.block)
    if mark.dim == 1 and before[:2] == after[:2]:  # only what stands behind them
        return mark
    if mark.dim == 1 and len(after) == 2 and before[0] == after[0]:
        return Mark(mark.group, 1, mark.block * before[2:].numel())
    return None


def _mean(passing: Passing) -> Mark | None:
    """Pass units on where the mean is over other dimensions."""
    mark, (_, *args), kwargs = passing.mark, passing.node.args, passing.node.kwargs
    dims = args[0] if args else kwargs.get("dim")
    keepdim = args[1] if len(args) > 1 else kwargs.get("keepdim", False)
    dims = [dims] if isinstance(dims, int) else dims
    if mark is None or not isinstance(dims, (list, tuple)):
        return None
    over = {dim % len(passing.before) for dim in dims if isinstance(dim, int)}
    if mark.dim in over or len(over) != len(dims):
        return None
    return mark if keepdim else Mark(mark.group, mark.dim - sum(dim < mark.dim for dim in over), mark.block)


def _both(passing: Passing) -> Mark | None:
    """Join the units of two operands that are added or multiplied; a number beside passes them on."""
    operands = [operand for operand in passing.node.args if isinstance(operand, fx.Node) and shape_of(operand)]
    if passing.node.kwargs or not operands:
        return None
    if len(operands) == 1:
        return passing.marks[operands[0]]
    one, other = (passing.marks[operand] for operand in operands)
    first, second = (shape_of(operand) for operand in operands)
    known = one or other
    if known is None or first is None or second is None or len(first) != len(second):
        return None
    return passing.groups.join(one, other) if first[known.dim] == second[known.dim] else None


READ_SHAPES = frozenset(("size", "dim", "numel", getattr))  # they look at no unit

_EACH_MODULE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Tanhshrink, nn.Softshrink,
    nn.Hardshrink, nn.Threshold, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)  # fmt: skip
_SPACE_MODULE = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Upsample, nn.ZeroPad1d, nn.ZeroPad2d, nn.ReflectionPad1d, nn.ReflectionPad2d,
)  # fmt: skip
_EACH_FUNCTION = (
    torch.relu, torch.tanh, torch.sigmoid, torch.neg, torch.abs, torch.square, torch.exp, operator.neg, operator.pow,
    F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.tanh, F.sigmoid, F.softplus,
    F.hardtanh, F.hardswish, F.dropout, F.dropout2d, "relu", "relu_", "tanh", "sigmoid", "contiguous", "clone",
    "detach", "square", "abs", "neg",
)  # fmt: skip
_SPACE_FUNCTION = (
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate,
)  # fmt: skip

OF_MODULES: dict[type[nn.Module], Callable[[Passing, Any], Mark | None]] = {
    nn.Linear: _linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed),
    nn.Embedding: _embedding,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _channel_norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm), _channel_norm),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), _last_norm),
    nn.PReLU: _prelu,
    nn.Flatten: _shape,
    **dict.fromkeys(_EACH_MODULE, _each),
    **dict.fromkeys(_SPACE_MODULE, _space),
}
OF_FUNCTIONS: dict[Any, Callable[[Passing], Mark | None]] = {
    **dict.fromkeys(_EACH_FUNCTION, _each),
    **dict.fromkeys(_SPACE_FUNCTION, _space),
    **dict.fromkeys((torch.flatten, "flatten", "view", "reshape", torch.reshape, "squeeze", torch.squeeze), _shape),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_", operator.sub, torch.sub), _both),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_", operator.truediv), _both),
}

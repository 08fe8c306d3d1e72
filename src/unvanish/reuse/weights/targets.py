"""The layers of a model that weights can be loaded into, one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ...layers import clean_name

# A transposed convolution is a convolution by its class in torch, and no convolution by its layout.
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
COUNTER = "num_batches_tracked"  # no other framework has it


@dataclass(frozen=True, eq=False)
class Target:
    """A layer of the model; one of several in a recurrent module that stacks them.

    Args:
        name: As `named_modules` gives it, without what wrappers put before it.
        module: Itself.
        tensors: Its own parameters and lasting buffers, by their names in the module.
        level: Of a recurrent module: which of its stacked layers.
        is_tied: All its parameters belong to an earlier layer, too.
    """

    name: str
    module: nn.Module
    tensors: Mapping[str, Tensor]
    level: int = 0
    is_tied: bool = False

    @property
    def kind(self) -> str:
        """Return the class of the module."""
        return type(self.module).__name__

    def full_name(self, tensor: str) -> str:
        """Return the name of a tensor in the model."""
        return f"{self.name}.{tensor}" if self.name else tensor


def targets_of(model: nn.Module) -> list[Target]:
    """List the layers of a model in the order in which it registered them.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.LSTM(2, 2, num_layers=2))
        >>> [(target.name, target.kind, target.level) for target in targets_of(net)]
        [('0', 'Conv2d', 0), ('2', 'LSTM', 0), ('2', 'LSTM', 1)]
    """
    found: list[Target] = []
    seen: set[int] = set()
    inner: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inner:
            continue
        tensors = dict(_own_tensors(module))
        if isinstance(module, nn.MultiheadAttention):
            inner |= set(module.modules())
            tensors |= {f"out_proj.{key}": tensor for key, tensor in _own_tensors(module.out_proj)}
        if not tensors.keys() - {COUNTER}:
            continue
        parameters = {id(tensor) for tensor in tensors.values() if isinstance(tensor, nn.Parameter)}
        is_tied = bool(parameters) and parameters <= seen
        seen |= parameters
        for level, part in enumerate(_levels(module, tensors)):
            found.append(Target(clean_name(name), module, part, level, is_tied))
    return found


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what a state dict would hold of the module itself."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


def _levels(module: nn.Module, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Divide the tensors of a recurrent module by its stacked layers."""
    if not isinstance(module, nn.RNNBase):
        return [tensors]
    return [
        {name: tensor for name, tensor in tensors.items() if name.removesuffix("_reverse").endswith(f"_l{level}")}
        for level in range(module.num_layers)
    ]

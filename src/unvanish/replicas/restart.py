"""Start one replica again from the others, as if it had just been made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .stack import mean


@torch.no_grad()
def restart(stacked: nn.Module, i: int, others: Sequence[int], centre: Mapping[str, Tensor]) -> None:
    """Give replica ``i`` the mean of the others, and the centre's weights where that has some; frozen ones stay."""
    trained = [(name, p) for name, p in stacked.named_parameters() if p.requires_grad]
    for name, tensor in (*trained, *stacked.named_buffers()):
        if name in centre:
            tensor[i] = centre[name]
        elif others:
            tensor[i] = mean(tensor[list(others)])[0]


@torch.no_grad()
def clear_states(stacked: nn.Module, i: int, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Empty what optimisers remember of replica ``i``, and its gradients.

    Of an optimiser of stacked parameters the slice of each tensor becomes zero; one of the replica's own parameters,
    in the memory of the stacked ones, starts anew with them.
    """
    for optimizer in optimizers:
        for parameter in stacked.parameters():
            _zero_slice(optimizer.state.get(parameter, {}).values(), parameter, i)
        own = {(p[i].data_ptr(), p.shape[1:]) for p in stacked.parameters()}
        for parameter in [p for group in optimizer.param_groups for p in group["params"]]:
            if (parameter.data_ptr(), parameter.shape) in own:
                optimizer.state.pop(parameter, None)
                parameter.grad = None
    for parameter in stacked.parameters():
        _zero_slice([parameter.grad], parameter, i)


def _zero_slice(values: Iterable[Any], parameter: Tensor, i: int) -> None:
    for value in values:
        if isinstance(value, Tensor) and value.shape[:1] == parameter.shape[:1]:
            value[i] = 0

"""Many models in one and one model out of many: tensors with a leading axis of replicas, ties and modes kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import OptionError

_BLOCK = 2**16  # numbers; several times as many fit into the cache of one core


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name; one that is shared appears under each of its names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def stack(models: Sequence[nn.Module]) -> nn.Module:
    """Return a copy of the first model, in which each parameter and buffer holds those of all models.

    The copy has the modes, ties, names and frozen parameters of the first model. It computes only when its
    tensors are replaced for the call by those of one replica.
    """
    tensors = [named_tensors(model) for model in models]
    memo: dict[int, Any] = {}
    for name, tensor in tensors[0].items():
        if id(tensor) not in memo:
            stacked = torch.stack([each[name].detach() for each in tensors])  # (n, *shape)
            memo[id(tensor)] = _like(tensor, stacked)
    return copy.deepcopy(models[0], memo)


def unstack(stacked: nn.Module, pick: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a plain model whose tensors are what ``pick`` makes of the stacked ones."""
    memo: dict[int, Any] = {}
    for tensor in named_tensors(stacked).values():
        memo[id(tensor)] = _like(tensor, pick(tensor.detach()).clone())
    return copy.deepcopy(stacked, memo)


def mean(stacked: Tensor) -> Tensor:
    """Return the mean over replicas with its axis kept; exact where all replicas are equal.

    Whole numbers, such as the counters of batch norms, have no mean: those of the first replica are taken. Of no
    replicas the mean is empty.

    Cost: large layers are read once, block by block; the mean of a block stays in the cache of a processor.
    """
    first = stacked[:1]
    if not (stacked.is_floating_point() or stacked.is_complex()):
        return first
    if first.numel() < _BLOCK or stacked.device.type != "cpu":
        # a sum of n equal numbers, divided by n, need not be that number
        return torch.add(first, (stacked - first).sum(0, keepdim=True), alpha=1 / max(len(stacked), 1))
    centre = first.flatten().clone()
    blocks = zip(torch.split(centre, _BLOCK), torch.split(stacked.flatten(1), _BLOCK, 1), strict=True)
    for block, rows in blocks:
        for count, row in enumerate(rows[1:], 2):
            block.lerp_(row, 1 / count)  # the mean of the first ``count`` replicas
    return centre.view_as(first)


def anew(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters are drawn again as their modules do it; frozen ones keep their values.

    Raises:
        OptionError: if a parameter belongs to a module that cannot draw it again.
    """
    fresh = copy.deepcopy(model)
    frozen = [(p, p.detach().clone()) for p in fresh.parameters() if not p.requires_grad]
    drawn: set[nn.Parameter] = set()
    for module in reversed(list(fresh.modules())):  # children first: their owner may draw them in a way of its own
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None and any(p.requires_grad for p in module.parameters()):
            reset()
            drawn.update(module.parameters())
    with torch.no_grad():
        for parameter, value in frozen:
            parameter.copy_(value)
    for name, parameter in fresh.named_parameters():
        if parameter.requires_grad and parameter not in drawn:
            raise OptionError(
                f"Replicas(): init='separate': parameter {name!r}: found no reset_parameters() in its module, expected "
                "one that draws it again. Write Replicas(model, n, init=make_model), where make_model(i) returns the "
                "model that replica i starts as."
            )
    return fresh


def starts(model: nn.Module, n: int, init: str | Callable[[int], nn.Module]) -> list[nn.Module]:
    """Return the models that the replicas start from; structure and modes are those of the first."""
    if init == "shared":
        return [model] * n
    if init == "separate":
        return [model, *(anew(model) for _ in range(n - 1))]
    assert callable(init)
    models = [check_model(init(i)) for i in range(n)]
    for i, made in enumerate(models):
        check_equal(named_tensors(model), named_tensors(made), f"Replicas(): init({i})")
    return models


def check_model(model: object) -> nn.Module:
    """Return the model if it can be stacked.

    Raises:
        OptionError: if it is no module, has no parameters, or some have no shape yet.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"Replicas(): model: found {type(model).__name__}, expected a torch.nn.Module. Call Replicas(model, n=3)."
        )
    tensors = named_tensors(model)
    lazy = [name for name, tensor in tensors.items() if is_lazy(tensor)]
    if lazy:
        raise OptionError(
            f"Replicas(): model: found {lazy[0]!r} without a shape, expected a model that has seen a batch. "
            "Call model(x) once before Replicas(model)."
        )
    if next(model.parameters(), None) is None:
        raise OptionError("Replicas(): model: found no parameters, expected some to train. Give the model that learns.")
    return model


def check_equal(tensors: dict[str, Tensor], other: dict[str, Tensor], where: str) -> None:
    """Make sure that two models have tensors of the same names, shapes and types.

    Raises:
        OptionError: if they differ; names the first tensor that does.
    """
    for name in (*tensors, *other):
        one, two = (_kind(each.get(name)) for each in (tensors, other))
        if one != two:
            raise OptionError(
                f"{where}: tensor {name!r}: found {two}, expected {one}, as in the model. "
                "All replicas need the same architecture."
            )


def _kind(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value

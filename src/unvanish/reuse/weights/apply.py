"""Write a plan into its model: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...errors import WeightsError
from .plan import Plan


@contextmanager
def written(plan: Plan) -> Iterator[None]:
    """Write all tensors and settings; if the body of the `with` raises, all are as before, bit for bit.

    Raises:
        WeightsError: if a tensor of the model cannot be written.
    """
    tensors = {id(tensor): tensor for step in plan.steps for tensor in step.tensors}
    for step in plan.steps:
        for name, tensor in zip(step.names, step.tensors, strict=True):
            if tensor.is_meta:
                raise WeightsError(
                    f"load_weights(): {name!r}: found no storage (device 'meta'), expected a tensor with values. "
                    "Write model.to_empty(device='cpu') first."
                )
    before = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    try:
        _write(plan)
        yield
    except BaseException:
        with torch.no_grad():
            for key, tensor in tensors.items():
                _put(tensor, before[key])
        for change in plan.changes:
            setattr(change.module, change.name, change.before)
        raise


def _write(plan: Plan) -> None:
    with torch.no_grad():
        for step in plan.steps:
            for tensor, value in zip(step.tensors, step.values, strict=True):
                _put(tensor, value)
    for change in plan.changes:
        setattr(change.module, change.name, change.after)


def _put(tensor: Tensor, value: Tensor) -> None:
    tensor.copy_(value)

"""Leave a model as it was found, whatever a forward and a backward pass did to it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Restore parameters, gradients, buffers, modes and random state on leaving, bit for bit.

    Inside, gradients are empty and no hook on an accumulated gradient runs: some of them take the step of
    an optimiser.

    Args:
        models: Plain attributes that are no tensors of the model are not covered.
    """
    modules = list(dict.fromkeys(module for model in models for module in model.modules()))
    with ExitStack() as undo:
        undo.enter_context(same_random_state(models))
        for module in modules:
            undo.callback(_restore_module(module))
        for parameter in dict.fromkeys(p for module in modules for p in module.parameters(recurse=False)):
            undo.callback(_restore_parameter(parameter))
            parameter.grad = None
            _hooks(parameter).clear()  # autograd holds this very dict
        yield


def _restore_module(module: nn.Module) -> Callable[[], None]:
    training, parameters, buffers = module.training, dict(module._parameters), dict(module._buffers)
    copies = {name: buffer.detach().clone() for name, buffer in buffers.items() if buffer is not None}

    def restore() -> None:
        module.training = training
        module._parameters.clear()
        module._parameters.update(parameters)
        module._buffers.clear()
        module._buffers.update(buffers)
        for name, copy in copies.items():
            buffer = buffers[name]
            if buffer is not None:
                buffer.data.copy_(copy)

    return restore


def _restore_parameter(parameter: nn.Parameter) -> Callable[[], None]:
    grad, needs_grad, hooks = parameter.grad, parameter.requires_grad, dict(_hooks(parameter))
    grad_copy = None if grad is None else grad.detach().clone()
    copy = parameter.detach().clone()

    def restore() -> None:
        parameter.data.copy_(copy)
        parameter.grad = grad
        if grad is not None and grad_copy is not None:
            grad.data.copy_(grad_copy)
        parameter.requires_grad_(needs_grad)
        _hooks(parameter).update(hooks)

    return restore


def _hooks(parameter: nn.Parameter) -> dict[Any, Any]:
    """Return the hooks that run when a gradient was accumulated; a dict of its own if there are none."""
    found: dict[Any, Any] | None = parameter._post_accumulate_grad_hooks
    return {} if found is None else found


@contextmanager
def same_random_state(models: Sequence[nn.Module]) -> Iterator[None]:
    """Restore the generators of torch, Python and numpy on leaving."""
    tensors: list[Tensor] = [p for model in models for p in model.parameters()]
    devices = sorted({p.device.index or 0 for p in tensors if p.device.type == "cuda"})
    python: Any = random.getstate()
    legacy: Any = np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)

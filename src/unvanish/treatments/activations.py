"""Use another activation, also where it is written as a function call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..records import Change
from .treatment import Patient, Steps, Treatment, around_forward

REPLACEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky-relu": lambda x: F.leaky_relu(x, 0.01),
    "elu": F.elu,
    "selu": F.selu,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "tanh": torch.tanh,
}
# Hidden activations as torch names the functions that modules, F, torch and tensors end in.
_SWAPPED = frozenset(("relu", "relu_", "tanh", "tanh_", "sigmoid", "sigmoid_", "selu", "elu", "gelu", "silu", "mish"))
_CODE = {
    "leaky-relu": "nn.LeakyReLU(0.01)  # or F.leaky_relu(x, 0.01)",
    "elu": "nn.ELU()",
    "selu": "nn.SELU()  # with lecun-init",
    "gelu": "nn.GELU()",
    "silu": "nn.SiLU()",
    "mish": "nn.Mish()",
    "tanh": "nn.Tanh()",
    "relu": "nn.ReLU()  # with he-init",
}


class _Swap(TorchFunctionMode):
    """Calls another function where a hidden activation is called; the last call of a forward pass may be kept."""

    def __init__(self, replacement: Callable[[Tensor], Tensor], keep: int) -> None:
        super().__init__()
        self.replacement = replacement
        self.keep = keep  # number of the call that makes the network's output: its range is meant
        self.calls = 0
        self.last: tuple[int, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in _SWAPPED or not args or not isinstance(args[0], Tensor):
            return func(*args, **(kwargs or {}))
        self.calls += 1
        if self.calls == self.keep:
            return func(*args, **(kwargs or {}))
        result = self.replacement(args[0])
        self.last = (self.calls, result)
        return result


def swap_activation(identifier: str) -> Treatment:
    """Use one activation for all hidden layers; the one that makes the network's output keeps its range.

    Works for modules and functional calls alike, because both end in the same functions. Gates of recurrent
    layers are computed inside torch and stay.

    Source: Maas et al. 2013 (leaky relu), Clevert et al. 2016 (elu), Klambauer et al. 2017 (selu), Hendrycks &
    Gimpel 2016 (gelu).
    """
    replacement = REPLACEMENTS[identifier]

    def apply(patient: Patient) -> Steps:
        output_call = [0]

        def before() -> _Swap:
            mode = _Swap(replacement, output_call[0])
            mode.__enter__()  # type: ignore[no-untyped-call]
            return mode

        def after(mode: _Swap, output: Any) -> Any:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if mode.last is not None and output is mode.last[1]:
                output_call[0] = mode.last[0]  # from the next call on the last activation is left alone
            return output

        handles = around_forward(patient.model, before, after)
        try:
            yield Change(identifier, f"hidden activations are {identifier}")
        finally:
            for handle in handles:
                handle.remove()

    return Treatment(identifier, apply, code=_CODE[identifier])


def is_activation_module(module: nn.Module) -> bool:
    """Say whether a module is one of the activations that can be swapped."""
    return type(module).__name__.lower() in {name.rstrip("_") for name in _SWAPPED}

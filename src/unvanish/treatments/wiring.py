"""Let signals pass by: skip connections."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TreatmentError
from ..records import Change
from .treatment import Patient, Steps, Treatment, owned_by_optimizer

NAME = "unvanish_skip"


def skip_connections(start: float = 1.0) -> Treatment:
    """Add a learnt share of its input to the output of each layer that keeps the shape: F(x) + a x.

    ``start`` is the first a: 1 for an untrained network, 0 for a trained one, which it leaves as it is.

    Source: He et al. 2016, section 3.1; Bachlechner et al. 2021 (learnt share).
    """

    def apply(patient: Patient) -> Steps:
        layers = [(name, m) for name, m in patient.model.named_modules() if _keeps_shape(m)]
        if not layers:
            raise TreatmentError(
                "treat(): 'skip-connections': found no layer whose output has the shape of its input, expected at "
                "least one. Nothing was changed."
            )
        with ExitStack() as stack:
            for _, layer in layers:
                stack.enter_context(_Skip(layer, start, patient))
            names = tuple(name for name, _ in layers)
            what = f"{len(layers)} layers pass their input on, times {start:g}"
            yield Change("skip-connections", what, names, preserves_function=start == 0)

    return Treatment(
        "skip-connections", apply, "" if start == 1 else f"{start:g}", preserves_function=start == 0,
        code="return layer(x) + x  # in forward(), where the shapes agree",
    )  # fmt: skip


def _keeps_shape(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return module.in_features == module.out_features
    if not isinstance(module, nn.modules.conv._ConvNd) or module.in_channels != module.out_channels:
        return False
    kept = isinstance(module.padding, str) and module.padding == "same"
    if not kept and not isinstance(module.padding, str):
        sizes = zip(module.kernel_size, module.padding, module.dilation, strict=True)
        kept = all(2 * pad == dilation * (kernel - 1) for kernel, pad, dilation in sizes)
    return kept and all(stride == 1 for stride in module.stride)


class _Skip:
    """One skip connection; its share is a parameter of the layer."""

    def __init__(self, layer: nn.Module, start: float, patient: Patient) -> None:
        weight = next(layer.parameters())
        self.layer, self.share = layer, nn.Parameter(torch.full((), start, device=weight.device, dtype=weight.dtype))
        self.owned = owned_by_optimizer([self.share], patient.optimizers, weight)

    def __enter__(self) -> None:
        self.layer.register_parameter(NAME, self.share)
        self.owned.__enter__()
        self.handle = self.layer.register_forward_hook(_add_input)

    def __exit__(self, *error: object) -> None:
        self.handle.remove()
        self.owned.__exit__(None, None, None)
        del self.layer._parameters[NAME]


def _add_input(layer: nn.Module, args: Any, output: Tensor) -> Any:
    share = layer._parameters[NAME]
    return output if share is None or args[0].shape != output.shape else output + share * args[0]

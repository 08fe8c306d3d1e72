"""Which layers of a network can be pretrained: a linear or convolutional layer and the activation that follows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import OptionError

_LAYERS = (nn.Linear, nn.Conv2d)
_DROPOUTS = (nn.modules.dropout._DropoutNd,)
ACTIVATIONS = (
    nn.Sigmoid, nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
    nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Softsign, nn.ReLU6, nn.LogSigmoid,
)  # fmt: skip
# what may stand before a layer: it learns nothing, and is the same in training and evaluation
_BETWEEN = (
    nn.Flatten, nn.Unflatten, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.ZeroPad2d, nn.Upsample,
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One layer to pretrain.

    Args:
        name: Of the layer in the model.
        layer: The layer itself.
        before: What stands between the features of the stage below and the layer. Dropout is left out.
        activation: What follows the layer.
    """

    name: str
    layer: nn.Linear | nn.Conv2d
    before: tuple[nn.Module, ...]
    activation: nn.Module

    @property
    def is_frozen(self) -> bool:
        """Say whether the layer keeps its weights: another hand froze it."""
        return not self.layer.weight.requires_grad

    def read(self, features: Tensor) -> Tensor:
        """Return what the layer reads, from the features of the stage below."""
        for module in self.before:
            features = module(features)
        return features

    def respond(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the features of this stage for what the layer reads, with these weights."""
        features: Tensor = self.activation(_apart(self.activation, self.project(inputs, weight, bias)))
        return features

    def project(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what the layer hands to its activation, with these weights."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(inputs, weight, bias)
        return F.conv2d(inputs, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    def project_back(self, hidden: Tensor, weight: Tensor, like: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the transposed projection: from hidden units to something shaped as what the layer reads."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(hidden, weight.t(), bias)
        padding = [int(p) for p in layer.padding]  # numbers: other kinds are refused
        extra = []  # rows and columns at the border that a stride has not reached
        for size, made, p, s, d, kernel in zip(
            like.shape[-2:], hidden.shape[-2:], padding, layer.stride, layer.dilation, layer.kernel_size, strict=True
        ):
            extra.append(size - ((made - 1) * s - 2 * p + d * (kernel - 1) + 1))
        return F.conv_transpose2d(hidden, weight, bias, layer.stride, padding, extra, layer.groups, layer.dilation)


def stages_of(model: nn.Module | Sequence[nn.Module], layers: int | None, method: str) -> tuple[Stage, ...]:
    """Return the stages of an `nn.Sequential`, or of a list of modules that run one after the other, lowest first.

    Args:
        model: Sequential modules within it are gone into.
        layers: How many; None: of an `nn.Sequential` all but its last layer, which is the head; of a list all.
        method: ``"rbm"`` wants linear layers with a sigmoid.

    Raises:
        OptionError: if there is something else in the way.
    """
    found = _pair(model)
    is_list = not isinstance(model, nn.Module)
    count = len(found) - (0 if is_list else 1) if layers is None else layers
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(found):
        raise OptionError(
            f"pretrain(): layers: found {layers!r}, expected a whole number from 1 to {len(found)}, the number of "
            f"linear and convolutional layers{'' if layers is not None else ', and more than the head'}. "
            "Nothing was changed. Name it with layers=1, or give a list of modules to pretrain all of them."
        )
    chosen = tuple(found[:count])
    for stage in chosen:
        _check(stage, method)
    weights = [id(stage.layer.weight) for stage in chosen]
    if len({*weights}) < len(weights):
        raise OptionError(
            "pretrain(): model: found one weight in two layers, expected each layer to have its own. Nothing was "
            "changed. Pretrain the layers below the shared one with layers=n."
        )
    return chosen


def _pair(model: nn.Module | Sequence[nn.Module]) -> list[Stage]:
    """Pair layers with what follows them; modules that cannot be passed end the stack, and an error if it is empty."""
    stages: list[Stage] = []
    before: list[nn.Module] = []
    waiting: tuple[str, nn.Linear | nn.Conv2d] | None = None
    stop = ""
    for name, module in _leaves(model):
        if isinstance(module, _DROPOUTS):
            continue
        if waiting is not None:
            is_active = isinstance(module, ACTIVATIONS)
            stages.append(Stage(*waiting, tuple(before), module if is_active else nn.Identity()))
            before, waiting = [], None
            if is_active:
                continue
        if type(module) in _LAYERS:
            waiting = (name, module)  # type: ignore[assignment]  # one of them, by its type
        elif isinstance(module, (*_BETWEEN, *ACTIVATIONS)):
            before.append(module)
        else:
            stop = f"{type(module).__name__} {name!r}"
            break
    if waiting is not None:
        stages.append(Stage(*waiting, tuple(before), nn.Identity()))
    if not stages or stop:
        raise OptionError(
            f"pretrain(): model: found {stop or 'no linear or convolutional layer'}, expected an nn.Sequential, or a "
            "list of modules that run one after the other, of nn.Linear or nn.Conv2d with their activations. Nothing "
            "was changed. Write pretrain([model.fc1, nn.Sigmoid(), model.fc2, nn.Sigmoid()], data)."
        )
    return stages


def _leaves(model: nn.Module | Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that run one after the other, with their names."""
    items = enumerate(model) if not isinstance(model, nn.Module) else [("", model)]
    for key, module in items:
        if isinstance(module, nn.Sequential):
            yield from ((f"{key}.{name}".lstrip("."), leaf) for name, leaf in _children(module))
        else:
            yield str(key), module


def _children(sequential: nn.Sequential) -> Iterator[tuple[str, nn.Module]]:
    for name, child in sequential.named_children():
        if isinstance(child, nn.Sequential):
            yield from ((f"{name}.{inner}", leaf) for inner, leaf in _children(child))
        else:
            yield name, child


def _check(stage: Stage, method: str) -> None:
    layer, kind = stage.layer, type(stage.activation).__name__
    if next(layer.children(), None) is not None or not isinstance(layer.weight, nn.Parameter):
        raise OptionError(
            f"pretrain(): layer {stage.name!r}: found a weight that is computed, or something built into the layer, "
            "expected a plain layer. Nothing was changed. Pretrain first, and wrap the layer then."
        )
    if method == "rbm" and not (isinstance(layer, nn.Linear) and isinstance(stage.activation, nn.Sigmoid)):
        after = "no activation" if kind == "Identity" else kind
        raise OptionError(
            f"pretrain(): layer {stage.name!r}: found {type(layer).__name__} with {after}, expected Linear with "
            "Sigmoid: hidden units of a Boltzmann machine are on or off. Nothing was changed. "
            "Use method='autoencoder', or fewer layers=."
        )
    if isinstance(layer, nn.Conv2d) and (isinstance(layer.padding, str) or layer.padding_mode != "zeros"):
        raise OptionError(
            f"pretrain(): layer {stage.name!r}: found padding={layer.padding!r} and padding_mode="
            f"{layer.padding_mode!r}, expected numbers and 'zeros'. Nothing was changed. Write padding=1."
        )


def _apart(activation: nn.Module, inputs: Tensor) -> Tensor:
    """Return inputs that the activation may write into."""
    return inputs.clone() if getattr(activation, "inplace", False) and torch.is_grad_enabled() else inputs

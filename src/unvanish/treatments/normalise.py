"""Normalise what a layer puts out, before its activation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TreatmentError
from ..layers import is_batch_norm, is_normalisation
from ..records import Change
from .treatment import Patient, Steps, Treatment, owned_by_optimizer, saved_tensors
from .units import normed

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
NAME = "unvanish_norm"


def _make_batch_norm(layer: nn.Module) -> nn.Module:
    width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    kinds = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    dims = 1 if isinstance(layer, nn.Linear) else len(layer.kernel_size)  # type: ignore[arg-type]
    return kinds[dims](int(width))  # type: ignore[arg-type]


def _make_layer_norm(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return nn.LayerNorm(layer.out_features)
    return nn.GroupNorm(1, int(layer.out_channels))  # type: ignore[arg-type]


def batch_norm() -> Treatment:
    """Batch normalisation between each hidden linear or convolutional layer and its activation.

    Source: Ioffe & Szegedy 2015, algorithm 1.
    """
    code = "nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())  # a norm before each activation"
    return Treatment("batch-norm", _insert("batch-norm", _make_batch_norm), code=code)


def layer_norm() -> Treatment:
    """Layer normalisation between each hidden layer and its activation; needs no batch.

    Batch norms that are there are replaced, others are added only where there is none.

    Source: Ba, Kiros & Hinton 2016; Wu & He 2018 (one group, for convolutions).
    """
    code = "nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), nn.ReLU())  # a norm before each activation"

    def apply(patient: Patient) -> Steps:
        has_batch_norm = any(is_batch_norm(module) for module in patient.model.modules())
        yield from (_replace_batch_norms if has_batch_norm else _insert("layer-norm", _make_layer_norm))(patient)

    return Treatment("layer-norm", apply, code=code)


def _replace_batch_norms(patient: Patient) -> Steps:
    """Put a norm over each example in the place of every batch norm."""
    places = [(parent, key, m) for parent in patient.model.modules() for key, m in parent._modules.items()]
    replaced = [(parent, key, norm) for parent, key, norm in places if norm is not None and is_batch_norm(norm)]
    with ExitStack() as stack:
        for parent, key, norm in replaced:
            new = _PerExample(int(norm.num_features))  # type: ignore[arg-type]
            like = next(norm.parameters(), next(patient.model.parameters()))
            new.to(device=like.device, dtype=like.dtype).train(norm.training)
            stack.enter_context(owned_by_optimizer(list(new.parameters()), patient.optimizers, like))
            stack.callback(parent._modules.__setitem__, key, norm)
            parent._modules[key] = new
        yield Change("layer-norm", f"{len(replaced)} batch norms are replaced by layer norms")


class _PerExample(nn.GroupNorm):
    """Layer norm over channels and positions of an example, for the shapes that a batch norm takes."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)


def _insert(identifier: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[Patient], Steps]:
    def apply(patient: Patient) -> Steps:
        layers = _hidden_layers(patient.model)
        if not layers:
            raise TreatmentError(
                f"treat(): {identifier!r}: found no hidden linear or convolutional layer without a norm after it, "
                "expected at least one. Nothing was changed."
            )
        with ExitStack() as stack:
            for _, layer in layers:
                stack.enter_context(_Inserted(layer, make(layer), patient))
            yield Change(identifier, f"{len(layers)} layers are normalised", tuple(name for name, _ in layers))

    return apply


def _hidden_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers to normalise: all but the last, and none that a normalisation follows already."""
    modules = [(name, m) for name, m in model.named_modules() if isinstance(m, _LAYERS) or is_normalisation(m)]
    layers: list[tuple[str, nn.Module]] = []
    for place, (name, module) in enumerate(modules[:-1]):
        if isinstance(module, _LAYERS) and not is_normalisation(modules[place + 1][1]):
            layers.append((name, module))
    return layers


class _Inserted:
    """A norm that runs on a layer's output, registered in the layer so that `state_dict` holds it."""

    def __init__(self, layer: nn.Module, norm: nn.Module, patient: Patient) -> None:
        weight = next(layer.parameters())
        self.layer, self.norm = layer, norm.to(device=weight.device, dtype=weight.dtype).train(layer.training)
        self.owned = owned_by_optimizer(list(norm.parameters()), patient.optimizers, weight)

    def __enter__(self) -> None:
        self.layer.add_module(NAME, self.norm)
        self.owned.__enter__()
        self.handle = self.layer.register_forward_hook(_normalised)

    def __exit__(self, *error: object) -> None:
        self.handle.remove()
        self.owned.__exit__(None, None, None)
        del self.layer._modules[NAME]


def _normalised(layer: nn.Module, args: Any, output: Tensor) -> Any:
    norm = layer._modules[NAME]
    assert norm is not None
    if isinstance(norm, nn.BatchNorm1d) and output.dim() == 3 and isinstance(layer, nn.Linear):
        return norm(output.flatten(0, 1)).view_as(output)  # (batch * time, width)
    if isinstance(norm, nn.BatchNorm1d) and norm.training and output.shape[0] == 1 and output.dim() == 2:
        return output  # one example has no statistics
    return norm(output)


def precise_bn(batches: Iterable[Any] = ()) -> Treatment:
    """Statistics of a whole training set for batch norms, pooled in float64, instead of running averages.

    Source: Wu & Johnson 2021, section 3.1.
    """
    taken = list(batches)

    def apply(patient: Patient) -> Steps:
        norms = [m for m in patient.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        norms = [m for m in norms if m.running_mean is not None]
        inputs = taken or ([patient.inputs] if patient.inputs else [])
        if not norms or not inputs:
            raise TreatmentError(
                "treat(): 'precise-bn': found no batch norm with running statistics, or no batches, expected both. "
                "Nothing was changed. Call treat(model, None, precise_bn(loader))."
            )
        buffers = [buffer for norm in norms for buffer in norm.buffers()]
        with saved_tensors(buffers):
            _pool(patient.model, norms, inputs)
            yield Change("precise-bn", f"{len(norms)} norms hold the statistics of {len(inputs)} batches")

    return Treatment("precise-bn", apply, code="unvanish.treat(model, None, precise_bn(train_loader)).keep()")


@torch.no_grad()
def _pool(model: nn.Module, norms: list[Any], inputs: list[Any]) -> None:
    """Set each norm's mean and variance to those of its input over all batches."""
    sums: dict[int, list[Any]] = {id(norm): [0, 0.0, 0.0] for norm in norms}

    def see(norm: nn.Module, args: Any) -> None:
        flat = args[0].double().movedim(1, -1).flatten(0, -2) if args[0].dim() > 2 else args[0].double()
        entry = sums[id(norm)]
        entry[0] += flat.shape[0]
        entry[1] = entry[1] + flat.sum(0)
        entry[2] = entry[2] + (flat * flat).sum(0)

    modes = [(module, module.training) for module in model.modules()]
    handles = [norm.register_forward_pre_hook(see) for norm in norms]
    try:
        for module in model.modules():
            module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
        for batch in inputs:
            arguments = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
            model(*(arguments[:1] if len(arguments) == 2 else arguments))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    for norm in norms:
        count, total, square = sums[id(norm)]
        if count:
            mean = total / count
            norm.running_mean.copy_(mean)
            norm.running_var.copy_((square / count - mean**2).clamp(min=0) * count / max(count - 1, 1))


def fold_bn() -> Treatment:
    """Fold batch norms into the layers before them, for prediction: the same outputs at no cost.

    Norms that stand directly after a layer in an `nn.Sequential` are found by that; all others by a batch, from what
    reads a layer's output: ``inputs=(x,)``.

    Source: Jacob et al. 2018, section 3.2.
    """
    return Treatment(
        "fold-bn", _fold, preserves_function=True, code="unvanish.treat(model.eval(), None, 'fold-bn').keep()"
    )


def _fold(patient: Patient) -> Steps:
    pairs = [] if patient.model.training else _foldable(patient)
    if not pairs:
        raise TreatmentError(
            "treat(): 'fold-bn': found no linear or convolutional layer followed by a batch norm in eval mode, "
            "expected at least one. Nothing was changed. Call model.eval() first; with a batch, inputs=(x,), norms "
            "outside of nn.Sequential are found, too."
        )
    originals: list[tuple[nn.Module, Any, Any, nn.Module, str, nn.Module]] = []
    for layer, parent, key, norm in pairs:
        originals.append((layer, layer.weight, layer.bias, parent, key, norm))
        _fold_pair(layer, norm)
        parent._modules[key] = nn.Identity()
    try:
        yield Change("fold-bn", f"{len(pairs)} batch norms are folded", preserves_function=True)
    finally:
        for layer, weight, bias, parent, key, norm in originals:
            layer.weight, layer.bias = weight, bias
            parent._modules[key] = norm


def _foldable(patient: Patient) -> list[tuple[Any, nn.Module, str, Any]]:
    """Return layers, and where the norms stand that are folded into them."""
    places = [(parent, key, m) for parent in patient.model.modules() for key, m in parent._modules.items()]
    uses = Counter(module for _, _, module in places)
    layers = {norm: layer for layer, norm in (normed(patient) if patient.inputs else [])}
    for parent in patient.model.modules():
        if isinstance(parent, nn.Sequential):
            layers |= {norm: layer for layer, norm in pairwise(parent)}
    return [
        (layers[norm], parent, key, norm)
        for parent, key, norm in places
        if norm in layers and uses[norm] == uses[layers[norm]] == 1 and _is_foldable(layers[norm], norm)
    ]


def _is_foldable(layer: nn.Module, norm: Any) -> bool:
    is_norm = isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None
    is_layer = isinstance(layer, _LAYERS) and not isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return is_norm and is_layer


@torch.no_grad()
def _fold_pair(layer: Any, norm: Any) -> None:
    scale = 1 / torch.sqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale + (norm.bias.double() if norm.bias is not None else 0.0)
    if layer.bias is not None:
        shift = shift + layer.bias.double() * scale
    weight = layer.weight.double() * scale.view(-1, *[1] * (layer.weight.dim() - 1))
    layer.weight = nn.Parameter(weight.to(layer.weight), requires_grad=layer.weight.requires_grad)
    layer.bias = nn.Parameter(shift.to(layer.weight), requires_grad=layer.weight.requires_grad)

"""Which layers a model has, what they are called, and how they were left by their initialisation.

A *layer* is a module that owns parameters itself. Its name is the one `named_modules` gives it, so
that a user finds it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel and DDP; torch.compile
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
_NORMS = (*_BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that belong to ``module`` itself and not to a child."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter


def is_layer(module: nn.Module) -> bool:
    """Say whether ``module`` owns parameters."""
    return any(parameter is not None for parameter in module._parameters.values())


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield name, module, and of how many replicas its parameters are stacked (0: it is an ordinary module).

    Replicas hold their stack in a child, of which the name says nothing to the user: it is left out.
    """
    holders = {name: count for name, module in model.named_modules() if (count := replica_count(module))}
    stems = {f"{name}.stacked".lstrip("."): name for name in holders}
    for full, module in model.named_modules():
        stem = next((stem for stem in stems if f"{full}.".startswith(f"{stem}.")), None)
        if stem is None:
            yield full, module, 0
        else:
            yield (stems[stem] + full[len(stem) :]).lstrip("."), module, holders[stems[stem]]


def replica_count(module: nn.Module) -> int:
    """Return of how many replicas a module holds the stack; 0 if it holds none.

    Known by its form, n and a child whose parameters all have a first axis of n: `Replicas` stands above this module.
    """
    stacked = module._modules.get("stacked")
    count = 0 if stacked is None else getattr(module, "n", 0)
    is_stack = stacked is not None and all(p.shape[:1] == (count,) for p in stacked.parameters())
    return count if is_stack and isinstance(count, int) else 0


def first_replica(layer: nn.Module) -> nn.Module:
    """Return a stacked layer as its first replica is: the same, with parameters that lack the axis of replicas."""
    plain: nn.Module = object.__new__(type(layer))
    first = {name: nn.Parameter(p.detach()[0], p.requires_grad) for name, p in own_parameters(layer)}
    plain.__dict__ = {**layer.__dict__, "_parameters": {**layer._parameters, **first}}
    return plain


def is_normalisation(module: nn.Module) -> bool:
    """Say whether ``module`` normalises; its input scale cannot hurt and its weights are gains."""
    return isinstance(module, _NORMS) or type(module).__name__.endswith(("Norm", "Norm1d", "Norm2d"))


def is_batch_norm(module: nn.Module) -> bool:
    """Say whether ``module`` takes its statistics from the batch."""
    return isinstance(module, _BATCH_NORMS)


def clean_name(name: str) -> str:
    """Remove what wrappers put before a name.

    Example:
        >>> clean_name("module._orig_mod.net.0")
        'net.0'
    """
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def unregistered_name(module: nn.Module, owners: list[tuple[str, nn.Module]]) -> str | None:
    """Find ``module`` in a plain list, tuple or dict of one of ``owners``; None if it is not there.

    Such a module runs, but ``parameters()`` of its owner does not list it, so no optimiser gets it.
    """
    for owner_name, owner in owners:
        for attribute, value in vars(owner).items():
            items: Any = ()
            if isinstance(value, (list, tuple)):
                items = enumerate(value)
            elif isinstance(value, dict) and not attribute.startswith("_"):
                items = value.items()
            for key, item in items:
                for inner, found in item.named_modules() if isinstance(item, nn.Module) else ():
                    if found is module:
                        prefix = f"{owner_name}." if owner_name else ""
                        return f"{prefix}{attribute}[{key!r}]{'.' if inner else ''}{inner}"
    return None


def fan(weight: Tensor) -> tuple[int, int]:
    """Return fan in and fan out of a weight as `torch.nn.init` counts them; 0 if it has none.

    Example:
        >>> fan(torch.zeros(8, 3, 5, 5))
        (75, 200)
    """
    if weight.dim() < 2:
        return 0, 0
    field = math.prod(weight.shape[2:])
    return weight.shape[1] * field, weight.shape[0] * field


def looks_fresh(module: nn.Module, *, least: int = 256) -> bool:
    """Say whether the largest weight still is as a usual random initialisation draws it.

    Tests mean, spread and kurtosis against uniform and normal draws with the spreads of the
    initialisations in use. Trained weights fail it: training makes their tails heavy and moves their
    spread. Four standard errors, so a fresh layer passes with probability above 0.999.

    Args:
        module: A layer.
        least: With fewer weights the answer is no: too few to tell a trained layer.

    Source: the initialisations of `torch.nn` 2.13; LeCun 1998, Glorot 2010, He 2015 (spreads); normal
    theory for the standard errors of mean, spread and kurtosis.
    """
    weights = [p for name, p in own_parameters(module) if p.dim() >= 2 and p.is_floating_point()]
    if not weights:
        return False
    weight = max(weights, key=lambda p: p.numel())
    if weight.numel() < least or weight.is_meta:
        return False
    flat = weight.detach().reshape(-1)[:200_000].double()
    count, std = flat.numel(), float(flat.std())
    if not std > 0 or not math.isfinite(std):
        return False
    error = 1 / math.sqrt(count)
    centred = (flat - flat.mean()) / std
    kurtosis = float((centred**4).mean())
    if abs(float(flat.mean())) > 4 * std * error:
        return False
    largest = float(flat.abs().max())
    for expected, spread_error, kurtosis_error in ((1.8, 0.45, 1.5), (3.0, 0.71, 4.9)):  # uniform, normal
        near_kurtosis = abs(kurtosis - expected) < 4 * error * kurtosis_error
        for spread in _usual_spreads(module, weight) if near_kurtosis else ():
            # a uniform draw never leaves its bounds; training nearly always takes some weight out of them
            in_bounds = expected == 3.0 or largest <= spread * math.sqrt(3) * (1 + 1e-5)
            if in_bounds and abs(std / spread - 1) < 4 * spread_error * error + 1e-3:
                return True
    return False


def _usual_spreads(module: nn.Module, weight: Tensor) -> list[float]:
    """Return the standard deviations that usual initialisations give this weight."""
    fan_in, fan_out = fan(weight)
    spreads = [0.02, 0.01]  # transformers; old ImageNet recipes
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return [1.0, *spreads, 1 / math.sqrt(weight.shape[1]), math.sqrt(2 / sum(weight.shape))]
    if isinstance(module, nn.RNNBase):
        return [1 / math.sqrt(3 * module.hidden_size)]
    gains = (1.0, math.sqrt(2.0), 5 / 3)
    spreads.append(1 / math.sqrt(3 * fan_in))  # torch's default of Linear and Conv
    spreads += [gain * math.sqrt(2 / (fan_in + fan_out)) for gain in gains]
    spreads += [gain / math.sqrt(fan_in) for gain in gains]
    return spreads


def has_equal_units(module: nn.Module) -> bool:
    """Say whether all units of a layer have the very same weights, so that they stay copies.

    Source: Goodfellow, Bengio & Courville 2016, section 8.4 (initialisation must break symmetry).
    """
    matrices = [p for _, p in own_parameters(module) if p.dim() >= 2]
    if not matrices or is_normalisation(module) or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return False
    return all(p.shape[0] > 1 and bool((p.detach() == p.detach()[:1]).all()) for p in matrices)


def recurrent_radius(module: nn.Module) -> float:
    """Return the spectral radius of a plain RNN's first recurrent weight; 0 for anything else.

    Source: Pascanu, Mikolov & Bengio 2013, section 2.1: gradients through T steps scale as radius**T.
    """
    if not isinstance(module, nn.RNN) or module.hidden_size > 1024:
        return 0.0
    weight = module.get_parameter("weight_hh_l0").detach()
    if not bool(torch.isfinite(weight).all()):
        return 0.0
    return float(torch.linalg.eigvals(weight.double()).abs().max())

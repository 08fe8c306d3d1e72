"""How alike replicas are, layer by layer, and how far they are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from ...terrain import LayerRow
from ..stack import mean
from .surface import Weights


def layers_of(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the layers that own trained parameters, with the names of these; a tied one counts where it is first."""
    found: dict[str, list[str]] = {}
    for name in trained:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def compared(names: Sequence[str], weights: Weights) -> list[str]:
    """Return the matrices among some parameters, or all if there are none.

    Biases, and the gains of norms, start equal in all networks: they would make independent ones look alike.
    """
    return [name for name in names if weights[name].dim() >= 2] or list(names)


def cosine(one: Weights, other: Weights, names: Sequence[str]) -> float:
    """Return the cosine between some tensors of two models; nan if one is zero.

    Example:
        >>> cosine({"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([3.0, 4.0])}, ["w"])
        0.6
    """
    product = math.fsum(_dot(one[name], other[name]) for name in names)
    norms = [math.sqrt(math.fsum(_dot(each[name], each[name]) for name in names)) for each in (one, other)]
    return product / (norms[0] * norms[1]) if all(norms) else math.nan


def overlaps(models: Sequence[Weights], names: Sequence[str]) -> tuple[tuple[float, ...], ...]:
    """Return the cosines between all models, as a symmetric matrix."""
    names = compared(names, models[0])
    count = len(models)
    upper = {(i, j): cosine(models[i], models[j], names) for i in range(count) for j in range(i + 1, count)}
    return tuple(tuple(1.0 if i == j else upper[min(i, j), max(i, j)] for j in range(count)) for i in range(count))


def centre(models: Sequence[Weights]) -> Weights:
    """Return the mean of models; whole numbers are those of the first."""
    return {name: mean(torch.stack([model[name] for model in models]))[0] for name in models[0]}


def norm(weights: Weights, names: Sequence[str]) -> float:
    """Return the Euclidean norm of some tensors."""
    return math.sqrt(math.fsum(_dot(weights[name], weights[name]) for name in names))


def layer_rows(model: nn.Module, names: Sequence[str], raw: list[Weights], aligned: list[Weights]) -> list[LayerRow]:
    """Return one row a layer: overlaps, the mean over pairs, and spreads."""
    modules = dict(model.named_modules())
    middle = centre(raw)
    trained = {name: raw[0][name] for name in names}
    rows = []
    for layer, owned in layers_of(model, trained).items():
        count = sum(raw[0][name].numel() for name in owned)
        gaps = [{name: each[name] - middle[name] for name in owned} for each in raw]
        distance = math.fsum(norm(gap, owned) ** 2 for gap in gaps) / len(raw)
        size = norm(middle, owned) ** 2
        rows.append(
            LayerRow(
                name=layer,
                kind=type(modules[layer]).__name__,
                parameters=count,
                overlap=_mean_cosine(raw, compared(owned, raw[0])),
                aligned_overlap=_mean_cosine(aligned, compared(owned, raw[0])) if aligned else math.nan,
                spread=distance / count,
                relative_spread=distance / size if size else math.nan,
            )
        )
    return rows


def _mean_cosine(models: Sequence[Weights], names: Sequence[str]) -> float:
    found = [cosine(one, other, names) for one, other in combinations(models, 2)]
    return math.fsum(found) / len(found)


def _dot(one: Tensor, other: Tensor) -> float:
    return float((one.double() * other.double()).sum())

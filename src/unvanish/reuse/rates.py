"""A learning rate for each layer, as the parameter groups of any optimiser, and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import OptionError
from ..layers import is_normalisation
from .freeze import layers_of


def layer_rates(
    model: nn.Module, lr: float, *, factor: float = 1 / 2.6, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Return parameter groups in which each layer learns at ``factor`` times the rate of the layer above.

    The rate of layer i of L is ``lr * factor**(L - 1 - i)``. Layers are counted as in `freeze_to`, frozen ones too, so
    the groups and the rates stay what they are when layers freeze and thaw, and schedulers fit all along.

    Args:
        model: Each of its parameters comes into exactly one group; a shared one has the rate of its upper layer.
        lr: Rate of the topmost layer, > 0.
        factor: Dimensionless, > 0. 1: the same rate for all.
        weight_decay: If given, for weight matrices only; biases, norms and embeddings have none.

    Raises:
        OptionError: if a number cannot be used.

    Source: Howard & Ruder 2018, section 3.2 (a rate for each layer, 1/2.6); Clark et al. 2020 (0.8 for a transformer
    of 12 layers).

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> optimizer = torch.optim.SGD(layer_rates(model, 0.1, factor=0.5))
        >>> print(rate_table(optimizer))
        layer    weights  learn        lr     decay
        0             16     16      0.05         0
        2             10     10       0.1         0
    """
    for name, value in (
        ("lr", lr),
        ("factor", factor),
        ("weight_decay", 1.0 if weight_decay is None else weight_decay),
    ):
        if not 0 <= value < math.inf or (value == 0 and name != "weight_decay"):
            raise OptionError(
                f"layer_rates(): {name}: found {value!r}, expected a finite number above 0. "
                "Write layer_rates(model, 1e-3, factor=0.8)."
            )
    layers = layers_of(model) or [(type(model).__name__, [model])]
    place_of = dict.fromkeys(model.parameters(), 0)  # what belongs to no layer goes with the lowest
    place_of |= {p: place for place, (_, own) in enumerate(layers) for module in own for p in module.parameters()}
    exempt = set(_exempt(model))
    groups = []
    for place, (name, _) in enumerate(layers):
        own = [p for p, where in place_of.items() if where == place]
        rate = {"layer": name, "lr": lr * factor ** (len(layers) - 1 - place)}
        if weight_decay is None:
            groups.append({"params": own, **rate})
            continue
        for decays in (True, False):
            params = [p for p in own if (p not in exempt) is decays]
            if params:
                groups.append({"params": params, **rate, "weight_decay": weight_decay if decays else 0.0})
    return groups


def rate_table(optimizer: torch.optim.Optimizer) -> str:
    """Return the groups of an optimiser as lines: weights, how many of them learn, rate and decay."""
    lines = [f"{'layer':<9}{'weights':>7}{'learn':>7}{'lr':>10}{'decay':>10}"]
    for number, group in enumerate(optimizer.param_groups):
        sizes = [(p.numel(), p.requires_grad) for p in group["params"]]
        learning = sum(size for size, learns in sizes if learns)
        lines.append(
            f"{group.get('layer', number)!s:<9}{sum(size for size, _ in sizes):>7}{learning:>7}"
            f"{group['lr']:>10.3g}{group.get('weight_decay', 0):>10.3g}"
        )
    return "\n".join(lines)


def _exempt(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield biases, gains and embeddings."""
    for module in model.modules():
        whole = is_normalisation(module) or isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        yield from (p for p in module.parameters(recurse=False) if whole or p.dim() < 2)

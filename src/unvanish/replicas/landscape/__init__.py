"""How the minima of replicas lie to each other: overlap, spread, barriers, local energy, curvature, local entropy."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...terrain import Landscape
from ...untouched import untouched
from ..replicas import Replicas
from ..stack import named_tensors
from .given import PARTS as PARTS
from .given import Part as Part
from .given import Settings, check_models, check_same, check_settings
from .surface import Surface, Weights, batches_of
from .survey import measure

__all__ = ["PARTS", "Part", "landscape"]


def landscape(
    replicas: Replicas | Sequence[nn.Module],
    loss_fn: Callable[[Any, Any], Tensor],
    loader: Any,
    *,
    parts: Sequence[Part] = PARTS,
    align: bool = True,
    points: int = 15,
    pairs: int = 6,
    sigmas: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5),
    draws: int = 10,
    width: float = 0.3,
    chains: int = 5,
    seed: int = 0,
) -> Landscape:
    """Return how the minima of replicas lie to each other, in numbers that print, draw and turn into JSON.

    Overlaps and spreads come from the weights alone. The other parts look at the data, in evaluation mode, with the
    statistics of batch norms estimated anew at each point. Where outputs are scores of classes and targets whole
    numbers, mistakes are counted beside the loss. The models, their gradients and the random state stay as they are.

    Args:
        replicas: Replicas, or two or more plain models of one architecture.
        loss_fn: Function of an output and y; returns one number, the mean over its batch.
        loader: Batches as pairs ``(x, y)``; x may be a tensor, a tuple or a mapping of arguments. It is read once, and
            its batches are kept: of large data, give a part.
        parts: Which parts look at the data: ``"barriers"``, ``"local_energy"``, ``"curvature"``, ``"local_entropy"``.
        align: Also give all replicas a common order of hidden units, and measure overlaps and barriers again. Needs
            scipy. Where it cannot be done rightly, it is not done, and a note says why.
        points: On each path, its ends included. 11 to 25 are usual.
        pairs: Paths between replicas, at most; with more pairs, these are spread over all.
        sigmas: Strengths of the noise in the local energy, as shares of each weight.
        draws: Of the noise, at each strength.
        width: Of the neighbourhood in the local entropy, in units of the rms of each layer's weights.
        chains: In the local entropy.
        seed: Of all random numbers, also of a loader that shuffles. The same seed gives the same numbers.

    Raises:
        OptionError: if an argument cannot be used, models differ in architecture, a replica's loss is not finite, or
            scipy is missing.

    Cost: with n replicas at most ``2 (pairs + n) (points - 2)`` looks at the data for barriers, ``(n + 1) draws`` for
    each sigma, ``30 (n + 1)`` with two backward passes each for curvature, and ``51 (n + 1) (chains + 1)`` for local
    entropy. Each is a forward pass, two with batch norm. The result says how many were made.

    Source: barriers: Entezari et al. 2022; alignment: Ainsworth, Hayase & Srinivasa 2023; local energy: Pittorino et
    al. 2022; local entropy: Baldassi et al. 2016, Chaudhari et al. 2017, estimated as in Neal 2001.

    Example:
        >>> from torch.nn.functional import mse_loss
        >>> one, other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(one.weight, 1.0), nn.init.constant_(other.weight, 3.0)
        >>> data = [(torch.tensor([[1.0]]), torch.tensor([[2.0]]))]
        >>> found = landscape([one, other], mse_loss, data, parts=["curvature"])
        >>> found.overlaps[0][1], found.layers[0].spread
        (1.0, 1.0)
        >>> found.place("centre").loss, found.place("centre").curvature.top
        (0.0, 2.0)
    """
    settings = Settings(
        tuple(parts),
        align,
        points,
        pairs,
        tuple(sigmas),
        draws,
        width,
        chains,
        seed,
    )
    check_settings(settings)
    models = check_models(replicas)
    start = time.perf_counter()
    with untouched(*models), _same_generators(loader):
        _seed(settings.seed)
        batches = batches_of(loader)
        if isinstance(replicas, Replicas):
            model = replicas.replica(0)
            weights = [_one(replicas, i) for i in range(replicas.n)]
        else:
            model = copy.deepcopy(models[0])
            weights = [_copied(each) for each in models]
        surface = Surface(model, loss_fn, batches)
        if not isinstance(replicas, Replicas):
            check_same(surface, models, weights)
        found = measure(surface, weights, settings)
    return replace(found, seconds=time.perf_counter() - start)


def _one(replicas: Replicas, i: int) -> Weights:
    return {name: tensor[i].detach().clone() for name, tensor in named_tensors(replicas.stacked).items()}


def _copied(model: nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}


@contextmanager
def _same_generators(loader: Any) -> Iterator[None]:
    """Put back the generators that a loader and its sampler draw from."""
    holders = (loader, getattr(loader, "sampler", None))
    kept = [(g, g.get_state()) for h in holders if isinstance(g := getattr(h, "generator", None), torch.Generator)]
    try:
        yield
    finally:
        for generator, state in kept:
            generator.set_state(state)


def _seed(seed: int) -> None:
    """Start the random numbers that a loader may draw anew; `untouched` puts them back."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)

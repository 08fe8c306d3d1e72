"""What `landscape` is given, and whether it can be used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from ...errors import OptionError
from ..backends import call
from ..replicas import Replicas
from ..stack import check_equal, check_model, named_tensors
from .surface import Surface, Weights, is_near, tensors_of

Part = Literal["barriers", "local_energy", "curvature", "local_entropy"]
PARTS: tuple[Part, ...] = get_args(Part)


class Settings(NamedTuple):
    """How closely to look."""

    parts: tuple[Part, ...]
    align: bool
    points: int
    pairs: int
    sigmas: tuple[float, ...]
    draws: int
    width: float
    chains: int
    seed: int


def check_models(replicas: Any) -> list[nn.Module]:
    """Return what must stay untouched: the replicas as one module, or the plain models.

    Raises:
        OptionError: if they are something else, fewer than two, or differ in architecture.
    """
    if isinstance(replicas, Replicas):
        models, count = [replicas.stacked], replicas.n
    elif isinstance(replicas, (list, tuple)) and all(isinstance(each, nn.Module) for each in replicas):
        models, count = list(replicas), len(replicas)
    else:
        raise OptionError(
            f"landscape(): replicas: found {type(replicas).__name__}, expected Replicas or a list of plain models. "
            "Write landscape([model, other], loss_fn, loader)."
        )
    if count < 2:
        raise OptionError(
            f"landscape(): replicas: found {count}, expected two or more: a landscape is how they lie to each other. "
            "Write landscape([model, other], loss_fn, loader)."
        )
    for i, model in enumerate(models):
        if isinstance(model, Replicas):
            raise OptionError(
                f"landscape(): replicas[{i}]: found Replicas in a list, expected plain models. "
                "Write landscape([*(a.replica(i) for i in range(a.n)), ...], loss_fn, loader)."
            )
        check_model(model)
        check_equal(named_tensors(models[0]), named_tensors(model), f"landscape(): replicas[{i}]")
    return models


def check_same(surface: Surface, models: Sequence[nn.Module], weights: Sequence[Weights]) -> None:
    """Make sure that the first model computes with the weights of another what that one computes.

    Raises:
        OptionError: if it does not.
    """
    for i, (model, values) in enumerate(zip(models, weights, strict=True)):
        model.eval()
        with torch.no_grad():
            own = tensors_of(call(model, {}, surface.batches[0][0]))
        surface.forward += 1
        if not is_near(own, surface.output(values)):
            raise OptionError(
                f"landscape(): replicas[{i}]: found another output than that of the first model with the same weights, "
                "expected models that differ in weights alone. Compare those of one architecture."
            )


def check_settings(settings: Settings) -> None:
    """Make sure that settings can be used.

    Raises:
        OptionError: if one cannot; names it.
    """
    for part in settings.parts:
        if part not in PARTS:
            raise OptionError(
                f"landscape(): parts: found {part!r}, expected some of {', '.join(PARTS)}. Write parts=['barriers']."
            )
    for name, least in (("points", 3), ("pairs", 1), ("draws", 2), ("chains", 2), ("seed", 0)):
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(
                f"landscape(): {name}: found {value!r}, expected a whole number from {least} on. "
                f"Write {name}={max(least, 10)}."
            )
    if not (_is_number(settings.width) and 0 < settings.width < math.inf):
        raise OptionError(f"landscape(): width: found {settings.width!r}, expected a number above 0. Write width=0.3.")
    if not settings.sigmas or not all(_is_number(sigma) and 0 < sigma < math.inf for sigma in settings.sigmas):
        raise OptionError(
            f"landscape(): sigmas: found {settings.sigmas!r}, expected numbers above 0. Write sigmas=(0.1, 0.3)."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

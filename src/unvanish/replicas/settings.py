"""What a coupling can be made of: refused at once if not."""

from __future__ import annotations

import math
from typing import get_args

from ..errors import OptionError
from .binary import latent_levels
from .forces import Force
from .kicks import check_kick
from .replicas import Replicas
from .schedules import Automatic, check_strength


def check_settings(
    replicas: object, strength: object, every: object, force: object, scale: float, outer: object
) -> None:
    """Refuse what cannot be used, before anything is made.

    Raises:
        OptionError: names the argument, what was found, and what is expected.
    """
    if not isinstance(replicas, Replicas):
        raise OptionError(
            f"Coupling(): replicas: found {type(replicas).__name__}, expected Replicas. "
            "Write Coupling(Replicas(model, n=3))."
        )
    if not callable(strength) and not isinstance(strength, Automatic):
        check_strength(strength)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise OptionError(f"Coupling(): every: found {every!r}, expected a whole number from 1 on. Write every=10.")
    if force is not None and force not in get_args(Force):
        raise OptionError(
            f"Coupling(): force: found {force!r}, expected {', '.join(map(repr, get_args(Force)))} or None. "
            "Write force='elastic'."
        )
    if not 0 < scale < math.inf:
        raise OptionError(f"Coupling(): scale: found {scale!r}, expected a finite number above 0. Write scale=1.0.")
    if callable(outer) != (force == "outer"):
        raise OptionError(
            f"Coupling(): outer: found {outer!r} with force={force!r}, expected a function that returns an optimiser, "
            "with force='outer' only. Write outer=lambda centre: torch.optim.SGD(centre, lr=0.7, momentum=0.9, "
            "nesterov=True)."
        )


def check_kicks(replicas: Replicas, force: Force | None, gamma: object, form: object) -> None:
    """Refuse a force for discrete weights where there are none, and what a kick cannot use.

    Raises:
        OptionError: names the argument, what was found, and what is expected.
    """
    check_kick("Coupling", 1.0 if callable(gamma) else gamma, form)
    if force == "binary" and not latent_levels(replicas.stacked):
        raise OptionError(
            "Coupling(): force: found 'binary' for a model without BinaryLinear or BinaryConv2d, expected a model with "
            "discrete weights. Write force='elastic'."
        )

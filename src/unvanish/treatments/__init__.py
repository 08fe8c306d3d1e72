"""Every remedy: a function that returns a `Treatment`, by the id that findings name.

    Treatment.apply(patient) -> change, until it is undone

Add one: write a function that returns a `Treatment`, and put it in `TREATMENTS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ..errors import TreatmentError
from .activations import REPLACEMENTS, swap_activation
from .arithmetic import safe_math
from .augment import augment_mirror, augment_noise, augment_rotate, augment_rotate_crop, augment_smooth
from .capacity import limit_units
from .gradients import adaptive_clip, clip_norm, clip_value, normalise_layers
from .initialise import he_init, lecun_init, lsuv_init, orthogonal_init, xavier_init
from .loop import (
    add_to_optimizer,
    descend,
    logits_loss,
    match_target_shape,
    standardise_inputs,
    standardise_targets,
    unfreeze,
    zero_grad,
)
from .normalise import batch_norm, fold_bn, layer_norm, precise_bn
from .pretraining import greedy_pretraining
from .rates import layerwise_rates, lower_lr, raise_lr, warm_up
from .regularise import EarlyStopping as EarlyStopping
from .regularise import dropout, early_stopping, weight_decay
from .transfer import transfer
from .treatment import Patient as Patient
from .treatment import Treatment as Treatment
from .treatment import applied as applied
from .wiring import skip_connections

TREATMENTS: Mapping[str, Callable[..., Treatment]] = {
    "he-init": he_init,
    "xavier-init": xavier_init,
    "lecun-init": lecun_init,
    "orthogonal-init": orthogonal_init,
    "lsuv-init": lsuv_init,
    **{name: partial(swap_activation, name) for name in REPLACEMENTS},
    "batch-norm": batch_norm,
    "layer-norm": layer_norm,
    "precise-bn": precise_bn,
    "fold-bn": fold_bn,
    "skip-connections": skip_connections,
    "clip-norm": clip_norm,
    "clip-value": clip_value,
    "adaptive-clip": adaptive_clip,
    "normalise-layers": normalise_layers,
    "lower-lr": lower_lr,
    "raise-lr": raise_lr,
    "warm-up": warm_up,
    "layerwise-rates": layerwise_rates,
    "weight-decay": weight_decay,
    "dropout": dropout,
    "early-stopping": early_stopping,
    "limit-units": limit_units,
    "augment-rotate": augment_rotate,
    "augment-noise": augment_noise,
    "augment-smooth": augment_smooth,
    "augment-mirror": augment_mirror,
    "augment-rotate-crop": augment_rotate_crop,
    "standardise-inputs": standardise_inputs,
    "standardise-targets": standardise_targets,
    "zero-grad": zero_grad,
    "descend": descend,
    "unfreeze": unfreeze,
    "add-to-optimizer": add_to_optimizer,
    "logits-loss": logits_loss,
    "match-target-shape": match_target_shape,
    "safe-math": safe_math,
    "greedy-pretraining": greedy_pretraining,
    "transfer": transfer,
}


def parse_treatment(text: str) -> Treatment:
    """Return the treatment that ``ID`` or ``ID=value[,value]`` names.

    Raises:
        TreatmentError: if there is no such treatment or the value does not fit.

    Example:
        >>> str(parse_treatment("clip-norm=0.5"))
        'clip-norm=0.5'
    """
    identifier, _, value = text.partition("=")
    make = TREATMENTS.get(identifier)
    if make is None:
        near = difflib.get_close_matches(identifier, TREATMENTS, 1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(TREATMENTS)}."
        raise TreatmentError(
            f"treat(): found {identifier!r}, expected the id of a treatment. Nothing was changed. {hint}"
        )
    arguments = [_value(part) for part in value.split(",")] if value else []
    try:
        return make(*arguments)
    except TypeError as error:
        raise TreatmentError(
            f"treat(): {text!r}: found {len(arguments)} value{'s' if len(arguments) != 1 else ''}, which "
            f"{identifier!r} does not take. Nothing was changed."
        ) from error


def _value(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text

"""Where a map was flattened in front of a layer, or is made of its output.

Keras and Flax count channels last, torch first. A layer that follows a flattened map has its inputs in another order
than torch's, in the same number: every shape fits. What the file says of it is believed first; else a layer that
follows a map of C channels in the model, with a multiple of C inputs, is taken to follow it flattened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .foreign import Family, ForeignLayer
from .layouts import Flat
from .targets import CONV, CONV_TRANSPOSE, Target

_MAP_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)
_VECTOR_NORMS = (nn.BatchNorm1d, nn.LayerNorm, nn.SyncBatchNorm)


def flats(pairs: Sequence[tuple[Target, ForeignLayer | None]], family: Family) -> list[Flat]:
    """Return for each layer of the model which of its ends counts positions of a map.

    Args:
        pairs: All layers of the model in their order, each with what it is loaded from.
        family: Whose layouts the file has.
    """
    if family not in ("keras", "flax"):
        return [Flat()] * len(pairs)
    targets = [target for target, _ in pairs]
    before, behind = _flattened(targets), _unflattened(targets)
    found = []
    for (target, source), channels_in, channels_out in zip(pairs, before, behind, strict=True):
        settings = source.settings if source else {}
        if settings.get("is_told"):
            channels_in = _told(settings.get("flattened", 0), channels_in)
            channels_out = _told(settings.get("made_into", 0), channels_out)
        if isinstance(target.module, _VECTOR_NORMS):
            found.append(Flat(channels_in or channels_out))
        elif isinstance(target.module, nn.Linear):
            found.append(Flat(channels_in, channels_out))
        else:
            found.append(Flat())
    return found


def _told(channels: int, seen: int) -> int:
    """Return what the file says; of a map whose shape it does not say, what is seen in the model."""
    return seen if channels < 0 else channels


def width(module: Any) -> int:
    """Return the number of features that a layer takes, 0 if it has no such number."""
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    return int(getattr(module, "num_features", getattr(module, "in_features", 0)))


def _flattened(targets: Sequence[Target]) -> list[int]:
    """Return the channels of the map in front of each layer, if it takes all its positions."""
    found, channels = [], 0
    for target in targets:
        module: Any = target.module
        takes = channels and width(module) > channels and width(module) % channels == 0
        found.append(channels if takes else 0)
        if isinstance(module, (*CONV, *CONV_TRANSPOSE)):
            channels = module.out_channels
        elif isinstance(module, _MAP_NORMS):
            channels = getattr(module, "num_features", getattr(module, "num_channels", 0))
        elif not isinstance(module, (*_VECTOR_NORMS, nn.PReLU)):
            channels = 0
    return found


def _unflattened(targets: Sequence[Target]) -> list[int]:
    """Return the channels of the map that is made of each layer's output."""
    found, wanted = [], 0
    for target in reversed(targets):
        module: Any = target.module
        given = int(getattr(module, "out_features", 0)) or width(module)
        makes = wanted and given > wanted and given % wanted == 0
        found.append(wanted if makes else 0)
        if isinstance(module, CONV_TRANSPOSE):
            wanted = module.in_channels
        elif isinstance(module, CONV):
            wanted = 0  # a convolution behind a dense layer is more often that of another branch
        elif not isinstance(module, (*_VECTOR_NORMS, *_MAP_NORMS, nn.PReLU)):
            wanted = 0
    return found[::-1]

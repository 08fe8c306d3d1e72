"""What a layer computes beside its weights: epsilon, momentum, stride, padding, activations inside of it.

A setting that the file tells and torch can take over is changed with the weights; one that makes the layer another
function is refused; one that the file does not tell is a doubt, which a proof or a word of the user settles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .foreign import Family, ForeignLayer
from .padding import check_padding
from .recurrent import check_form
from .targets import BATCH_NORM, CONV, CONV_TRANSPOSE, Target

_EPSILON = {  # of a framework's normalisations, where the file does not tell it
    ("keras", "BatchNorm"): 1e-3,
    ("keras", "LayerNorm"): 1e-3,
    ("keras", "GroupNorm"): 1e-3,
    ("flax", "BatchNorm"): 1e-5,
    ("flax", "LayerNorm"): 1e-6,
    ("flax", "GroupNorm"): 1e-6,
}
# Of inputs with channels last, where the file does not tell their shape.
_LAST_AXES = {"BatchNorm1d": ([1], [2]), "BatchNorm2d": ([3],), "BatchNorm3d": ([4],)}


@dataclass(frozen=True)
class Change:
    """A setting of a module that the file has otherwise."""

    layer: str
    module: nn.Module
    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        place = f"{self.layer}.{self.name}" if self.layer else self.name
        return f"{place}: {self.before!r} → {self.after!r}"


@dataclass(frozen=True)
class Verdict:
    """What came of comparing the settings of one layer."""

    changes: tuple[Change, ...] = ()
    faults: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


def compare_settings(source: ForeignLayer, target: Target, family: Family, epsilon: float | None) -> Verdict:
    """Compare what a file tells of a layer with the settings of the module.

    Args:
        source: Its settings may be empty.
        target: Where it goes.
        family: Whose defaults hold where the file does not tell.
        epsilon: What the user says of normalisations whose epsilon the file does not tell.

    Raises:
        WeightsError: if a recurrent layer computes what torch's cannot.
    """
    if family == "torch":
        return Verdict()
    check_form(source, target)
    where = f"{target.name!r} from {source.name!r}"
    faults = [*_axis(source, target), *_shape(source, target), *_activations(source, target)]
    padding_faults, doubts = check_padding(source, target, family)
    doubts += [*_channels_first(source, target), *_heads(source)]
    changes, more = _norm(source, target, family, epsilon)
    return Verdict(
        tuple(changes),
        tuple(f"{where}: {fault}" for fault in [*faults, *padding_faults]),
        tuple(f"{where}: {doubt}" for doubt in [*doubts, *more]),
    )


def _norm(
    source: ForeignLayer, target: Target, family: Family, epsilon: float | None
) -> tuple[list[Change], list[str]]:
    module: Any = target.module
    changes: list[Change] = []
    if not isinstance(target.module, (*BATCH_NORM, nn.LayerNorm, nn.GroupNorm)):
        return changes, []
    kind = "BatchNorm" if isinstance(target.module, BATCH_NORM) else target.kind
    told = source.settings.get("epsilon", epsilon)
    usual = _EPSILON.get((family, kind))
    doubts = []
    if told is not None:
        if not math.isclose(told, module.eps, rel_tol=1e-6):
            changes.append(Change(target.name, module, "eps", module.eps, float(told)))
    elif usual is not None and not math.isclose(usual, module.eps, rel_tol=1e-6):
        doubts.append(
            f"the file does not tell epsilon; {family} has {usual:g} by default, the {target.kind} has {module.eps:g}. "
            f"Write epsilon={usual:g} to set what the file's model had"
        )
    momentum = source.settings.get("momentum")
    if kind == "BatchNorm" and isinstance(momentum, float) and family == "keras" and module.momentum is not None:
        ours = round(1 - momentum, 12)  # torch weighs the new batch, Keras the old mean
        if not math.isclose(ours, module.momentum, rel_tol=1e-6):
            changes.append(Change(target.name, module, "momentum", module.momentum, ours))
    return changes, doubts


def _axis(source: ForeignLayer, target: Target) -> Iterator[str]:
    axis = source.settings.get("axis")
    axes = axis if isinstance(axis, list) else [axis]
    rank = len(source.settings.get("shape", ()))
    last = ([-1], [rank]) if rank else ([-1], *_LAST_AXES.get(target.kind, ([1], [2], [3], [4])))
    if isinstance(target.module, nn.LayerNorm) and axis is not None and axes not in last and len(axes) == 1:
        yield f"found axis={axis}, expected the last one, which is what nn.LayerNorm normalises. Build it by hand"
    if isinstance(target.module, BATCH_NORM) and axis is not None and axes not in (*last, [1]):
        yield f"found axis={axis}, expected the last one, the channels of Keras. Save it with channels last"
    groups = source.settings.get("groups")
    if isinstance(target.module, nn.GroupNorm) and groups and groups not in (-1, target.module.num_groups):
        yield f"found {groups} groups, expected {target.module.num_groups}. Build nn.GroupNorm with {groups} groups"


def _channels_first(source: ForeignLayer, target: Target) -> Iterator[str]:
    """Tell of a net with channels first: its arrays are laid out alike, and a map is flattened as torch does it."""
    axis = source.settings.get("axis")
    is_second = isinstance(target.module, (nn.BatchNorm2d, nn.BatchNorm3d)) and axis in (1, [1])
    if is_second or source.settings.get("data_format") == "channels_first":
        yield (
            "the file's net has channels first, as torch; if it flattens a map, that is in torch's order already. "
            "Write flatten='channels_last' for it, and prove it"
        )


def _heads(source: ForeignLayer) -> Iterator[str]:
    """Tell what the model has to do with the parts of attention itself."""
    if source.kind == "Projection":
        heads = source.arrays["kernel"].shape[0 if source.name.endswith("output") else 1]
        yield f"the file's attention has {heads} heads, which an nn.Linear does not tell; its parts look alike"


def _shape(source: ForeignLayer, target: Target) -> Iterator[str]:
    """Compare stride, dilation and groups of convolutions."""
    module: Any = target.module
    if not isinstance(module, (*CONV, *CONV_TRANSPOSE)):
        return
    space = len(module.kernel_size)
    for theirs, ours in (("strides", "stride"), ("dilation", "dilation")):
        told = as_tuple(source.settings.get(theirs), space)
        if told and told != tuple(getattr(module, ours)):
            found = tuple(getattr(module, ours))
            yield f"found {ours}={told} in the file, expected {found}. Build the {target.kind} with {ours}={told}"
    told_groups = source.settings.get("groups")
    if told_groups and source.kind != "DepthwiseConv" and told_groups != module.groups:
        yield f"found groups={told_groups} in the file, expected {module.groups}. Build it with groups={told_groups}"
    if source.kind == "DepthwiseConv" and module.groups != module.in_channels:
        source_groups = module.in_channels
        yield f"found a depthwise convolution, expected groups={module.groups}. Build it with groups={source_groups}"


def _activations(source: ForeignLayer, target: Target) -> Iterator[str]:
    """Compare what recurrent layers apply inside; torch's LSTM and GRU have tanh and sigmoid."""
    if not isinstance(target.module, (nn.RNNBase, nn.RNNCellBase)):
        return
    is_plain = isinstance(target.module, (nn.RNN, nn.RNNCell))
    wanted = str(getattr(target.module, "nonlinearity", "tanh")).lower() if is_plain else "tanh"
    told = source.settings.get("activation")
    if told is not None and told != wanted:
        yield f"found activation={told!r}, expected {wanted!r}, which torch has in {target.kind}. Write it by hand"
    inner = source.settings.get("recurrent_activation")
    if inner is not None and not is_plain and inner != "sigmoid":
        yield f"found recurrent_activation={inner!r}, expected 'sigmoid'. Write the layer by hand"
    if source.settings.get("go_backwards") and not source.settings.get("is_bidirectional"):
        yield "found go_backwards=True, expected False: torch reads forwards. Reverse the input, and build it anew"
    if source.settings.get("is_bidirectional") and source.settings.get("merge_mode", "concat") != "concat":
        yield f"found merge_mode={source.settings['merge_mode']!r}, expected 'concat', which is what torch does"


def compare_slopes(model: nn.Module, slopes: Sequence[float]) -> tuple[list[Change], list[str]]:
    """Compare the slopes of LeakyReLU; return changes, and a doubt where the counts differ."""
    ours = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.LeakyReLU)]
    if not slopes:
        return [], []
    if len(ours) != len(slopes):
        doubt = (
            f"the file has {len(slopes)} LeakyReLU of slopes {sorted(set(slopes))}, the model {len(ours)}; torch's "
            "default is 0.01. Build them as nn.LeakyReLU(slope)"
        )
        return [], [doubt]
    return [
        Change(name, module, "negative_slope", module.negative_slope, slope)
        for (name, module), slope in zip(ours, slopes, strict=True)
        if not math.isclose(float(module.negative_slope), slope, rel_tol=1e-6)
    ], []


def as_tuple(value: Any, count: int) -> tuple[int, ...]:
    """Return a setting of a convolution for each axis; empty if it was not told."""
    if isinstance(value, int):
        return (value,) * count
    if isinstance(value, (list, tuple)) and len(value) == count and all(isinstance(item, int) for item in value):
        return tuple(value)
    return ()

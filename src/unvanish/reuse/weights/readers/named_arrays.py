"""From arrays under names to layers: the names of the arrays tell whose layouts they have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from ..foreign import Family, ForeignLayer
from .guard import natural
from .keras_layers import named

_KERAS = {"gamma", "beta", "moving_mean", "moving_variance", "recurrent_kernel", "embeddings", "depthwise_kernel"}
_FLAX = {"scale", "embedding", "var", "negative_slope"}
_FLAX_ROLES = {
    "scale": "gamma",
    "bias": "beta",
    "mean": "mean",
    "var": "variance",
    "embedding": "embeddings",
    "negative_slope": "alpha",
}
_FLAX_CLASSES = {
    "Dense": "Dense",
    "Conv": "Conv",
    "ConvTranspose": "ConvTranspose",
    "BatchNorm": "BatchNorm",
    "LayerNorm": "LayerNorm",
    "GroupNorm": "GroupNorm",
    "Embed": "Embedding",
    "PReLU": "PReLU",
}
_GATES = {"i", "f", "g", "o", "r", "z", "n"}
_ATTENTION = {"query": "query", "key": "key", "value": "value", "out": "output"}
_KERAS_PARTS = {"query", "key", "value", "attention_output"}
_SIDES = {"forward": "", "backward": "backward_"}


def layers_of(arrays: Mapping[str, Tensor], layout: Family | None) -> tuple[Family, list[ForeignLayer]]:
    """Group arrays into layers.

    Returns:
        Whose layouts they have, and the layers in the order of the arrays.
    """
    names = {name: name.split(":")[0].replace(".", "/").split("/") for name in arrays}
    leaves = {parts[-1] for parts in names.values()}
    family: Family = layout or _family_of(leaves)
    is_guessed = layout is None and family == "flax" and not leaves & _FLAX
    groups: dict[str, dict[str, Tensor]] = {}
    for name, parts in names.items():
        groups.setdefault("/".join(parts[:-1]), {})[parts[-1]] = arrays[name]
    if family == "keras":
        return family, list(_keras(groups))
    if family == "flax":
        told = {"is_guessed": True} if is_guessed else {}
        return family, [replace(layer, settings={**layer.settings, **told}) for layer in _flax(groups)]
    return "torch", list(_torch(groups))


def _family_of(leaves: set[str]) -> Family:
    """Tell the framework by the names of the arrays; `kernel` alone may be of Keras or Flax, mostly laid out alike."""
    if leaves & _KERAS:
        return "keras"
    return "flax" if leaves & _FLAX or "kernel" in leaves else "torch"


def _torch(groups: dict[str, dict[str, Tensor]]) -> Iterator[ForeignLayer]:
    """Give the output of an attention layer to it, as the model's list of layers does."""
    inner = {name for name in groups if name.endswith("out_proj") and "in_proj_weight" in groups.get(name[:-9], {})}
    for name, group in groups.items():
        if name not in inner:
            more = groups.get(f"{name}/out_proj", {}) if f"{name}/out_proj" in inner else {}
            yield ForeignLayer(name, "Torch", {**group, **{f"out_proj.{role}": array for role, array in more.items()}})


def _keras(groups: dict[str, dict[str, Tensor]]) -> Iterator[ForeignLayer]:
    merged: dict[str, dict[str, Tensor]] = {}
    for name, group in groups.items():
        parts = name.split("/")
        holder, prefix = (name, "") if parts[-1] not in _KERAS_PARTS else ("/".join(parts[:-1]), f"{parts[-1]}/")
        merged.setdefault(holder, {}).update({f"{prefix}{role}": array for role, array in group.items()})
    for name, group in merged.items():
        yield from named(name, "", group, {})


def _flax(groups: dict[str, dict[str, Tensor]]) -> Iterator[ForeignLayer]:
    merged: dict[str, dict[str, Tensor]] = {}
    for name, group in groups.items():
        holder, prefix = _flax_holder(name, groups)
        merged.setdefault(holder, {}).update({f"{prefix}{role}": array for role, array in group.items()})
    for name in sorted(merged, key=natural):
        yield _flax_layer(name, merged[name])


def _flax_holder(name: str, groups: Mapping[str, object]) -> tuple[str, str]:
    """Return the layer that an array belongs to, and what is put before its role.

    Gates of a cell and parts of attention are modules of their own in the file; a batch norm stands in two collections.
    """
    parts = [part for part in name.split("/") if part not in ("params", "batch_stats")]
    parts = [part for number, part in enumerate(parts) if not _is_list(parts, number)]
    side = ""
    last = parts[-1].rstrip("_") if parts else ""
    if (len(last) == 2 and last[0] in "ih" and last[1] in _GATES) or last in ("dense_i", "dense_h"):
        parts, side = parts[:-1], f"{last}/"
    elif last in _ATTENTION and all(f"{name[: -len(last)]}{part}" in groups for part in _ATTENTION):
        parts, side = parts[:-1], f"{_ATTENTION[last]}/"
    elif parts[-2:] and len(parts) > 1 and last in ("i", "h") and "cell" in parts[-2].lower():
        parts, side = parts[:-1], f"{last}/"
    if parts and parts[-1] == "cell":
        parts = parts[:-1]
    if parts and (found := re.fullmatch(r"(forward|backward)_rnn", parts[-1])):
        return "/".join(parts[:-1]), _SIDES[found[1]] + side
    return "/".join(parts), side


def _is_list(parts: list[str], number: int) -> bool:
    """Say whether a part only names the list that numbered layers stand in."""
    return parts[number] == "layers" and number + 1 < len(parts) and parts[number + 1].isdigit()


def _flax_layer(name: str, arrays: dict[str, Tensor]) -> ForeignLayer:
    last = name.split("/")[-1]
    kind = _FLAX_CLASSES.get(re.sub(r"_\d+$", "", last), "")
    bare = {role.removeprefix("backward_") for role in arrays}
    if bare & {"ii/kernel", "hi/kernel", "ir/kernel", "dense_i/kernel"}:
        size = arrays.get("dense_h/kernel")
        gates = 0 if size is None else size.shape[1] // max(size.shape[0], 1)
        kind = "GRU" if "ir/kernel" in bare or gates == 3 else "LSTM"
    elif "i/kernel" in bare and "h/kernel" in bare:
        kind = "RNN"
    elif "query/kernel" in bare:
        kind = "MultiHeadAttention"
    if kind in ("LSTM", "GRU", "RNN", "MultiHeadAttention"):
        is_both = any(role.startswith("backward_") for role in arrays)
        return ForeignLayer(name, kind, arrays, {"is_bidirectional": is_both} if is_both else {})
    return _flax_plain(name, kind, arrays)


def _flax_plain(name: str, kind: str, arrays: dict[str, Tensor]) -> ForeignLayer:
    if "kernel" in arrays:
        return ForeignLayer(name, kind or "Kernel", arrays)
    if set(arrays) & {"scale", "mean"} or kind.endswith("Norm"):
        roles = {_FLAX_ROLES.get(role, role): array for role, array in arrays.items()}
        return ForeignLayer(name, kind or ("BatchNorm" if "mean" in roles else "Norm"), roles)
    if set(arrays) <= {"embedding"} or set(arrays) <= {"negative_slope"}:
        roles = {_FLAX_ROLES[role]: array for role, array in arrays.items()}
        if "alpha" in roles:
            roles["alpha"] = roles["alpha"].reshape(-1) if roles["alpha"].dim() == 0 else roles["alpha"]
        return ForeignLayer(name, "PReLU" if "alpha" in roles else "Embedding", roles)
    return ForeignLayer(name, "Raw", arrays)

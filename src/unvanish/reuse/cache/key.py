"""What cached rows depend on, as digests that can be compared and named."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .cut import Cut
from .samples import content_of

FORMAT = 1


def key_of(cut: Cut, example: Any, *, rows: int, views: int | None, fingerprint: str | None) -> dict[str, Any]:
    """Return all that the rows of a cache depend on, but the content of the samples.

    Args:
        cut: Where the frozen part ends.
        example: Inputs of the model.
        rows: Number of samples.
        views: Draws of each sample.
        fingerprint: What the user says the data is.
    """
    model = cut.model
    inputs = [[str(leaf.dtype), list(leaf.shape[1:])] for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    key = {
        "format": FORMAT,
        "layers": layer_digests(cut),
        "cut": [[name, leaf] for name, (_, leaf) in zip(cut.names, cut.needed, strict=True)],
        "precision": _precision(next(model.parameters()).device.type),
        "inputs": inputs,
        "samples": rows,
        "views": views,
        "fingerprint": fingerprint,
    }
    return dict(json.loads(json.dumps(key)))


def difference(key: dict[str, Any], written: dict[str, Any]) -> tuple[str, str, str] | None:
    """Return what differs between two keys, and how it was and is; None if they are equal."""
    for part in written.keys() | key.keys():
        was, now = written.get(part), key.get(part)
        if was == now:
            continue
        if part == "layers" and isinstance(was, dict) and isinstance(now, dict):
            names = [name for name in (*now, *was) if was.get(name) != now.get(name)]
            return f"layer {names[0]!r}", str(was.get(names[0], "not there")), str(now.get(names[0], "not there"))
        return part, str(was), str(now)
    return None


def layer_digests(cut: Cut) -> dict[str, str]:
    """Return a digest of each module that the features depend on: kind, settings, parameters, buffers.

    Which parameters and buffers count was found by following the data, so a change in the rest of the model, such as
    training it, changes nothing here.

    Example:
        >>> from .find import find_cut
        >>> model = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.ReLU(), nn.Linear(4, 2))
        >>> list(layer_digests(find_cut(model, torch.zeros(2, 3))))
        ['0', '1']
    """
    below = {
        f"{top}.{name}".strip("."): module for top, part in cut.modules.items() for name, module in part.named_modules()
    }
    digests = {name: hashlib.sha256(_settings(module).encode()) for name, module in below.items()}
    tensors = {**dict(cut.model.named_parameters()), **dict(cut.model.named_buffers())}
    for name in cut.tensors:
        owner = name.rpartition(".")[0]
        digest = digests.setdefault(owner, hashlib.sha256())
        digest.update(f"{name}{tensors[name].dtype}{tuple(tensors[name].shape)}".encode())
        digest.update(content_of(tensors[name]))
    return {name: digest.hexdigest()[:16] for name, digest in digests.items()}


def _settings(module: nn.Module) -> str:
    """Return kind and plain attributes of a module. Its mode is left out: features are computed in evaluation mode."""
    own = {name: _plain(value) for name, value in vars(module).items() if not name.startswith("_")}
    for name in ("training", "forward", "train"):
        own.pop(name, None)
    kind = type(module)
    return json.dumps([kind.__module__, kind.__qualname__, module.extra_repr(), own], sort_keys=True)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, Tensor):
        return hashlib.sha256(content_of(value)).hexdigest()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    # of other objects only the kind: their repr may hold an address; the recomputed rows see the rest
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def _precision(device: str) -> list[str]:
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "off"
    return [device, autocast, torch.get_float32_matmul_precision()]

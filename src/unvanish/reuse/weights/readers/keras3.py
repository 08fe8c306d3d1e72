"""Keras 3: `.keras`, an archive of a configuration and weights, and `.weights.h5`, the weights alone.

In both the arrays of a layer are numbered, under a path made of class names; the name that the user gave a layer
stands in an attribute since Keras 3.6, and in the configuration always.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
from torch import Tensor

from ..foreign import Family, Foreign, ForeignLayer
from .guard import Budget, refused
from .hdf5 import SafeFile, opened
from .keras_config import KINDS, SNAKES, Node, nodes_of, settings_of, slopes_of, snake
from .keras_layers import positional, untyped
from .zipped import archive

_NOT_LAYERS = {"vars", "optimizer", "metrics", "compile_metrics", "loss_tracker", "seed_generator"}
_ATTENTION = {"query_dense": "query", "key_dense": "key", "value_dense": "value", "output_dense": "output"}


def read_keras(path: Path, budget: Budget, part: str, layout: Family | None) -> Foreign:
    """Read a `.keras` archive."""
    with archive(path, budget) as members:
        config = json.loads(members.read("config.json"))
        if "model.weights.h5" not in members.members:
            raise refused(path, "no member 'model.weights.h5'", "the weights in one", "Save it unsharded")
        weights = members.read("model.weights.h5")
    nodes = nodes_of(config) if isinstance(config, dict) else []
    with opened(io.BytesIO(weights), budget) as file:
        layers = tuple(_container(file, file.root, "", nodes, 0))
    return Foreign(str(path), "Keras 3 (.keras)", "keras", layers, bool(nodes), not nodes, slopes_of(nodes))


def read_weights_h5(path: Path, budget: Budget, part: str, layout: Family | None) -> Foreign:
    """Read a `.weights.h5` file, which says nothing of the settings of its layers."""
    with opened(path, budget) as file:
        layers = tuple(_container(file, file.root, "", [], 0))
    return Foreign(str(path), "Keras 3 (.weights.h5)", "keras", layers, is_kind_ordered=True)


def _container(
    file: SafeFile, group: h5py.Group, prefix: str, nodes: Sequence[Node], depth: int
) -> Iterator[ForeignLayer]:
    """Yield the layers of a model or of a layer that holds others."""
    entries = file.children(group, depth)
    yield from _own(file, entries, prefix, None)
    for key, entry in entries.items():
        if key in _NOT_LAYERS or not isinstance(entry, h5py.Group):
            continue
        if key == "layers":
            children = file.children(entry, depth + 1)
            for name, node in _in_order(file, children, nodes):
                own = node.name if node else _label(file, children[name]) or name
                yield from _layer(file, name, children[name], _under(prefix, own), node, depth + 2)
        else:  # an attribute of a layer or model that the user wrote
            yield from _layer(file, key, entry, _under(prefix, key), None, depth + 1)


def _in_order(file: SafeFile, children: Mapping[str, Any], nodes: Sequence[Node]) -> Iterator[tuple[str, Node | None]]:
    """Pair the entries of a file with the configuration, in the order of that; what it does not name comes last."""
    left = {key: entry for key, entry in children.items() if isinstance(entry, h5py.Group)}
    by_label = {label: key for key, entry in left.items() if (label := _label(file, entry))}
    counts: dict[str, int] = {}
    for node in nodes:
        stem = snake(node.kind)
        number = counts.get(stem, 0)
        counts[stem] = number + 1
        key = by_label.get(node.name) if by_label else f"{stem}_{number}" if number else stem
        if key in left:
            del left[key]
            yield key, node
    for key in left:
        yield key, None


def _label(file: SafeFile, entry: h5py.Group) -> str:
    """Return the name that the user gave a layer; empty in files of before Keras 3.6."""
    texts = file.text(file.child(entry, "vars"), "name") if "vars" in entry else []
    return texts[0] if texts else ""


def _under(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix else name


def _layer(
    file: SafeFile, key: str, group: h5py.Group, name: str, node: Node | None, depth: int
) -> Iterator[ForeignLayer]:
    theirs = node.kind if node else _class_of(key) or _class_of(_label(file, group))
    settings = settings_of(node) if node and not node.inner else {}
    kind = KINDS.get(theirs, "")
    if kind == "Bidirectional":
        yield from _bidirectional(file, group, name, settings, depth)
    elif kind == "TimeDistributed":
        yield from _wrapped(file, group, name, node, depth)
    elif kind == "MultiHeadAttention":
        yield _attention(file, group, name, settings, depth)
    elif kind in ("LSTM", "GRU", "RNN"):
        yield from positional(name, kind, _cell(file, group, depth), settings)
    elif kind:
        yield from _own(file, file.children(group, depth), name, (kind, settings))
    else:
        yield from _container(file, group, name, node.inner if node else (), depth)


def _class_of(key: str) -> str:
    """Return the class that the key of an entry names; empty if it names none."""
    return SNAKES.get(key) or SNAKES.get(re.sub(r"_\d+$", "", key), "")


def _own(
    file: SafeFile, entries: Mapping[str, Any], name: str, told: tuple[str, Mapping[str, Any]] | None
) -> Iterator[ForeignLayer]:
    """Yield what a group holds itself."""
    held = entries.get("vars")
    arrays = _arrays(file, held) if isinstance(held, h5py.Group) else []
    if arrays:
        yield from positional(name, told[0], arrays, told[1]) if told else untyped(name, arrays)


def _arrays(file: SafeFile, group: h5py.Group) -> list[Tensor]:
    return [file.array(entry) for entry in file.children(group).values()]


def _cell(file: SafeFile, group: h5py.Group, depth: int) -> list[Tensor]:
    file.budget.level(depth)
    return _arrays(file, file.child(group, "cell/vars"))


def _bidirectional(
    file: SafeFile, group: h5py.Group, name: str, settings: Mapping[str, Any], depth: int
) -> Iterator[ForeignLayer]:
    """Yield one layer of two directions; its kind is that of the cells."""
    cells = {key: file.child(group, f"{key}_layer") for key in ("forward", "backward")}
    label = (
        _label(file, file.child(cells["forward"], "cell")).removesuffix("_cell") if "cell" in cells["forward"] else ""
    )
    kind = KINDS.get(_class_of(re.sub(r"_cell(_\d+)?$", "", label)) or _class_of(label), "") or "Recurrent"
    forwards, backwards = (_cell(file, cell, depth) for cell in cells.values())
    (front,) = positional(name, kind, forwards, settings)
    (behind,) = positional(name, kind, backwards, settings)
    arrays = {**front.arrays, **{f"backward_{role}": array for role, array in behind.arrays.items()}}
    yield ForeignLayer(name, kind, arrays, {**settings, "is_bidirectional": True})


def _wrapped(file: SafeFile, group: h5py.Group, name: str, node: Node | None, depth: int) -> Iterator[ForeignLayer]:
    """Yield the layer that is applied to each time step; it counts under the name of the wrapper."""
    inner = file.child(group, "layer")
    config = node.config.get("layer") if node else None
    if isinstance(config, dict):
        found = nodes_of({"class_name": "Sequential", "config": [config]})
        yield from _layer(file, "layer", inner, name, found[0] if found else None, depth + 1)
    else:
        yield from _layer(file, _label(file, inner) or "layer", inner, name, None, depth + 1)


def _attention(file: SafeFile, group: h5py.Group, name: str, settings: Mapping[str, Any], depth: int) -> ForeignLayer:
    file.budget.level(depth)
    arrays: dict[str, Tensor] = {}
    for key, part in _ATTENTION.items():
        held = _arrays(file, file.child(group, f"{key}/vars"))
        arrays |= {f"{part}/{role}": array for role, array in zip(("kernel", "bias"), held, strict=False)}
    return ForeignLayer(name, "MultiHeadAttention", arrays, settings)

"""Keras 3: `.keras`, an archive of a configuration and weights, and `.weights.h5`, the weights alone.

In both the arrays of a layer are numbered, under a path made of class names; the name that the user gave a layer
stands in an attribute since Keras 3.6, and in the configuration always.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..foreign import Family, Foreign, ForeignLayer
from .apart import Entry, read_tree
from .guard import Budget, refused
from .keras_config import KINDS, SNAKES, Node, nodes_of, settings_of, slopes_of, snake
from .keras_layers import positional, untyped
from .zipped import archive

_NOT_LAYERS = {"vars", "metrics", "compile_metrics", "loss_tracker", "seed_generator"}
_ATTENTION = {"query_dense": "query", "key_dense": "key", "value_dense": "value", "output_dense": "output"}


def read_keras(path: Path, budget: Budget, part: str, layout: Family | None) -> Foreign:
    """Read a `.keras` archive."""
    with archive(path, budget) as members:
        config = json.loads(members.read("config.json"))
        if "model.weights.h5" not in members.members:
            raise refused(path, "no member 'model.weights.h5'", "the weights in one", "Save it unsharded")
        weights = members.read("model.weights.h5")
    nodes = nodes_of(config) if isinstance(config, dict) else []
    layers = tuple(_container(read_tree("hdf5", weights, budget), "", nodes))
    return Foreign(str(path), "Keras 3 (.keras)", "keras", layers, bool(nodes), not nodes, slopes_of(nodes))


def read_weights_h5(path: Path, tree: Entry) -> Foreign:
    """Read a `.weights.h5` file, which says nothing of the settings of its layers."""
    layers = tuple(_container(tree, "", []))
    return Foreign(str(path), "Keras 3 (.weights.h5)", "keras", layers, is_kind_ordered=True)


def _container(group: Entry, prefix: str, nodes: Sequence[Node]) -> Iterator[ForeignLayer]:
    """Yield the layers of a model or of a layer that holds others."""
    if arrays := _held(group):
        yield from untyped(prefix, arrays)
    for key, entry in group.entries.items():
        if key in _NOT_LAYERS or entry.array is not None:
            continue
        if key == "layers":
            for name, node in _in_order(entry, nodes):
                inner = entry.entries[name]
                yield from _layer(name, inner, _under(prefix, node.name if node else _label(inner) or name), node)
        else:  # an attribute of a layer or model that the user wrote
            yield from _layer(key, entry, _under(prefix, key), None)


def _in_order(group: Entry, nodes: Sequence[Node]) -> Iterator[tuple[str, Node | None]]:
    """Pair the entries of a file with the configuration, in the order of that; what it does not name comes last."""
    left = {key: entry for key, entry in group.entries.items() if entry.array is None}
    by_label = {label: key for key, entry in left.items() if (label := _label(entry))}
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


def _label(entry: Entry) -> str:
    """Return the name that the user gave a layer; empty in files of before Keras 3.6."""
    texts = entry.entries["vars"].text("name") if "vars" in entry.entries else []
    return texts[0] if texts else ""


def _under(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix else name


def _layer(key: str, group: Entry, name: str, node: Node | None) -> Iterator[ForeignLayer]:
    theirs = node.kind if node else _class_of(key) or _class_of(_label(group))
    settings = settings_of(node) if node and not node.inner else {}
    kind = KINDS.get(theirs, "")
    if kind == "Bidirectional":
        yield from _bidirectional(group, name, settings)
    elif kind == "TimeDistributed":
        yield from _wrapped(group, name, node)
    elif kind == "MultiHeadAttention":
        yield _attention(group, name, settings)
    elif kind in ("LSTM", "GRU", "RNN"):
        yield from positional(name, kind, _held(group.find("cell")), settings)
    elif kind:
        if arrays := _held(group):
            yield from positional(name, kind, arrays, settings)
    else:
        yield from _container(group, name, node.inner if node else ())


def _class_of(key: str) -> str:
    """Return the class that the key of an entry names; empty if it names none."""
    return SNAKES.get(key) or SNAKES.get(re.sub(r"_\d+$", "", key), "")


def _held(group: Entry) -> list[Tensor]:
    """Return the arrays of a layer itself."""
    return group.entries["vars"].arrays() if "vars" in group.entries else []


def _bidirectional(group: Entry, name: str, settings: Mapping[str, Any]) -> Iterator[ForeignLayer]:
    """Yield one layer of two directions; its kind is that of the cells."""
    forwards, backwards = (group.find(f"{way}_layer/cell") for way in ("forward", "backward"))
    kind = KINDS.get(_class_of(re.sub(r"_cell(_\d+)?$", "", _label(forwards))), "") or "Recurrent"
    (front,) = positional(name, kind, _held(forwards), settings)
    (behind,) = positional(name, kind, _held(backwards), settings)
    arrays = {**front.arrays, **{f"backward_{role}": array for role, array in behind.arrays.items()}}
    yield ForeignLayer(name, kind, arrays, {**settings, "is_bidirectional": True})


def _wrapped(group: Entry, name: str, node: Node | None) -> Iterator[ForeignLayer]:
    """Yield the layer that is applied to each time step; it counts under the name of the wrapper."""
    inner = group.find("layer")
    config = node.config.get("layer") if node else None
    found = nodes_of({"class_name": "Sequential", "config": [config]}) if isinstance(config, dict) else []
    yield from _layer(_label(inner) or "layer", inner, name, found[0] if found else None)


def _attention(group: Entry, name: str, settings: Mapping[str, Any]) -> ForeignLayer:
    arrays: dict[str, Tensor] = {}
    for key, part in _ATTENTION.items():
        held = _held(group.find(key))
        arrays |= {f"{part}/{role}": array for role, array in zip(("kernel", "bias"), held, strict=False)}
    return ForeignLayer(name, "MultiHeadAttention", arrays, settings)

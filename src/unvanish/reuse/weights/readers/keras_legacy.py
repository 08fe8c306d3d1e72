"""The older `.h5` files of Keras 2 and 3: names and their order stand in attributes.

The spelling of paths differs between versions (``c1/c1/kernel:0``, ``c1/c1/kernel``, ``c1/kernel``), so the attributes
are followed; and a nested model with frozen parts lists its trainable weights first, so arrays are told by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from ..foreign import Foreign, ForeignLayer
from .apart import Entry
from .keras_config import KINDS, Node, nodes_of, settings_of, slopes_of
from .keras_layers import named

_DIRECTIONS = ("forward_", "backward_")
_PARTS = ("query", "key", "value", "attention_output")


def is_legacy(tree: Entry) -> bool:
    """Say whether a file of HDF5 has the older form."""
    return any(name.startswith("layer_names") for name in tree.texts) or "model_weights" in tree.entries


def read_h5(path: Path, tree: Entry) -> Foreign:
    """Read a whole model, or weights alone, in the older form."""
    config = tree.text("model_config")
    model = json.loads(config[0]) if config else {}
    nodes = nodes_of(model) if isinstance(model, dict) else []
    root = tree.entries.get("model_weights", tree)
    by_name = {node.name: node for node in nodes}
    layers: list[ForeignLayer] = []
    for name in dict.fromkeys(root.text("layer_names")):
        group = root.find(name)
        found = {weight: group.find(weight).array for weight in group.text("weight_names")}
        layers += _layers(name, {weight: array for weight, array in found.items() if array is not None}, by_name)
    return Foreign(str(path), "Keras (.h5)", "keras", tuple(layers), is_ordered=True, slopes=slopes_of(nodes))


def _layers(name: str, arrays: dict[str, Tensor], nodes: dict[str, Node]) -> Iterator[ForeignLayer]:
    """Yield the layers of one entry; a nested model is one entry with the layers of all its own."""
    node = nodes.get(name)
    groups: dict[str, dict[str, Tensor]] = {}
    for path, array in arrays.items():
        parts = [part for part in path.split(":")[0].split("/") if part]
        holder, role = _place(parts)
        groups.setdefault(holder, {})[role] = array
    inner = _descendants(node.inner) if node else {}
    if node and not inner:
        merged = {role: array for group in groups.values() for role, array in group.items()}
        if merged:
            yield from _typed(name, node, merged)
        return
    for holder, group in groups.items():
        last = holder.split("/")[-1]
        own = last if not holder or len(groups) > 1 or inner else name
        full = name if own in ("", name) else f"{name}/{own}"
        yield from _typed(full, inner.get(last), group)


def _descendants(nodes: Sequence[Node]) -> dict[str, Node]:
    """Return the layers of a model, and of the models in it, by their names."""
    found: dict[str, Node] = {}
    for node in nodes:
        found |= _descendants(node.inner)
    return found | {node.name: node for node in nodes}


def _typed(name: str, node: Node | None, arrays: dict[str, Tensor]) -> Iterator[ForeignLayer]:
    kind = KINDS.get(node.kind, "") if node else ""
    settings = settings_of(node) if node else {}
    is_both = any(role.startswith("backward_") for role in arrays)
    if is_both:
        settings = {**settings, "is_bidirectional": True}
    if kind in ("Bidirectional", "TimeDistributed") and node:
        inner = (node.config.get("layer") or {}).get("class_name", "")
        kind = KINDS.get(inner, "")
    yield from named(name, kind, arrays, settings)


def _place(parts: list[str]) -> tuple[str, str]:
    """Divide the path of an array into its layer and its role there."""
    *holder, role = parts
    prefix = ""
    if holder and holder[-1] in _PARTS:
        prefix = f"{holder.pop()}/"
    if holder and "cell" in holder[-1]:
        holder.pop()
    if holder and holder[-1].startswith(_DIRECTIONS):
        prefix = "backward_" if holder.pop().startswith("backward_") else ""
    return "/".join(holder), f"{prefix}{role}"

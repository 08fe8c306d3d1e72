"""What the configuration of a Keras model says of its layers: kinds, order, settings, what was flattened."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .guard import MOST_ENTRIES, MOST_LEVELS

KINDS = {
    "Dense": "Dense",
    "Conv1D": "Conv",
    "Conv2D": "Conv",
    "Conv3D": "Conv",
    "DepthwiseConv1D": "DepthwiseConv",
    "DepthwiseConv2D": "DepthwiseConv",
    "SeparableConv1D": "SeparableConv",
    "SeparableConv2D": "SeparableConv",
    "Conv1DTranspose": "ConvTranspose",
    "Conv2DTranspose": "ConvTranspose",
    "Conv3DTranspose": "ConvTranspose",
    "BatchNormalization": "BatchNorm",
    "SyncBatchNormalization": "BatchNorm",
    "LayerNormalization": "LayerNorm",
    "GroupNormalization": "GroupNorm",
    "Embedding": "Embedding",
    "PReLU": "PReLU",
    "LSTM": "LSTM",
    "CuDNNLSTM": "",  # other biases
    "GRU": "GRU",
    "SimpleRNN": "RNN",
    "MultiHeadAttention": "MultiHeadAttention",
    "Bidirectional": "Bidirectional",
    "TimeDistributed": "TimeDistributed",
}
_NORMS = ("BatchNormalization", "LayerNormalization", "GroupNormalization")
_RECURRENT = ("LSTM", "GRU", "SimpleRNN", "Bidirectional", "Embedding")
_COPIED = {
    "strides": "strides",
    "padding": "padding",
    "dilation_rate": "dilation",
    "groups": "groups",
    "data_format": "data_format",
    "activation": "activation",
    "recurrent_activation": "recurrent_activation",
    "reset_after": "reset_after",
    "epsilon": "epsilon",
    "momentum": "momentum",
    "axis": "axis",
    "scale": "scale",
    "center": "center",
    "num_heads": "heads",
    "merge_mode": "merge_mode",
    "output_padding": "output_padding",
    "go_backwards": "go_backwards",
}


@dataclass
class Node:
    """One layer of a configuration."""

    name: str
    kind: str  # the class, as Keras calls it
    config: Mapping[str, Any]
    shape: tuple[int | None, ...] = ()  # of its input, without the batch; empty if not said
    before: list[Node] = field(default_factory=list)
    after: list[Node] = field(default_factory=list)
    inner: list[Node] = field(default_factory=list)


def snake(name: str) -> str:
    """Return how Keras writes the name of a class in a file.

    Example:
        >>> snake("Conv2DTranspose"), snake("PReLU"), snake("SimpleRNN")
        ('conv2d_transpose', 'p_re_lu', 'simple_rnn')
    """
    name = re.sub(r"\W+", "", name)
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


SNAKES = {snake(name): name for name in KINDS}


def nodes_of(model: Mapping[str, Any], depth: int = 0) -> list[Node]:
    """Return the layers of a model's configuration in their order, each with its neighbours."""
    config = model.get("config", {})
    entries = config if isinstance(config, list) else config.get("layers", [])
    if not isinstance(entries, list) or len(entries) > MOST_ENTRIES or depth > MOST_LEVELS:
        return []
    found = [_node(entry, depth) for entry in entries if isinstance(entry, dict)]
    by_name = {node.name: node for node in found}
    is_chain = model.get("class_name") == "Sequential" or isinstance(config, list)
    for place, (node, entry) in enumerate(zip(found, entries, strict=False)):
        names = [found[place - 1].name] if is_chain and place else [] if is_chain else list(_inbound(entry))
        for name in dict.fromkeys(names):
            if name in by_name:
                node.before.append(by_name[name])
                by_name[name].after.append(node)
    return found


def _node(entry: Mapping[str, Any], depth: int) -> Node:
    config = entry.get("config", {})
    kind = str(entry.get("class_name", ""))
    config = config if isinstance(config, dict) else {"layers": config}
    name = str(config.get("name", entry.get("name", "")))
    shape = (entry.get("build_config") or {}).get("input_shape") or config.get("batch_shape") or ()
    is_shape = isinstance(shape, list) and all(size is None or isinstance(size, int) for size in shape)
    node = Node(name, kind, config, tuple(shape[1:]) if is_shape else ())
    if "layers" in config:
        node.inner = nodes_of(entry, depth + 1)
    return node


def _inbound(entry: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the layers in front: Keras 3 writes a history, Keras 2 lists ``[name, node, tensor]``."""
    stack: list[Any] = [entry.get("inbound_nodes", [])]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            history = item.get("keras_history")
            if isinstance(history, list) and history:
                yield str(history[0])
            stack += list(item.values())
        elif isinstance(item, list):
            if len(item) >= 3 and isinstance(item[0], str) and isinstance(item[1], int):
                yield item[0]
            else:
                stack += item


def settings_of(node: Node) -> dict[str, Any]:
    """Return what is said of a layer, in the words of `ForeignLayer.settings`."""
    config = node.config
    found = {ours: config[theirs] for theirs, ours in _COPIED.items() if theirs in config}
    found["is_told"] = True
    if node.shape:
        found["shape"] = node.shape
    if len(node.before) == 1 and node.before[0].kind.startswith("ZeroPadding"):
        found["padded"] = node.before[0].config.get("padding")
    if node.kind == "Bidirectional":
        inner = (config.get("layer") or {}).get("config", {})
        found |= {ours: inner[theirs] for theirs, ours in _COPIED.items() if theirs in inner}
    found["flattened"] = channels_before(node)
    found["made_into"] = channels_behind(node)
    return found


def channels_before(node: Node) -> int:
    """Return the channels of the map that was flattened in front of a layer; 0: none was, -1: one of unknown shape."""
    for here in _trace(node, is_forward=False):
        if here.kind in ("Flatten", "Reshape") and (
            here.kind == "Flatten" or len(here.config.get("target_shape", ())) == 1
        ):
            return _channels(here.shape, here, is_forward=False)
    return 0


def channels_behind(node: Node) -> int:
    """Return the channels of the map that the output of a layer is made into; 0: none."""
    for here in _trace(node, is_forward=True):
        shape = here.config.get("target_shape", ())
        if here.kind == "Reshape" and isinstance(shape, list) and len(shape) > 1:
            return _channels(tuple(shape), here, is_forward=True)
    return 0


def _channels(shape: tuple[Any, ...], node: Node, *, is_forward: bool) -> int:
    """Return the last size if the shape is that of a map; rows of a sequence stand as torch has them."""
    if not shape:
        return -1
    if len(shape) < 3:
        neighbours = list(_trace(node, is_forward=is_forward, is_past_weights=True))
        if len(shape) < 2 or not neighbours or not neighbours[-1].kind.endswith(("Conv1D", "Conv1DTranspose")):
            return 0
    return shape[-1] if isinstance(shape[-1], int) else -1


def _trace(node: Node, *, is_forward: bool, is_past_weights: bool = False) -> Iterator[Node]:
    """Yield the layers behind or in front of one, until the next with weights; norms are passed."""
    here = node
    for _ in range(MOST_LEVELS):
        neighbours = here.after if is_forward else here.before
        if len(neighbours) != 1:
            return
        here = neighbours[0]
        has_weights = (here.kind in KINDS and here.kind not in _NORMS) or bool(here.inner)
        if has_weights:
            if is_past_weights:
                yield here
            return
        yield here


def slopes_of(nodes: list[Node]) -> tuple[float, ...]:
    """Return the slopes of all LeakyReLU layers in their order."""
    found: list[float] = []
    for node in nodes:
        if node.kind == "LeakyReLU":
            slope = node.config.get("negative_slope", node.config.get("alpha", 0.3))
            slope = slope.get("config", {}).get("value") if isinstance(slope, dict) else slope
            found.append(float(slope) if isinstance(slope, (int, float)) else 0.3)
        found += slopes_of(node.inner)
    return tuple(found)

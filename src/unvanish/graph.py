"""Read the graph that autograd built: which activations ran, and what stands before the loss.

The graph is the one place that knows functional calls (`F.relu`, `torch.tanh`) as well as modules, and it
costs nothing while nobody looks. Saved tensors are read only where no user hook would run
(activation checkpointing would compute the forward pass again).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .records import Op

MAX_NODES = 20_000  # a longer graph is read from the loss side only
MAX_PATHS = 8
MAX_PATH_LENGTH = 64
Node = Any  # torch.autograd.graph.Node; its saved attributes are dynamic


@dataclass(frozen=True, slots=True)
class Activation:
    """How to judge the values of one kind of activation function.

    ``dead_at``: at or below it a unit passes (almost) no gradient. ``low``, ``high``: outside of them the
    local derivative is under 5 % of its maximum.
    """

    kind: str
    saved: str  # the attribute of the node that holds the values
    dead_at: float = -math.inf
    low: float = -math.inf
    high: float = math.inf


# tanh' = 1 - a**2 < 0.05 for |a| > 0.975; sigmoid' = a (1 - a) < 0.0125 outside (0.0127, 0.9873).
# gelu and silu are within 0.5 % of zero slope left of -3 and -7.
ACTIVATIONS: Mapping[str, Activation] = {
    "ReluBackward0": Activation("relu", "result", dead_at=0.0),
    "ThresholdBackward0": Activation("relu", "self", dead_at=0.0),
    "LeakyReluBackward0": Activation("leaky_relu", "self"),
    "PreluKernelBackward0": Activation("prelu", "self"),
    "EluBackward0": Activation("elu", "self_or_result", low=-0.95),
    "GeluBackward0": Activation("gelu", "self", dead_at=-3.0),
    "SiluBackward0": Activation("silu", "self", dead_at=-7.0),
    "MishBackward0": Activation("mish", "self", dead_at=-7.0),
    "SoftplusBackward0": Activation("softplus", "self", dead_at=-5.0),
    "TanhBackward0": Activation("tanh", "result", low=-0.975, high=0.975),
    "SigmoidBackward0": Activation("sigmoid", "result", low=0.0127, high=0.9873),
    "HardsigmoidBackward0": Activation("hardsigmoid", "self", low=-3.0, high=3.0),
    "HardswishBackward0": Activation("hardswish", "self", dead_at=-3.0),
    "HardtanhBackward0": Activation("hardtanh", "self", low=-math.inf, high=math.inf),
    "ClampMinBackward0": Activation("clamp", "self"),
    "ClampBackward1": Activation("clamp", "self"),
}

# Nodes that only re-arrange what passes through them, or keep its sign and order.
_TRANSPARENT = frozenset(
    f"{name}Backward{i}"
    for i in (0, 1)
    for name in (
        "View Reshape ReshapeAlias UnsafeView Transpose T Permute Squeeze Unsqueeze Alias Clone Expand "
        "Select Slice Split Unbind Cat Stack Index Narrow Copy Contiguous AsStrided SplitWithSizes "
        "AvgPool2D MaxPool2DWithIndices MkldnnMaxPool2D AdaptiveAvgPool2D MkldnnAdaptiveAvgPool2D Flatten"
    ).split()
)
_LOSS_ENDS = frozenset(("AccumulateGrad", "torch::autograd::AccumulateGrad"))
_VIEWS_TO_SKIP = frozenset(("ViewBackward0", "ReshapeAliasBackward0", "UnsafeViewBackward0", "AliasBackward0"))


@dataclass(slots=True)
class GraphPlan:
    """What one walk found; valid for every later graph with the same signature."""

    signature: tuple[str, ...]
    activations: tuple[tuple[int, str, Activation], ...]  # place in the walk, layer, how to judge it
    names: dict[int, str]  # place in the walk -> module that made it
    loss_paths: tuple[tuple[Op, ...], ...]
    depths: dict[str, int]  # layer -> parametric layers between it and the loss


def key(node: Node) -> int:
    """Return a number that names a node in its thread without keeping it, and its graph, alive."""
    return int(node._sequence_nr())


def walk(root: Node) -> tuple[list[Node], tuple[str, ...]]:
    """Return the nodes below ``root``, nearest to the loss first, and their names.

    Cost: about 2 microseconds a node; at most `MAX_NODES`.
    """
    nodes, seen = [root], {root}
    for node in nodes:
        if len(nodes) >= MAX_NODES:
            break
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                nodes.append(child)
    return nodes, tuple([node.name() for node in nodes])


def saved(node: Node, attribute: str) -> Tensor | None:
    """Return a saved tensor, or None where reading it could run code or fail."""
    raw = getattr(node, f"_raw_saved_{attribute}", None)
    if raw is None or raw.unpack_hook is not None:
        return None
    try:
        value = getattr(node, f"_saved_{attribute}")
    except RuntimeError:  # freed, or modified in place
        return None
    return value.detach() if isinstance(value, Tensor) else None


def plan_graph(
    nodes: Sequence[Node], signature: tuple[str, ...], outputs: Mapping[int, str], layers: frozenset[str]
) -> GraphPlan:
    """Say what a walked graph holds.

    Args:
        nodes: From `walk`.
        signature: From `walk`.
        outputs: The `key` of the node that made the output of a module -> the module's name.
        layers: Which of these names are layers with parameters.
    """
    activations, taken = [], set()
    for place, (node, name) in enumerate(zip(nodes, signature, strict=True)):
        activation = ACTIVATIONS.get(name)
        if activation is None:
            continue
        layer = _layer_before(node, outputs, layers)
        if layer and layer not in taken:
            taken.add(layer)
            activations.append((place, layer, _refine(node, activation)))
    names = {place: outputs[key(node)] for place, node in enumerate(nodes) if key(node) in outputs}
    return GraphPlan(
        signature,
        tuple(activations),
        names,
        read_loss_paths(nodes[0], outputs, layers),
        _depths(nodes, outputs, layers),
    )


def _refine(node: Node, activation: Activation) -> Activation:
    """Give the bounds that depend on the call: hardtanh's and clamp's limits."""
    if activation.kind not in ("hardtanh", "clamp"):
        return activation
    ends = ("_saved_min_val", "_saved_max_val") if activation.kind == "hardtanh" else ("_saved_min", "_saved_max")
    low, high = (getattr(node, end, None) for end in ends)
    low, high = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    if low == 0.0:
        return Activation("relu" if high == math.inf else "relu6", "self", dead_at=0.0, high=high)
    return Activation("hardtanh", "self", low=low, high=high)


def _layer_before(node: Node, outputs: Mapping[int, str], layers: frozenset[str]) -> str:
    """Return the layer whose output reaches ``node`` through nodes that only re-arrange or add."""
    for _ in range(8):
        children = [child for child, _ in node.next_functions if child is not None]
        if not children:
            return ""
        node = children[0]
        name = outputs.get(key(node), "")
        if name in layers:
            return name
        if node.name() in ACTIVATIONS:
            return ""
    return ""


def _depths(nodes: Sequence[Node], outputs: Mapping[int, str], layers: frozenset[str]) -> dict[str, int]:
    """Return for each layer the least number of layers between it and the loss (breadth first)."""
    depth: dict[Node, int] = {nodes[0]: 0}
    found: dict[str, int] = {}
    queue = [nodes[0]]
    for node in queue:
        here = depth[node]
        name = outputs.get(key(node))
        if name in layers:
            found.setdefault(name, here)
            here += 1
        for child, _ in node.next_functions:
            if child is not None and child not in depth and len(queue) < MAX_NODES:
                depth[child] = here
                queue.append(child)
    return found


def read_loss_paths(root: Node, outputs: Mapping[int, str], layers: frozenset[str]) -> tuple[tuple[Op, ...], ...]:
    """Return the ways from the loss (first) down to the first layers (last), at most `MAX_PATHS`.

    A loss of several terms has several paths; a node is followed once.
    """
    paths: list[tuple[Op, ...]] = []
    seen = {root}
    stack: list[tuple[Node, tuple[Op, ...]]] = [(root, ())]
    while stack and len(paths) < MAX_PATHS:
        node, above = stack.pop()
        name = outputs.get(key(node), "")
        path = (*above, Op(op_name(node), _shape(node), name, _details(node)))
        children = [child for child, _ in node.next_functions if child is not None]
        below = [child for child in children if child.name() not in _LOSS_ENDS]
        if name in layers or not below or len(path) >= MAX_PATH_LENGTH:
            paths.append(path)
            continue
        for child in reversed(below):
            if child not in seen:
                seen.add(child)
                stack.append((child, path))
    return tuple(paths)


def op_name(node: Node) -> str:
    """Return the name of an operation: LogSoftmax for LogSoftmaxBackward0."""
    name: str = node.name()
    return name.rsplit("::", 1)[-1].rstrip("0123456789").removesuffix("Backward")


def _shape(node: Node) -> tuple[int, ...]:
    """Return the shape of what the forward operation of ``node`` gave."""
    try:
        metadata = node._input_metadata
        return tuple(int(size) for size in metadata[0].shape) if metadata else ()
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return ()


def _details(node: Node) -> dict[str, Any]:
    """Return the plain settings of an operation, and facts of its saved values where they are small."""
    details: dict[str, Any] = {"inputs": len(node.next_functions)}
    for key in ("dim", "exponent", "reduction", "alpha", "min", "max"):
        value = getattr(node, f"_saved_{key}", None)
        if isinstance(value, (int, float)):
            details[key] = value if abs(value) < 2**62 else value - 2**64
    details["constant_inputs"] = sum(child is None for child, _ in node.next_functions)
    return details


def prediction_and_target(
    nodes: Sequence[Node], outputs: Sequence[tuple[int, Tensor]]
) -> tuple[Tensor | None, Tensor | None, str]:
    """Return what the loss compares, and the kind of loss: its tensors as autograd saved them.

    Knows the fused losses by their nodes, and a hand-written difference by what stands on both sides of
    it: the network's output is known, so the other side is the target.

    Args:
        nodes: The walked graph, nearest to the loss first.
        outputs: What the network returned at this step, with the `key` of the node that made it.
    """
    for node in nodes[:64]:
        name = node.name()
        kind = _LOSSES.get(name)
        if kind is not None:
            return saved(node, "self"), saved(node, "target"), kind
        if name.startswith("Sub") and name.endswith("Backward0"):
            difference = _difference_above(nodes, node)
            if difference is not None:
                return _split_difference(node, difference, outputs)
    return None, None, ""


_LOSSES = {
    "MseLossBackward0": "mse",
    "L1LossBackward0": "l1",
    "SmoothL1LossBackward0": "smooth-l1",
    "HuberLossBackward0": "huber",
    "BinaryCrossEntropyBackward0": "bce",
    "BinaryCrossEntropyWithLogitsBackward0": "bce-with-logits",
    "NllLossBackward0": "nll",
    "NllLoss2DBackward0": "nll",
    "KlDivBackward0": "kl",
}
_DIFFERENCE_USERS = {
    "PowBackward0": ("self", "mse"),
    "MulBackward0": ("self", "mse"),
    "AbsBackward0": ("self", "l1"),
    "LinalgVectorNormBackward0": ("self", "l2"),
    "NormBackward0": ("self", "l2"),
}


def _difference_above(nodes: Sequence[Node], sub: Node) -> tuple[Tensor, str] | None:
    """Return the value of ``sub`` from the operation that squares it or takes its absolute value."""
    for node in nodes[:64]:
        use = _DIFFERENCE_USERS.get(node.name())
        if use and node.next_functions[0][0] is sub:
            if node.name() == "PowBackward0" and node._saved_exponent != 2:
                return None
            if node.name() == "MulBackward0" and not _is_same(node.next_functions[1][0], sub):
                return None
            value = saved(node, use[0])
            return None if value is None else (value, use[1])
    return None


def _is_same(node: Node | None, sub: Node) -> bool:
    """Say whether a node is that difference, or the same one written a second time."""
    if node is None or node is sub:
        return node is sub
    return bool(node.name() == sub.name() and node.next_functions == sub.next_functions)


def _split_difference(
    sub: Node, difference: tuple[Tensor, str], outputs: Sequence[tuple[int, Tensor]]
) -> tuple[Tensor | None, Tensor | None, str]:
    """Return prediction and target of ``prediction - target`` or ``target - prediction``."""
    value, kind = difference
    (left, _), (right, _) = sub.next_functions
    if (left is None) == (right is None):
        return None, None, kind
    prediction = _value_of(left if left is not None else right, outputs)
    if prediction is None:
        return None, None, kind
    target = prediction - value if left is not None else prediction + value
    return prediction, target, kind


def _value_of(node: Node, outputs: Sequence[tuple[int, Tensor]]) -> Tensor | None:
    """Return the forward value of ``node`` if it is a network output or a plain view of one."""
    for made_by, output in outputs:
        if made_by == key(node):
            return output
    if node.name() in (*_VIEWS_TO_SKIP, "SqueezeBackward0", "SqueezeBackward1", "UnsqueezeBackward0"):
        child = node.next_functions[0][0]
        value = None if child is None else _value_of(child, outputs)
        shape = _shape(node)
        return value.reshape(shape) if value is not None and value.numel() == math.prod(shape) else None
    if node.name() == "SelectBackward0":
        child = node.next_functions[0][0]
        value = None if child is None else _value_of(child, outputs)
        return None if value is None else value.select(_signed(node._saved_dim), _signed(node._saved_index))
    return None


def _signed(value: int) -> int:
    """Return an unsigned saved index as the signed number it stands for."""
    return value - 2**64 if value >= 2**63 else value


_SAVED_INPUTS = ("self", "input", "mat1", "other", "target", "result", "self_or_result", "weight", "mat2")


def first_nonfinite(nodes: Sequence[Node], names: Mapping[int, str]) -> dict[str, Any]:
    """Find where the forward pass first left the finite numbers, from what autograd saved.

    Returns:
        ``op`` (the operation that made the first nan or inf), ``layer`` (the module it ran in, or the nearest
        one after it) and ``smallest_input`` where the operation's own input is known; empty if unknown.

    Cost: one pass over all saved tensors. Called once, when a loss stops being finite.
    """
    culprit, origin = None, None
    for place in range(len(nodes) - 1, -1, -1):  # farthest from the loss first
        node = nodes[place]
        for slot, attribute in enumerate(_SAVED_INPUTS):
            value = saved(node, attribute)
            if value is None or not value.is_floating_point() or bool(torch.isfinite(value).all()):
                continue
            if attribute in ("result", "self_or_result") or slot >= 7:
                culprit, origin = place, node
            else:
                culprit, origin = place, _producer(node, attribute)
            break
        if culprit is not None:
            break
    if culprit is None:
        return {}
    place_of = {node: place for place, node in enumerate(nodes)}
    place = place_of.get(origin, culprit)
    answer: dict[str, Any] = {"op": op_name(nodes[place])}
    if answer["op"] == "AccumulateGrad":
        answer["op"] = "weights"
    answer["layer"] = names.get(place) or names.get(culprit) or _nearest_name(culprit, names)
    own = saved(nodes[place], "self") if place != culprit else None
    if own is not None and own.numel() and own.is_floating_point():
        answer["smallest_input"] = float(own.min())
    return answer


def _producer(node: Node, attribute: str) -> Node:
    """Return the node whose output ``node`` saved as ``attribute``."""
    children = [child for child, _ in node.next_functions if child is not None]
    if node.name().startswith("Addmm") and attribute == "mat1" and len(node.next_functions) > 1:
        return node.next_functions[1][0] or node
    return children[0] if children else node


def _nearest_name(place: int, names: Mapping[int, str]) -> str:
    """Return the name of the nearest module towards the loss."""
    return next((names[i] for i in range(place, -1, -1) if i in names), "")

"""Reading the operations between the loss and the network."""

from __future__ import annotations

import math
from collections.abc import Collection

from ..records import Op

REGRESSION = frozenset(("mse", "l1", "smooth-l1", "huber", "l2"))

# Operations that only re-arrange: what stands below them is what counts.
_TRANSPARENT = frozenset(
    "View Reshape ReshapeAlias UnsafeView Transpose T Permute Squeeze Unsqueeze Alias Clone Expand ToCopy Select "
    "Slice Index Gather Contiguous Narrow Cat Stack Split SplitWithSizes Unbind".split()
)
_AFFINE = frozenset(("Add", "Sub", "Mul", "Div", "Clamp", "ClampMin", "ClampMax", "Neg"))
_POSITIVE = frozenset(("Exp", "Softplus", "Sigmoid", "Softmax", "Pow", "Abs", "Relu", "LinalgVectorNorm"))
_COMPARISONS = frozenset(("MseLoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "Sub", "Rsub"))
_RANGES = {
    "Sigmoid": (0.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
    "Relu": (0.0, math.inf),
    "Softplus": (0.0, math.inf),
    "Hardtanh": (-1.0, 1.0),
    "Hardsigmoid": (0.0, 1.0),
}


def below(path: tuple[Op, ...], place: int) -> Op | None:
    """Return the next operation towards the network that does more than re-arrange."""
    for op in path[place + 1 :]:
        if op.name not in _TRANSPARENT:
            return op
    return None


def find(path: tuple[Op, ...], wanted: Collection[str]) -> Op | None:
    """Return the first of some operations on a path."""
    return next((op for op in path if op.name in wanted), None)


def raw_log(path: tuple[Op, ...], place: int) -> bool:
    """Say whether a logarithm here is taken of a network output that nothing made positive.

    Only re-arranging, clamping, scaling and shifting may stand between the two; a softmax, sigmoid, exp,
    square or sum of such makes the output fit for it.
    """
    if path[place].name != "Log":
        return False
    between = path[place + 1 :]
    if not between or not between[-1].layer or between[-1].name in _POSITIVE:
        return False
    return all(op.name in _TRANSPARENT or op.name in _AFFINE for op in between[:-1])


def range_of_output(path: tuple[Op, ...]) -> tuple[float, float, str, str] | None:
    """Return the range of the activation that the network ends in, its name and layer; None if unbounded."""
    compare = next((i for i, op in enumerate(path) if op.name in _COMPARISONS), None)
    if compare is None:
        return None
    for op in path[compare + 1 :]:
        if op.name in _RANGES:
            low, high = _RANGES[op.name]
            return low, high, op.name, op.layer
        if op.name not in _TRANSPARENT:
            return None  # scaled or shifted afterwards: the range is another
    return None

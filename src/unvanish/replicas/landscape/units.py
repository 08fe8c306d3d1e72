"""Which hidden units of a network may change places without changing what it computes.

The operations of the network are read one after the other. Each value that passes carries a mark: along which
dimension the units of some group lie. A layer that mixes units starts a new group; what works on each unit alone
passes the mark on; where two values are added, their groups become one. All that is not known holds the groups that
reach it in place: too careful at times, but not wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ..stack import named_tensors
from .groups import Groups, Mark, Units
from .passing import OF_FUNCTIONS, OF_MODULES, READ_SHAPES, Passing, shape_of


class Unreadable(Exception):
    """The operations of a network could not be read; says why."""


def hidden_units(model: nn.Module, x: Any) -> tuple[Units, ...]:
    """Return the groups of hidden units that may change places, from input to output.

    Args:
        model: In evaluation mode.
        x: A tensor, or a tuple of them, to learn shapes from.

    Raises:
        Unreadable: if the model takes arguments by name or cannot be traced by torch.fx.

    Cost: a forward pass of one batch.

    Source: Ainsworth, Hayase & Srinivasa 2023, who list the groups of some networks.  Ours: reading them from a trace.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> (units,) = hidden_units(net, torch.zeros(3, 4))
        >>> units.size, [(axis.tensor, axis.dim) for axis in units.axes]
        (8, [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)])
    """
    if isinstance(x, dict):
        raise Unreadable("it takes its arguments by name")
    try:
        traced = fx.symbolic_trace(model)
        with torch.no_grad():
            ShapeProp(traced).propagate(*(x if isinstance(x, (tuple, list)) else (x,)))
    except Exception as error:  # whatever a network does that a trace cannot follow
        why = str(error).strip().splitlines()
        raise Unreadable(f"torch.fx cannot trace it: {why[0] if why else type(error).__name__}") from error
    groups = Groups(named_tensors(model))
    marks: dict[fx.Node, Mark | None] = {}
    for node in traced.graph.nodes:
        marks[node] = _read(Passing(groups, marks, node), traced)
    return groups.free()


def _read(passing: Passing, traced: fx.GraphModule) -> Mark | None:
    """Return the mark of what an operation makes; None, and its operands are held in place, if it is not known."""
    node = passing.node
    if node.op == "get_attr":
        passing.groups.hold_tensor(str(node.target))
    if node.target in READ_SHAPES:
        return None
    mark = None
    if node.op == "call_module" and node.args and shape_of(node) is not None:
        module = traced.get_submodule(str(node.target))
        rule = OF_MODULES.get(type(module))
        mark = None if rule is None else rule(passing, module)
    elif node.op in ("call_function", "call_method") and node.args and shape_of(node) is not None:
        known = OF_FUNCTIONS.get(node.target)
        mark = None if known is None else known(passing)
    if mark is None:
        for operand in node.all_input_nodes:
            passing.groups.hold(passing.marks[operand])
    return mark

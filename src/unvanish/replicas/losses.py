"""The losses of all replicas from their outputs: in one call where that is provably the same, else one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..errors import OptionError
from .stacked import Stacked

LossFn = Callable[[Any, Any], Tensor]

# Means over all elements of two tensors of one shape.
_BY_ELEMENT: dict[Any, Callable[..., Tensor]] = {
    F.mse_loss: F.mse_loss,
    F.l1_loss: F.l1_loss,
    F.smooth_l1_loss: F.smooth_l1_loss,
    F.binary_cross_entropy_with_logits: F.binary_cross_entropy_with_logits,
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
}


def losses_of(loss_fn: LossFn, outputs: Any, y: Any, n: int, *, is_separate: bool) -> Tensor:
    """Return one loss a replica.

    Args:
        loss_fn: Function of the output of one replica and its part of ``y``.
        outputs: What the network gave, in which tensors that differ between replicas are `Stacked`.
        y: What ``loss_fn`` compares with.
        n: Replicas.
        is_separate: Whether tensors of ``y`` have a leading axis of replicas.
    """
    if isinstance(outputs, Stacked) and isinstance(y, Tensor):
        at_once = _at_once(loss_fn, outputs, y if is_separate else y.expand(n, *y.shape))
        if at_once is not None:
            return at_once
    leaves, structure = tree_flatten(outputs)
    columns = [leaf.front().unbind(0) if isinstance(leaf, Stacked) else [leaf] * n for leaf in leaves]
    losses = []
    for i in range(n):
        output = tree_unflatten([column[i] for column in columns], structure)
        losses.append(scalar(loss_fn(output, part(y, i) if is_separate else y)))
    return torch.stack(losses)  # (n,)


def scalar(loss: Any, where: str = "Replicas.loss()") -> Tensor:
    """Return a loss that is one number.

    Args:
        loss: What a loss function returned.
        where: Whose argument that function is.

    Raises:
        OptionError: if it is not.
    """
    if isinstance(loss, Tensor) and loss.dim() == 0:
        return loss
    found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise OptionError(
        f"{where}: loss_fn: found {found}, expected one number for one network, such as the mean over its batch. "
        "Write loss_fn=lambda output, y: ....mean()."
    )


def part(value: Any, i: int) -> Any:
    """Return what replica ``i`` gets of data with a leading axis of replicas."""
    value = dict(value) if isinstance(value, Mapping) else value
    return tree_map(lambda leaf: leaf[i] if isinstance(leaf, Tensor) else leaf, value)


def _at_once(loss_fn: LossFn, output: Stacked, y: Tensor) -> Tensor | None:
    """Return the losses if ``loss_fn`` is known to be a mean over rows or elements, none of which sees another."""
    by_element = _BY_ELEMENT.get(loss_fn if not isinstance(loss_fn, nn.Module) else type(loss_fn))
    if by_element is not None and getattr(loss_fn, "reduction", "mean") == "mean":
        if output.shape != y.shape[1:]:  # broadcasts, which means another thing alone
            return None
        return by_element(output.front(), y, reduction="none").flatten(1).mean(1)
    if loss_fn is F.cross_entropy:
        return _cross_entropy(output, y, -100, 0.0)
    if type(loss_fn) is nn.CrossEntropyLoss and loss_fn.weight is None and loss_fn.reduction == "mean":
        return _cross_entropy(output, y, loss_fn.ignore_index, loss_fn.label_smoothing)
    return None


def _cross_entropy(output: Stacked, y: Tensor, ignore_index: int, label_smoothing: float) -> Tensor | None:
    # (batch, classes, ...) of one replica, and (n, batch, ...) of all
    if y.is_floating_point() or len(output.shape) != y.dim() or output.shape[:1] != y.shape[1:2]:
        return None
    if output.layout == "turned":  # softmax of a few classes that lie in a row is slow
        logits, labels = output.turned(), y
    else:
        logits, labels = output.front().flatten(0, 1), y.flatten(0, 1)
    rows = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
    return rows.view(len(y), -1).sum(1) / (y != ignore_index).flatten(1).sum(1)

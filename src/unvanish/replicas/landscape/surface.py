"""The loss of one architecture over fixed data, at any weights, and what looking there has cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from ...errors import OptionError
from ...graph import walk
from ..backends import LossFn, call
from ..losses import scalar
from ..stack import named_tensors
from ..statistics import estimate_statistics

Weights = dict[str, Tensor]  # parameters and buffers of a model, by name
Batch = tuple[Any, Any]

_ONCE = "torch::autograd::Error"  # what torch puts behind functions marked once_differentiable


class Height(NamedTuple):
    """The loss at some weights, and the share of examples classified wrongly; nan where there are no classes."""

    loss: float
    mistakes: float


class Surface:
    """The loss of one architecture over given batches, as a function of the weights.

    Everything is computed in evaluation mode, by a model of its own. The statistics of batch norms are estimated anew
    at all weights: those of a mean, or of weights with noise, are not the mean of statistics.

    Args:
        model: A copy that may be changed.
        loss_fn: Function of an output and y; returns one number, the mean over its batch.
        batches: Pairs of x and y.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, batches: Sequence[Batch]) -> None:
        self.model = model.eval()
        self.loss_fn = loss_fn
        self.tensors = named_tensors(model)
        device = next(model.parameters()).device
        self.batches = [_moved(batch, device) for batch in batches]
        sizes = [_size(x) for x, _ in self.batches]
        self.examples = sum(sizes)
        self.shares = [size / self.examples for size in sizes]
        self.forward = 0
        self.backward = 0
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = trained or dict(model.named_parameters())  # a model for prediction may be frozen as a whole
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        has_statistics = any(isinstance(m, _BatchNorm) and m.track_running_stats for m in model.modules())
        inputs = [x for x, _ in self.batches]
        # a single example that is left over may have no variance
        several = [x for x, size in zip(inputs, sizes, strict=True) if size > 1]
        self._for_statistics = (several or inputs) if has_statistics else []

    @torch.no_grad()
    def place(self, weights: Mapping[str, Tensor]) -> None:
        """Go to some weights, and estimate the statistics of batch norms there."""
        for name, value in weights.items():
            self.tensors[name].copy_(value)
        if self._for_statistics:
            estimate_statistics(_Called(self.model), [(x,) for x in self._for_statistics])
            self.forward += len(self._for_statistics)

    @torch.no_grad()
    def output(self, weights: Mapping[str, Tensor]) -> list[Tensor]:
        """Return what the model with just these weights and buffers makes of the first batch."""
        for name, value in weights.items():
            self.tensors[name].copy_(value)
        self.forward += 1
        return tensors_of(call(self.model, {}, self.batches[0][0]))

    @torch.no_grad()
    def height(self, weights: Mapping[str, Tensor]) -> Height:
        """Return the loss and the share of mistakes at some weights."""
        self.place(weights)
        loss, wrong, counted = 0.0, 0, 0
        for (x, y), share in zip(self.batches, self.shares, strict=True):
            output = call(self.model, {}, x)
            loss += share * float(self._loss(output, y))
            found = _mistakes(output, y)
            wrong, counted = wrong + found[0], counted + found[1]
        self.forward += len(self.batches)
        return Height(loss, wrong / counted if counted else math.nan)

    def curve(self, direction: Mapping[str, Tensor]) -> Weights:
        """Return the Hessian of the loss at the present place times a direction; as many trained parameters.

        Raises:
            RuntimeError: if something cannot be differentiated twice.
        """
        total = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        names, parameters = list(self.parameters), list(self.parameters.values())
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            for (x, y), share in zip(self.batches, self.shares, strict=True):
                loss = self._loss(call(self.model, {}, x), y)
                grads = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
                along = sum((g * direction[name]).sum() for name, g in zip(names, grads, strict=True))
                if not (isinstance(along, Tensor) and along.requires_grad):
                    continue  # a loss that is linear in the weights has no curvature
                if _ONCE in walk(along.grad_fn)[1]:  # which autograd leaves out, if only some gradients are asked for
                    raise RuntimeError("an operation in the model or loss can be differentiated only once")
                seconds = torch.autograd.grad(along, parameters, materialize_grads=True)
                for name, second in zip(names, seconds, strict=True):
                    total[name].add_(second.detach(), alpha=share)
        self.forward += len(self.batches)
        self.backward += 2 * len(self.batches)
        return total

    def _loss(self, output: Any, y: Any) -> Tensor:
        return scalar(self.loss_fn(output, y), "landscape()")


class _Called(nn.Module):
    """A model that takes its arguments as one: a tensor, a tuple of arguments, or a mapping of them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Any:
        return call(self.model, {}, x)


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors in an output, in a fixed order."""
    return [leaf for leaf in tree_leaves(_plain(output)) if isinstance(leaf, Tensor)]


def is_near(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Say whether outputs are equal up to rounding; sums in another order differ by that."""
    for a, b in zip(one, other, strict=True):
        if a.is_floating_point():
            close = float(torch.finfo(a.dtype).eps) ** 0.5
            largest = float(a.where(a.isfinite(), 0).abs().max()) if a.numel() else 0.0
            if not torch.allclose(a, b, rtol=close, atol=close * largest, equal_nan=True):
                return False
    return True


def batches_of(loader: Any) -> list[Batch]:
    """Return all batches of a loader as pairs of x and y.

    Raises:
        OptionError: if it cannot be iterated, is empty, or its batches are no pairs.
    """
    try:
        found = list(loader)
    except TypeError as error:
        raise OptionError(
            f"landscape(): loader: found {type(loader).__name__}, which gives no batches ({error}), expected an "
            "iterable of pairs (x, y). Write loader=[(x, y)] for a single batch."
        ) from error
    if not found:
        raise OptionError(
            "landscape(): loader: found no batches, expected at least one pair (x, y). An iterator that was used "
            "before is empty: give the loader itself."
        )
    return [_pair(batch) for batch in found]


def _pair(batch: Any) -> Batch:
    if isinstance(batch, (Tensor, Mapping)):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    found = f"one of {len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
    raise OptionError(
        f"landscape(): loader: found as a batch {found}, expected a pair (x, y), a tensor or a mapping. "
        "Write loader=[(x, y) for x, y, *_ in loader]."
    )


def _size(x: Any) -> int:
    """Return the number of examples in a batch: the length of its first tensor."""
    for leaf in tree_leaves(_plain(x)):
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf):
            return len(leaf)
    raise OptionError(
        "landscape(): loader: found a batch without examples, expected tensors with a first axis of examples. "
        "Leave empty batches out."
    )


def _moved(batch: Batch, device: torch.device) -> Batch:
    x, y = (_plain(part) for part in batch)
    moved = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, (x, y))
    return moved[0], moved[1]


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _mistakes(output: Any, y: Any) -> tuple[int, int]:
    """Return how many examples are classified wrongly, and of how many; (0, 0) where there are no classes.

    Classes are scores along the second axis and a whole number for each example, as for ``cross_entropy``; targets
    below zero, such as its ``ignore_index``, are left out.
    """
    if not (isinstance(output, Tensor) and isinstance(y, Tensor)):
        return 0, 0
    is_whole = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    if not (is_whole and output.is_floating_point() and output.dim() >= 2 and output.shape[1] >= 2):
        return 0, 0
    counted = y >= 0
    if y.shape != output.shape[:1] + output.shape[2:] or bool((y >= output.shape[1]).any()):
        return 0, 0
    return int(((output.argmax(1) != y) & counted).sum()), int(counted.sum())

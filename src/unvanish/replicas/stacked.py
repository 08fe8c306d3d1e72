"""A tensor of each replica in one, the three ways to lay them out, and what shapes mean for one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .streams import Streams

Layout = Literal["front", "folded", "turned"]


class NotUnderstood(Exception):  # it never leaves the package: the loop takes over
    """An operation has no rule for all replicas at once."""


class Where(NamedTuple):
    """Where an operation runs: for how many replicas, and with whose random numbers."""

    n: int
    streams: Streams | None = None


@dataclass(slots=True)
class Stacked:
    """What the replicas hold at one place of their networks.

    Args:
        tensor: As the layout says.
        n: Replicas.
        layout: ``"front"``: ``(n, *shape of one replica)``. ``"folded"``: ``(batch, n * channels, ...)``, as grouped
            convolutions and batch norms take it. ``"turned"``: ``(n, features, batch)``, as products of stacked
            matrices leave it.
    """

    tensor: Tensor
    n: int
    layout: Layout = "front"

    @property
    def shape(self) -> torch.Size:
        """The shape that one replica sees."""
        first, second, *places = self.tensor.shape
        if self.layout == "folded":
            return torch.Size((first, second // self.n, *places))
        if self.layout == "turned":
            return torch.Size((*places, second))
        return self.tensor.shape[1:]

    def front(self) -> Tensor:
        """Return the tensor with the replicas along the first axis."""
        if self.layout == "folded":
            return torch.unflatten(self.tensor, 1, (self.n, -1)).transpose(0, 1)
        return self.tensor.transpose(1, 2) if self.layout == "turned" else self.tensor

    def folded(self) -> Tensor:
        """Return the tensor with the replicas' channels beside each other."""
        if self.layout == "folded":
            return self.tensor
        if self.tensor.dim() < 3:
            raise NotUnderstood(f"channels in a tensor of shape {tuple(self.shape)}")
        return channels_last(self.front().transpose(0, 1).flatten(1, 2))  # (batch, n * channels, ...)

    def turned(self) -> Tensor:
        """Return a batch of vectors with its rows along the last axis."""
        if self.layout == "turned":
            return self.tensor
        return self.front().transpose(1, 2)  # (n, features, batch)

    def like(self, tensor: Tensor) -> Stacked:
        """Return another tensor that is laid out as this one."""
        return Stacked(tensor, self.n, self.layout)

    def axis(self, dim: int) -> int:
        """Return which axis of `front` is the axis ``dim`` of one replica."""
        rank = len(self.shape)
        if not -rank <= dim < rank:
            raise NotUnderstood(f"axis {dim} of a tensor of shape {tuple(self.shape)}")
        return dim + 1 if dim >= 0 else dim


def channels_last(images: Tensor) -> Tensor:
    """Return images as processors convolve many channels fastest; other tensors, and on other devices, as they are."""
    if images.dim() == 4 and images.device.type == "cpu":
        return images.contiguous(memory_format=torch.channels_last)
    return images


def for_each(value: Any, n: int) -> Stacked:
    """Return a value as one of each replica: what all share is the same for each."""
    return value if isinstance(value, Stacked) else Stacked(value.expand(n, *value.shape), n)


def aligned(function: Callable[..., Tensor], n: int, values: Sequence[Any], options: dict[str, Any]) -> Any:
    """Apply an elementwise function, in which the shapes of one replica broadcast as they do alone."""
    stacked = [value for value in values if isinstance(value, Stacked)]
    others = [value for value in values if isinstance(value, Tensor) and value.dim()]
    if not stacked:
        return function(*values, **options)
    if not others and all(s.layout == stacked[0].layout and s.shape == stacked[0].shape for s in stacked):
        return stacked[0].like(function(*(v.tensor if isinstance(v, Stacked) else v for v in values), **options))
    rank = max([len(s.shape) for s in stacked] + [other.dim() for other in others])
    return Stacked(function(*(_with_rank(value, rank) for value in values), **options), n)


def _with_rank(value: Any, rank: int) -> Any:
    if not isinstance(value, Stacked):
        return value  # broadcasts along the replicas
    front = value.front()
    return front[(slice(None), *[None] * (rank + 1 - front.dim()))]  # (n, 1, ..., *shape of one replica)

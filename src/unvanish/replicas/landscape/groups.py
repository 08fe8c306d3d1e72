"""Groups of hidden units that have to move together, and the tensors along which they lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor


class Axis(NamedTuple):
    """A dimension of a parameter or buffer along which units lie, each ``block`` entries long."""

    tensor: str
    dim: int
    block: int


@dataclass(frozen=True, slots=True)
class Units:
    """A group of hidden units that may change places, together along all its axes."""

    size: int
    axes: tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """Along which dimension of a value the units of a group lie, each ``block`` entries long after flattening."""

    group: int
    dim: int
    block: int = 1


class Groups:
    """The groups found so far in a network with such tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self._parents: list[int] = []
        self._sizes: list[int] = []
        self._held: set[int] = set()
        self._axes: dict[tuple[str, int], Mark | None] = {}
        uses = Counter(id(tensor) for tensor in tensors.values())
        self._foreign = {name for name, tensor in tensors.items() if uses[id(tensor)] > 1}

    def begin(self, size: int, dim: int) -> Mark:
        """Start a new group."""
        self._parents.append(len(self._parents))
        self._sizes.append(size)
        return Mark(self._parents[-1], dim)

    def hold(self, mark: Mark | None) -> None:
        """Hold a group in place."""
        if mark is not None:
            self._held.add(self._find(mark.group))

    def hold_tensor(self, name: str) -> None:
        """Hold in place what lies along a tensor that is used otherwise than by its layer, tied ones for example."""
        self._foreign.add(name)

    def join(self, one: Mark | None, other: Mark | None) -> Mark | None:
        """Make one group of two; held in place, if they cannot move together or one is held."""
        if one is None or other is None or (one.dim, one.block) != (other.dim, other.block):
            self.hold(one)
            self.hold(other)
            return None
        first, second = self._find(one.group), self._find(other.group)
        self._parents[second] = first
        if second in self._held:
            self._held.add(first)
        return one

    def lies(self, name: str, dim: int, mark: Mark | None) -> Mark | None:
        """Note that units lie along a dimension of a tensor; what lies there already has to move with them.

        Returns:
            The mark, or None if the units are held in place.
        """
        tensor = self.tensors.get(name)  # None: computed from others, by weight norm for example
        if mark is not None and (tensor is None or self._sizes[mark.group] * mark.block != tensor.shape[dim]):
            self.hold(mark)
            mark = None
        if (name, dim) in self._axes:
            known = self._axes[name, dim]
            # where the units lie in the values that pass does not matter to the tensor
            joined = self.join(known, None if mark is None or known is None else replace(mark, dim=known.dim))
            mark = None if joined is None else mark
        self._axes[name, dim] = mark
        return mark

    def free(self) -> tuple[Units, ...]:
        """Return the groups that nothing holds in place, in the order in which they began."""
        for (name, _), mark in self._axes.items():
            if name in self._foreign:
                self.hold(mark)
        found: dict[int, list[Axis]] = {}
        for (name, dim), mark in self._axes.items():
            if mark is not None and self._find(mark.group) not in self._held:
                found.setdefault(self._find(mark.group), []).append(Axis(name, dim, mark.block))
        return tuple(Units(self._sizes[group], tuple(axes)) for group, axes in found.items() if self._sizes[group] > 1)

    def _find(self, group: int) -> int:
        while self._parents[group] != group:
            group = self._parents[group]
        return group

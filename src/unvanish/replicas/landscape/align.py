"""Give the hidden units of networks a common order, by which they lie as near to each other as can be found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ...errors import OptionError
from .groups import Axis, Units
from .surface import Weights

_MAX_ROUNDS = 100  # of coordinate descent; a few are needed
_GAIN = 1e-9  # of the size of the products: less is rounding

Permutations = tuple[Tensor, ...]  # for each group of units: the old place of what comes to each place


def align(models: Sequence[Weights], groups: Sequence[Units], parameters: Iterable[str]) -> list[Weights]:
    """Return the models with their units in a common order; the first keeps its own.

    Each is matched to the first, and then in turns to the sum of all others, as long as the sum of all products of
    pairs grows. No model changes what it computes.

    Args:
        models: Two or more.
        groups: What may change places.
        parameters: Names of the tensors whose products count.

    Cost: about ten assignment problems for each group and model; of cubic time in the units of a group.

    Raises:
        OptionError: if scipy is missing.

    Source: Ainsworth, Hayase & Srinivasa 2023, algorithms 1 and 3.
    """
    match = Matching(groups, frozenset(parameters))
    orders = [match.identity(), *(match.best(models[0], model) for model in models[1:])]
    for _ in range(_MAX_ROUNDS if len(models) > 2 else 0):
        is_better = False
        for place in range(1, len(models)):
            moved = [permuted(m, groups, order) for m, order in zip(models, orders, strict=True)]
            others = {n: sum((m[n] for i, m in enumerate(moved) if i != place), moved[0][n] * 0) for n in match.names}
            found = match.improved(others, models[place], orders[place])
            if found is not orders[place]:
                orders[place], is_better = found, True
        if not is_better:
            break
    return [permuted(model, groups, order) for model, order in zip(models, orders, strict=True)]


def permuted(weights: Weights, groups: Sequence[Units], order: Permutations) -> Weights:
    """Return weights whose units have changed places.

    Example:
        >>> units = Units(3, (Axis("w", 0, 1),))
        >>> permuted({"w": torch.tensor([5.0, 6.0, 7.0])}, [units], (torch.tensor([2, 0, 1]),))["w"].tolist()
        [7.0, 5.0, 6.0]
    """
    moved = dict(weights)
    for units, places in zip(groups, order, strict=True):
        for axis in units.axes:
            moved[axis.tensor] = _permute(moved[axis.tensor], axis, places)
    return moved


def _permute(tensor: Tensor, axis: Axis, places: Tensor) -> Tensor:
    entries = places[:, None] * axis.block + torch.arange(axis.block)  # (units, block)
    return tensor.index_select(axis.dim, entries.flatten().to(tensor.device))


class Matching:
    """Find the order of units in which one network lies nearest to another.

    Args:
        groups: What may change places.
        parameters: Names of the tensors whose products count.
    """

    def __init__(self, groups: Sequence[Units], parameters: frozenset[str]) -> None:
        self.groups = [Units(g.size, tuple(axis for axis in g.axes if axis.tensor in parameters)) for g in groups]
        self.names = list(dict.fromkeys(axis.tensor for group in self.groups for axis in group.axes))
        self._assign = _assignment()

    def identity(self) -> Permutations:
        """Return the order as it is."""
        return tuple(torch.arange(group.size) for group in self.groups)

    def best(self, target: Weights, moving: Weights) -> Permutations:
        """Return the better of what is reached from the order as it is, and from one that is built from the input on.

        The first cannot be worse than no change; the second finds an order that was only shuffled.
        """
        built = self.improved(target, moving, self._from_input(target, moving))
        kept = self.improved(target, moving, self.identity())
        return built if self._product(target, moving, built) > self._product(target, moving, kept) else kept

    def improved(self, target: Weights, moving: Weights, order: Permutations) -> Permutations:
        """Return a better order, found for one group after the other while all others stay; itself if none is."""
        least = _GAIN * sum(float((target[n].double() ** 2 + moving[n].double() ** 2).sum()) for n in self.names)
        product = self._product(target, moving, order)
        for _ in range(_MAX_ROUNDS):
            is_better = False
            for place, group in enumerate(self.groups):
                found = self._assign(self._gains(target, moving, order, place, group.axes))
                changed = (*order[:place], found, *order[place + 1 :])
                reached = self._product(target, moving, changed)
                # where a group lies along both sides of a weight, the best for each side need not be so for both
                if reached > product + least:
                    order, product, is_better = changed, reached, True
            if not is_better:
                break
        return order

    def _from_input(self, target: Weights, moving: Weights) -> Permutations:
        """Return an order found for group after group, by the tensors alone whose other sides are settled."""
        order, settled = self.identity(), set[int]()
        for place, group in enumerate(self.groups):
            open_tensors = {
                axis.tensor for i, other in enumerate(self.groups) if i not in settled | {place} for axis in other.axes
            }
            axes = tuple(axis for axis in group.axes if axis.tensor not in open_tensors) or group.axes
            found = self._assign(self._gains(target, moving, order, place, axes))
            order = (*order[:place], found, *order[place + 1 :])
            settled.add(place)
        return order

    def _gains(self, target: Weights, moving: Weights, order: Permutations, place: int, axes: Sequence[Axis]) -> Tensor:
        """Return the product of what lies at unit i of the target with unit j of the other, for all i and j."""
        size = self.groups[place].size
        total = torch.zeros(size, size, dtype=torch.float64)
        for axis in axes:
            value = moving[axis.tensor]
            for i, group in enumerate(self.groups):
                for other in group.axes:
                    if other.tensor == axis.tensor and (i, other.dim) != (place, axis.dim):
                        value = _permute(value, other, order[i])
            one, two = (each.movedim(axis.dim, 0).reshape(size, -1).double() for each in (target[axis.tensor], value))
            total += (one @ two.T).cpu()
        return total

    def _product(self, target: Weights, moving: Weights, order: Permutations) -> float:
        moved = permuted({name: moving[name] for name in self.names}, self.groups, order)
        return sum(float((target[name].double() * moved[name].double()).sum()) for name in self.names)


def _assignment() -> Callable[[Tensor], Tensor]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise OptionError(
            "landscape(): found no scipy, expected it to align units. Run: pip install 'unvanish[landscape]', or call "
            "landscape(..., align=False)."
        ) from error
    return lambda gains: torch.as_tensor(linear_sum_assignment(gains.numpy(), maximize=True)[1])

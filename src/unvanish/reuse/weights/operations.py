"""Changes of layout that can be undone: each gives back the same bytes.

An operation turns a list of tensors into another one. What a rule needs is written as a few of them in a row, so the
way back needs no second set of rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...errors import WeightsError


class Operation(Protocol):
    """What turns tensors into tensors, and back; `str` names it for the plan."""

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """Change the layout."""

    def back(self, tensors: list[Tensor]) -> list[Tensor]:
        """Undo `forward`."""


@dataclass(frozen=True)
class Permute:
    """Put the axes of every tensor into another order.

    Example:
        >>> str(Permute((1, 0))), str(Permute((3, 2, 0, 1)))
        ('transpose', 'permute(3, 2, 0, 1)')
    """

    axes: tuple[int, ...]

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.permute(self.axes) for tensor in tensors]

    def back(self, tensors: list[Tensor]) -> list[Tensor]:
        inverse = tuple(self.axes.index(axis) for axis in range(len(self.axes)))
        return [tensor.permute(inverse) for tensor in tensors]

    def __str__(self) -> str:
        return "transpose" if self.axes == (1, 0) else f"permute{self.axes}"


@dataclass(frozen=True)
class Reshape:
    """Read every tensor in another shape; its size stays."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.reshape(self.after) for tensor in tensors]

    def back(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.reshape(self.before) for tensor in tensors]

    def __str__(self) -> str:
        return f"reshape{self.after}"


@dataclass(frozen=True)
class Flip:
    """Reverse the order along some axes."""

    axes: tuple[int, ...]

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.flip(self.axes) for tensor in tensors]

    def back(self, tensors: list[Tensor]) -> list[Tensor]:
        return self.forward(tensors)

    def __str__(self) -> str:
        return f"flip{self.axes}"


@dataclass(frozen=True)
class Gates:
    """Put equal blocks of the first axis into another order: ``order[i]`` is the old place of the new block i.

    Example:
        >>> Gates((1, 0, 2)).forward([torch.tensor([1, 1, 2, 2, 3, 3])])[0].tolist()
        [2, 2, 1, 1, 3, 3]
    """

    order: tuple[int, ...]

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        return [self._reordered(tensor, self.order) for tensor in tensors]

    def back(self, tensors: list[Tensor]) -> list[Tensor]:
        inverse = tuple(self.order.index(place) for place in range(len(self.order)))
        return [self._reordered(tensor, inverse) for tensor in tensors]

    @staticmethod
    def _reordered(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
        blocks = tensor.chunk(len(order))
        return torch.cat([blocks[place] for place in order])

    def __str__(self) -> str:
        return f"gates{self.order}"


@dataclass(frozen=True)
class Join:
    """Put several tensors behind one another along the first axis."""

    sizes: tuple[int, ...]

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat(tensors)]

    def back(self, tensors: list[Tensor]) -> list[Tensor]:
        return list(torch.split(tensors[0], list(self.sizes)))

    def __str__(self) -> str:
        return f"join {len(self.sizes)}"


@dataclass(frozen=True)
class Split:
    """Cut one tensor along its first axis; the reverse of `Join`."""

    sizes: tuple[int, ...]

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        return list(torch.split(tensors[0], list(self.sizes)))

    def back(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat(tensors)]

    def __str__(self) -> str:
        return f"split in {len(self.sizes)}"


@dataclass(frozen=True)
class Unstack:
    """Take the rows of one tensor apart: they lose its first axis."""

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        return list(tensors[0].unbind())

    def back(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.stack(tensors)]

    def __str__(self) -> str:
        return "rows apart"


@dataclass(frozen=True)
class Fill:
    """Add a constant tensor where the file has none; on the way back it must still be that constant.

    Args:
        value: Of each entry.
        shape: Of the tensor.
        is_first: It comes before the others, not behind them.
    """

    value: float
    shape: tuple[int, ...]
    is_first: bool = False

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        dtype = tensors[0].dtype if tensors else torch.float32
        filled = torch.full(self.shape, self.value, dtype=dtype)
        return [filled, *tensors] if self.is_first else [*tensors, filled]

    def back(self, tensors: list[Tensor]) -> list[Tensor]:
        filled, rest = (tensors[0], tensors[1:]) if self.is_first else (tensors[-1], tensors[:-1])
        if not bool((filled == torch.tensor(self.value, dtype=filled.dtype)).all()):
            raise WeightsError(
                f"reverse(): a tensor of shape {self.shape}: found values other than {self.value:g}, expected the "
                "constant that loading put there. The file's format has no place for them. Convert the weights as "
                "they were loaded."
            )
        return rest

    def __str__(self) -> str:
        return f"fill {self.value:g}"


def flatten_rows(size: int, channels: int, outputs: int) -> tuple[Operation, ...]:
    """Turn a dense kernel over positions and channels (last) into torch's weight over channels (first).

    The rows of the kernel count positions first and channels fastest, as a channels-last map is flattened; torch
    flattens channels first.
    """
    positions = size // channels
    return (
        Reshape((size, outputs), (positions, channels, outputs)),
        Permute((2, 1, 0)),
        Reshape((outputs, channels, positions), (outputs, size)),
    )


def channels_first(size: int, channels: int) -> tuple[Operation, ...]:
    """Reorder a first axis that counts (position, channel) to (channel, position); other axes stay."""
    positions = size // channels
    order = tuple(place * channels + channel for channel in range(channels) for place in range(positions))
    return (Gates(order),) if positions > 1 and channels > 1 else ()


def forward(operations: Sequence[Operation], tensors: list[Tensor]) -> list[Tensor]:
    """Apply operations in order."""
    for operation in operations:
        tensors = operation.forward(tensors)
    return [tensor.contiguous() for tensor in tensors]


def back(operations: Sequence[Operation], tensors: list[Tensor]) -> list[Tensor]:
    """Undo operations in the reverse order."""
    for operation in reversed(operations):
        tensors = operation.back(tensors)
    return [tensor.contiguous() for tensor in tensors]

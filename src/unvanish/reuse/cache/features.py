"""Cached rows as a data set, and the rest of the model that learns from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from .cut import Cut
from .samples import Form
from .store import Manifest, Rows

Ints = npt.NDArray[np.int64]


class Head(nn.Module):
    """The part of a model above its frozen layers: takes features, returns what the model returns.

    It holds the model itself, so parameters, modes and optimisers are the same, and what it learns is in the model.

    Args:
        cut: Where the frozen part ends.
        placeholder: Device of the tensors that stand in for what no one needs.
    """

    def __init__(self, cut: Cut, placeholder: str | None) -> None:
        super().__init__()
        self.model = cut.model
        self._cut, self._placeholder = cut, placeholder

    def forward(self, features: Tensor | Sequence[Tensor]) -> Any:
        """Compute the output of the model from a batch of features."""
        given = (features,) if isinstance(features, Tensor) else tuple(features)
        return self._cut.rest(given, placeholder=self._placeholder)


class Batches:
    """The batches of features, in an order that is drawn anew whenever they are iterated.

    A `DataLoader` does more than to read rows takes; this costs a seventh of it.

    Args:
        features: What is read.
        order: Yields numbers of rows.
        batch_size: Rows of a batch.
        drop_last: Leave out a last batch that is not full.
        generator: What the order is drawn from.
    """

    def __init__(
        self,
        features: Features,
        order: Iterable[int],
        batch_size: int,
        *,
        drop_last: bool,
        generator: torch.Generator | None,
    ) -> None:
        self.features, self.order, self.batch_size = features, order, batch_size
        self.drop_last, self.generator = drop_last, generator

    def __len__(self) -> int:
        full, left = divmod(len(self.features), self.batch_size)
        return full + (left > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Any]:
        # a DataLoader draws a seed for its workers here, and orders are to be the same as with one
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        rows = np.fromiter(self.order, dtype=np.int64)
        for number in range(len(self)):
            yield self.features[rows[number * self.batch_size : (number + 1) * self.batch_size]]


class Features(Dataset[Any]):
    """What a frozen part has computed from a data set, in place of what the model takes.

    ``features[i]`` is the sample ``dataset[i]`` with features for its inputs; a list of numbers gives a batch.
    With ``views=K`` there are K rows for each sample: row ``view * len(dataset) + i``.

    Args:
        rows: On disk.
        form: How a batch is made up.
        head: What learns from them.
        columns: Of the rows, how many are features.
    """

    def __init__(self, rows: Rows, form: Form, head: Head, columns: int) -> None:
        self.head: Head | None = head
        self._rows, self._form, self._columns = rows, form, columns

    @property
    def folder(self) -> Path:
        """Return where the rows are."""
        return self._rows.folder

    @property
    def manifest(self) -> Manifest:
        """Return what is written there, and how it was computed."""
        return self._rows.manifest

    def __len__(self) -> int:
        return self.manifest.rows

    def __getitem__(self, row: int | Sequence[int] | Tensor | Ints) -> Any:
        if isinstance(row, int):
            number = row + len(self) if row < 0 else row
            if not 0 <= number < len(self):
                raise IndexError(f"row {row} of {len(self)}")
            batch = self._batch([number])
            return tree_map(lambda tensor: tensor[0], batch)
        return self._batch(row.tolist() if isinstance(row, Tensor) else row)

    def __getitems__(self, rows: list[int]) -> list[Any]:
        """Return many rows at once: what a `DataLoader` asks for."""
        leaves, spec = tree_flatten(self._batch(rows))
        return [tree_unflatten(list(row), spec) for row in zip(*leaves, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "head": None}  # workers of a loader read rows; they need no model

    def loader(
        self,
        batch_size: int = 256,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Batches | DataLoader[Any]:
        """Return a loader of whole batches; from the same seed it shuffles as `DataLoader(dataset, ...)` does.

        Args:
            batch_size: Rows of a batch.
            shuffle: Another order in each epoch.
            drop_last: Leave out a last batch that is not full.
            generator: What the order is drawn from.
            options: If given, for a `DataLoader`, which is returned then: ``num_workers``, ``pin_memory``.
        """
        order: Any = RandomSampler(self, generator=generator) if shuffle else SequentialSampler(self)
        if not options:
            return Batches(self, order, batch_size, drop_last=drop_last, generator=generator)
        batches = BatchSampler(order, batch_size, drop_last)
        return DataLoader(self, batch_size=None, sampler=batches, generator=generator, **options)

    def __repr__(self) -> str:
        manifest = self.manifest
        shapes = ", ".join(str(tuple(column.shape)) for column in manifest.columns[: self._columns])
        return f"Features({len(self):,} rows of {shapes} in {str(self.folder)!r}, {manifest.data_bytes:,} bytes)"

    def _batch(self, rows: Sequence[int] | Ints) -> Any:
        columns = self._rows.gather(rows)
        features = columns[: self._columns]
        given = features[0] if len(features) == 1 else tuple(features)
        return self._form.join(given, columns[self._columns :])

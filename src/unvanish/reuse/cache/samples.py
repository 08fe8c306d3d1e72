"""Read a data set in order, know its content, and notice what is drawn at random."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from ...errors import OptionError
from ...untouched import same_random_state

PROBED = 16  # samples that are read twice


class Draws(Dataset[Any]):
    """A data set with random augmentation, where row ``view * n + i`` is one fixed draw of sample i.

    Before each read the generators of torch, numpy and Python start from the number of the row; after it they are as
    before. So the same row is the same draw in every process and at every time.

    Args:
        dataset: Has ``len`` and reads by number.
        views: How many draws there are of each sample. >= 1

    Example:
        >>> class Noisy(Dataset):
        ...     def __len__(self): return 5
        ...     def __getitem__(self, i): return i + torch.rand(())
        >>> draws = Draws(Noisy(), 2)
        >>> len(draws), bool(draws[3] == draws[3]), bool(draws[3] == draws[8])
        (10, True, False)
    """

    def __init__(self, dataset: Any, views: int) -> None:
        self.dataset, self.views = dataset, views

    def __len__(self) -> int:
        return len(self.dataset) * self.views

    def __getitem__(self, row: int) -> Any:
        with same_random_state([]):
            torch.default_generator.manual_seed(row)  # torch.manual_seed would seed the accelerators too
            random.seed(row)
            np.random.seed(row % 2**32)
            return self.dataset[row % len(self.dataset)]


@dataclass(frozen=True)
class Form:
    """How a batch of a data set is made up: what the model takes, and what is kept beside it.

    Args:
        inputs: Keys of what the model takes, for samples that are dicts.
        kind: Type of a batch: ``list``, ``dict`` or ``Tensor``.
        rest: How the rest is nested: a nest of numbers in the places of its tensors.
    """

    inputs: tuple[str, ...]
    kind: type
    rest: Any

    @staticmethod
    def of(batch: Any, inputs: Sequence[str] | None) -> Form:
        """Return the form of a batch.

        Raises:
            OptionError: if it is not clear what the model takes, or something is neither tensor nor number.
        """
        if isinstance(batch, dict) and (not inputs or not set(inputs) < set(batch)):
            raise OptionError(
                f"cache_features(): inputs: found {inputs!r}, expected the keys that the model takes, of "
                f"{sorted(batch)!r}. Nothing was written. Write inputs=[{sorted(batch)[0]!r}]."
            )
        kind = dict if isinstance(batch, dict) else list if isinstance(batch, (tuple, list)) else Tensor
        form = Form(tuple(inputs or ()), kind, ())
        taken, rest = form._split(batch)
        for leaf in (*tree_flatten(taken)[0], *tree_flatten(rest)[0]):
            if not isinstance(leaf, Tensor):
                raise OptionError(
                    f"cache_features(): dataset: found {type(leaf).__name__} in a batch, expected tensors and numbers. "
                    "Nothing was written. Leave it out, and look it up by the number of the row."
                )
        places = itertools.count()
        return Form(form.inputs, kind, tree_map(lambda _: next(places), rest))

    def split(self, batch: Any) -> tuple[Any, list[Tensor]]:
        """Return what the model takes, and the tensors beside it."""
        inputs, rest = self._split(batch)
        return inputs, tree_flatten(rest)[0]

    def join(self, features: Any, rest: list[Tensor]) -> Any:
        """Return a batch with features in place of what the model takes."""
        beside: Any = rest if self.rest == tuple(range(len(rest))) else tree_map(rest.__getitem__, self.rest)
        if self.kind is dict:
            return {"features": features, **beside}
        return features if self.kind is Tensor else [features, *beside]

    def _split(self, batch: Any) -> tuple[Any, Any]:
        if self.kind is dict:
            taken = {key: batch[key] for key in self.inputs}
            return taken, {key: value for key, value in batch.items() if key not in taken}
        return (batch, ()) if self.kind is Tensor else (batch[0], tuple(batch[1:]))


def read(dataset: Any, batches: Sequence[Sequence[int]], workers: int = 0) -> Iterator[Any]:
    """Yield the collated samples of each of these lists or ranges of rows."""
    if type(dataset) is TensorDataset:  # whose rows need not be put together one by one
        return ([_rows(tensor, rows) for tensor in dataset.tensors] for rows in batches)
    return iter(DataLoader(dataset, batch_sampler=[list(rows) for rows in batches], num_workers=workers))


def _rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Return a copy of some rows: a layer may work in place on what it is given."""
    return tensor[rows.start : rows.stop].clone() if isinstance(rows, range) else tensor[rows]


def first(dataset: Any, count: int, start: int = 0) -> Any:
    """Return a collated batch of samples from the beginning on; those of a small data set come again."""
    return default_collate([dataset[(start + row) % len(dataset)] for row in range(count)])


def to_device(values: Any, device: torch.device) -> Any:
    """Move all tensors of a nest."""
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, values)


class Content:
    """The digest of what was read, whatever the size of the batches.

    Example:
        >>> one, two = Content(), Content()
        >>> one.add(torch.arange(6))
        >>> two.add(torch.arange(2))
        >>> two.add(torch.arange(2, 6))
        >>> one.digest() == two.digest()
        True
    """

    def __init__(self) -> None:
        self._columns: list[Any] = []

    def add(self, batch: Any) -> None:
        """Take a batch in."""
        leaves = tree_flatten(batch)[0]
        while len(self._columns) < len(leaves):
            leaf = leaves[len(self._columns)]
            self._columns.append(hashlib.sha256(f"{leaf.dtype}{tuple(leaf.shape[1:])}".encode()))
        for column, leaf in zip(self._columns, leaves, strict=True):
            column.update(content_of(leaf))

    def digest(self) -> str:
        """Return the digest of all that was added, in hexadecimal."""
        return hashlib.sha256(b"".join(column.digest() for column in self._columns)).hexdigest()


def content_of(tensor: Tensor) -> Any:
    """Return the bytes of a tensor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def check_fixed(dataset: Any, *, is_drawn: bool) -> None:
    """Make sure that a sample is the same whenever it is read.

    Raises:
        OptionError: if two reads of a sample differ, or if a read draws random numbers.
    """
    if type(dataset) is TensorDataset:  # tensors are looked up by number, and nothing else
        return
    total = len(dataset)
    for row in sorted({place * total // PROBED for place in range(PROBED)}):
        before = _generators()
        pair = [tree_flatten(dataset[row])[0] for _ in range(2)]
        moved = _generators() != before
        differ = any(not _equal(one, two) for one, two in zip(*pair, strict=True))
        if differ and is_drawn:
            raise OptionError(
                f"cache_features(): dataset: found two draws of row {row} that differ although the generators of "
                "torch, numpy and Python started from the same seed, expected the same. Nothing was written. "
                "Let its augmentation draw from torch's default generator."
            )
        if differ or moved:
            found = "two reads of it that differ" if differ else "random numbers drawn while it is read"
            raise OptionError(
                f"cache_features(): dataset: row {row}: found {found}, expected the same sample each time: what is "
                "cached is computed once, and random augmentation would end. Nothing was written. Write views=8 to "
                "cache eight draws of each sample, or augment the features."
            )


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, (Tensor, np.ndarray)):
        first, second = torch.as_tensor(one), torch.as_tensor(two)
        return first.shape == second.shape and bytes(content_of(first)) == bytes(content_of(second))
    return bool(one == two) or (one != one and two != two)


def _generators() -> tuple[bytes, Any, bytes]:
    legacy: Any = np.random.get_state()
    return bytes(content_of(torch.get_rng_state())), random.getstate(), legacy[1].tobytes() + bytes([legacy[2] % 256])

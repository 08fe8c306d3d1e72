"""Batches for replicas: each replica sees all rows once an epoch, in an order of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from ..errors import OptionError

_OPTIONS = ("num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor")
_MORE_OPTIONS = ("persistent_workers", "in_order")


class ReplicaLoader:
    """Load a batch for each replica, stacked along a new first axis, for ``batches="separate"``.

    The order of replica i in an epoch depends on the seed, i and the epoch only: not on how many replicas there are,
    nor on what else draws random numbers. As with a plain loader, each ``for`` begins a new epoch; only the first one
    after `load_state_dict` goes on within one.

    Args:
        data: A data set with a length, or a `DataLoader` of one, whose batch size, collate function, workers and
            other options are taken over.
        n: Replicas.
        batch_size: Rows a replica; by default that of the loader.
        seed: Of the orders; a whole number from 0 on.
        drop_last: Leave out a last batch that is smaller; by default as the loader does, else no.

    Raises:
        OptionError: if an argument cannot be used, the data has no length, or the loader samples in a way of its own.

    Example:
        >>> loader = ReplicaLoader(TensorDataset(torch.arange(6.0)), n=2, batch_size=3)
        >>> batches = [x for (x,) in loader]
        >>> [tuple(x.shape) for x in batches]
        [(2, 3), (2, 3)]
        >>> torch.cat(batches, 1).sort(1).values.tolist()
        [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]
    """

    def __init__(
        self,
        data: Dataset[Any] | DataLoader[Any],
        n: int,
        *,
        batch_size: int | None = None,
        seed: int = 0,
        drop_last: bool | None = None,
    ) -> None:
        loader = data if isinstance(data, DataLoader) else None
        self.dataset: Any = data.dataset if isinstance(data, DataLoader) else data
        _check(self.dataset, loader, seed)
        self.n = n
        self.batch_size = _batch_size(loader, batch_size)
        self.seed = seed
        self.drop_last = bool(loader and loader.drop_last) if drop_last is None else drop_last
        self.epoch = 0
        self.step = 0  # batches of this epoch that were given out
        self._is_resumed = False
        collate = default_collate if loader is None else loader.collate_fn
        self._is_indexed = type(self.dataset) is TensorDataset and collate is default_collate
        options = {name: getattr(loader, name) for name in (*_OPTIONS, *_MORE_OPTIONS) if loader is not None}
        # a generator of its own, because loaders draw the seed of their workers from the one of torch otherwise
        self._generator = torch.Generator()
        self._loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_sampler=_Rows(self),
            collate_fn=_ForEach(collate, n),
            generator=self._generator,
            **options,
        )

    def __len__(self) -> int:
        """Return the batches of one epoch."""
        rows = len(self.dataset)
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of an epoch; after a resume those that are left of it."""
        if not self._is_resumed and self.step:
            self.epoch, self.step = self.epoch + 1, 0  # the last one was broken off
        self._is_resumed = False
        self._generator.manual_seed(_seed(self.seed, self.epoch, self.n))
        for batch in self._at_once() if self._is_indexed else self._loader:
            self.step += 1
            yield batch
        self.epoch, self.step = self.epoch + 1, 0

    def order(self, i: int) -> Tensor:
        """Return the rows in the order in which replica ``i`` sees them in this epoch."""
        generator = torch.Generator().manual_seed(_seed(self.seed, self.epoch, i))
        return torch.randperm(len(self.dataset), generator=generator)

    def rows(self) -> Iterator[Tensor]:
        """Yield the rows of each batch that is left of this epoch, ``(n, batch)``."""
        orders = torch.stack([self.order(i) for i in range(self.n)])
        for step in range(self.step, len(self)):
            yield orders[:, step * self.batch_size : (step + 1) * self.batch_size]

    def state_dict(self) -> dict[str, int]:
        """Return what a resumed run needs: where it is, and in which orders."""
        return {"seed": self.seed, "epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on after the batch at which the state was taken."""
        self.seed, self.epoch, self.step = state["seed"], state["epoch"], state["step"]
        self._is_resumed = True

    def _at_once(self) -> Iterator[list[Tensor]]:
        """Yield the batches of tensors by one index each, not row by row."""
        for rows in self.rows():
            yield [tensor[rows] for tensor in self.dataset.tensors]


class _Rows:
    """The rows of all replicas of each batch, behind each other, as a loader wants them."""

    def __init__(self, loader: ReplicaLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[list[int]]:
        return (rows.flatten().tolist() for rows in self.loader.rows())


class _ForEach:
    """Collates the samples of each replica, then stacks the batches; a class, because workers may be spawned."""

    def __init__(self, collate: Callable[[list[Any]], Any], n: int) -> None:
        self.collate = collate
        self.n = n

    def __call__(self, samples: list[Any]) -> Any:
        size = len(samples) // self.n
        batches = [self.collate(samples[i * size : (i + 1) * size]) for i in range(self.n)]
        return tree_map(_stacked, *(dict(batch) if isinstance(batch, Mapping) else batch for batch in batches))


def _stacked(*parts: Any) -> Any:
    """Stack tensors; of anything else return the list, one a replica."""
    if not isinstance(parts[0], Tensor):
        return list(parts)
    shapes = {tuple(part.shape) for part in parts}
    if len(shapes) > 1:
        raise OptionError(
            f"ReplicaLoader(): data: found batches of shapes {sorted(shapes)} at one step, expected one shape for all "
            "replicas. Pad to a fixed length in collate_fn."
        )
    return torch.stack(parts)


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def _batch_size(loader: DataLoader[Any] | None, batch_size: int | None) -> int:
    size = loader.batch_size if batch_size is None and loader is not None else batch_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise OptionError(
            f"ReplicaLoader(): batch_size: found {size!r}, expected a whole number from 1 on. Write batch_size=32."
        )
    return size


def _check(dataset: Any, loader: DataLoader[Any] | None, seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise OptionError(f"ReplicaLoader(): seed: found {seed!r}, expected a whole number from 0 on. Write seed=0.")
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise OptionError(
            f"ReplicaLoader(): data: found {type(dataset).__name__}, expected a data set with a length, whose rows can "
            "be had in any order. Write TensorDataset(x, y), or stack batches of your own: torch.stack([x0, x1, ...])."
        )
    if loader is not None and not _is_plain(loader):
        name = type(loader.sampler if type(loader.batch_sampler) is BatchSampler else loader.batch_sampler).__name__
        raise OptionError(
            f"ReplicaLoader(): data: found a loader that samples by {name}, expected one that gives each row once an "
            "epoch. Write ReplicaLoader(loader.dataset, n, batch_size=32)."
        )


def _is_plain(loader: DataLoader[Any]) -> bool:
    if type(loader.batch_sampler) is not BatchSampler:
        return False
    sampler: Any = loader.sampler
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return type(sampler) is SequentialSampler

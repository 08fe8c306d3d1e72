"""Compute the features of a data set once, and prove on every opening that they still hold."""

from __future__ import annotations

import itertools
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from ...errors import OptionError, StaleCacheError
from ...measures import largest
from ...untouched import same_random_state
from ..freeze import Trunk
from .cut import in_evaluation
from .features import Features
from .find import find_cut
from .key import difference, key_of
from .prove import check_rows, proven_head
from .samples import Content, Draws, Form, check_fixed, first, read, to_device
from .store import (
    MANIFEST,
    Column,
    Manifest,
    Rows,
    ShardWriter,
    clean,
    damaged,
    load_manifest,
    new_manifest,
    save_manifest,
)

CANARIES = 8  # rows that are computed again whenever a cache is opened


def to_stderr(line: str) -> None:
    """Write a line to standard error."""
    sys.stderr.write(f"{line}\n")


def cache_features(
    trunk: Trunk | nn.Module,
    dataset: Any,
    folder: str | Path,
    *,
    inputs: Sequence[str] | None = None,
    batch_size: int = 256,
    views: int | None = None,
    fingerprint: str | None = None,
    max_bytes: int | None = None,
    dtype: torch.dtype | None = None,
    workers: int = 0,
    rebuild: bool = False,
    tell: Callable[[str], object] = to_stderr,
) -> Features:
    """Compute what the frozen layers of a model hand over, once for each sample, and read it from then on.

    Finds where the frozen part ends, also where skips cross the border, and stores what crosses it, with the labels.
    Training ``features.head`` on the rows is training the model on the samples, without the cost of the frozen part.
    What lies in the folder is used only if it is proven: checksums of every byte; digests of weights, buffers and
    settings below the cut; the content of every sample; and some rows computed again. A run that was killed goes on
    where it ended, shard by shard. Several processes may call this for one folder: one computes, the others wait.

    Args:
        trunk: What `freeze_to` returned, or a model with frozen layers.
        dataset: Has ``len`` and reads samples by number: tensors, or tuples or dicts of tensors and numbers. The model
            takes the first of a tuple; the rest is kept beside the features. Nothing is read from it later.
        folder: Is made if it is not there.
        inputs: If samples are dicts, the keys that the model takes.
        batch_size: Rows that go through the frozen part at once. With that of your training the features have the bits
            that it would compute, on a CPU and with float32; otherwise they agree to rounding.
        views: With random augmentation, how many draws of each sample are cached.
        fingerprint: A name for this content of the data set. Without it every sample is read again and compared when
            a cache is opened; with it only some, and a change of the others is yours to name.
        max_bytes: The most that may be written.
        dtype: Store floating numbers as this, such as ``torch.float16``: smaller, and no longer exact.
        workers: Processes that read samples.
        rebuild: Compute anew whatever is there.
        tell: Gets lines about size and time.

    Returns:
        A data set of features, with ``head`` and ``loader``.

    Raises:
        OptionError: if the data is random, nothing is frozen, or there is no room.
        StaleCacheError: if the cache in the folder was computed from other weights, data or settings.

    Cost: once, one pass of the frozen part. On opening, one read of the cache and one of the data set (not with a
    fingerprint), and the frozen part for a few rows.

    Source: Ours.

    Example:
        >>> import tempfile, unvanish
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> data = torch.utils.data.TensorDataset(torch.randn(10, 3), torch.arange(10))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     features = cache_features(unvanish.freeze_to(model, -1), data, folder, tell=lambda line: None)
        ...     for x, y in features.loader(5):
        ...         assert torch.equal(features.head(x), model(data[y][0]))
        ...     x.shape
        torch.Size([5, 4])
    """
    model: nn.Module = trunk.model if isinstance(trunk, Trunk) else trunk
    model = getattr(model, "_orig_mod", model)  # what torch.compile was given
    samples = _check_options(model, dataset, views=views, batch_size=batch_size, dtype=dtype)
    path = Path(folder)
    with same_random_state([model]):
        check_fixed(samples, is_drawn=views is not None)
        plan = _Plan(model, samples, inputs, batch_size, workers, tell)
        columns = plan.columns(dtype)
        key = key_of(plan.cut, plan.example, rows=len(dataset), views=views, fingerprint=fingerprint)
        path.mkdir(parents=True, exist_ok=True)
        with _only_writer(path, tell):
            manifest = None if rebuild else _usable(path, key, columns, plan, has_name=fingerprint is not None)
            is_new = manifest is None
            if manifest is None:
                manifest = new_manifest(key, columns, len(samples), batch_size)
            if manifest.missing:
                _check_room(path, manifest, max_bytes, tell)
            if is_new:
                (path / MANIFEST).unlink(missing_ok=True)
            clean(path, manifest)
            if manifest.missing:
                manifest = plan.fill(path, manifest)
    return Features(Rows(path, manifest), plan.form, plan.head, len(plan.cut.needed))


class _Plan:
    """How rows are computed from samples."""

    def __init__(
        self,
        model: nn.Module,
        samples: Any,
        inputs: Sequence[str] | None,
        batch_size: int,
        workers: int,
        tell: Callable[[str], object],
    ) -> None:
        self.samples, self.batch_size, self.workers, self.tell = samples, batch_size, workers, tell
        self.device = next(model.parameters()).device
        batch = first(samples, 4)
        self.form = Form.of(batch, inputs)
        self.example, rest = self._split(batch)
        self.cut = find_cut(model, self.example)
        other, _ = self._split(first(samples, 3, start=4))  # another number of rows
        self.rows = [*check_rows(self.cut, self.example), *rest]
        self.head = proven_head(self.cut, other)

    def _split(self, batch: Any) -> tuple[Any, list[Tensor]]:
        inputs, rest = self.form.split(batch)
        return to_device(inputs, self.device), rest

    def compute(self, batch: Any, *, as_is: bool = False) -> list[Tensor]:
        """Return all columns of a batch; of a model that is in evaluation mode, as it is."""
        inputs, rest = self._split(batch)
        return [*self.cut.features(inputs, as_is=as_is), *rest]

    def columns(self, dtype: torch.dtype | None) -> list[Column]:
        """Return the columns of a row."""
        kinds = [tensor.dtype for tensor in self.rows]
        stored = [
            dtype if dtype and kind.is_floating_point and place < len(self.cut.needed) else kind
            for place, kind in enumerate(kinds)
        ]
        return [
            Column(tuple(t.shape[1:]), *pair)
            for t, pair in zip(self.rows, zip(kinds, stored, strict=True), strict=True)
        ]

    def fill(self, folder: Path, manifest: Manifest) -> Manifest:
        """Compute the shards that are missing; each is in the manifest when it is on the disk."""
        began, count = time.monotonic(), 0
        for number, batches in self._read(manifest, manifest.missing):
            content = Content()
            with ShardWriter(folder, manifest, number) as writer, in_evaluation(self.cut.model):
                for batch in batches:
                    content.add(batch)
                    columns = self.compute(batch, as_is=True)
                    _check_range(manifest.columns, columns)
                    writer.add(columns)
                    count += len(columns[0])
                manifest = manifest.with_shard(number, writer.finish(content.digest()))
            save_manifest(folder, manifest)
        self.tell(f"cache_features(): {count:,} rows computed and written in {time.monotonic() - began:.1f} s")
        return manifest

    def changed_samples(self, manifest: Manifest) -> list[int]:
        """Return the shards whose samples are not those that it was computed from."""
        changed = []
        for number, batches in self._read(manifest, sorted(manifest.shards)):
            content = Content()
            for batch in batches:
                content.add(batch)
            if content.digest() != manifest.shards[number].content:
                changed.append(number)
        return changed

    def _read(self, manifest: Manifest, numbers: Sequence[int]) -> Iterator[tuple[int, Iterator[Any]]]:
        """Yield each shard with the batches of its samples; read them to the end before the next."""
        parts = [
            (number, [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)])
            for number in numbers
            for rows in (manifest.rows_of(number),)
        ]
        batches = read(self.samples, [rows for _, chunks in parts for rows in chunks], self.workers)
        for number, chunks in parts:
            yield number, itertools.islice(batches, len(chunks))

    def wrong_canary(self, folder: Path, manifest: Manifest) -> int | None:
        """Compute some rows again; return the number of one that does not agree with what is stored."""
        there = [row for number in manifest.shards for row in manifest.rows_of(number)]
        rows = random.SystemRandom().sample(there, min(CANARIES, len(there)))
        stored = Rows(folder, manifest).gather(rows)
        fresh = self.compute(next(read(self.samples, [rows])))
        for place, (old, new) in enumerate(zip(stored, fresh, strict=True)):
            tolerance = _tolerance(manifest.columns[place]) if place < len(self.cut.needed) else 0.0
            for row, one, other in zip(rows, old, new.cpu(), strict=True):
                atol = tolerance * largest(other) if tolerance else 0.0
                if not torch.allclose(one, other, rtol=0.0, atol=atol, equal_nan=True):
                    return row
        return None


def _usable(
    folder: Path, key: dict[str, Any], columns: list[Column], plan: _Plan, *, has_name: bool
) -> Manifest | None:
    """Return what may be used of the cache in a folder; None if there is none.

    Raises:
        StaleCacheError: if it was computed from something else.
    """
    manifest = load_manifest(folder)
    if manifest is None:
        return None
    differs = difference(key, manifest.key)
    if differs is None and list(manifest.columns) != columns:
        was, now = (str([str(column.stored) for column in each]) for each in (manifest.columns, columns))
        differs = ("dtype", was, now)
    if differs is not None:
        part, was, now = differs
        raise _stale(folder, f"{part}: found {now}, expected {was}, with which it was computed.")
    torn = damaged(folder, manifest)
    if torn:
        plan.tell(f"cache_features(): {len(torn)} damaged shards of {len(manifest.shards)} are computed again")
        manifest = manifest.without(torn)
    if not manifest.shards:
        return manifest
    changed = [] if has_name else plan.changed_samples(manifest)
    if changed:
        rows = manifest.rows_of(changed[0])
        raise _stale(
            folder, f"dataset: found other samples among rows {rows[0]} to {rows[-1]}, expected those of the cache."
        )
    wrong = plan.wrong_canary(folder, manifest)
    if wrong is not None:
        raise _stale(
            folder, f"row {wrong}: found other features when it was computed again, expected those of the cache."
        )
    return manifest


def _stale(folder: Path, what: str) -> StaleCacheError:
    return StaleCacheError(
        f"cache_features(): {what} The cache was not used. Call cache_features(trunk, dataset, {str(folder)!r}, "
        "rebuild=True) if the change was meant, or name another folder."
    )


def _check_options(
    model: nn.Module, dataset: Any, *, views: int | None, batch_size: int, dtype: torch.dtype | None
) -> Any:
    """Return the samples to be cached.

    Raises:
        OptionError: if an argument cannot be used.
    """
    if not isinstance(model, nn.Module) or next(model.parameters(), None) is None:
        raise OptionError(
            f"cache_features(): trunk: found {type(model).__name__}, expected a module with frozen parameters. "
            "Write cache_features(unvanish.freeze_to(model, -1), dataset, 'features/')."
        )
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) or not len(dataset):
        raise OptionError(
            f"cache_features(): dataset: found {type(dataset).__name__}, expected samples that are read by number. "
            "Give the data set itself, not its loader; for tensors TensorDataset(x, y)."
        )
    for name, number in (("views", 1 if views is None else views), ("batch_size", batch_size)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise OptionError(f"cache_features(): {name}: found {number!r}, expected a whole number from 1 on.")
    if dtype is not None and dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise OptionError(
            f"cache_features(): dtype: found {dtype!r}, expected a floating type. Write dtype=torch.float16."
        )
    return dataset if views is None else Draws(dataset, views)


def _tolerance(column: Column) -> float:
    """Return how far a row may be from one that is computed in another batch, as a share of its largest number."""
    if not column.dtype.is_floating_point:
        return 0.0
    return min(1000 * torch.finfo(column.dtype).eps, 0.05) + 2 * torch.finfo(column.stored).eps


def _check_range(columns: Sequence[Column], tensors: Sequence[Tensor]) -> None:
    for column, tensor in zip(columns, tensors, strict=True):
        if column.stored != column.dtype and bool((tensor.abs() > torch.finfo(column.stored).max).any()):
            raise OptionError(
                f"cache_features(): dtype: found features up to {float(tensor.abs().max()):.3g}, expected at most "
                f"{torch.finfo(column.stored).max:.3g} for {column.stored}. Write dtype=torch.bfloat16, or none."
            )


def _check_room(folder: Path, manifest: Manifest, max_bytes: int | None, tell: Callable[[str], object]) -> None:
    """Say how much will be written, before anything is.

    Raises:
        OptionError: if that is more than is allowed or than there is room for.
    """
    share = sum(len(manifest.rows_of(number)) for number in manifest.missing) / manifest.rows
    needed, free = int(manifest.data_bytes * share), shutil.disk_usage(folder).free
    tell(
        f"cache_features(): {manifest.rows:,} rows, {needed / 1e6:,.1f} MB to be written to {str(folder)!r}, "
        f"{free / 1e6:,.0f} MB free"
    )
    if max_bytes is not None and manifest.data_bytes > max_bytes:
        raise OptionError(
            f"cache_features(): max_bytes: found {max_bytes:,}, expected at least the {manifest.data_bytes:,} bytes of "
            "the features. Nothing was written. Allow more, store them with dtype=torch.float16, or cut at a layer "
            "with a smaller output."
        )
    if needed > free:
        raise OptionError(
            f"cache_features(): folder: found {free:,} bytes of free space, expected {needed:,}. Nothing was written. "
            "Name a folder on another disk, or store less with dtype=torch.float16."
        )


@contextmanager
def _only_writer(folder: Path, tell: Callable[[str], object]) -> Iterator[None]:
    """Hold the lock of a folder; say so when another process has it. It ends with the process that holds it."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tell("cache_features(): another process computes these features; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()

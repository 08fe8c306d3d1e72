"""Rows on disk: shards with checksums, a manifest that is written after them, one writer at a time."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

MANIFEST = "manifest.json"
_OURS = re.compile(r"[0-9a-f]{8}-\d{5}\.\d+\.npy(\.new)?|manifest\.json\.new")
_CHUNK = 1 << 20
SHARD_BYTES = 16 << 20  # what a kill can cost, unless the cache is so large that there would be many files
MOST_SHARDS = 32  # a shuffled batch reads from all of them


@dataclass(frozen=True)
class Column:
    """What one tensor of a row looks like.

    Args:
        shape: Of a row.
        dtype: As it is given out.
        stored: As it lies on the disk; another one loses digits.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Return the size of a row on disk."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.stored.itemsize

    def to_json(self) -> list[Any]:
        """Return what `from_json` takes."""
        return [list(self.shape), str(self.dtype), str(self.stored)]

    @staticmethod
    def from_json(value: Any) -> Column:
        """Return the column that `to_json` has described."""
        shape, dtype, stored = value
        kinds = [getattr(torch, kind.removeprefix("torch.")) for kind in (dtype, stored)]
        return Column(tuple(shape), kinds[0], kinds[1])


@dataclass(frozen=True)
class Shard:
    """Some consecutive rows, one file for each column.

    Args:
        rows: How many.
        files: Their names.
        checksums: SHA-256 of each file.
        content: Digest of the samples that the rows were computed from.
    """

    rows: int
    files: tuple[str, ...]
    checksums: tuple[str, ...]
    content: str


@dataclass(frozen=True)
class Manifest:
    """What lies in a folder, and what it was computed from.

    Args:
        key: What the rows depend on.
        build: Part of the names of all files, so that a new cache never has the files of an old one.
        columns: Those of a row.
        rows: In all.
        shard_rows: Rows of each shard but the last.
        shards: By number; those that are missing are not yet computed.
        facts: How it was computed: for people.
    """

    key: dict[str, Any]
    build: str
    columns: tuple[Column, ...]
    rows: int
    shard_rows: int
    shards: dict[int, Shard]
    facts: dict[str, Any]

    @property
    def missing(self) -> list[int]:
        """Return the numbers of shards that are not there."""
        return [number for number in range(-(-self.rows // self.shard_rows)) if number not in self.shards]

    @property
    def data_bytes(self) -> int:
        """Return the size of all rows."""
        return self.rows * sum(column.row_bytes for column in self.columns)

    def rows_of(self, number: int) -> range:
        """Return the rows of a shard."""
        return range(number * self.shard_rows, min((number + 1) * self.shard_rows, self.rows))

    def with_shard(self, number: int, shard: Shard) -> Manifest:
        """Return a manifest that has this shard too."""
        return replace(self, shards={**self.shards, number: shard})

    def without(self, numbers: Sequence[int]) -> Manifest:
        """Return a manifest that lacks these shards."""
        return replace(self, shards={n: shard for n, shard in self.shards.items() if n not in numbers})


def new_manifest(key: dict[str, Any], columns: Sequence[Column], rows: int, batch_size: int) -> Manifest:
    """Return the manifest of a cache without rows."""
    row_bytes = max(sum(column.row_bytes for column in columns), 1)
    wanted = max(SHARD_BYTES, row_bytes * rows // MOST_SHARDS) // row_bytes
    shard_rows = max(round(wanted / batch_size), 1) * batch_size  # so that a shard begins where a batch does
    return Manifest(key, secrets.token_hex(4), tuple(columns), rows, shard_rows, {}, {})


def load_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder; None if there is none or it is damaged."""
    try:
        document = json.loads((folder / MANIFEST).read_bytes())
        body = document["body"]
        if document["sha256"] != _checksum_of(body):
            return None
        return Manifest(
            body["key"], body["build"], tuple(map(Column.from_json, body["columns"])), body["rows"],
            body["shard_rows"],
            {
                int(number): Shard(rows, tuple(files), tuple(checksums), content)
                for number, (rows, files, checksums, content) in body["shards"].items()
            },
            body["facts"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest of a folder, whole or not at all."""
    body = {
        "key": manifest.key,
        "build": manifest.build,
        "columns": [column.to_json() for column in manifest.columns],
        "rows": manifest.rows,
        "shard_rows": manifest.shard_rows,
        "shards": {str(n): [s.rows, s.files, s.checksums, s.content] for n, s in manifest.shards.items()},
        "facts": manifest.facts,
    }
    text = json.dumps({"sha256": _checksum_of(body), "body": body}, indent=1)
    new = folder / f"{MANIFEST}.new"
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(folder / MANIFEST)
    _sync_folder(folder)


def clean(folder: Path, manifest: Manifest | None) -> None:
    """Remove files of ours that the manifest does not name: torn or stale ones."""
    named = {name for shard in manifest.shards.values() for name in shard.files} if manifest else set()
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in named:
            path.unlink()


def damaged(folder: Path, manifest: Manifest) -> list[int]:
    """Return the numbers of shards whose files are not what was written."""
    return [
        number
        for number, shard in manifest.shards.items()
        if shard.rows != len(manifest.rows_of(number))
        or any(_file_checksum(folder / name) != sum_ for name, sum_ in zip(shard.files, shard.checksums, strict=True))
    ]


class ShardWriter:
    """Writes the files of one shard under other names; they get their names when all is on the disk.

    Use it in a ``with``: if the block fails, nothing is left.
    """

    def __init__(self, folder: Path, manifest: Manifest, number: int) -> None:
        self._folder, self._columns = folder, manifest.columns
        self._rows = len(manifest.rows_of(number))
        self._names = [f"{manifest.build}-{number:05d}.{place}.npy" for place in range(len(manifest.columns))]
        self._files: list[BinaryIO] = []
        self._sums: list[Any] = []
        self._written = 0

    def __enter__(self) -> ShardWriter:
        try:
            for place, (name, column) in enumerate(zip(self._names, self._columns, strict=True)):
                self._files.append((self._folder / f"{name}.new").open("wb"))
                self._sums.append(hashlib.sha256())
                self._write(place, _header((self._rows, *column.shape), column.stored))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            with contextlib.suppress(OSError):  # a full disk fails once more here
                file.close()
        for name in self._names:
            (self._folder / f"{name}.new").unlink(missing_ok=True)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Write some rows of all columns."""
        for place, (tensor, column) in enumerate(zip(tensors, self._columns, strict=True)):
            rows = tensor.detach().to("cpu", column.stored).contiguous()
            self._write(place, np.ascontiguousarray(_bits(rows)).reshape(-1).view(np.uint8).data)
        self._written += len(tensors[0])

    def finish(self, content: str) -> Shard:
        """Give the files their names and return what belongs into the manifest."""
        if self._written != self._rows:
            raise RuntimeError(f"{self._written} rows were computed, {self._rows} belong into the shard")
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for name in self._names:
            (self._folder / f"{name}.new").replace(self._folder / name)
        _sync_folder(self._folder)
        return Shard(self._rows, tuple(self._names), tuple(s.hexdigest() for s in self._sums), content)

    def _write(self, place: int, data: Any) -> None:
        self._sums[place].update(data)
        self._files[place].write(data)


class Rows:
    """The rows of a complete cache, read from memory maps; in another process they are opened anew."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._maps: list[dict[int, Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": None}  # a pickled memory map would carry its content

    def gather(self, rows: Sequence[int] | np.ndarray) -> list[Tensor]:
        """Return these rows of each column, copied."""
        if self._maps is None:
            self._maps = [self._open(place) for place in range(len(self.manifest.columns))]
        wanted = np.asarray(rows, dtype=np.int64)
        size = self.manifest.shard_rows
        numbers = wanted // size
        is_one = size >= self.manifest.rows
        parts = [] if is_one else [(int(n), np.nonzero(numbers == n)[0]) for n in np.unique(numbers)]
        found = []
        for column, maps in zip(self.manifest.columns, self._maps, strict=True):
            values = maps[0][wanted] if is_one else np.empty((len(wanted), *column.shape), _kind(column.stored))
            for number, places in parts:
                values[places] = maps[number][wanted[places] - number * size]
            found.append(_from_bits(values, column.stored).to(column.dtype))
        return found

    def _open(self, place: int) -> dict[int, Any]:
        # a plain array over the map: the class of memory maps makes each access slower
        return {
            number: np.asarray(np.load(self.folder / shard.files[place], mmap_mode="r", allow_pickle=False))
            for number, shard in self.manifest.shards.items()
        }


def _bits(tensor: Tensor) -> Any:
    """Return an array of a tensor; numpy has no bfloat16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _kind(dtype: torch.dtype) -> Any:
    return _bits(torch.empty(0, dtype=dtype)).dtype


def _header(shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": _kind(dtype).str, "fortran_order": False, "shape": shape})
    return header.getvalue()


def _from_bits(values: Any, dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor


def _checksum_of(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _file_checksum(path: Path) -> str:
    total = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for chunk in _chunks(file):
                total.update(chunk)
    except OSError:
        return ""
    return total.hexdigest()


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


def _sync_folder(folder: Path) -> None:
    """Make sure that a new name outlives a power cut."""
    if os.name == "nt":  # where a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

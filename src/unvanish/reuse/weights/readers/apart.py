"""Formats whose libraries parse in C, read in a process of its own: on damaged files they may hang or crash.

A few bytes flipped in a file of Keras made HDF5 loop for ever, and a folder of orbax that declares a large chunk made
tensorstore end its process: see `tests/test_weights_hostile.py` and `tests/test_weights_orbax.py`. The process has
limits of time and memory; `dump` is what runs in it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from torch import Tensor

from .guard import MOST_LEVELS, Budget, natural, refused, tensor_of

_SCRIPT = Path(__file__).with_name("dump.py")
_SECONDS = 5  # of computing; a file of some megabytes takes less than one, most of it the start
_BYTES_A_SECOND = 10_000_000
_LONGEST_DOCUMENT = 1 << 28

Form = Literal["hdf5", "orbax"]


@dataclass(frozen=True)
class Entry:
    """A group or an array of a file, as plain data.

    Args:
        texts: Attributes that are texts.
        entries: Of a group, numbers in names sorted by size.
        array: Of an array.
    """

    texts: Mapping[str, list[str]]
    entries: Mapping[str, Entry]
    array: Tensor | None = None

    def text(self, name: str) -> list[str]:
        """Return an attribute of texts, also one that was cut in numbered parts; empty if there is none."""
        if name in self.texts:
            return self.texts[name]
        found: list[str] = []
        number = 0
        while f"{name}{number}" in self.texts:
            found += self.texts[f"{name}{number}"]
            number += 1
        return found

    def find(self, path: str) -> Entry:
        """Return what stands under a path.

        Raises:
            ValueError: if nothing does.
        """
        here = self
        for part in path.split("/"):
            if part not in ("", "."):
                if part not in here.entries:
                    raise ValueError(f"no entry {path!r}, which the file's own list names")
                here = here.entries[part]
        return here

    def arrays(self) -> list[Tensor]:
        """Return the arrays that stand in a group, in their order."""
        return [entry.array for entry in self.entries.values() if entry.array is not None]


def read_tree(form: Form, source: Path | bytes, budget: Budget) -> Entry:
    """Return all groups and arrays of a file or folder, or of a file that was read from an archive.

    Raises:
        WeightsError: if it asks for what it may not, is damaged, or takes too long.
    """
    content = source if isinstance(source, bytes) else None
    seconds = _SECONDS + (budget.size if content is None else len(content)) // _BYTES_A_SECOND
    given = "-" if content is not None else str(source)
    process = subprocess.Popen(
        [sys.executable, "-P", str(_SCRIPT), form, given, json.dumps(limits(budget)), str(seconds)],
        stdin=subprocess.DEVNULL if content is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_environment(),
    )
    guard = threading.Timer(20 * seconds, process.kill)  # where the time of computing cannot be limited
    guard.start()
    try:
        assert process.stdout is not None
        if content is not None and process.stdin is not None:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(content)
        return received(process.stdout, budget)
    except _EndedEarlyError as error:
        found = f"damaged content (the library for {form} did not finish, {process.wait()})"
        raise refused(budget.file, found, "a file as its framework writes it", "Save it anew") from error
    finally:
        guard.cancel()
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def limits(budget: Budget) -> dict[str, int]:
    """Return what the process may take."""
    return {"entries": budget.entries_left, "size": budget.bytes_left, "levels": MOST_LEVELS}


class _EndedEarlyError(Exception):
    """The process wrote less than it said."""


def received(stream: IO[bytes], budget: Budget) -> Entry:
    """Build the tree that the process wrote."""
    _exactly(stream, 1)  # the first part is a document
    return _entry(_document(stream, budget)["tree"], stream, budget)


def _document(stream: IO[bytes], budget: Budget) -> dict[str, Any]:
    """Return what the process says, unless it says why it cannot go on."""
    length = int.from_bytes(_exactly(stream, 8), "little")
    if length > _LONGEST_DOCUMENT:
        raise _EndedEarlyError
    document: dict[str, Any] = json.loads(_exactly(stream, length))
    if "refused" in document:
        raise refused(budget.file, *document["refused"])
    if "damaged" in document:
        raise ValueError(document["damaged"])
    return document


def _entry(tree: Mapping[str, Any], stream: IO[bytes], budget: Budget) -> Entry:
    """Build the tree; arrays stand in the stream in the order in which the tree names them."""
    budget.entries()
    texts = {str(name): list(map(str, values)) for name, values in tree["texts"].items()}
    if "entries" in tree:
        found = {name: _entry(inner, stream, budget) for name, inner in tree["entries"].items()}
        return Entry(texts, {name: found[name] for name in sorted(found, key=natural)})
    dtype, shape = np.dtype(tree["dtype"]), tuple(tree["shape"])
    array = np.frombuffer(_bytes(stream, math.prod(shape) * dtype.itemsize, budget), dtype).reshape(shape)
    is_marked = texts.get("dtype") == ["bfloat16"]  # so Keras marks what HDF5 has no type for
    return Entry(texts, {}, tensor_of(array, "bfloat16" if is_marked else ""))


def _bytes(stream: IO[bytes], size: int, budget: Budget) -> bytes:
    """Return the bytes of an array."""
    budget.bytes(size)
    if _exactly(stream, 1) == b"d":
        _document(stream, budget)
    if int.from_bytes(_exactly(stream, 8), "little") != size:
        raise _EndedEarlyError
    return _exactly(stream, size)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) != size:
        raise _EndedEarlyError
    return content


def _environment() -> dict[str, str]:
    """Return an environment in which the same packages are found, and no plugins of HDF5."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "HDF5_PLUGIN_PRELOAD": "::"}

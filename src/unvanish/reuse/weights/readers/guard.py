"""What a file may ask for: so many entries, so many bytes for each byte that it has, so many levels."""

from __future__ import annotations

import importlib
import os
import re
import stat
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ....errors import WeightsError

MOST_ENTRIES = 100_000  # a network in one file has hundreds to some thousands
MOST_LEVELS = 64
# Weights hardly compress: float32 drawn from a continuous law keep over 80 % of their size. Zeros of a fresh bias
# or optimiser do, so a hundredfold is allowed, and a megabyte to any file.
RATIO = 100
FREE_BYTES = 1 << 20


class Budget:
    """Counts what a reader takes of a file.

    Args:
        file: Named in errors.
        size: Bytes of the file, or of all files of a folder.
    """

    def __init__(self, file: Path, size: int) -> None:
        self.file = file
        self.size = size
        self.bytes_left = RATIO * size + FREE_BYTES
        self.entries_left = MOST_ENTRIES

    @classmethod
    def of(cls, path: Path) -> Budget:
        """Return the budget of a file or of a folder of files."""
        if not path.is_dir():
            return cls(path, path.stat().st_size)
        counted, size = cls(path, 0), 0
        for here, folders, files in os.walk(path):
            counted.entries(len(folders) + len(files))
            for name in (*folders, *files):
                status = (Path(here) / name).lstat()
                if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                    raise refused(path, f"{name!r}, a link or a device", "files", "Do not trust this folder")
                size += status.st_size if stat.S_ISREG(status.st_mode) else 0
        return cls(path, size)

    def entries(self, count: int = 1) -> None:
        """Take entries: arrays, groups, nodes."""
        self.entries_left -= count
        if self.entries_left < 0:
            raise refused(self.file, "too many entries", f"at most {MOST_ENTRIES:,}", "Save the weights alone")

    def bytes(self, count: int) -> None:
        """Take bytes before they are read."""
        self.bytes_left -= count
        if count < 0 or self.bytes_left < 0:
            raise refused(
                self.file,
                "arrays that declare far more than the file stores",
                f"at most {RATIO} times its size",
                "Do not trust this file",
            )

    def level(self, depth: int) -> None:
        """Check how deep a part is nested."""
        if depth > MOST_LEVELS:
            raise refused(self.file, "parts nested too deeply", f"at most {MOST_LEVELS} levels", "Save it anew")


def refused(file: Path, found: str, expected: str, advice: str) -> WeightsError:
    """Return the error that a file cannot be read, in its four parts."""
    return WeightsError(f"load_weights(): file {str(file)!r}: found {found}, expected {expected}. {advice}.")


def extra(module: str, name: str, file: Path) -> ModuleType:
    """Import what an extra brings.

    Raises:
        WeightsError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise WeightsError(
            f"load_weights(): file {str(file)!r}: found no {module!r} to read it with, expected it to be installed. "
            f"Write: pip install 'unvanish[{name}]'"
        ) from error


def tensor_of(array: Any, dtype: str = "") -> Tensor:
    """Return a tensor with the bytes of an array of numpy; bfloat16 comes as its bits."""
    import numpy as np

    name = dtype or str(array.dtype)
    if name == "bfloat16":
        bits = np.frombuffer(np.ascontiguousarray(array).tobytes(), dtype=np.int16)
        return torch.from_numpy(bits.reshape(array.shape).copy()).view(torch.bfloat16)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"an array of type {array.dtype}")
    native = array.astype(array.dtype.newbyteorder("="), copy=True, order="C")
    return torch.from_numpy(native)


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers by their size.

    Example:
        >>> sorted(["dense_10", "dense_2", "dense"], key=natural)
        ['dense', 'dense_2', 'dense_10']
    """
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d{1,18})", name)]

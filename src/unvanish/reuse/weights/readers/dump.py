"""Run in a process of its own: check what a library written in C parses, and write what lies in it to standard output.

Written are parts, each after its kind and length: a document, then the bytes of all arrays in their order; where an
array cannot be read, a document that says so. `dump_hdf5` and `dump_orbax` read the formats. None of these files
imports anything of its package: they start in a fraction of a second, without torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

_MEMORY = 4 << 30  # addresses, of which most are never used

Source = str | bytes
Content = Iterator[Any]  # a tree that names all arrays, then the bytes of each


class RefusedError(Exception):
    """What was found, what was expected, what to do."""


class Allowance:
    """Counts what a reader takes.

    Args:
        entries: Groups, arrays and texts allowed.
        size: Bytes of arrays allowed.
        levels: Of groups in groups.
    """

    def __init__(self, entries: int, size: int, levels: int) -> None:
        self._entries, self._size, self._levels = entries, size, levels

    def entries(self, count: int) -> None:
        """Take entries."""
        self._entries -= count
        if self._entries < 0:
            raise RefusedError("too many entries", "fewer", "Save the weights alone")

    def bytes(self, count: int) -> None:
        """Take bytes before they are read."""
        self._size -= count
        if self._size < 0:
            raise self.distrust("arrays that declare far more than the file stores", "about its size")

    def level(self, depth: int) -> None:
        """Check how deep a part is nested."""
        if depth > self._levels:
            raise RefusedError("parts nested too deeply", f"at most {self._levels} levels", "Save it anew")

    def distrust(self, found: str, expected: str) -> RefusedError:
        """Return the error for what no framework writes."""
        return RefusedError(found, expected, "Do not trust this file")


def main(form: str, source: Source, limits: dict[str, int], output: BinaryIO) -> None:
    """Write what lies in a file or folder."""
    try:
        content = _reader(form)(source, Allowance(**limits))
        _write(output, {"tree": next(content)})
        for array in content:
            _part(output, b"a", array)
    except RefusedError as error:
        _write(output, {"refused": error.args})
    except Exception as error:  # the libraries raise whatever they meet in a damaged file
        _write(output, {"damaged": f"{type(error).__name__}: {error}"[:300]})


def _reader(form: str) -> Callable[[Source, Allowance], Content]:
    """Return `read` of the file beside this one: run as a script, this one is in no package."""
    spec = importlib.util.spec_from_file_location(form, Path(__file__).with_name(f"dump_{form}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    read: Callable[[Source, Allowance], Content] = module.read
    return read


def _write(output: BinaryIO, document: dict[str, Any]) -> None:
    _part(output, b"d", json.dumps(document).encode())


def _part(output: BinaryIO, kind: bytes, content: bytes) -> None:
    output.write(kind + len(content).to_bytes(8, "little"))
    output.write(content)


def limit(seconds: int, size: int) -> None:
    """Let the system end this process when it computes for longer, or takes far more memory than the arrays need."""
    try:
        import resource
    except ImportError:  # not every system can; the parent has a clock
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY + 2 * size, _MEMORY + 2 * size))


if __name__ == "__main__":
    allowed = json.loads(sys.argv[3])
    limit(int(sys.argv[4]), allowed["size"])
    main(sys.argv[1], sys.stdin.buffer.read() if sys.argv[2] == "-" else sys.argv[2], allowed, sys.stdout.buffer)

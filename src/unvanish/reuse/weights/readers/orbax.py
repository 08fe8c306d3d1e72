"""Folders that orbax wrote, read with tensorstore alone, in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..foreign import Family, Foreign
from . import apart
from .flax_tree import foreign_of
from .guard import Budget, extra, refused


def read_orbax(path: Path, budget: Budget, part: str, layout: Family | None) -> Foreign:
    """Read the arrays of a checkpoint of orbax."""
    extra("tensorstore", "orbax", path)
    if not (path / "_METADATA").is_file():
        inner = [entry for entry in path.iterdir() if (entry / "_METADATA").is_file()]
        if len(inner) != 1:
            raise refused(path, "no '_METADATA' in it", "a folder as orbax writes it", "Name the folder of one step")
        path = inner[0]
    return foreign_of(path, "orbax", _tree(apart.read_tree("orbax", path, budget)), part, layout)


def _tree(entry: apart.Entry) -> dict[str, Any]:
    return {name: _tree(inner) if inner.array is None else inner.array for name, inner in entry.entries.items()}

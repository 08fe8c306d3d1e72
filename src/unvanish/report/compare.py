"""Runs side by side."""

from __future__ import annotations

from collections.abc import Sequence

from ..records import Findings, Recording
from .ink import Ink


def compare_text(runs: Sequence[tuple[str, Recording, Findings]], ink: Ink) -> str:
    """Return runs side by side."""
    return ink.render(*[name for name, _, _ in runs])

"""Functions of torch that are wrapped for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Wraps:
    """Wraps functions, and takes its wrappers off again; others may wrap them meanwhile."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Put what ``make`` returns for a function in its place, until `undo`.

        Args:
            owner: The module or class that has the function.
            name: Its name there.
            make: Returns a wrapper, with ``__wrapped__`` as `functools.wraps` sets it.
        """
        original = getattr(owner, name)
        ours = make(original)
        setattr(owner, name, ours)

        def undo() -> None:
            ours.is_left = True
            if getattr(owner, name) is ours:  # else someone wrapped it later; ours only passes on by then
                inner = original
                while getattr(inner, "is_left", False):  # another watch, left before this one
                    inner = inner.__wrapped__
                setattr(owner, name, inner)

        self._undo.append(undo)

    def undo(self) -> None:
        """Put everything back, the last one first."""
        for undo in reversed(self._undo):
            undo()
        self._undo = []

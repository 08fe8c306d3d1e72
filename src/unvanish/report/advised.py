"""Advice as text: one sentence, and the lines to paste."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from .ink import plain


def advised(advice: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield what an advice of the JSON document says."""
    yield Text.assemble(("advice: ", "bold cyan"), f"{plain(advice['why'])} {plain(advice['source'])}")
    for line in advice["code"].splitlines():
        yield Padding(Text(plain(line), style="cyan"), (0, 0, 0, 2))

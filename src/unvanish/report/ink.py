"""What a stream can show: its width, its colours, its characters; and small bars.

Names of layers come from other people's code: they are shown as text only, never as markup or as
commands to the terminal.
"""

from __future__ import annotations

import io
import math
import os
import re
import shutil
from dataclasses import dataclass
from typing import IO

from rich.console import Console, RenderableType

MAX_WIDTH = 110  # wider lines are hard to read
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_PLAIN = str.maketrans(
    {
        "█": "#",
        "─": "-",
        "✖": "X",
        "▲": "!",
        "●": "i",
        "✔": "+",
        "·": "|",
        "–": "-",
        "—": "-",
        "−": "-",
        "→": ">",
        "←": "<",
        "…": "~",
        "×": "x",
        "÷": "/",
        "≤": "<=",
        "≥": ">=",
        "≈": "~",
        "’": "'",
        "é": "e",
    }
)


@dataclass(frozen=True, slots=True)
class Ink:
    """What a stream can show.

    Args:
        width: In columns.
        has_colour: Styles may be used.
        has_blocks: Block characters can be encoded.
        encoding: Of the stream.
    """

    width: int = 80
    has_colour: bool = False
    has_blocks: bool = True
    encoding: str = "utf-8"

    @classmethod
    def of(cls, stream: IO[str], *, is_colour_wanted: bool = True) -> Ink:
        """Ask a stream, and the environment, what can be shown.

        Example:
            >>> Ink.of(io.StringIO()).has_colour
            False
        """
        encoding = getattr(stream, "encoding", None) or "utf-8"
        is_terminal = bool(getattr(stream, "isatty", bool)())
        width = shutil.get_terminal_size((80, 24)).columns if is_terminal else _columns()
        is_forced = bool(os.environ.get("FORCE_COLOR"))
        is_refused = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        return cls(
            width=max(40, min(width, MAX_WIDTH)),
            has_colour=is_colour_wanted and not is_refused and (is_terminal or is_forced),
            has_blocks=_can_encode("█▏✖▲✔●·→…─", encoding),
            encoding=encoding,
        )

    def render(self, *parts: RenderableType) -> str:
        """Return the parts as text that the stream can hold."""
        buffer = io.StringIO()
        console = Console(
            file=buffer,
            width=self.width,
            force_terminal=self.has_colour,
            color_system="standard" if self.has_colour else None,
            highlight=False,
            markup=False,
            emoji=False,
            legacy_windows=False,
        )
        for part in parts:
            console.print(part)
        text = re.sub(r"[ ]+$", "", buffer.getvalue(), flags=re.MULTILINE)
        if not self.has_blocks:
            text = text.translate(_PLAIN)
        return text.encode(self.encoding, "backslashreplace").decode(self.encoding)

    def bar(self, share: float, width: int) -> str:
        """Draw a share of 0 to 1; a share above 0 shows at least a sliver.

        Example:
            >>> Ink().bar(0.5, 4), Ink(has_blocks=False).bar(0.5, 4)
            ('██  ', '##..')
        """
        if not math.isfinite(share):
            return " " * width
        share = min(max(share, 0.0), 1.0)
        if not self.has_blocks:
            full = max(round(share * width), 1 if share > 0 else 0)
            return "#" * full + "." * (width - full)
        eighths = max(round(share * width * 8), 1 if share > 0 else 0)
        full, rest = divmod(eighths, 8)
        return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def _columns() -> int:
    """Return the width that the environment asks for, where there is no terminal to ask."""
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdigit() and int(columns) > 0 else 80


def _can_encode(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def plain(text: object) -> str:
    r"""Return text without any character that could command a terminal.

    Example:
        >>> plain("net\x1b[31m.0\n")
        'net\\x1b[31m.0\\n'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shorten(text: str, width: int) -> str:
    """Fit a dotted name: abbreviate its parts from the left, then cut the middle out.

    Example:
        >>> shorten("encoder.layers.11.attention.out", 24)
        'e.l.11.attention.out'
        >>> shorten("AVeryLongClassName", 9)
        'AVer…Name'
    """
    parts = text.split(".")
    for place, part in enumerate(parts[:-1]):
        if len(".".join(parts)) <= width:
            break
        parts[place] = part if part.isdigit() else part[:1]
    text = ".".join(parts)
    if len(text) <= width:
        return text
    left = (width - 1) // 2
    return f"{text[:left]}…{text[len(text) - (width - 1 - left) :]}"


def number(value: float | None) -> str:
    """Write a number in at most seven characters; a dash where there is none.

    Example:
        >>> number(0.00012), number(12.5), number(None), number(float("inf")), number(3e-11)
        ('1.2e-4', '12.5', '–', 'inf', '3.0e-11')
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    if 1e-2 <= abs(value) < 1e4:
        text = f"{value:.3g}"
        return f"{value:.0f}" if "e" in text else text
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"

"""How fast the layers of coupled replicas learn, and by what, as a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rich.text import Text

from ..records import Findings
from .ink import Ink, number, plain, shorten
from .table import MAX_ROWS, UPDATE_DECADES, fold, value

_COLUMNS = (
    ("centre", "centre_ratio"),
    ("optimiser", "step_ratio"),
    ("pull", "pull_ratio"),
    ("cosine", "pull_alignment"),
    ("spread", "spread_ratio"),
)
_NUMBER = 9
_BAR = 8


def speed_table(findings: Findings, ink: Ink) -> Iterator[Text]:
    """Draw one line a layer; nothing for a run without a watched coupling."""
    rows = [row for row in findings.layers if "learning_speed" in row]
    if not rows:
        return
    fixed = 4 + _BAR + len(_COLUMNS) * (_NUMBER + 1)
    name = max(8, min(max(len(plain(row["name"])) for row in rows), ink.width - fixed))
    heads = "".join(f" {head:>{_NUMBER}}" for head, _ in _COLUMNS)
    yield Text(f"  {'learning':{name}}  {'':{_BAR}}{heads}", style="bold")
    shown = fold([False] * len(rows), MAX_ROWS)
    for place in shown:
        yield _line(rows[place], name, ink)
    words = (
        "From one pull to the next, over the weights. centre: the way of the mean, which is all that replicas learn "
        "together (bar: half = 1e-3); optimiser and pull: the ways of the replicas, and the cosine between them; "
        "spread: their distance to the mean."
    )
    if len(shown) < len(rows):
        words = f"{len(shown)} of {len(rows)} layers are shown; all are in the JSON document. {words}"
    yield Text(words, style="dim")


def _line(row: Mapping[str, Any], width: int, ink: Ink) -> Text:
    speeds = row["learning_speed"]
    centre = value(speeds, "centre_ratio")
    low, high = UPDATE_DECADES
    share = max((math.log10(centre) - low) / (high - low), 1e-9) if centre > 0 else math.nan
    text = Text(no_wrap=True, overflow="crop")
    text.append(f"  {shorten(plain(row['name']), width):{width}}  ")
    text.append(ink.bar(share, _BAR), "blue")
    for _, key in _COLUMNS:
        text.append(f" {number(value(speeds, key)):>{_NUMBER}}")
    return text

"""The layers of a run as a table with small bars, from input to output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from ..records import SEVERITIES, Findings
from .ink import Ink, number, plain, shorten

MAX_ROWS = 40
SIGNS = {"critical": "✖", "warning": "▲", "info": "●"}
STYLES = {"critical": "bold red", "warning": "yellow", "info": "cyan"}
GRADIENT_DECADES = 6.0  # below the largest gradient; what is smaller shows no bar worth the name
UPDATE_DECADES = (-6.0, 0.0)  # 1e-3, the customary ratio, fills half of the bar
_SHARE_BAR, _SHARE_WORDS = 4, 9
_NUMBER = 7

LayerRow = Mapping[str, Any]


def severities(findings: Findings) -> dict[str, str]:
    """Return the worst severity of every layer that has a finding."""
    worst: dict[str, str] = {}
    for finding in sorted(findings, key=lambda f: SEVERITIES.index(f.severity), reverse=True):
        for name in (finding.layer, *finding.layers):
            if name:
                worst[name] = finding.severity
    return worst


def layer_table(findings: Findings, ink: Ink) -> Iterator[Text]:
    """Draw one line a layer: gradient, update ratio, dead or saturated share."""
    rows = findings.layers
    if not rows:
        return
    marks = severities(findings)
    columns = _Columns(rows, ink)
    yield columns.heading()
    shown = fold([str(row["name"]) in marks for row in rows])
    for index in shown:
        yield columns.line(rows[index], marks.get(str(rows[index]["name"]), ""))
    yield _legend(len(rows), len(shown), has_updates=columns.has_updates)


def fold(is_marked: Sequence[bool], limit: int = MAX_ROWS) -> list[int]:
    """Choose the rows to show: first, last, those with findings, and others evenly spread.

    Example:
        >>> fold([False] * 8 + [True, False], limit=4)
        [0, 4, 8, 9]
    """
    count = len(is_marked)
    if count <= limit:
        return list(range(count))
    shown = {0, count - 1}
    marked = [index for index in range(count) if is_marked[index] and index not in shown]
    shown.update(_spread(marked, limit - len(shown)))
    others = [index for index in range(count) if index not in shown]
    shown.update(_spread(others, limit - len(shown)))
    return sorted(shown)


def _spread(items: Sequence[int], count: int) -> list[int]:
    """Return at most ``count`` items, evenly spread."""
    if len(items) <= count:
        return list(items)
    return [items[int((k + 0.5) * len(items) / count)] for k in range(count)]


def _legend(count: int, shown: int, *, has_updates: bool) -> Text:
    words = "Bars are logarithmic. gradient: full = the largest, empty = a millionth of it. "
    if has_updates:
        words += "update/weight: half = 1e-3 a step, the usual size."
    if shown < count:
        words = f"{shown} of {count} layers are shown; all are in the JSON document. {words}"
    return Text(words, style="dim")


def value(row: LayerRow, key: str) -> float:
    """Return a number of a layer; nan where it is missing."""
    found = row.get(key)
    return math.nan if found is None else float(found)


def gradient_share(grad: float, largest: float) -> float:
    """Return how much of its bar a gradient fills, on a logarithmic scale below the largest.

    Example:
        >>> gradient_share(1e-3, 1.0), gradient_share(1.0, 1.0)
        (0.5, 1.0)
    """
    if not (grad > 0 and largest > 0):
        return math.nan
    share = 1 + math.log10(min(grad, largest) / largest) / GRADIENT_DECADES
    return max(share, 1e-9)


class _Columns:
    """The widths that fit these layers into this stream."""

    def __init__(self, rows: Sequence[LayerRow], ink: Ink) -> None:
        self.ink = ink
        finite = [v for v in (value(row, "grad_rms") for row in rows) if math.isfinite(v)]
        self.largest = max(finite, default=math.nan)
        self.has_shares = any(_share(row)[0] >= 0.005 for row in rows)
        self.has_updates = any(math.isfinite(value(row, "update_ratio")) for row in rows)
        longest = max(len(plain(row["name"])) for row in rows)
        self.kind = min(max(max(len(plain(row["kind"])) for row in rows), 4), 11)
        fixed = 2 + 1 + self.kind + (1 + self.has_updates) * (2 + 1 + _NUMBER)
        fixed += (2 + _SHARE_BAR + 1 + _SHARE_WORDS) if self.has_shares else 0
        free = ink.width - fixed
        self.name = max(8, min(max(longest, 5), free - 14, 44))
        bars = max(free - self.name, 8)
        self.update = min(bars * 2 // 5, 12) if self.has_updates else 0
        self.grad = min(bars - self.update, 16)

    def heading(self) -> Text:
        grad, update = self.grad + 1 + _NUMBER, self.update + 1 + _NUMBER
        line = f"  {'layer':{self.name}} {'kind':{self.kind}}  {'gradient':{grad}}"
        if self.has_updates:
            line += f"  {'update/weight':{update}}"
        if self.has_shares:
            line += "  dead/saturated"
        return Text(line, style="bold")

    def line(self, row: LayerRow, severity: str) -> Text:
        style = STYLES.get(severity, "")
        is_trained = row.get("is_trainable", True) and row.get("is_optimised", True)
        text = Text(no_wrap=True, overflow="crop")
        text.append(f"{SIGNS.get(severity, ' ')} ", style)
        text.append(f"{shorten(plain(row['name']), self.name):{self.name}} ", style)
        text.append(f"{plain(row['kind'])[: self.kind]:{self.kind}}  ", "dim")
        self._gradient(text, row, style)
        if self.has_updates:
            self._update(text, row, style, is_trained=bool(is_trained))
        if self.has_shares:
            self._shares(text, row, style)
        return text

    def _gradient(self, text: Text, row: LayerRow, style: str) -> None:
        grad = value(row, "grad_rms")
        text.append(self.ink.bar(gradient_share(grad, self.largest), self.grad), style or "blue")
        text.append(f" {number(grad):>{_NUMBER}}")

    def _update(self, text: Text, row: LayerRow, style: str, *, is_trained: bool) -> None:
        ratio = value(row, "update_ratio")
        if not is_trained:
            word = "frozen" if not row.get("is_trainable", True) else "not trained"
            if not row.get("parameters", 1):
                word = ""
            text.append(f"  {word:>{self.update + 1 + _NUMBER}}", "dim")
            return
        low, high = UPDATE_DECADES
        share = math.nan
        if ratio > 0 and math.isfinite(ratio):
            share = max((math.log10(ratio) - low) / (high - low), 1e-9)
        text.append("  " + self.ink.bar(share, self.update), style or "blue")
        text.append(f" {number(ratio):>{_NUMBER}}")

    def _shares(self, text: Text, row: LayerRow, style: str) -> None:
        share, word = _share(row)
        if share >= 0.005:
            text.append("  " + self.ink.bar(share, _SHARE_BAR), style or "magenta")
            text.append(f" {share * 100:>3.0f}% {word}")


def _share(row: LayerRow) -> tuple[float, str]:
    """Return the larger of the dead and the saturated share, and which it is."""
    dead, saturated = value(row, "dead_share"), value(row, "saturated_share")
    dead, saturated = (0.0 if math.isnan(v) else v for v in (dead, saturated))
    return (dead, "dead") if dead >= saturated else (saturated, "sat.")

"""Runs side by side: verdicts, losses, and the layers of equal name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import RenderableType
from rich.text import Text

from ..records import SCHEMA_VERSION, SEVERITIES, Findings, Recording, finite
from ..version import VERSION
from .ink import Ink, number, plain, shorten
from .table import SIGNS, STYLES, LayerRow, fold, gradient_share, severities, value
from .text import duration, loss_ends, optimizer_name

_LABEL = 10
_NUMBER = 7
_CELL = 2 * _NUMBER + 1  # the numbers of one run: gradient and update ratio
_SIGN = 4  # the place of a finding's sign before them
_NAME = 14


class RunView(NamedTuple):
    """One of the runs that are compared."""

    name: str
    recording: Recording
    findings: Findings
    extra: Mapping[str, str] = {}  # further rows of the summary


def compare_text(runs: Sequence[RunView], ink: Ink) -> str:
    """Return runs side by side; more than fit stand below each other, as many at a time as fit."""
    fitting = max((ink.width - _NAME) // (_CELL + _SIGN), 2)
    size = math.ceil(len(runs) / math.ceil(len(runs) / fitting))
    groups = [runs[start : start + size] for start in range(0, len(runs), size)]
    return "\n".join(ink.render(*_group(group, ink)) for group in groups)


def compare_document(runs: Sequence[RunView]) -> dict[str, Any]:
    """Return the comparison as plain values: each run's document, with the ends of its loss."""
    documents = []
    for run in runs:
        start, end = _ends(run) or (math.nan, math.nan)
        document = run.findings.to_dict()
        documents.append({"name": run.name, "loss_start": finite(start), "loss_end": finite(end), **document})
    return {"schema_version": SCHEMA_VERSION, "unvanish": VERSION, "runs": documents}


def _group(runs: Sequence[RunView], ink: Ink) -> Iterator[RenderableType]:
    yield from _summary(runs, ink)
    yield ""
    yield from _layers(runs, ink)


def _ends(run: RunView) -> tuple[float, float] | None:
    traces = run.recording.traces
    return loss_ends(traces[0].losses) if traces else None


def _summary(runs: Sequence[RunView], ink: Ink) -> Iterator[Text]:
    width = (ink.width - _LABEL) // len(runs) - 2
    rows: list[tuple[str, list[tuple[str, str]]]] = [
        ("", [(plain(run.name), "bold") for run in runs]),
        ("verdict", [_verdict(run.findings) for run in runs]),
        ("loss", [(_loss(run), "") for run in runs]),
        ("optimizer", [(_optimizers(run), "") for run in runs]),
        ("steps", [(_steps(run.findings), "") for run in runs]),
    ]
    for label in dict.fromkeys(label for run in runs for label in run.extra):
        rows.append((plain(label), [(plain(run.extra.get(label, "–")), "bold") for run in runs]))
    most = max(len(run.findings) for run in runs)
    for place in range(most):
        cells = [_illness(run.findings, place) for run in runs]
        rows.append(("findings" if place == 0 else "", cells))
    for label, cells in rows:
        line = Text(no_wrap=True, overflow="crop")
        line.append(f"{label:{_LABEL}}", "dim")
        for text, style in cells:
            line.append(f"  {_cut(text, width):{width}}", style)
        yield line
        if not label and cells is rows[0][1]:
            yield Text("─" * ink.width, style="dim")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _verdict(findings: Findings) -> tuple[str, str]:
    if not findings.findings:
        return ("✔ clean", "green") if findings.verdict == "clean" else ("? inconclusive", "yellow")
    worst = min(findings, key=lambda f: SEVERITIES.index(f.severity)).severity
    count = sum(f.severity == worst for f in findings)
    return f"{SIGNS[worst]} {count} {worst}", STYLES[worst]


def _illness(findings: Findings, place: int) -> tuple[str, str]:
    if place >= len(findings):
        return "", ""
    finding = findings[place]
    return f"{SIGNS[finding.severity]} {plain(finding.illness)}", STYLES[finding.severity]


def _loss(run: RunView) -> str:
    ends = _ends(run)
    return "–" if ends is None else f"{number(ends[0])} → {number(ends[1])}"


def _optimizers(run: RunView) -> str:
    return plain(", ".join(optimizer_name(trace) for trace in run.recording.traces[:2])) or "–"


def _steps(findings: Findings) -> str:
    seconds = findings.run.get("seconds")
    steps = str(findings.run.get("steps", 0))
    return steps if seconds is None else f"{steps} in {duration(float(seconds))}"


def _layers(runs: Sequence[RunView], ink: Ink) -> Iterator[Text]:
    tables = [{str(row["name"]): row for row in run.findings.layers} for run in runs]
    every = dict.fromkeys(name for table in tables for name in table)
    names = [name for name in every if sum(name in table for table in tables) > 1 or len(runs) == 1]
    if not names:
        yield Text("No two of these runs have a layer of the same name.", style="dim")
        return
    marks = [severities(run.findings) for run in runs]
    longest = max(max(len(plain(name)) for name in names), 5)
    room = (ink.width - min(longest, 24)) // len(runs) - _CELL - _SIGN - 1
    bar = min(room, 16) if room >= 3 else 0
    width = min(longest, ink.width - len(runs) * (_SIGN + _CELL + (bar + 1 if bar else 0)))
    yield _heading(len(runs), width, bar)
    largest = [max((v for r in t.values() if (v := value(r, "grad_rms")) < math.inf), default=math.nan) for t in tables]
    shown = fold([any(name in mark for mark in marks) for name in names])
    for name in (names[place] for place in shown):
        line = Text(f"{shorten(plain(name), width):{width}}", no_wrap=True, overflow="crop")
        for table, mark, top in zip(tables, marks, largest, strict=True):
            _cell(line, table.get(name), mark.get(name, ""), top, ink, bar)
        yield line
    words = "gradient: full = the largest of its run, empty = a millionth of it. upd/w: update/weight a step."
    yield Text(words if len(shown) == len(names) else f"{len(shown)} of {len(names)} layers. {words}", style="dim")


def _heading(count: int, width: int, bar: int) -> Text:
    grad = f"{'gradient':{bar + 1 + _NUMBER}}" if bar else f"{'grad':>{_NUMBER}}"
    cell = " " * _SIGN + f"{grad} {'upd/w':>{_NUMBER}}"
    return Text(f"{'layer':{width}}" + cell * count, style="bold", no_wrap=True, overflow="crop")


def _cell(line: Text, row: LayerRow | None, severity: str, largest: float, ink: Ink, bar: int) -> None:
    """Add one run's numbers of one layer; the sign of a finding stands before them."""
    style = STYLES.get(severity, "")
    line.append(f"  {SIGNS.get(severity, ' ')} ", style)
    grad, ratio = (math.nan, math.nan) if row is None else (value(row, "grad_rms"), value(row, "update_ratio"))
    if bar:
        line.append(ink.bar(gradient_share(grad, largest), bar) + " ", style or "blue")
    line.append(f"{number(grad):>{_NUMBER}} {number(ratio):>{_NUMBER}}")

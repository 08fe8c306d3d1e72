"""Findings as text for a terminal or a pipe: header, layers, illnesses, verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..records import SEVERITIES, Finding, Findings, Recording, Trace
from ..terrain import Landscape
from .advised import advised
from .ink import Ink, number, plain, shorten
from .remedies import in_words
from .speeds import speed_table
from .table import SIGNS, STYLES, layer_table

_LABEL = 9
_MAX_NUMBERS = 6


def report_text(
    findings: Findings, ink: Ink, recording: Recording | None = None, landscape: Landscape | None = None
) -> str:
    """Return the whole report of a run.

    Args:
        findings: The diagnosis.
        ink: What the stream can show.
        recording: Adds the optimisers and the course of the loss to the header.
        landscape: Adds a section on how the minima of replicas lie to each other.
    """
    return ink.render(*_parts(findings, ink, recording, landscape))


def verdict_line(findings: Findings, ink: Ink) -> str:
    """Return the verdict alone, in one line."""
    return ink.render(_verdict(findings, ink.width))


def _parts(
    findings: Findings, ink: Ink, recording: Recording | None, landscape: Landscape | None
) -> Iterator[RenderableType]:
    yield from _header(findings, ink, recording)
    if findings.layers:
        yield ""
        yield from layer_table(findings, ink)
    if any("learning_speed" in row for row in findings.layers):
        yield ""
        yield from speed_table(findings, ink)
    for finding in sorted(findings, key=lambda f: SEVERITIES.index(f.severity)):
        yield ""
        yield from _finding(finding, is_check=_is_check(findings))
    failures = _failures(findings.run)
    if failures or findings.notes:
        yield ""
    for note in failures:
        yield Padding(Text(plain(note), style="yellow"), (0, 0, 0, 2))
    for note in findings.notes:
        yield _paragraph(plain(note))
    for advice in findings.advice:
        yield ""
        yield from advised(advice.to_dict())
    if landscape is not None:
        yield ""
        yield landscape
    yield ""
    yield _verdict(findings, ink.width)


def _header(findings: Findings, ink: Ink, recording: Recording | None) -> Iterator[RenderableType]:
    yield Text.assemble(("unvanish", "bold"), "  ", plain(findings.run.get("script", "a training")))
    yield Text("─" * ink.width, style="dim")
    facts = ["before training, one batch"] if _is_check(findings) else _facts(findings.run, recording)
    yield Text(" · ".join(plain(fact) for fact in facts), style="dim")


def _is_check(findings: Findings) -> bool:
    return bool(findings.run.get("kind") == "check")


def _facts(run: Mapping[str, Any], recording: Recording | None) -> list[str]:
    """Return what stepped, how long, how the loss went, and what watching cost."""
    traces = () if recording is None else recording.traces
    facts = [optimizer_name(trace) for trace in traces[:3]]
    if len(traces) > 3:
        facts[-1] += f" and {len(traces) - 3} more"
    seconds, share = run.get("seconds"), run.get("watch_share")
    steps = f"{run.get('steps', 0):,} steps".replace(",", " ")
    facts.append(steps if seconds is None else f"{steps} in {duration(float(seconds))}")
    facts += [course for trace in traces[:1] if (course := loss_course(trace.losses))]
    if share is not None:
        facts.append(f"watching cost {_percent(float(share))}")
    return facts


def optimizer_name(trace: Trace) -> str:
    """Return what stepped, and its learning rate."""
    lr = trace.facts.get("lr")
    return trace.name if lr is None else f"{trace.name} lr {number(float(lr))}"


def loss_course(losses: Any) -> str:
    """Return how the loss went, first to last; single steps are noisy, so medians of the ends.

    Example:
        >>> loss_course([4.0, 4.0, 3.0, 2.0, 1.0, 1.0])
        'loss 4 → 1'
    """
    ends = loss_ends(losses)
    return "" if ends is None else f"loss {number(ends[0])} → {number(ends[1])}"


def loss_ends(losses: Any) -> tuple[float, float] | None:
    """Return the medians of the first and the last twentieth of the losses; None without losses."""
    values = [float(loss) for loss in losses]
    if not values:
        return None
    count = min(max(len(values) // 20, 1), 50)
    return _median(values[:count]), _median(values[-count:])


def _median(values: list[float]) -> float:
    finite = sorted(v for v in values if math.isfinite(v))
    return finite[len(finite) // 2] if finite else math.nan


def _finding(finding: Finding, *, is_check: bool) -> Iterator[RenderableType]:
    style = STYLES[finding.severity]
    parts = [finding.severity, *([where] if (where := _where(finding)) else [])]
    if not is_check:
        parts.append(f"since step {finding.step}")
    if finding.share_of_run < 0.995:
        parts.append(f"{_percent(finding.share_of_run)} of the run")
    head = Text.assemble((plain(finding.illness), style), "  ", " · ".join(parts))
    yield _beside(Text(SIGNS[finding.severity], style), head, 2)
    yield _paragraph(plain(finding.why))
    # a dotted name belongs to an illness that follows; the JSON document has these too
    evidence = [(name, found) for name, found in finding.evidence.items() if "." not in name]
    if evidence:
        numbers = [f"{plain(name)} {number(_float(found))}" for name, found in evidence[:_MAX_NUMBERS]]
        yield _labelled("numbers", ", ".join(numbers) + (", …" if len(evidence) > _MAX_NUMBERS else ""))
    for place, treatment in enumerate(finding.treatments):
        yield _labelled("try" if place == 0 else "or", in_words(plain(treatment)))
    if finding.folded:
        yield _labelled("explains", ", ".join(map(plain, finding.folded)))
    yield _labelled("source", plain(finding.source))


def _where(finding: Finding) -> str:
    name = plain(finding.layer)
    others = len([layer for layer in finding.layers if layer != finding.layer])
    if not name:
        return f"{others} layers" if others else ""
    return f"{name} and {others} more" if others else name


def _float(found: object) -> float | None:
    return float(found) if isinstance(found, (int, float)) else None


def _paragraph(text: str) -> RenderableType:
    return Padding(Text(text), (0, 0, 0, 2))


def _labelled(label: str, text: str) -> RenderableType:
    return _beside(Text(f"  {label}", style="dim"), Text(text), _LABEL + 2)


def _beside(mark: Text, text: Text, width: int) -> RenderableType:
    """Put a mark into the margin of a paragraph."""
    grid = Table.grid(padding=0)
    grid.add_column(width=width, no_wrap=True)
    grid.add_column()
    grid.add_row(mark, text)
    return grid


def _failures(run: Mapping[str, Any]) -> list[str]:
    """Say what went wrong, in the script or with us: the report is then about a part of the run only."""
    found = []
    if run.get("error"):
        found.append(f"The script did not come to its end: {run['error']}")
    if run.get("failure"):
        found.append(f"The watch failed and switched itself off; the training went on unwatched: {run['failure']}")
    if run.get("record_failure"):
        found.append(f"The record could not be written, watching went on in memory: {run['record_failure']}")
    return found


def _verdict(findings: Findings, width: int) -> Text:
    if findings.verdict == "inconclusive" and not findings.at_least("warning"):
        return Text(f"? inconclusive: {_reason(findings)}", style="bold yellow")
    if not findings.findings:
        what = "model before its first step" if _is_check(findings) else "run"
        return Text(f"✔ clean: nothing is wrong with this {what}", style="bold green")
    worst = min(findings, key=lambda f: SEVERITIES.index(f.severity))
    counts = [(sum(f.severity == s for f in findings), s) for s in SEVERITIES]
    named = ", ".join(f"{n} {s}{'s' if s == 'warning' and n > 1 else ''}" for n, s in counts if n)
    words = f"{SIGNS[worst.severity]} {named}: first look at {plain(worst.illness)}"
    if worst.layer:
        words += f" in {shorten(plain(worst.layer), max(width - len(words) - 4, 8))}"
    return Text(words, STYLES[worst.severity])


def _reason(findings: Findings) -> str:
    steps = findings.run.get("steps", 0)
    if not steps:
        return "nothing trained"
    return f"{steps} steps are too few to judge" if steps < 50 else "there is too little to judge by"


def duration(seconds: float) -> str:
    """Write a time span.

    Example:
        >>> duration(4.21), duration(75), duration(7325)
        ('4.2 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _percent(share: float) -> str:
    """Write a share in per cent.

    Example:
        >>> _percent(0.0062), _percent(0.96)
        ('0.62 %', '96 %')
    """
    per_cent = 100 * share
    return f"{per_cent:.0f} %" if per_cent >= 10 else f"{per_cent:.2g} %"

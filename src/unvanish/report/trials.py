"""A search for a cure as text: what was found, what was tried, what holds, and what to do."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .advised import advised
from .ink import Ink, number, plain
from .remedies import in_words
from .table import SIGNS, STYLES

Document = Mapping[str, Any]


def cure_text(document: Document, ink: Ink, command: Sequence[str] = ()) -> str:
    """Return a search for a cure as text.

    Args:
        document: What `cure` found, as in its JSON document.
        ink: What the stream can show.
        command: Script and arguments, for the line that trains the whole script with the winner.
    """
    return ink.render(*_parts(document, ink, command))


def cure_line(document: Document, ink: Ink) -> str:
    """Return what came of the search, in one line."""
    return ink.render(_verdict(document))


def _parts(document: Document, ink: Ink, command: Sequence[str]) -> Iterator[RenderableType]:
    run, budget = document["run"], document["budget"]
    yield Text.assemble(("unvanish cure", "bold"), "  ", plain(run.get("script", "a training")))
    yield Text("─" * ink.width, style="dim")
    yield Text(" · ".join(_facts(document)), style="dim")
    for finding in document["findings"]:
        if finding["severity"] != "info":
            yield _found(finding)
    if document["trials"]:
        yield ""
        yield _table(document)
        yield Text(f"Steps used: {_runs(budget['used'], run)} of {_runs(budget['steps'], run)} runs.", style="dim")
    for note in document["notes"]:
        yield Padding(Text(plain(note), style="yellow"), (0, 0, 0, 2))
    for advice in document["advice"]:
        yield ""
        yield from advised(advice)
    if document["winner"] is not None:
        yield ""
        yield from _what_to_do(document["winner"], command)
    yield ""
    yield _verdict(document)


def _facts(document: Document) -> list[str]:
    name = plain(document["metric"]["name"])
    facts = [f"{document['run'].get('steps', 0):,} steps a run"]
    values = document["baseline"]["values"]
    if values:
        facts.append(f"{name} {number(_level(values[0]))} untreated")
    direction = "more" if document["metric"]["higher_is_better"] else "less"
    return [*facts, f"judged by {direction} {name} after equal steps"]


def _found(finding: Mapping[str, Any]) -> Text:
    sign, style = SIGNS[finding["severity"]], STYLES[finding["severity"]]
    where = f" in {plain(finding['layer'])}" if finding["layer"] else ""
    return Text.assemble((f"{sign} {plain(finding['illness'])}", style), where, ": ", plain(finding["why"]))


def _table(document: Document) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("tried", overflow="fold")
    for name in ("steps", "seeds", plain(document["metric"]["name"]), "untreated"):
        table.add_column(name, justify="right")
    table.add_column("")
    for trial in document["trials"]:
        is_winner = document["winner"] is not None and trial is document["trials"][-1]
        is_start = is_winner and document["winner"]["is_mended"]
        failure = plain(trial["error"] or "")
        outcome = failure or ("verified" if is_winner else trial["stopped"] or _kept(trial))
        style = "green" if is_winner else "red" if failure else "dim" if trial["stopped"] else ""
        spread = trial["values"] if len(trial["values"]) > 1 else []
        level = number(_level(trial["median"])) if trial["values"] else "–"
        level += f" ({number(_least(spread))} to {number(_most(spread))})" if spread else ""
        table.add_row(
            Text(plain(" + ".join(trial["treatments"]))),
            f"{trial['steps']:,}",
            str(len(trial["seeds"])),
            level,
            number(_level(trial["untreated"])) + (" at start" if is_start else ""),
            Text(outcome),
            style=style,
        )
    return table


def _kept(trial: Mapping[str, Any]) -> str:
    return "not verified" if len(trial["seeds"]) > 1 else "kept" if trial["values"] else "not run"


def _level(value: float | None) -> float:
    """Return a level; one that is missing in a document was not finite."""
    return math.inf if value is None else float(value)


def _least(values: Sequence[float | None]) -> float:
    return min(map(_level, values))


def _most(values: Sequence[float | None]) -> float:
    return max(map(_level, values))


def _runs(steps: float, run: Mapping[str, Any]) -> str:
    return f"{steps / max(run.get('steps') or 1, 1):.1f}"


def _what_to_do(winner: Mapping[str, Any], command: Sequence[str]) -> Iterator[RenderableType]:
    for treatment in winner["treatments"]:
        yield Text.assemble(("do ", "dim"), in_words(plain(treatment)))
    if winner["code"]:
        yield Padding(Text(winner["code"], style="cyan"), (0, 0, 0, 4))
    if command:
        options = " ".join(f"--treat {shlex.quote(treatment)}" for treatment in winner["treatments"])
        yield Text.assemble(("or ", "dim"), f"unvanish run {options} {shlex.join(command)}")


def _verdict(document: Document) -> Text:
    winner = document["winner"]
    if document["error"]:
        return Text(f"✖ nothing could be tried: {plain(document['error'])}", style="bold red")
    if winner is not None:
        return Text(_won(document), style="bold green")
    if document["is_interrupted"]:
        return Text("? interrupted: the same command goes on from here", style="bold yellow")
    if not any(finding["severity"] != "info" for finding in document["findings"]):
        return Text("✔ nothing is needed: nothing is wrong with this run", style="bold green")
    return Text("✖ nothing that was tried helped for certain; nothing is recommended", style="bold red")


def _won(document: Document) -> str:
    winner, metric = document["winner"], document["metric"]
    gain, seeds = winner["gain"], len(document["trials"][-1]["seeds"])
    name, named = plain(metric["name"]), plain(" + ".join(winner["treatments"]))
    change = f"{100 * gain:.0f} % {'more' if metric['higher_is_better'] else 'less'} {name}"
    if winner["is_mended"]:
        return (
            f"✔ {named}: the mistake is gone, {change} than at the start on {seeds} fresh seeds (p = {winner['p']:.2g})"
        )
    return f"✔ {named}: {change} than untreated on {seeds} fresh seeds (paired t-test, p = {winner['p']:.2g})"

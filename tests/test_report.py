"""The report: what it shows, and that it fits every stream."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unvanish
from tests.traces import make_trace
from unvanish.output import FailOn, exit_code
from unvanish.records import Finding, Findings, Recording, Severity, Trace
from unvanish.report import Ink, RunView, compare_document, compare_text, report_text, verdict_line
from unvanish.report.ink import number, plain, shorten
from unvanish.report.remedies import REMEDIES, in_words
from unvanish.report.table import fold

HOSTILE = "net\x1b[2J\n[red]\u202e0"


def row(name: str, **measures: Any) -> dict[str, Any]:
    """Return one layer as the diagnosis hands it out."""
    base: dict[str, Any] = {"name": name, "kind": "Linear", "activation": "relu", "parameters": 10, "severity": ""}
    base |= {"grad_rms": 1e-3, "update_ratio": 1e-3, "dead_share": math.nan, "saturated_share": None}
    return base | {"is_trainable": True, "is_optimised": True} | measures


def finding(severity: Severity = "critical", layer: str = "net.0", **more: Any) -> Finding:
    fields: dict[str, Any] = {"evidence": {"grad_rms": 3e-11}, "treatments": ("he-init", "my-own"), "step": 20} | more
    return Finding("vanishing-gradient", severity, "The gradient is 3e-11 there.", "Hochreiter 1991", layer, **fields)


def findings(*found: Finding, layers: tuple[Any, ...] = (), verdict: Any = None, **run: Any) -> Findings:
    facts = {"script": "train.py", "steps": 660, "seconds": 4.2, "watch_share": 0.006} | run
    return Findings(facts, found, layers, verdict or ("findings" if found else "clean"))


def recording(*losses: float) -> Recording:
    trace = Trace(
        "SGD", (), np.zeros(0, np.int64), {}, {}, np.arange(len(losses)), np.array(losses), facts={"lr": 0.02}
    )
    return Recording({}, (trace,))


def test_the_report_says_everything_once() -> None:
    """Header with the cost, the layers, illness, layer, step, reason, numbers, remedies, source; verdict last."""
    found = finding(layers=("net.0", "net.2"), folded=("stagnation",), share_of_run=0.9)
    text = report_text(findings(found, layers=(row("net.0"), row("net.2"))), Ink(width=90), recording(4.0, 2.0))
    lines = text.splitlines()
    assert lines[0] == "unvanish  train.py"
    assert lines[2] == "SGD lr 0.02 · 660 steps in 4.2 s · loss 4 → 2 · watching cost 0.6 %"
    assert "✖ vanishing-gradient  critical · net.0 and 1 more · since step 20 · 90 % of the run" in lines
    assert "  The gradient is 3e-11 there." in lines
    assert "  numbers  grad_rms 3.0e-11" in lines
    assert any(line.startswith("  try      he-init: initialise with") for line in lines)
    assert "  or       my-own" in lines
    assert "  explains stagnation" in lines
    assert "  source   Hochreiter 1991" in lines
    assert lines[-1] == "✖ 1 critical: first look at vanishing-gradient in net.0"


def test_worst_first() -> None:
    """Findings stand in the order of their severity, and each carries its own sign."""
    found = (finding("info"), finding("warning", layer="b"), finding("critical", layer="c"))
    lines = report_text(findings(*found), Ink()).splitlines()
    assert [line[0] for line in lines if "vanishing-gradient  " in line] == ["✖", "▲", "●"]
    assert lines[-1].startswith("✖ 1 critical, 1 warning, 1 info: first look at")


def test_layers_with_findings_are_marked_by_a_sign() -> None:
    """Without any colour the layers of a finding can still be told from the others."""
    lines = report_text(findings(finding(), layers=(row("net.0"), row("net.2"))), Ink()).splitlines()
    assert [line[0] for line in lines if re.match(r". net\.\d", line)] == ["✖", " "]
    coloured = report_text(findings(finding(), layers=(row("net.0"),)), Ink(has_colour=True))
    assert re.search(r"\x1b\[1;31m✖ ", coloured)


def test_bars_are_logarithmic() -> None:
    """A gradient a thousandth of the largest fills half of what the largest fills."""
    rows = (row("a", grad_rms=1e-3), row("b", grad_rms=1.0), row("c", grad_rms=0.0), row("d", grad_rms=math.nan))
    text = report_text(findings(layers=rows), Ink(has_blocks=False))
    bars = [re.findall(r"[#.]{16}", line)[:1] for line in text.splitlines() if re.match(r"  [abcd] ", line)]
    assert [bar[0].count("#") if bar else None for bar in bars] == [8, 16, None, None]


def test_frozen_and_forgotten_layers_are_named() -> None:
    """A layer that is not trained says so in place of its update; dead units get their share."""
    rows = (row("a", is_trainable=False), row("b", is_optimised=False), row("c", dead_share=0.87))
    text = report_text(findings(layers=rows), Ink())
    assert re.search(r"^  a .* frozen$", text, re.MULTILINE)
    assert re.search(r"^  b .* not trained$", text, re.MULTILINE)
    assert re.search(r"^  c .* 87% dead$", text, re.MULTILINE)


@pytest.mark.parametrize("width", [40, 60, 80, 110])
@pytest.mark.parametrize("has_colour", [True, False])
def test_no_line_is_too_wide(width: int, has_colour: bool) -> None:
    """Whatever the names, the table and the words stay within the width."""
    names = ("a" * 70, "encoder.layers.11.attention.output.dense", HOSTILE, "0")
    rows = tuple(row(name, kind="BatchNorm2d", dead_share=1.0, saturated_share=0.5) for name in names)
    report = findings(finding(layer=names[0], layers=names), layers=rows, script="x" * 100)
    text = report_text(report, Ink(width=width, has_colour=has_colour), recording(1.0))
    text += compare_text([RunView(name, recording(1.0), report) for name in names], Ink(width=width))
    # where 4 columns of numbers do not fit into 40, nothing can help
    limit = max(width, 52)
    assert max(len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in text.splitlines()) <= limit


def test_names_are_no_commands() -> None:
    """Control characters, terminal commands, direction marks and markup in names come out as plain text."""
    report = findings(finding(layer=HOSTILE), layers=(row(HOSTILE),), script=HOSTILE)
    text = report_text(report, Ink()) + compare_text([RunView(HOSTILE, recording(), report)] * 2, Ink())
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "net\\x1b[2J\\n[red]\\u202e0" in text


def test_streams_without_block_characters() -> None:
    """What an ASCII or Latin-1 stream is given can be encoded in it, and keeps its columns."""
    report = findings(finding(layer="netz.ö.木"), layers=(row("netz.ö.木"), row("b")))
    for encoding in ("ascii", "latin-1"):
        ink = Ink.of(io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert not ink.has_blocks
        text = report_text(report, ink, recording(2.0, 1.0))
        text.encode(encoding)
        assert "loss 2 > 1" in text
        assert "#" in text
    assert Ink.of(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")).has_blocks


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours on a terminal, none in a pipe, with NO_COLOR, TERM=dumb or --no-color; FORCE_COLOR asks for them."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Ink.of(Terminal()).has_colour
    assert not Ink.of(Terminal(), is_colour_wanted=False).has_colour
    assert not Ink.of(io.StringIO()).has_colour
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert Ink.of(io.StringIO()).has_colour
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Ink.of(Terminal()).has_colour
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not Ink.of(Terminal()).has_colour


def test_the_width_is_the_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """COLUMNS counts in a pipe; without it 80; never below 40 or beyond what can be read."""
    for columns, width in (("100", 100), ("7", 40), ("900", 110), ("none", 80)):
        monkeypatch.setenv("COLUMNS", columns)
        assert Ink.of(io.StringIO()).width == width


def test_many_layers_are_folded() -> None:
    """First, last and all with findings stay, others are spread evenly, and the report tells how many there are."""
    shown = fold([place in (301, 577) for place in range(1000)])
    assert len(shown) == 40
    assert {0, 301, 577, 999} <= set(shown)
    assert max(b - a for a, b in itertools.pairwise(shown)) < 60
    assert len(fold([True] * 1000)) == 40
    text = report_text(findings(layers=tuple(row(f"l{i}") for i in range(1000))), Ink())
    assert "40 of 1000 layers are shown" in text
    assert len(text.splitlines()) < 60


def test_our_own_failures_are_told() -> None:
    """A watch that switched itself off and a record that could not be written stand in the report."""
    text = " ".join(report_text(findings(failure="KeyError: 3", record_failure="disk full"), Ink()).split())
    assert "The watch failed and switched itself off; the training went on unwatched: KeyError: 3" in text
    assert "The record could not be written, watching went on in memory: disk full" in text


@pytest.mark.parametrize(
    ("report", "line"),
    [
        (findings(), "✔ clean: nothing is wrong with this run"),
        (findings(kind="check"), "✔ clean: nothing is wrong with this model before its first step"),
        (findings(verdict="inconclusive", steps=0), "? inconclusive: nothing trained"),
        (findings(verdict="inconclusive", steps=7), "? inconclusive: 7 steps are too few to judge"),
        (findings(finding("warning"), finding("warning")), "▲ 2 warnings: first look at vanishing-gradient in net.0"),
        (findings(finding("info")), "● 1 info: first look at vanishing-gradient in net.0"),
        (
            findings(finding("info", layer="b.encoder.layer.11.attention.output.dense")),
            "● 1 info: first look at vanishing-gradient in b.e.l.11.attention.output.dense",
        ),
    ],
)
def test_the_verdict_is_one_line(report: Findings, line: str) -> None:
    """The verdict says what to look at first, or why there is none."""
    assert verdict_line(report, Ink()) == line + "\n"


def test_exit_codes_follow_fail_on() -> None:
    """1 from the asked severity on, 4 if inconclusive below it, 0 otherwise, and 0 always with `never`."""
    warned, unsure = findings(finding("warning")), findings(finding("info"), verdict="inconclusive")
    assert [exit_code(warned, fail_on) for fail_on in FailOn] == [0, 1, 1, 0]
    assert [exit_code(unsure, fail_on) for fail_on in FailOn] == [4, 4, 1, 0]
    assert [exit_code(findings(), fail_on) for fail_on in FailOn] == [0, 0, 0, 0]


def test_runs_side_by_side() -> None:
    """Each run has its verdict, loss, findings and layers; only layers of a name that two share are shown."""
    sick = findings(finding(), layers=(row("net.0", grad_rms=1e-11), row("mine")))
    well = findings(layers=(row("net.0", update_ratio=2e-3), row("other")))
    runs = [
        RunView("sick", recording(2.3, 2.3), sick, {"accuracy": "10%"}),
        RunView("well", recording(2.3, 0.01), well),
    ]
    lines = [" ".join(line.split()) for line in compare_text(runs, Ink()).splitlines()]
    assert lines[0] == "sick well"
    assert "verdict ✖ 1 critical ✔ clean" in lines
    assert "loss 2.3 → 2.3 2.3 → 0.01" in lines
    assert "accuracy 10% –" in lines
    assert "findings ✖ vanishing-gradient" in lines
    assert any(re.match(r"net\.0 ✖ ▏ 1\.0e-11 1\.0e-3 █+ 1\.0e-3 2\.0e-3", line) for line in lines)
    assert not any(line.startswith(("mine", "other")) for line in lines)


def test_more_runs_than_fit_stand_below_each_other() -> None:
    """Seven runs keep to the width and all appear."""
    runs = [RunView(f"run-{k}", recording(1.0), findings(layers=(row("a"),))) for k in range(7)]
    text = compare_text(runs, Ink())
    assert all(f"run-{k}" in text for k in range(7))
    assert max(map(len, text.splitlines())) <= 80
    unlike = [RunView(name, recording(), findings(layers=(row(name),))) for name in "ab"]
    assert "No two of these runs have a layer of the same name." in compare_text(unlike, Ink())


def test_the_document_of_a_comparison() -> None:
    """It holds each run's own document and the ends of its loss; what is not finite is null."""
    document = compare_document([RunView("a", recording(2.0, 1.0), findings()), RunView("b", recording(), findings())])
    read = json.loads(json.dumps(document, allow_nan=False))
    assert [(run["name"], run["loss_start"], run["loss_end"]) for run in read["runs"]] == [
        ("a", 2, 1),
        ("b", None, None),
    ]
    assert read["runs"][0]["verdict"] == "clean"


def test_the_loss_is_told_by_medians() -> None:
    """One wild loss at either end, or a nan, does not become what the run is said to have done."""
    losses = [9e9, *[2.0] * 99, *[1.0] * 99, math.nan]
    assert "loss 2 → 1 ·" in report_text(findings(), Ink(), recording(*losses))
    assert "loss – → – ·" in report_text(findings(), Ink(), recording(math.nan))


def test_a_real_trace_is_reported() -> None:
    """A report of traces as the watch writes them holds their optimisers."""
    trace = make_trace()
    text = report_text(findings(), Ink(width=110), Recording({}, (trace,) * 5))
    assert f"{trace.name} lr" in text
    assert "and 2 more" in text


def test_remedies_are_explained() -> None:
    """Every treatment that the diagnosis recommends has words of its own."""
    folder = Path(unvanish.diagnose.__code__.co_filename).parent
    source = "".join(file.read_text(encoding="utf-8") for file in folder.glob("*.py"))
    tuples = re.findall(r"treatments=\(([^()]*)\)", source)
    named = {word for words in tuples for word in re.findall(r'"([a-z-]+)"', words)}
    assert len(named) > 10
    assert named <= REMEDIES.keys(), named - REMEDIES.keys()
    assert in_words("clip-norm=2") == f"clip-norm=2: {REMEDIES['clip-norm']}"


def test_numbers_and_names_fit_their_columns() -> None:
    """A number takes at most seven characters, a name at most its width."""
    rng = np.random.default_rng(0)
    values = [*(10 ** rng.uniform(-44, 38, 2000)), 9.996, 0.00999999, 9999.6, 0.0, math.inf, -math.inf]
    assert max(len(number(float(value))) for value in values) <= 7
    assert max(len(shorten("a.bb.ccc." * 9, width)) for width in range(8, 40)) < 40
    assert all(len(shorten("layer" * 9, width)) == width for width in range(8, 40))
    assert plain("a\tb\u200bc") == "a\\tb\\u200bc"

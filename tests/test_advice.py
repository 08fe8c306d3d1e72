"""Advice: said where it is true, silent elsewhere, and the same from a record without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import unvanish
from tests.traces import layers, make_trace, with_layer
from unvanish.cure import Cure
from unvanish.diagnose import diagnose
from unvanish.diagnose.advice import LEAST_EQUAL_ROWS, LEAST_FRONT_SAMPLES, LEAST_SHARE, advice
from unvanish.records import Findings, Recording, Trace
from unvanish.report import Ink, cure_text, report_text
from unvanish.trace import read_recording

FRONT: dict[str, Any] = {
    "layers": ["first", "middle"],
    "border": "out",
    "is_apart": False,
    "step": 0,
    "last_step": 399,
    "samples": 20,
    "seconds": 0.0071,
    "step_seconds": 0.01,
    "share_of_step": 0.71,
    "batch_norms": [],
    "is_random": False,
    "is_changed": False,
    "rows_a_step": 32.0,
    "row_pairs": 128_000,  # of 1,280 rows in 10 epochs
    "equal_pairs": 100,
}
FROZEN = with_layer(with_layer(layers(), 0, is_trainable=False), 1, is_trainable=False)


def trace_of(**changed: Any) -> Trace:
    """Return the trace of a training on a frozen trunk."""
    return make_trace(chain=FROZEN, facts={"frozen_front": {**FRONT, **changed}})


def findings_of(trace: Trace) -> Findings:
    return diagnose(Recording({"script": "train.py", "steps": trace.total_steps}, (trace,)))


# What is said -----------------------------------------------------------------------------------------------


def test_a_trunk_that_is_computed_again_is_pointed_out() -> None:
    """The advice names layers, share and what an epoch would take, and brings lines to paste."""
    (found,) = advice(trace_of())
    assert found.kind == "recomputed-frozen-trunk"
    assert found.layers == ("first", "middle")
    assert found.share_of_step == 0.71
    assert found.share_of_run == 1.0
    assert found.evidence["passes"] == pytest.approx(10.0)
    assert "Layers first to middle are frozen and computed again for every batch: 71% of a step." in found.why
    assert "an epoch would take about 0.29 of its time" in found.why
    assert "unvanish.freeze_to(model, 'out')" in found.code
    assert 'cache_features(trunk, dataset, "cache/", batch_size=32)' in found.code


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"batch_norms": ["first", "middle"]}, "the batch norm first uses each batch"),
        ({"is_random": True}, "random numbers are drawn in them"),
        ({"batch_norms": ["first"], "is_random": True}, "goes on changing and random numbers are drawn in them"),
    ],
)
def test_a_trunk_that_is_not_held_is_to_be_held_first(changed: Mapping[str, Any], words: str) -> None:
    """In training mode with batch norm or dropout what a trunk gives changes: another kind, and `freeze_to` first."""
    (found,) = advice(trace_of(**changed))
    assert found.kind == "frozen-trunk-not-held"
    assert words in found.why
    assert found.why.index("freeze_to") < found.why.index("cache_features")


@pytest.mark.parametrize(
    "changed",
    [
        {"share_of_step": LEAST_SHARE - 0.01},
        {"samples": LEAST_FRONT_SAMPLES - 1},
        {"equal_pairs": 0},
        {"equal_pairs": LEAST_EQUAL_ROWS - 1, "row_pairs": 10},
        {"equal_pairs": 14},  # each row came 1.4 times: a second epoch has only begun
        {"is_changed": True},
    ],
    ids=str,
)
def test_nothing_is_said_where_it_would_not_be_true(changed: Mapping[str, Any]) -> None:
    """Small shares, few samples, rows that do not come again, weights that are changed by hand."""
    assert not list(advice(trace_of(**changed)))


def test_nothing_is_said_of_weights_that_were_never_learnt() -> None:
    """A frozen layer as initialisation left it is a finding, and to keep what it computes no good advice."""
    trace = replace(trace_of(), layers=with_layer(FROZEN, 0, is_trainable=False, is_fresh=True))
    findings = findings_of(trace)
    assert "frozen-parameters" in [finding.illness for finding in findings]
    assert not findings.advice


@pytest.mark.parametrize(
    "front", [None, [], "x", {}, {"layers": []}, {"layers": ["first"]}, {**FRONT, "samples": None}]
)
def test_records_without_whole_facts_get_no_advice(front: Any) -> None:
    """Records from before there was advice, and runs too short for a time, are read as ever."""
    assert not findings_of(make_trace(facts={"frozen_front": front})).advice
    assert not findings_of(make_trace()).advice


@pytest.mark.parametrize(
    ("border", "is_apart", "line"),
    [
        ("out", True, "freeze_to(model, '1.out')"),
        ("", True, "freeze_to(model, '1')"),
        ("", False, "freeze_to(model, n)  # n: how many layers are frozen"),
    ],
)
def test_the_lines_to_paste_fit_the_model(border: str, is_apart: bool, line: str) -> None:
    """Two models are put together; where the border has no name that `freeze_to` takes, it is left to the user."""
    (found,) = advice(trace_of(border=border, is_apart=is_apart))
    assert line in found.code
    assert ("torch.nn.Sequential(trunk, head)" in found.code) == is_apart


# Where it is said -------------------------------------------------------------------------------------------


def test_an_advice_is_no_finding() -> None:
    """Verdict and findings are those of the same run without it; the document has it under its own key."""
    with_it, without = findings_of(trace_of()), findings_of(trace_of(share_of_step=0.1))
    assert with_it.verdict == without.verdict == "clean"
    assert with_it.findings == without.findings
    document = json.loads(with_it.to_json())
    (found,) = document["advice"]
    assert found["layers"] == ["first", "middle"]
    assert set(found) >= {"kind", "share_of_step", "step", "share_of_run", "evidence", "why", "code", "source"}
    assert json.loads(without.to_json())["advice"] == []
    assert str(with_it).splitlines()[0] == str(without)
    assert str(with_it).splitlines()[1].startswith("advice: Layers first to middle are frozen")


def test_the_report_shows_it_under_the_findings() -> None:
    """One paragraph and the lines to paste, before the verdict; layer names command no terminal."""
    text = report_text(findings_of(trace_of(layers=["a\x1b[2J", "b"])), Ink(width=100))
    assert "advice: Layers a\\x1b[2J to b are frozen" in text
    assert "\x1b" not in text
    assert text.index("cache_features(trunk") < text.index("clean: nothing is wrong")
    lines = report_text(findings_of(trace_of()), Ink(width=80)).splitlines()
    assert '  features = unvanish.cache_features(trunk, dataset, "cache/", batch_size=32)' in lines
    assert "advice" not in report_text(findings_of(make_trace()), Ink(width=80))


def test_cure_tells_it_too() -> None:
    """Document and text of a search for a cure have the advice of the untreated run."""
    document = Cure(findings_of(trace_of()), "training loss", is_higher_better=False).to_dict()
    assert document["advice"][0]["kind"] == "recomputed-frozen-trunk"
    assert "advice: Layers first to middle are frozen" in cure_text(document, Ink(width=80))


SCRIPT = """
import torch
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)
x = torch.randn(256, 1, 12, 12)
y = (x.mean((1, 2, 3)) > 0).long()
model = nn.Sequential(
    *(nn.Conv2d(1, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 2)),
)


def train(epochs):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    for _ in range(epochs):
        for rows in torch.randperm(256).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


train(4)
model[:4].requires_grad_(False)
train(EPOCHS)
"""


def command(*arguments: str, where: Path) -> dict[str, Any]:
    """Run the command line in a process of its own, and return its document."""
    done = subprocess.run(
        [sys.executable, "-m", "unvanish", *arguments],
        cwd=where,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_a_script_is_told_and_its_record_says_the_same_without_torch(tmp_path: Path) -> None:
    """`run` points out the trunk of a script, in 0 as exit code; `report` repeats it where there is no torch."""
    (tmp_path / "train.py").write_text(SCRIPT.replace("EPOCHS", "12"))
    (tmp_path / "torch.py").write_text("raise ImportError('there is no torch here')")
    here = tmp_path / "elsewhere"
    here.mkdir()
    (here / "train.py").write_text((tmp_path / "train.py").read_text())
    told = command("run", "--json", "-", "train.py", where=here)
    (found,) = told["advice"]
    assert (found["kind"], found["layers"]) == ("recomputed-frozen-trunk", ["0", "2"])
    assert LEAST_SHARE < found["share_of_step"] < 1
    (folder,) = (here / "runs").iterdir()
    assert command("report", "--json", "-", str(folder), where=tmp_path)["advice"] == told["advice"]
    facts = read_recording(folder).traces[1].facts["frozen_front"]
    assert facts["layers"] == ["0", "2"]


def test_a_script_of_one_epoch_is_not_told(tmp_path: Path) -> None:
    """No row comes twice, so there is nothing to save."""
    (tmp_path / "train.py").write_text(SCRIPT.replace("EPOCHS", "1").replace("256", "512"))
    assert command("run", "--json", "-", "--fail-on", "never", "train.py", where=tmp_path)["advice"] == []


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("is_apart", [False, True])
def test_the_lines_that_are_advised_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: bool, is_apart: bool
) -> None:
    """Pasted after the training they build a cache, and then nothing is advised any more."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    x = torch.randn(120, 40)
    dataset = TensorDataset(x, (x[:, 0] > 0).long())
    width = 400
    between = [nn.BatchNorm1d(width)] if norm else []
    trunk = nn.Sequential(nn.Linear(40, width), *between, nn.ReLU(), nn.Linear(width, width))
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.mul_(1.5).add_(0.01)  # learnt elsewhere
    trunk.requires_grad_(False)
    head = nn.Sequential(nn.ReLU(), nn.Linear(width, 2))
    model = nn.Sequential(trunk, head)
    optimizer = torch.optim.Adam(head.parameters())

    def train(forward: Any, batches: Any) -> None:
        for rows, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(forward(rows), y).backward()
            optimizer.step()

    def two_models(rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = trunk(rows)
        return head(features)

    plain = [batch for _ in range(20) for batch in zip(*(t.split(20) for t in dataset.tensors), strict=True)]
    with unvanish.watch([trunk, head] if is_apart else model, optimizer, every=1, folder=None) as run:
        train(two_models if is_apart else model, plain)
    (found,) = run.diagnose().advice
    assert found.kind == ("frozen-trunk-not-held" if norm else "recomputed-frozen-trunk")
    space = {"unvanish": unvanish, "torch": torch, "model": model, "trunk": trunk, "head": head, "dataset": dataset}
    exec(found.code, space | {"loss_fn": nn.functional.cross_entropy})
    exec(found.code.partition("for f, y")[0], space)
    features = space["features"]
    with unvanish.watch(space["model"], optimizer, every=1, folder=None) as run:
        for _ in range(20):
            train(features.head, features.loader(20, shuffle=True))
    assert not run.diagnose().advice

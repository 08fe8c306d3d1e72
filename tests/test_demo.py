"""The demonstration: real data, a right diagnosis, a verified cure."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import pytest

from unvanish import TargetError, demo, read_recording
from unvanish.output import Output


def test_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sigmoid network is found ill by its gradient, a verified treatment makes it learn; records are kept."""
    output = Output()
    output.stream = io.StringIO()
    demo.demonstrate(output, tmp_path)
    text = output.stream.getvalue()
    assert "✖ vanishing-gradient  critical" in text
    assert "verified" in text
    assert "paired t-test, p = " in text.replace("\n", " ")
    last = text.splitlines()[-1] if text.splitlines()[-1].startswith("✔") else " ".join(text.splitlines()[-2:])
    assert last.startswith("✔ found vanishing-gradient; cured by ")
    assert "test accuracy 10% → " in last
    assert int(last.split("→")[1].split("%")[0]) > 60
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"script and records: {tmp_path / 'demo'}"
    records = list((tmp_path / "demo" / "trials").glob("untreated-*/*/run.sqlite"))
    assert any(read_recording(record.parent).steps == 660 for record in records)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"pip install 'unvanish\[demo\]'"):
        demo.demonstrate(Output(), None)


def test_a_remedy_that_does_not_help_is_not_praised() -> None:
    """The last line follows the accuracies."""
    from unvanish.cure import Cure
    from unvanish.records import Findings, Recording

    nothing = Findings({}, (), (), "clean")
    result = demo.Result("x", Recording({}, ()), nothing, 0.5)
    verdict = demo._verdict(Cure(nothing, "training loss", False), result, result).plain
    assert verdict.startswith("✖ found nothing; cured by nothing; test accuracy 50% → 50%")

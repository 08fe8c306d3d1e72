"""The demonstration: real data, a right diagnosis, a remedy that helps."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from unvanish import TargetError, demo, read_recording
from unvanish.output import Output


@pytest.fixture
def one_thread() -> object:
    """Small matrices are faster on one thread; the generator is put back."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


def test_the_demonstration(one_thread: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sigmoid network is found ill by its gradient, the remedied one clean and far better; records are kept."""
    output = Output()
    output.stream = io.StringIO()
    demo.demonstrate(output, tmp_path)
    text = output.stream.getvalue()
    assert "✖ vanishing-gradient  critical" in text
    assert "verdict     ✖ 1 critical                       ✔ clean" in text
    last = text.splitlines()[-1]
    assert last.startswith("✔ test accuracy 10% → ")
    assert last.endswith("found before: vanishing-gradient; after: nothing")
    assert int(last.split("→")[1].split("%")[0]) > 60
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in said] == ["Training", "Training", "record:", "record:"]
    assert read_recording(Path(said[-1].removeprefix("record: "))).steps == 660


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(TargetError, match=r"pip install 'unvanish\[demo\]'"):
        demo.load_digits()


def test_a_remedy_that_does_not_help_is_not_praised() -> None:
    """The last line follows the accuracies."""
    digits = demo.load_digits()
    result = demo.train("x", demo.relu_network, demo.Digits(*(part[:1] for part in digits)), None, Output(quiet=True))
    assert demo._verdict(result, result).plain.startswith("✖ test accuracy")

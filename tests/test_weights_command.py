"""`unvanish weights` lists a file, shows the plan for a model, and says by its exit code whether it would load."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from tests.test_weights_golden import GOLDEN
from unvanish import TargetError
from unvanish.output import Output
from unvanish.weights import Wanted, show

MODEL = """
import torch
from torch import nn
print("the model's own words")
def dense(): return nn.Linear(4, 4)
def other(): return nn.Linear(5, 5)
def with_loss(): return nn.Linear(4, 4), nn.MSELoss(), (torch.zeros(1, 4), torch.zeros(1, 4))
def broken(): raise RuntimeError("no model today")
"""


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "unvanish", "weights", *arguments], cwd=cwd, capture_output=True, text=True, timeout=100
    )


def test_a_file_is_listed(tmp_path: Path) -> None:
    """Each layer with its kind, arrays and settings; as text and as one document."""
    done = run(str(GOLDEN / "keras_net_cnn.keras"), "--json", "list.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("Keras 3 (.keras)", "6 layers, 16 arrays", "bn2", "epsilon=0.01", "[3, 3, 2, 4]"):
        assert words in done.stdout
    document = json.loads((tmp_path / "list.json").read_text())
    assert [layer["name"] for layer in document["layers"]] == ["conv1", "bn1", "conv2", "bn2", "fc1", "fc2"]
    assert document["layers"][0]["arrays"][0] == {"name": "kernel", "shape": [3, 3, 2, 4], "dtype": "float32"}


def test_the_plan_for_a_model_and_its_exit_codes(tmp_path: Path) -> None:
    """0 if it would load, 1 if it would be refused, 3 if the file cannot be loaded."""
    (tmp_path / "m.py").write_text(MODEL)
    dense = str(GOLDEN / "keras_dense.keras")
    done = run(dense, "--onto", "m.py:with_loss", "--json", "-", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)  # what the model's file prints is not in it
    assert document["tensors"][0]["operations"] == ["transpose"]
    assert document["problems"] == []
    assert "the model's own words" in done.stderr
    done = run(dense, "--onto", "m.py:other", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "it would be refused" in done.stdout
    assert "expected (5, 5)" in done.stdout
    (tmp_path / "bad.keras").write_bytes(b"PK\x03\x04 no archive")
    done = run("bad.keras", cwd=tmp_path)
    assert done.returncode == 3
    assert "unvanish: weights: file 'bad.keras': found damaged content" in done.stderr


def test_a_factory_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the user's code raises is shown whole; a name that is not there is an error of the target."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "failing.py").write_text(MODEL)
    wanted = Wanted(GOLDEN / "flax_dense.msgpack", f"{tmp_path}/failing.py:broken", (), (), None, "", "")
    with pytest.raises(typer.Exit) as ended:
        show(wanted, Output())
    assert ended.value.exit_code == 3
    assert "no model today" in capsys.readouterr().err
    with pytest.raises(TargetError, match="weights: factory 'nothing' in"):
        show(replace(wanted, onto=f"{tmp_path}/failing.py:nothing"), Output())

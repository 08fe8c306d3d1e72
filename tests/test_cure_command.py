"""`unvanish cure` on real scripts, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

# A classification that forgets to clear its gradients; {more} runs once an epoch.
SCRIPT = """
import sys
import torch
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(256, 8)
y = torch.randint(4, (256,))
x[:, :4] += 3 * nn.functional.one_hot(y, 4)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
loss_fn = nn.CrossEntropyLoss()
for epoch in range({epochs}):
    for batch in torch.randperm(256).split(32):
        loss = loss_fn(model(x[batch]), y[batch])
        {clear}
        loss.backward()
        optimizer.step()
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    print(f"accuracy {{accuracy:.4f}}", flush=True)
    {more}
"""


def write_script(folder: Path, *, sick: bool = True, more: str = "pass", epochs: int = 30) -> Path:
    """Write the script; a healthy one clears its gradients."""
    script = folder / "train.py"
    clear = "pass" if sick else "optimizer.zero_grad()"
    script.write_text(SCRIPT.format(clear=clear, more=more, epochs=epochs))
    return script


def run_cure(folder: Path, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder; its standard input is never read to its end."""
    return subprocess.run(
        [sys.executable, "-m", "unvanish", "cure", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=timeout, check=False, input="typed\n",
    )  # fmt: skip


def document(folder: Path, *arguments: str) -> tuple[dict[str, Any], int]:
    """Run the command and return its JSON document and exit code."""
    done = run_cure(folder, "--json", "-", *arguments)
    assert done.stdout, done.stderr
    return json.loads(done.stdout), done.returncode


def files(folder: Path) -> dict[str, bytes]:
    """Return the user's files: all but the records."""
    found = [file for file in folder.rglob("*") if file.is_file() and "runs" not in file.relative_to(folder).parts]
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


def test_a_sick_script_is_cured_and_its_files_stay_as_they_are(tmp_path: Path) -> None:
    """The winner mends the fault, every trial had the arguments and an empty standard input, no file was changed."""
    more = (
        'open("out.txt", "w").write("relative"); '
        'open(__file__ + ".log", "w").write("beside the script"); '
        'torch.save(model.state_dict(), "model.pt"); '
        'assert sys.argv[1:] == ["--rate", "1"] and not sys.stdin.read()'
    )
    write_script(tmp_path, more=more)
    (tmp_path / "model.pt").write_bytes(b"the user's best model")
    before = files(tmp_path)
    found, status = document(tmp_path, "train.py", "--rate", "1")
    assert status == 0
    assert found["winner"]["treatments"][0] == "zero-grad"
    assert found["winner"]["p"] < 0.05
    assert found["budget"]["used"] <= found["budget"]["steps"] == 6 * 240
    assert found["run"]["script"] == "train.py"
    assert "zero_grad" in found["winner"]["code"]
    assert files(tmp_path) == before


def test_a_healthy_script_needs_nothing(tmp_path: Path) -> None:
    """One training is all it costs, and the exit code is 0."""
    write_script(tmp_path, sick=False)
    done = run_cure(tmp_path, "train.py")
    assert done.returncode == 0, done.stderr
    assert "nothing is needed" in done.stdout
    assert "tried" not in done.stdout


@pytest.mark.slow
def test_the_users_metric_decides(tmp_path: Path) -> None:
    """With --metric the levels are those that the script prints, and larger ones win with --maximise."""
    write_script(tmp_path)
    found, status = document(tmp_path, "--metric", "accuracy ([0-9.]+)", "--maximise", "train.py")
    assert status == 0
    assert found["metric"] == {"name": "accuracy", "higher_is_better": True}
    last = found["trials"][-1]
    assert all(0 <= value <= 1 for value in last["values"])
    assert last["median"] > last["untreated"]


DEEP = """
import torch
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(256, 8)
y = x[:, :4].argmax(1)
layers = []
for width in [8] + [24] * 13:
    layers += [nn.Linear(width, 24), nn.Sigmoid()]
model = nn.Sequential(*layers, nn.Linear(24, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
for step in range(300):
    batch = torch.randint(256, (32,))
    loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if any(isinstance(module, nn.BatchNorm1d) for module in model.modules()):
        raise ValueError("no norms here")
"""


def test_a_trial_that_crashes_fails_alone(tmp_path: Path) -> None:
    """A script that dies under one treatment loses that trial; the rest go on."""
    (tmp_path / "train.py").write_text(DEEP)
    found, _ = document(tmp_path, "train.py")
    failed = [trial for trial in found["trials"] if trial["error"]]
    assert failed
    assert all("no norms here" in trial["error"] for trial in failed)
    assert all("batch-norm" in trial["treatments"] for trial in failed)
    assert any(trial["values"] for trial in found["trials"])


@pytest.mark.slow
def test_a_script_without_a_seed_is_judged_over_its_own_spread(tmp_path: Path) -> None:
    """Unseeded numbers differ from trial to trial; the fault is still found and mended."""
    script = write_script(tmp_path)
    script.write_text(script.read_text().replace("torch.manual_seed(0)", "torch.seed()"))
    found, status = document(tmp_path, "train.py")
    assert status == 0
    assert len(set(found["trials"][-1]["values"])) == 3


@pytest.mark.slow
def test_a_script_that_never_ends_is_cut_off(tmp_path: Path) -> None:
    """What it did until the time limit counts as the run; the treated trials are short ones."""
    write_script(tmp_path, epochs=10**9, more="import time; time.sleep(0.05)")
    found, status = document(tmp_path, "--timeout", "4", "train.py")
    assert "took longer than 4 s" in " ".join(found["notes"])
    assert found["run"]["steps"] > 50
    assert any(trial["values"] for trial in found["trials"])
    assert status in (0, 1)


def test_ctrl_c_ends_the_children_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """After Ctrl-C the table so far is printed, no trial is left running, and finished trials are read back."""
    write_script(tmp_path, more="import time; time.sleep(0.1)")
    command = [sys.executable, "-m", "unvanish", "cure", "train.py"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("zero-grad"):
                break
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in output
    assert "zero-grad" in output
    assert not _running_in(tmp_path)
    found, status = document(tmp_path, "train.py")
    assert status == 0
    assert "were read back" in " ".join(found["notes"])


def _running_in(folder: Path) -> list[str]:
    """Return the processes whose working folder lies in a folder."""
    time.sleep(0.2)
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if os.readlink(process / "cwd").startswith(str(folder)):
                    found.append(process.name)
            except OSError:
                continue
    return found


@pytest.mark.slow
def test_several_trials_at_once_give_the_same(tmp_path: Path) -> None:
    """--jobs changes the order in which trials run, and nothing else."""
    write_script(tmp_path)
    one, _ = document(tmp_path, "train.py")
    two, _ = document(tmp_path, "--jobs", "2", "--fresh", "train.py")
    assert two["trials"] == one["trials"]
    assert two["winner"] == one["winner"]


@pytest.mark.slow
def test_a_forked_trial_equals_one_in_a_process_of_its_own(tmp_path: Path) -> None:
    """A script that sets environment variables is not forked; its trials end at the same losses."""
    script = write_script(tmp_path)
    forked, _ = document(tmp_path, "train.py")
    script.write_text("import os\nos.environ['MINE'] = '1'\n" + script.read_text())
    alone, _ = document(tmp_path, "--fresh", "train.py")
    assert alone["trials"] == forked["trials"]


def test_a_patched_copy_trains_with_the_winner(tmp_path: Path) -> None:
    """--apply writes a copy that reaches what the trials reached; the script itself stays as it is."""
    script = write_script(tmp_path)
    source = script.read_text()
    done = run_cure(tmp_path, "--apply", "mended.py", "train.py")
    assert done.returncode == 0, done.stderr
    assert script.read_text() == source
    treatments = re.search(r"unvanish run --treat (.*) train.py", done.stdout)
    assert treatments is not None
    named = ", ".join(repr(treatment) for treatment in treatments[1].split(" --treat "))
    new = set((tmp_path / "mended.py").read_text().splitlines()) - set(source.splitlines())
    assert new == {
        "import unvanish",
        f"unvanish.treat(model, optimizer, {named}).keep()  # found by unvanish cure",
    }
    mended = subprocess.run(
        [sys.executable, "mended.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(mended[-1]) > 0.95


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--metric", "accuracy [0-9]", "--maximise", "train.py"], "expected one around the number"),
        (["--metric", "accuracy ([0-9]", "--maximise", "train.py"], "expected a regular expression"),
        (["--metric", "accuracy ([0-9]+)", "train.py"], "expected one of them"),
        (["--maximise", "train.py"], "found no --metric"),
        (["--apply", "train.py", "train.py"], "expected a new file"),
        (["--apply", "nowhere/new.py", "train.py"], "expected one that exists"),
        (["--apply", "new.py", "-m", "json"], "found a module"),
        (["--budget", "1", "train.py"], "budget"),
        (["--folder", "train.py/x", "train.py"], "expected a folder that can be written"),
    ],
)
def test_bad_options_are_told_before_anything_runs(tmp_path: Path, arguments: list[str], words: str) -> None:
    """The exit code is 2, and nothing was run or written."""
    write_script(tmp_path, more='open("ran", "w")')
    before = files(tmp_path)
    done = run_cure(tmp_path, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert files(tmp_path) == before
    assert not (tmp_path / "runs").exists()


def test_a_missing_script_and_one_that_raises(tmp_path: Path) -> None:
    """Both give exit code 3; what a script printed last is shown."""
    done = run_cure(tmp_path, "nowhere.py")
    assert done.returncode == 3
    assert "cure: script 'nowhere.py': found no such file" in done.stderr
    (tmp_path / "broken.py").write_text("import torch\nraise ValueError('no data')\n")
    done = run_cure(tmp_path, "broken.py")
    assert done.returncode == 3
    assert "nothing could be tried: ValueError: no data" in done.stdout
    assert "Traceback" in done.stderr


def test_a_script_that_does_not_train_is_inconclusive(tmp_path: Path) -> None:
    """Exit code 4, as with `run`."""
    (tmp_path / "idle.py").write_text("import torch\nprint(torch.ones(1))\n")
    done = run_cure(tmp_path, "idle.py")
    assert done.returncode == 4
    assert "nothing trained" in done.stdout


def test_torch_save_by_an_absolute_path_is_refused(tmp_path: Path) -> None:
    """`torch.save` opens files by itself, out of sight of Python's `open`; originals are safe from it."""
    target = tmp_path / "model.pt"
    torch.save({"best": torch.ones(1)}, target)
    before = target.read_bytes()
    write_script(tmp_path, more=f"torch.save(model.state_dict(), {str(target)!r})")
    done = run_cure(tmp_path, "train.py")
    assert done.returncode == 1  # no trial came to its end
    assert "must not write to the user's files" in " ".join(done.stdout.split())
    assert target.read_bytes() == before

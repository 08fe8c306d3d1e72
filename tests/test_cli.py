"""The commands, as a shell sees them: streams, exit codes, and scripts that run as `python` would run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

TRAIN = """
import os, signal, sys, torch
from torch import nn
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
inputs = torch.randn(64, 4)
def train(steps, inputs=inputs):
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(inputs), inputs[:, :1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
"""
WHERE = "import sys, json; print(json.dumps([sys.argv, __file__, __name__, sys.path[0], __package__]))\n"
WORKERS = """
import torch
from torch.utils.data import DataLoader, Dataset
class Squares(Dataset):
    def __len__(self): return 8
    def __getitem__(self, place): return torch.tensor(float(place**2))
if __name__ == "__main__":
    loader = DataLoader(Squares(), batch_size=4, num_workers=1, multiprocessing_context="spawn")
    print(sum(batch.sum().item() for batch in loader))
"""


@dataclass(frozen=True)
class Case:
    """A script, how it is run, and more of the environment."""

    script: str | None
    options: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] | None = None


CASES = {
    "raises": Case(TRAIN + "train(30)\nraise RuntimeError('boom in the middle')"),
    "exits 3": Case(TRAIN + "train(30)\nsys.exit(3)", ("--folder", "case.py/runs")),
    "exits 0": Case(TRAIN + "train(60)\nsys.exit(0)", ("--json", "out.json")),
    "no step": Case(TRAIN + "for _ in range(3): model(inputs).sum().backward()"),
    "no samples": Case(TRAIN + "for batch in torch.utils.data.DataLoader([]): train(1)"),
    "no torch": Case(WHERE, arguments=("--help", "-m", "--", "--json", "x y")),
    "interrupted": Case(TRAIN + "train(30)\nos.kill(os.getpid(), signal.SIGINT)\ntrain(9**9)"),
    "terminated": Case(TRAIN + "train(30)\nos.kill(os.getpid(), signal.SIGTERM)\ntrain(9**9)"),
    "workers": Case(WORKERS),
    "nan": Case(
        TRAIN + "inputs[3, 1] = float('nan')\ntrain(30)\nprint('printed')\nos.system('echo from a child')",
        ("--json", "-"),
    ),
    "quiet": Case(
        "import os\nos.environ['OMP_NUM_THREADS'] = '1'\nimport torch\nprint('threads', torch.get_num_threads())"
        + TRAIN
        + "train(60)",
        ("--no-record", "--quiet"),
        environment={"OMP_NUM_THREADS": "2"},
    ),
    "syntax": Case("import torch\nthis is no Python"),
    "missing": Case(None),
}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    folder: Path


def command(
    folder: Path, *arguments: str, program: tuple[str, ...] = ("-m", "unvanish"), environment: Mapping[str, str] = {}
) -> Ended:
    """Run the program in a folder."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", *program, *arguments],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        env={**inherited, "PYTHONIOENCODING": "utf-8", **environment},
    )
    return Ended(done.returncode, done.stdout, done.stderr, folder)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """All cases, each in a folder of its own; side by side, because most of their time is importing torch."""
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "-")) for name in CASES}

    def run(name: str) -> Ended:
        case, folder = CASES[name], folders[name]
        if case.script is not None:
            (folder / "case.py").write_text(case.script, encoding="utf-8")
        return command(folder, "run", *case.options, "case.py", *case.arguments, environment=case.environment or {})

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(CASES, pool.map(run, CASES), strict=True))


def records(folder: Path) -> list[Path]:
    return sorted((folder / "runs").glob("*/run.sqlite"))


def test_a_script_that_raises_is_still_diagnosed(ended: dict[str, Ended]) -> None:
    """Exit 3, the traceback whole and without our frames, and a report of the 30 steps before."""
    case = ended["raises"]
    assert case.code == 3
    assert "Traceback (most recent call last)" in case.err
    assert "RuntimeError: boom in the middle" in case.err
    assert f'File "{case.folder}/case.py", line 16, in <module>' in case.err
    assert "unvanish/" not in case.err.split("Traceback")[1].split("record:")[0]
    assert "30 steps" in case.out
    assert "The script did not come to its end: RuntimeError: boom in the middle" in case.out
    assert len(records(case.folder)) == 1


def test_the_status_of_a_script_is_passed_on(ended: dict[str, Ended]) -> None:
    """`sys.exit(3)` gives 3; `sys.exit(0)` leaves the verdict's code."""
    assert ended["exits 3"].code == 3
    assert "Traceback" not in ended["exits 3"].err
    case = ended["exits 0"]
    assert case.code == 0, case.err
    assert case.out.splitlines()[-1] == "✔ clean: nothing is wrong with this run"
    assert "\x1b" not in case.out
    assert case.err.splitlines()[-1] == f"record: {records(case.folder)[0].parent.relative_to(case.folder)}"


def test_the_document_has_the_promised_keys(ended: dict[str, Ended]) -> None:
    """`--json FILE` writes one document with all the keys that are promised."""
    document = json.loads((ended["exits 0"].folder / "out.json").read_text())
    assert {"schema_version", "unvanish", "run", "verdict", "findings", "layers"} <= document.keys()
    promised = {"id", "script", "steps", "seconds", "watch_share", "torch", "device", "seed"}
    assert promised <= document["run"].keys()
    assert (document["run"]["script"], document["run"]["steps"], document["verdict"]) == ("case.py", 60, "clean")
    assert [layer["name"] for layer in document["layers"]] == ["0", "2"]


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("no samples", "neither backward() nor the step of a torch optimizer was called"),
        ("no step", "backward() was called 3 times, but no torch optimizer took a step"),
        ("no torch", "the script never imported torch"),
    ],
)
def test_nothing_trained(ended: dict[str, Ended], name: str, seen: str) -> None:
    """A script that trains nothing ends with 4, and the report tells what was seen instead."""
    case = ended[name]
    assert case.code == 4, case.err
    assert f"Nothing trained: {seen}" in " ".join(case.out.split())
    assert case.out.splitlines()[-1] == "? inconclusive: nothing trained"


def test_signals_end_the_script_and_are_reported(ended: dict[str, Ended]) -> None:
    """Ctrl-C gives 130 and SIGTERM 143, each after a report of what was recorded."""
    for name, code in (("interrupted", 130), ("terminated", 143)):
        assert ended[name].code == code, ended[name].err
        assert "30 steps" in ended[name].out
        assert len(records(ended[name].folder)) == 1


def test_a_script_finds_what_python_would_give_it(ended: dict[str, Ended]) -> None:
    """Arguments, also those with dashes, `__file__`, `__name__` and `sys.path[0]` are those of a plain run."""
    case = ended["no torch"]
    plain = command(case.folder, *CASES["no torch"].arguments, program=("case.py",))
    assert json.loads(case.out.splitlines()[0]) == json.loads(plain.out)


def test_spawned_workers_find_classes_of_the_script(ended: dict[str, Ended]) -> None:
    """A class of the script is pickled to a spawned `DataLoader` worker, which does not report anything."""
    case = ended["workers"]
    assert case.out.splitlines()[0] == "140.0", case.err
    assert case.out.count("inconclusive") == 1


def test_document_alone_on_standard_output(ended: dict[str, Ended]) -> None:
    """With `--json -` what the script and its children print goes to standard error; nan is found, exit 1."""
    case = ended["nan"]
    document = json.loads(case.out)
    assert case.code == 1
    assert document["findings"][0]["illness"] == "non-finite"
    assert {"printed", "from a child"} <= set(case.err.splitlines())


def test_a_record_that_cannot_be_written_is_reported(ended: dict[str, Ended]) -> None:
    """The training goes on, the report is whole, and says that no record was kept."""
    case = ended["exits 3"]
    assert "30 steps" in case.out
    assert "The record could not be written, watching went on in memory" in case.out
    assert "record:" not in case.err


def test_quiet_and_without_a_record(ended: dict[str, Ended]) -> None:
    """`--no-record` makes no folder; `--quiet` prints the verdict alone; torch is imported by the script."""
    case = ended["quiet"]
    assert [file.name for file in case.folder.iterdir()] == ["case.py"]
    assert case.out == "threads 1\n✔ clean: nothing is wrong with this run\n"
    assert case.err == ""


def test_scripts_that_cannot_be_run(ended: dict[str, Ended]) -> None:
    """A syntax error and a missing file give 3; the error names the place."""
    assert ended["syntax"].code == ended["missing"].code == 3
    assert 'case.py", line 2' in ended["syntax"].err
    assert "SyntaxError: invalid syntax" in ended["syntax"].err
    assert "run: script 'case.py': found no such file, expected a Python script." in ended["missing"].err
    assert "Traceback" not in ended["missing"].err


def test_a_module_runs_as_python_would_run_it(tmp_path: Path) -> None:
    """`run -m` gives a module of a package its arguments, name and package."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "part.py").write_text(WHERE)
    script = str(Path(sys.executable).with_name("unvanish"))  # its own folder is first in sys.path
    ours = command(tmp_path, "run", "-m", "package.part", "--lr", "3", program=(script,))
    plain = command(tmp_path, "--lr", "3", program=("-m", "package.part"))
    assert json.loads(ours.out.splitlines()[0]) == json.loads(plain.out)
    missing = command(tmp_path, "run", "-m", "package.prat")
    assert (missing.code, missing.out) == (3, "")
    assert "run: module 'package.prat': found nothing of that name" in missing.err


OFFLINE = """
import contextlib, io, sys
from unvanish.cli import main
record = sys.argv[1]
for arguments in (
    ["--help"], ["run", "--help"], ["--version"], ["report", record], ["report", record, "--json", "-"],
    ["compare", record, record], ["compare", record, record, "--json", "-"], ["rnu"], ["run", "--evry", "3", "x.py"],
    ["run", "--every", "0", "x.py"], ["run"], ["compare", record], ["report", "nowhere"],
    ["report", record, "--json", "nowhere/x.json"], ["run", "nowhere.py"],
):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as stop:
            code = stop.code
    sys.stdout.write(repr((arguments[0], code, out.getvalue(), err.getvalue())) + "\\n")
sys.exit("torch" in sys.modules)
"""


@pytest.fixture(scope="module")
def offline(ended: dict[str, Ended]) -> list[tuple[str, int, str, str]]:
    """Commands that need no torch, in one process; it fails if torch was imported."""
    folder = ended["exits 0"].folder
    done = command(folder, str(records(folder)[0].parent), program=("-c", OFFLINE))
    assert done.code == 0, done.err
    return [eval(line) for line in done.out.splitlines()]


def test_help_and_reports_need_no_torch(offline: list[tuple[str, int, str, str]]) -> None:
    """Help, version, report and compare succeed in a process without torch, and write on standard output only."""
    for name, code, out, err in offline[:7]:
        assert (code, err) == (0, ""), name
        assert out
    assert offline[2][2].startswith("unvanish 0.")
    assert "clean" in offline[3][2]
    assert json.loads(offline[4][2])["verdict"] == "clean"
    assert [run["verdict"] for run in json.loads(offline[6][2])["runs"]] == ["clean", "clean"]


def test_wrong_usage(offline: list[tuple[str, int, str, str]]) -> None:
    """Each wrong call ends with 2, and its message says what was found and what to do."""
    words = (
        "Did you mean 'run'?",
        "No such option: --evry",
        "greater than or equal to 1",
        "Missing argument 'SCRIPT'",
        "compare: found one run",
        "report: 'nowhere': found no run.sqlite, expected the folder of a run.",
        "expected a file that can be written",
    )
    for (_, code, out, err), expected in zip(offline[7:14], words, strict=True):
        assert (code, out) == (2, ""), err
        assert expected in " ".join(err.replace("│", " ").split())
        assert "Traceback" not in err
    assert offline[14][1] == 3

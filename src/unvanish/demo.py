"""The whole way on data that ships with scikit-learn: a training that does not learn, diagnosed, cured, verified."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from rich.text import Text

from .cure import Cure, Request, cure
from .diagnose import diagnose
from .errors import TargetError
from .levels import Outcome
from .output import Output, nearby
from .processes import Trials
from .progress import CureProgress
from .records import Findings, Recording
from .remedy import code_of
from .report import RunView, compare_text, cure_text, report_text

SCRIPT = Path(__file__).with_name("demo_training.py")


class Result(NamedTuple):
    """One whole training."""

    name: str
    recording: Recording
    findings: Findings
    accuracy: float


def demonstrate(output: Output, folder: Path | None) -> None:
    """Run the sick training, show what is wrong, find what helps, and train again with it.

    Args:
        output: Where the reports go.
        folder: The script and the records are kept in a new folder of this one; None keeps none.

    Raises:
        TargetError: if scikit-learn is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise TargetError(
            "demo: found no scikit-learn, expected it for its handwritten digits. "
            "Install it: pip install 'unvanish[demo]'"
        )
    with ExitStack() as stack:
        place = _new_place(folder, stack)
        script = place / "train.py"
        shutil.copy(SCRIPT, script)
        trials = Trials(str(script), (), False, place / "trials", working=place)
        stack.callback(trials.close)
        _show(trials, output)
        if folder is not None:
            output.say(f"script and records: {nearby(place)}")


def _new_place(folder: Path | None, stack: ExitStack) -> Path:
    if folder is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unvanish-demo-")))
    place, number = folder.absolute() / "demo", 1
    while place.exists():
        number += 1
        place = folder.absolute() / f"demo-{number}"
    place.mkdir(parents=True)
    return place


def _show(trials: Trials, output: Output) -> None:
    """Write the report of the sick run, the search, and both runs side by side."""
    ink = output.ink()
    output.say("1. A 12-layer sigmoid network on handwritten digits, trained under watch ...")
    sick = _result("as written", trials.run(Request((), 0, 0, {})))
    if not output.quiet:
        _write(output, report_text(sick.findings, ink, sick.recording) + "\n")
    output.say("2. Which treatment helps? Short trials of the same script ...")
    with CureProgress(quiet=output.quiet) as progress:
        state = cure(trials, told=progress, code_of=code_of)
    if not output.quiet:
        document = state.to_dict()
        document["run"] = {**document["run"], "script": "train.py"}
        _write(output, cure_text(document, ink, ("train.py",)) + "\n")
    well = sick
    if state.winner is not None:
        treatments = state.winner.treatments
        output.say(f"3. The whole training again, with {' + '.join(treatments)} ...")
        well = _result("cured", trials.run(Request(treatments, 0, 0, {})))
        if not output.quiet:
            runs = [RunView(r.name, r.recording, r.findings, {"accuracy": f"{r.accuracy:.0%}"}) for r in (sick, well)]
            _write(output, compare_text(runs, ink) + "\n")
    _write(output, ink.render(_verdict(state, sick, well)))


def _result(name: str, outcome: Outcome) -> Result:
    if outcome.recording is None or outcome.error:
        raise TargetError(f"demo: the training failed: {outcome.error or 'nothing was recorded'}")
    recording = Recording({**outcome.recording.run, "script": f"train.py ({name})"}, outcome.recording.traces)
    return Result(name, recording, diagnose(recording), _accuracy(outcome))


def _accuracy(outcome: Outcome) -> float:
    found = re.findall(r"test accuracy ([0-9.]+)", outcome.text())
    return float(found[-1]) if found else math.nan


def _write(output: Output, text: str) -> None:
    output.stream.write(text)
    output.stream.flush()


def _verdict(state: Cure, sick: Result, well: Result) -> Text:
    """Say in one line what was wrong, what helped, and whether it did."""
    found = ", ".join(finding.illness for finding in sick.findings.at_least("warning")) or "nothing"
    left = ", ".join(finding.illness for finding in well.findings.at_least("warning")) or "nothing"
    remedy = "nothing" if state.winner is None else " + ".join(state.winner.treatments)
    has_helped = well.accuracy > sick.accuracy + 0.1
    words = f"found {found}; cured by {remedy}; test accuracy {sick.accuracy:.0%} → {well.accuracy:.0%}; left: {left}"
    return Text(f"{'✔' if has_helped else '✖'} {words}", style="bold green" if has_helped else "bold red")

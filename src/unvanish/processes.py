"""Run trials as processes: in a working folder of their own, with a time limit, ended together, kept for resuming."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .candidates import Combination
from .cure import Outcome
from .errors import OptionError, RecordError
from .trace import read_recording
from .trial import Spec

COPIED_BYTES = 20_000_000  # files of the working folder up to this sum are copied, the others linked
SEED_STEP = 1000


@dataclass
class Trials:
    """Runs one script again and again.

    Args:
        target: The script or module.
        arguments: Its arguments.
        is_module: ``target`` is a module.
        folder: Where trials keep their records; what is there already is not run again.
        timeout: Seconds for one trial; 0 = no limit.
    """

    target: str
    arguments: Sequence[str]
    is_module: bool
    folder: Path
    timeout: float = 0.0

    def __call__(self, treatments: Combination, steps: int, seed: int, facts: dict[str, float]) -> Outcome:
        """Run one trial, or read it back if it was run before."""
        place = self.folder / self._key(treatments, steps, seed)
        target = self.target if self.is_module else str(Path(self.target).resolve())
        spec = Spec(
            target, list(self.arguments), self.is_module, str(place), list(treatments), facts, steps, SEED_STEP * seed
        )
        if not spec.result.exists():
            shutil.rmtree(place, ignore_errors=True)
            spec.write()
            error = self._run(spec, place)
            if error:
                return Outcome(None, error=error)
        return _read(spec, place)

    def _key(self, treatments: Combination, steps: int, seed: int) -> str:
        """Name a trial by all it depends on; an edited script makes new ones."""
        source = b"" if self.is_module else Path(self.target).read_bytes()
        what = json.dumps([self.target, list(self.arguments), list(treatments), steps, seed]).encode()
        name = "-".join(treatments) or "untreated"
        readable = re.sub(r"[^a-z0-9.-]+", "-", name)[:40]
        return f"{readable}-{steps}-{seed}-{hashlib.sha256(source + what).hexdigest()[:8]}"

    def _run(self, spec: Spec, place: Path) -> str:
        """Run the trial's process; return what went wrong, if its result is missing."""
        work = place / "work"
        scratch_copy(Path.cwd(), work)
        command = [sys.executable, "-m", "unvanish.trial", str(spec.file.resolve())]
        with (place / "output.txt").open("wb") as output:
            process = subprocess.Popen(
                command, cwd=work, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                process.wait(self.timeout or None)
            except subprocess.TimeoutExpired:
                return f"took longer than {self.timeout:g} s"
            finally:
                end_group(process)
                shutil.rmtree(work, ignore_errors=True)
        return "" if spec.result.exists() else f"ended with status {process.returncode} and no result"


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def scratch_copy(source: Path, target: Path) -> None:
    """Make a working folder that looks like ``source``: what is small is copied, what is large is linked.

    What a trial writes under a relative path then lands here and not on the user's files.
    """
    target.mkdir(parents=True)
    left = COPIED_BYTES
    for item in sorted(source.iterdir()):
        if item.name.startswith(".") or item.name in ("runs", "__pycache__"):
            continue
        try:
            size = _size(item, left)
            if size > left:
                (target / item.name).symlink_to(item.resolve())
                continue
            left -= size
            if item.is_dir():
                shutil.copytree(item, target / item.name, symlinks=True)
            else:
                shutil.copy2(item, target / item.name)
        except OSError:
            continue


def _size(item: Path, enough: int) -> int:
    """Return the bytes of a file or folder, counting no further than ``enough``."""
    if not item.is_dir():
        return item.stat().st_size
    total = 0
    for folder, _, files in os.walk(item):
        total += 4096 + sum(os.lstat(os.path.join(folder, name)).st_size for name in files)
        if total > enough:
            break
    return total


def _read(spec: Spec, place: Path) -> Outcome:
    result = json.loads(spec.result.read_text())
    output = (place / "output.txt").read_text(errors="replace") if (place / "output.txt").exists() else ""
    error = ""
    if spec.treatments and result["refused"] and not result["applied"]:
        error = result["refused"][0]
    elif result["status"]:
        error = result["error"] or f"the script ended with status {result['status']}"
    try:
        recording = read_recording(Path(result["record"])) if result["record"] else None
    except RecordError as problem:
        return Outcome(None, output, str(problem))
    return Outcome(recording, output, error)


def metric_reader(pattern: str, *, is_higher_better: bool):  # type: ignore[no-untyped-def]
    """Return a score that reads the last match of a pattern with one group from a script's output.

    Raises:
        OptionError: if the pattern is no regular expression with one group.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise OptionError(f"cure: --metric: found {pattern!r} ({error}), expected a regular expression.") from error
    if expression.groups != 1:
        raise OptionError(
            f"cure: --metric: found {expression.groups} groups in {pattern!r}, expected one around the number. "
            r"Try 'accuracy ([0-9.]+)'."
        )
    sign = -1.0 if is_higher_better else 1.0

    def score(outcome: Outcome, steps: int) -> float:
        found = expression.findall(outcome.output)
        try:
            return sign * float(found[-1]) if found else float("inf")
        except ValueError:
            return float("inf")

    return score

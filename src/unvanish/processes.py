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
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from .cure import Metric, Request
from .errors import OptionError, RecordError
from .forks import ForkedTrial, Nursery, nursery_for
from .levels import Outcome
from .records import Recording
from .scratch import inside, mirror
from .trace import read_recording
from .trial import Spec
from .version import VERSION

Process = subprocess.Popen[bytes] | ForkedTrial
SEED_STEP = 1000
OUTPUT = "output.txt"
SOURCES = 2_000  # Python files beside the script that are looked at for changes


@dataclass
class Trials:
    """Runs one script again and again.

    Args:
        target: The script or module.
        arguments: Its arguments.
        is_module: ``target`` is a module.
        folder: Where trials keep their records; what is there already is not run again.
        timeout: Seconds for one trial; 0 = no limit.
        jobs: So many trials at once.
        variables: Of the environment, for the trials.
        working: The working folder that trials see a copy of; None: that of this process.
    """

    target: str
    arguments: Sequence[str]
    is_module: bool
    folder: Path
    timeout: float = 0.0
    jobs: int = 1
    variables: Mapping[str, str] = field(default_factory=dict)
    working: Path | None = None
    read_back: int = 0  # trials that were there already
    last_output: str = ""  # what the last trial printed
    _running: set[Process] = field(default_factory=set)
    _nursery: Nursery | None = None
    _has_no_nursery: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_stopped: bool = False

    def __call__(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Run trials, `jobs` at a time; outcomes come in the order of the requests.

        Leaving early, by an exception or Ctrl-C, ends every process.
        """
        if self.jobs == 1 or len(requests) == 1:
            yield from map(self.run, requests)
            return
        with ThreadPoolExecutor(self.jobs) as pool:
            waiting = [pool.submit(self.run, request) for request in requests]
            try:
                for future in waiting:
                    yield future.result()
            except BaseException:
                self.close()
                raise

    def run(self, request: Request) -> Outcome:
        """Run one trial, or read it back if it was run before."""
        place = self.folder / self._key(request)
        target = self.target if self.is_module else str(Path(self.target).resolve())
        spec = Spec(
            target=target,
            arguments=list(self.arguments),
            is_module=self.is_module,
            folder=str(place.resolve()),
            treatments=list(request.treatments),
            facts=dict(request.facts),
            max_steps=request.steps,
            seed_offset=SEED_STEP * request.seed,
            kept_folders=[str(folder) for folder in self._folders()],
        )
        if spec.result.exists():
            self.read_back += 1
            return self._read(spec)
        shutil.rmtree(place, ignore_errors=True)
        spec.write()
        error = self._run(spec, place)
        if not error:
            return self._read(spec)
        return replace(self._unfinished(spec, error), is_cut_off=error == self._too_long)

    def close(self) -> None:
        """End every process and start no other."""
        with self._lock:
            self._is_stopped = True
            running = list(self._running)
        for process in running:
            end_group(process)
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None

    def _folders(self) -> list[Path]:
        """Return what a script may write to by a relative path, or beside itself."""
        here = self.working or Path.cwd()
        return [here] if self.is_module else [here, Path(self.target).resolve().parent]

    def _key(self, request: Request) -> str:
        """Name a trial by all it depends on; an edited script makes new ones."""
        what = [VERSION, self.target, list(self.arguments), list(request.treatments), request.steps, request.seed]
        what += [dict(self.variables), self._sources]
        name = "-".join(request.treatments) or "untreated"
        readable = re.sub(r"[^a-z0-9.-]+", "-", name)[:40]
        return f"{readable}-{request.steps}-{request.seed}-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:8]}"

    @property
    def _sources(self) -> list[str]:
        """Say which state the script and the Python files beside it are in."""
        script = [] if self.is_module else [hashlib.sha256(Path(self.target).read_bytes()).hexdigest()]
        beside = sorted(self._folders()[-1].glob("*.py"))[:SOURCES]
        return script + [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in beside]

    def _run(self, spec: Spec, place: Path) -> str:
        """Run the trial's process; return what went wrong, if its result is missing."""
        mirror(self._folders(), spec.mirror, without=[self.folder])
        with self._lock:
            if self._is_stopped:
                return "stopped"
            try:
                process = self._start(spec, place)
            except OSError as error:
                return f"could not be started: {error}"
            self._running.add(process)
        try:
            process.wait(self.timeout or None)
        except subprocess.TimeoutExpired:
            return self._too_long
        finally:
            end_group(process)
            self._running.discard(process)
            shutil.rmtree(spec.mirror, ignore_errors=True)
        return "" if spec.result.exists() else f"ended without a result{_status(process)}"

    @property
    def _too_long(self) -> str:
        return f"took longer than {self.timeout:g} s"

    def _start(self, spec: Spec, place: Path) -> Process:
        """Start a trial: by forking where that is safe, else as a new process."""
        work = inside(spec.mirror, self._folders()[0])
        if self._nursery is None and not self._has_no_nursery:
            self._nursery = nursery_for(None if self.is_module else Path(self.target), self._environment())
            self._has_no_nursery = self._nursery is None
        if self._nursery is not None:
            return self._nursery.start(spec.file.resolve(), work, (place / OUTPUT).resolve())
        command = [sys.executable, "-m", "unvanish.trial", str(spec.file)]
        with (place / OUTPUT).open("wb") as output:
            return subprocess.Popen(
                command, cwd=work, env=self._environment(), stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def _environment(self) -> dict[str, str]:
        """Return the environment of a trial; trials that run together share the cores."""
        shared = {"PYTHONUNBUFFERED": "1"}
        if self.jobs > 1:
            shared["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // self.jobs, 1))
        return {**shared, **os.environ, **self.variables}

    def _unfinished(self, spec: Spec, error: str) -> Outcome:
        """Return what a trial recorded before it was ended."""
        record = next(iter(sorted(Path(spec.folder).glob("*/run.sqlite"))), None)
        return self._outcome(spec, "" if record is None else str(record.parent), error, ())

    def _read(self, spec: Spec) -> Outcome:
        """Return what came of a trial that ended by itself."""
        result = json.loads(spec.result.read_text())
        error = ""
        if spec.treatments and result["refused"] and not result["applied"]:
            error = result["refused"][0]
        elif result["status"]:
            error = result["error"] or f"the script ended with status {result['status']}"
        return self._outcome(spec, result["record"], error, [(step, end) for step, end in result["printed_at"]])

    def _outcome(self, spec: Spec, record: str, error: str, printed_at: Sequence[tuple[int, int]]) -> Outcome:
        printed = Path(spec.folder) / OUTPUT
        output = printed.read_bytes() if printed.exists() else b""
        self.last_output = output.decode(errors="replace")
        try:
            recording = read_recording(Path(record)) if record else None
        except RecordError as problem:
            return Outcome(None, output, error or str(problem))
        if recording is not None:
            recording = Recording({**recording.run, "script": self.target}, recording.traces)
        return Outcome(recording, output, error, printed_at)


def end_group(process: Process) -> None:
    """End a process and all it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _status(process: Process) -> str:
    return "" if process.returncode is None else f", status {process.returncode}"


def metric_reader(pattern: str, *, is_higher_better: bool) -> Metric:
    """Return a score that reads the last match of a pattern with one group from a script's output.

    Raises:
        OptionError: if the pattern is no regular expression with one group.

    Example:
        >>> score = metric_reader("accuracy ([0-9.]+)", is_higher_better=True)
        >>> score(Outcome(None, b"accuracy 0.1, accuracy 0.9"), 0)
        -0.9
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
        found = expression.findall(outcome.text(steps))
        try:
            value = sign * float(found[-1]) if found else float("inf")
        except ValueError:
            return float("inf")
        return value if value == value else float("inf")

    return score

"""Run a script under watch from its first step to its last; no line of it changes.

The watch is attached when the script imports torch, not before: what a script sets before that import
(``OMP_NUM_THREADS``, allocator settings) then works as it does without us.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .launch import Outcome, run_folder, run_target
from .records import Findings, Recording
from .wraps import Wraps

if TYPE_CHECKING:
    from .watch import Watch

log = logging.getLogger("unvanish")


@dataclass(frozen=True)
class Attended:
    """How a watched run ended, and what was recorded of it."""

    outcome: Outcome
    recording: Recording
    folder: Path | None  # None: nothing was kept on disk
    is_torch_seen: bool


@dataclass
class _Attendance:
    """Waits for torch, then watches."""

    every: int
    parent: Path | None
    target: str
    facts: dict[str, Any]
    watch: Watch | None = None
    folder: Path | None = None
    failure: str = ""
    also: Callable[[], None] | None = None
    pid: int = field(default_factory=os.getpid)
    wraps: Wraps = field(default_factory=Wraps)

    def begin(self) -> None:
        """Attach the watch; a failure of ours must not stop the script."""
        if os.getpid() != self.pid:
            return
        try:
            from .watch import Watch

            self.folder = None if self.parent is None else _reserve(self.parent, self.target)
            self.watch = Watch(every=self.every, folder=self.folder)
            self.watch.recorder.run.update(self.facts, id=self.folder.name if self.folder else "")
            self.watch.attach()
            if self.also is not None:
                self.also()
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            log.warning("watching could not begin, the script runs on: %s", self.failure)

    def follow_couplings(self) -> None:
        """Measure how fast the replicas of every coupling learn that the script makes from now on."""
        watch = self.watch
        if watch is None or os.getpid() != self.pid:
            return
        from .replicas.coupling import Coupling
        from .replicas.speed import LearningSpeed

        def following(original: Callable[..., None]) -> Callable[..., None]:
            @functools.wraps(original)
            def make(coupling: Coupling, *args: Any, **kwargs: Any) -> None:
                original(coupling, *args, **kwargs)
                measure(coupling)

            return make

        @watch.guard
        def measure(coupling: Coupling) -> None:
            LearningSpeed(coupling, self.every, write=watch.note_speeds, guard=watch.guard).__enter__()

        self.wraps.replace(Coupling, "__init__", following)

    def end(self, outcome: Outcome) -> Recording:
        """Finish the record and return it."""
        self.wraps.undo()
        watch = self.watch
        if watch is None:
            nothing = dict.fromkeys(("torch", "device", "seed", "watch_share"))
            seconds = round(time.time() - self.facts["started"], 3)
            failure = {"failure": self.failure} if self.failure else {}
            facts = {**nothing, **self.facts, "id": "", "seconds": seconds, "steps": 0}
            return Recording({**facts, "status": outcome.status, "error": outcome.message, **failure}, ())
        watch.recorder.run.update(status=outcome.status, error=outcome.message)
        watch.close()
        recording = watch.recording()
        failure = {"record_failure": watch.recorder.failure} if watch.recorder.failure else {}
        return Recording({**recording.run, **failure}, recording.traces)


def attend(
    target: str,
    arguments: Sequence[str],
    *,
    is_module: bool,
    every: int,
    parent: Path | None,
    also: Callable[[], None] | None = None,
) -> Attended:
    """Run a script or module under watch.

    Args:
        target: Path of a script, or name of a module.
        arguments: What the script finds in ``sys.argv[1:]``.
        is_module: ``target`` is a module, as with ``python -m``.
        every: Sample each so many steps. >= 1
        parent: The record is kept in a new folder of this one; None keeps none.
        also: Called when the watch is attached: what else is to be done to the script.
    """
    facts: dict[str, Any] = {"script": target, "arguments": list(arguments), "started": time.time()}
    attendance = _Attendance(every, None if parent is None else parent.absolute(), target, facts, also=also)
    coupling = "unvanish.replicas.coupling"
    with _WhenImported("torch", attendance.begin), _WhenImported(coupling, attendance.follow_couplings):
        outcome = run_target(target, list(arguments), is_module=is_module)
        if outcome.status == 0:
            _join_threads()
    recording = attendance.end(outcome)
    is_kept = attendance.folder is not None and not recording.run.get("record_failure")
    return Attended(outcome, recording, attendance.folder if is_kept else None, "torch" in sys.modules)


def _join_threads() -> None:
    """Wait for the script's threads, as Python does at exit."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()


def _reserve(parent: Path, target: str) -> Path:
    """Make a new folder for a run; two runs that start together get two."""
    while True:
        folder = run_folder(parent, target)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if folder.parent.is_dir():
                continue
            return folder
        except OSError:  # the recorder will meet the same error, and say so
            return folder
        return folder


class _WhenImported(importlib.abc.MetaPathFinder):
    """Calls a function when a module has just been imported; at once if it is there already."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name = name
        self._then = then

    def __enter__(self) -> _WhenImported:
        if self._name in sys.modules:
            self._then()
        else:
            sys.meta_path.insert(0, self)
        return self

    def __exit__(self, *error: object) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return spec

        def execute(module: ModuleType) -> None:
            del loader.exec_module  # from here on the loader is as it was
            loader.exec_module(module)
            self._then()

        loader.exec_module = execute
        return spec


def without_training(findings: Findings, recording: Recording, *, is_torch_seen: bool) -> Findings:
    """Say what was seen where nothing trained; other findings pass unchanged."""
    if recording.steps:
        return findings
    calls = int(recording.run.get("backward_calls", 0))
    if not is_torch_seen:
        seen = "the script never imported torch"
    elif recording.run.get("failure"):
        seen = "the watch could not look"
    elif calls:
        times = "once" if calls == 1 else f"{calls} times"
        seen = f"backward() was called {times}, but no torch optimizer took a step"
    else:
        seen = "neither backward() nor the step of a torch optimizer was called in this process"
    note = (
        f"Nothing trained: {seen}. A training in another process (torch.multiprocessing, a launcher) is "
        "watched by putting `unvanish run` before the script of that process."
    )
    return replace(findings, verdict="inconclusive", notes=(note, *findings.notes))

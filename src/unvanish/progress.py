"""How far a search for a cure has come: a bar on a terminal, a line a trial elsewhere. On standard error."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from .cure import Cure, Trial
from .report.ink import number, plain


class CureProgress:
    """Tells of a search while it goes on; a context manager.

    Args:
        quiet: Tell nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._is_bar = sys.stderr.isatty() and not quiet
        self._is_quiet = quiet
        self._told: dict[int, int] = {}  # by trial: how many of its runs
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[used]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> CureProgress:
        if self._is_bar:
            self._bar.start()
            self._task = self._bar.add_task("the untreated run, to its end", total=None, used="")
        elif not self._is_quiet:
            print("the untreated run, to its end ...", file=sys.stderr, flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_bar:
            self._bar.stop()

    def __call__(self, state: Cure) -> None:
        """Tell what is new."""
        news = list(self._news(state))
        if self._is_bar and self._task is not None:
            runs = state.budget / max(state.length, 1)
            used = f"{state.used / max(state.length, 1):.1f} of {runs:.1f} runs"
            self._bar.update(self._task, completed=state.used, total=state.budget, used=used)
            for line in news:
                self._bar.update(self._task, description=line)
        elif not self._is_quiet:
            for line in news:
                print(line, file=sys.stderr, flush=True)

    def _news(self, state: Cure) -> list[str]:
        if not self._told and state.baseline:
            self._told[-1] = 1
            return [f"untreated: {state.metric} {_shown(state, state.baseline[0])} after {state.length:,} steps"]
        lines = []
        for trial in state.trials:
            runs = len(trial.values) + bool(trial.error)
            if runs > self._told.get(id(trial), 0):
                self._told[id(trial)] = runs
                lines.append(_line(state, trial))
        return lines


def _line(state: Cure, trial: Trial) -> str:
    name = plain(" + ".join(trial.treatments))
    if trial.error:
        return f"{name}: {plain(trial.error)}"
    seed = f", seed {trial.seeds[-1]}" if trial.seeds[-1] else ""
    return f"{name}: {state.metric} {_shown(state, trial.values[-1])} after {trial.steps:,} steps{seed}"


def _shown(state: Cure, value: float) -> str:
    return number(-value if state.is_higher_better else value)

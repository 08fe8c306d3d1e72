"""The command `cure`: from its options to trials, from the search to the report and the patched copy."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from .candidates import Combination
from .cure import Cure, Metric, cure
from .errors import OptionError
from .output import CLEAN, FINDINGS, INCONCLUSIVE, TARGET, Output, nearby
from .patch import check_place, patched_copy
from .processes import Trials, metric_reader
from .progress import CureProgress
from .report import cure_line, cure_text

INTERRUPTED, TERMINATED = 130, 143
SHOWN_LINES = 12  # of the output of a script that failed


@dataclass(frozen=True)
class Wanted:
    """What the user asked for."""

    target: str
    arguments: tuple[str, ...]
    is_module: bool
    budget: float
    metric: str
    maximise: bool | None
    jobs: int
    timeout: float
    apply: Path | None
    folder: Path
    fresh: bool

    def score(self) -> Metric | None:
        """Return how trials are judged; None: by the training loss.

        Raises:
            OptionError: if a metric is no pattern with one group, or comes without its direction.
        """
        if not self.metric:
            if self.maximise is not None:
                raise OptionError(
                    "cure: --maximise and --minimise say in which direction --metric gets better: found no --metric. "
                    r"Try --metric 'accuracy ([0-9.]+)' --maximise."
                )
            return None
        if self.maximise is None:
            raise OptionError("cure: --metric: found neither --maximise nor --minimise, expected one of them.")
        return metric_reader(self.metric, is_higher_better=self.maximise)

    def command(self) -> tuple[str, ...]:
        """Return what follows `unvanish run` for this target."""
        return (*(("-m",) if self.is_module else ()), self.target, *self.arguments)

    def place(self) -> Path:
        """Return the folder of this script's trials; the same for the same command."""
        digest = hashlib.sha256(json.dumps([str(Path.cwd()), *self.command()]).encode()).hexdigest()[:8]
        stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(self.target).stem)[:40]
        return self.folder / f"cure-{stem}-{digest}"


def seek(wanted: Wanted, output: Output) -> int:
    """Look for a cure, report it, and return the exit code.

    Raises:
        OptionError: if an option does not fit, before anything is run.
    """
    score = wanted.score()
    if wanted.apply is not None:
        check_place(wanted.apply, wanted.target, is_module=wanted.is_module)
    place = wanted.place()
    if wanted.fresh:
        shutil.rmtree(place, ignore_errors=True)
    _make(place)
    trials = Trials(wanted.target, wanted.arguments, wanted.is_module, place, wanted.timeout, wanted.jobs)
    with _ended_by_signal() as ended, CureProgress(quiet=output.quiet) as progress, closing(trials):
        state = cure(
            trials,
            budget=wanted.budget,
            score=score,
            metric=_metric_name(wanted.metric),
            is_higher_better=bool(wanted.maximise),
            told=progress,
            code_of=code_of,
        )
    if trials.read_back:
        state.notes.append(f"{trials.read_back} trials of an earlier search were read back; --fresh runs all again")
    document = state.to_dict()
    ink = output.ink()
    output.write(cure_line(document, ink) if output.quiet else cure_text(document, ink, wanted.command()), document)
    if state.has_failed:
        output.say(_end_of(trials.last_output))
    if state.winner is not None and wanted.apply is not None:
        output.say(patched_copy(Path(wanted.target), wanted.apply, state.winner.treatments))
    output.say(f"trials: {nearby(place.absolute())}")
    return TERMINATED if ended else _exit_code(state)


def _make(place: Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            f"cure: --folder: found {error.strerror!r} for {str(place)!r}, expected a folder that can be written. "
            "Name another one with --folder."
        ) from error


def _metric_name(pattern: str) -> str:
    """Return what to call a metric: the words of its pattern.

    Example:
        >>> _metric_name(r"test accuracy:? ([0-9.]+)"), _metric_name("")
        ('test accuracy', 'training loss')
    """
    before = pattern.partition("(")[0]
    words = "".join(c if c.isalnum() or c in " _-" else " " for c in before).split()
    return " ".join(words) or ("metric" if pattern else "training loss")


def code_of(combination: Combination) -> str:
    """Return the lines to paste for a combination."""
    from .treatments import parse_treatment

    return "\n".join(filter(None, (parse_treatment(text).code for text in combination)))


def _end_of(output: str) -> str:
    return "\n".join(output.rstrip().splitlines()[-SHOWN_LINES:])


def _exit_code(state: Cure) -> int:
    if state.is_interrupted:
        return INTERRUPTED
    if state.error:
        return TARGET if state.has_failed else INCONCLUSIVE
    if state.winner is not None or not state.is_needed:
        return CLEAN
    return FINDINGS


@contextmanager
def _ended_by_signal() -> Iterator[list[int]]:
    """Treat SIGTERM like Ctrl-C, so that trials end with us; the list says whether it came."""
    ended: list[int] = []

    def end(number: int, frame: FrameType | None) -> NoReturn:
        ended.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield ended
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.stderr.flush()

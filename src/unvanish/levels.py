"""What came of a trial, and the level it reached: numbers that trials are ranked and judged by; lower is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .records import Recording, Trace

MIN_STEPS = 30
PAST_FAILURE = 1.25  # times the steps until the loss of the untreated run was not finite


@dataclass(frozen=True)
class Outcome:
    """What came of one trial.

    ``is_cut_off``: it was ended at the time limit. ``printed_at``: for each number of bytes printed, the last step that
    ended with so many: (step, bytes).
    """

    recording: Recording | None
    output: bytes = b""
    error: str = ""
    printed_at: Sequence[tuple[int, int]] = ()
    is_cut_off: bool = False

    @property
    def steps(self) -> int:
        """Steps of the optimiser that took most."""
        return 0 if self.recording is None else self.recording.steps

    def text(self, steps: int = 0) -> str:
        """Return what was printed in the first ``steps`` steps; 0 = all of it.

        Example:
            >>> Outcome(None, b"one, two", printed_at=((3, 3), (5, 8))).text(2)
            'one'
        """
        end = len(self.output)
        if steps and self.printed_at and steps < self.printed_at[-1][0]:
            end = next(offset for step, offset in self.printed_at if step >= steps)
        return self.output[:end].decode(errors="replace")


def loss_level(outcome: Outcome, steps: int) -> float:
    """Return the median training loss over the last tenth of the first ``steps`` steps; inf if not finite."""
    if outcome.recording is None or not outcome.recording.traces:
        return math.inf
    trace = main_trace(outcome.recording)
    seen = trace.loss_steps < steps if steps else np.ones(len(trace.losses), dtype=bool)
    losses = trace.losses[seen]
    tail = losses[-max(len(losses) // 10, 5) :]
    return float(np.median(tail)) if len(tail) and np.isfinite(tail).all() else math.inf


def start_level(outcome: Outcome) -> float:
    """Return the median of the first five training losses."""
    assert outcome.recording is not None
    return float(np.median(main_trace(outcome.recording).losses[:5]))


def held_out_level(outcome: Outcome, steps: int) -> float:
    """Return the last loss that the script measured without training on it, of the first ``steps`` steps."""
    if outcome.recording is None or not outcome.recording.traces:
        return math.inf
    events = [event for event in main_trace(outcome.recording).events if event.kind == "validation-loss"]
    seen = [float(event.details["loss"]) for event in events if not steps or event.step <= steps]
    return seen[-1] if seen and math.isfinite(seen[-1]) else math.inf


def main_trace(recording: Recording) -> Trace:
    """Return the trace with the most steps; the last of equals, because a script ends with what it is after."""
    return max(enumerate(recording.traces), key=lambda item: (item[1].total_steps, item[0]))[1]


def facts_of(recording: Recording | None) -> dict[str, float]:
    """Return what the untreated run says of its data."""
    from .diagnose.progress import pooled_target_std

    if recording is None or not recording.traces:
        return {}
    trace = main_trace(recording)
    mean = trace.scalars["target_mean"]
    known = mean[np.isfinite(mean)]
    spread = pooled_target_std(trace)
    regression = trace.facts.get("loss_kind") in ("mse", "l1", "smooth-l1", "huber")
    facts = {"is_regression": float(regression)}
    if len(known) and spread > 0:
        facts |= {"target_mean": float(known.mean()), "target_std": spread}
    return facts


def informative_steps(untreated: Outcome) -> int:
    """Return how long a trial must be to tell anything: past the first loss that was not finite, if there is one."""
    assert untreated.recording is not None
    trace = main_trace(untreated.recording)
    failed = trace.loss_steps[~np.isfinite(trace.losses)]
    return max(MIN_STEPS, int(PAST_FAILURE * failed[0])) if len(failed) else MIN_STEPS

"""The closed loop: diagnose a script, try treatments in short trials, keep what is verified.

    untreated run -> findings -> candidates -> successive halving -> fresh seeds against untreated -> verdict

Every trial is the user's script in a process of its own. A treatment is recommended only if it beats the untreated
run on seeds that played no part in choosing it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev
from typing import Any

import numpy as np

from .candidates import Combination, candidates, combined
from .diagnose import diagnose
from .records import Findings, Recording, Trace, finite
from .version import VERSION

FRESH_SEEDS = 3
LEAST_GAIN = 0.1  # of the untreated level; a smaller one is not worth a change
SIGNIFICANCE = 0.05
RUNG_SHARES = (1.5, 1.0)  # of one run's steps, spent on each rung of the halving
MIN_STEPS = 30

Metric = Callable[["Outcome", int], float]


@dataclass(frozen=True)
class Outcome:
    """What came of one trial."""

    recording: Recording | None
    output: str = ""
    error: str = ""

    @property
    def steps(self) -> int:
        """Steps of the optimiser that took most."""
        return 0 if self.recording is None else self.recording.steps


@dataclass
class Trial:
    """One combination of treatments and how it did."""

    treatments: Combination
    steps: int
    seeds: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    stopped: str | None = None  # "halved" or "failed"
    error: str | None = None

    @property
    def value(self) -> float:
        """The median over seeds; inf where nothing was measured."""
        return median(self.values) if self.values else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Return the trial as the JSON document shows it."""
        return {
            "treatments": list(self.treatments),
            "steps": self.steps,
            "seeds": list(self.seeds),
            "values": finite(list(self.values)),
            "median": finite(self.value),
            "stopped": self.stopped,
            "error": self.error,
        }


@dataclass(frozen=True)
class Winner:
    """A treatment that fresh seeds confirmed."""

    treatments: Combination
    gain: float  # share of the untreated level that went away, or the difference for levels that may be negative
    spread: float
    p: float
    code: str = ""


@dataclass
class Cure:
    """What was found, tried and verified."""

    findings: Findings
    metric: str
    is_higher_better: bool
    baseline: tuple[float, ...] = ()
    budget: int = 0
    used: int = 0
    trials: list[Trial] = field(default_factory=list)
    winner: Winner | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def is_needed(self) -> bool:
        """Say whether anything was wrong."""
        return any(finding.severity != "info" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return the document of DESIGN."""
        document = self.findings.to_dict()
        sign = -1.0 if self.is_higher_better else 1.0
        winner = self.winner
        return {
            "schema_version": document["schema_version"],
            "unvanish": VERSION,
            "run": document["run"],
            "findings": document["findings"],
            "metric": {"name": self.metric, "higher_is_better": self.is_higher_better},
            "baseline": finite(
                {"median": sign * median(self.baseline or (math.nan,)), "values": [sign * v for v in self.baseline]}
            ),
            "budget": {"steps": self.budget, "used": self.used},
            "trials": [
                {
                    **trial.to_dict(),
                    "values": finite([sign * v for v in trial.values]),
                    "median": finite(sign * trial.value),
                }
                for trial in self.trials
            ],
            "winner": None
            if winner is None
            else {
                "treatments": list(winner.treatments),
                "gain": finite(winner.gain),
                "spread": finite(winner.spread),
                "p": finite(winner.p),
                "code": winner.code,
            },
            "notes": list(self.notes),
        }


RunTrial = Callable[[Combination, int, int, dict[str, float]], Outcome]  # treatments, max steps, seed, facts


def cure(
    run: RunTrial,
    *,
    budget: float = 6.0,
    score: Metric | None = None,
    metric: str = "training loss",
    is_higher_better: bool = False,
    told: Callable[[Cure], None] = lambda state: None,
    code_of: Callable[[Combination], str] = lambda combination: "",
) -> Cure:
    """Find a treatment that verifiably helps.

    Args:
        run: Runs one trial: treatments, steps (0 = to the end), number of the seed, facts of the data.
        budget: At most so many times the steps of one run, the untreated one included. >= 3
        score: The level of an outcome after so many steps; lower is better. None: the training loss.
        metric: What the score is called.
        is_higher_better: The user's metric is maximised (``score`` then returns its negative).
        told: Hears of the state after every trial.
        code_of: The lines to paste for a combination.

    Returns:
        All that was tried. The winner passed a one-sided paired t-test (5 %) on `FRESH_SEEDS` fresh seeds, with a gain
        of at least `LEAST_GAIN`; a treatment that does nothing passes at most 5 % of the time.
    """
    search = _Search(run, score or loss_level, told, code_of)
    untreated = run((), 0, 0, {})
    recording = untreated.recording
    findings = diagnose(recording) if recording is not None else Findings({}, (), (), "inconclusive")
    state = Cure(findings, metric, is_higher_better)
    if recording is None or not recording.steps:
        state.notes.append(untreated.error or "the script did not train")
        return state
    search.begin(state, untreated, budget)
    if not state.is_needed:
        return state
    first = candidates(findings)
    if not first:
        state.notes.append("no treatment is known for what was found; it is to be mended in the script")
        return state
    search.choose(first)
    return state


class _Search:
    """Halving over candidates, then the test of the best ones."""

    def __init__(self, run: RunTrial, score: Metric, told: Any, code_of: Any) -> None:
        self.run, self.score, self.told, self.code_of = run, score, told, code_of

    def begin(self, state: Cure, untreated: Outcome, budget: float) -> None:
        self.state, self.untreated, self.length = state, untreated, untreated.steps
        self.facts = facts_of(untreated.recording)
        state.budget, state.used = int(budget * self.length), self.length
        state.baseline = (self.score(untreated, self.length),)
        self.told(state)

    def choose(self, first: Sequence[Combination]) -> None:
        """Narrow the candidates down, then verify from the best on until one holds."""
        rung = self._rung([Trial(combination, 0) for combination in first], RUNG_SHARES[0])
        best = self._better(rung)
        pairs = []
        if len(best) > 1 and best[0].value > 0.3 * self._untreated_at(best[0].steps):
            both = combined(best[0].treatments, best[1].treatments)
            pairs = [Trial(both, 0)] if all(both != trial.treatments for trial in rung) else []
        survivors = best[:2] + pairs
        if len(survivors) > 1:
            again = [Trial(trial.treatments, 0) for trial in survivors]
            survivors = self._better(self._rung(again, RUNG_SHARES[1])) or survivors[:1]
        for trial in survivors[:2]:
            if self._verify(trial):
                return

    def _rung(self, trials: list[Trial], share: float) -> list[Trial]:
        """Give each trial an equal part of a share of one run's steps; all but the better half are stopped."""
        steps = max(MIN_STEPS, min(self.length, int(share * self.length / len(trials))))
        for trial in trials:
            if not self._affords(steps):
                break
            trial.steps = steps
            self._measure(trial, seed=0)
            self.state.trials.append(trial)
            self.told(self.state)
        done = [trial for trial in trials if trial.values]
        for trial in sorted(done, key=lambda trial: trial.value)[max(2, len(done) // 3) :]:
            trial.stopped = trial.stopped or "halved"
        return done

    def _measure(self, trial: Trial, *, seed: int) -> None:
        outcome = self.run(trial.treatments, trial.steps, seed, self.facts)
        self.state.used += outcome.steps
        if outcome.recording is None or outcome.error or not outcome.steps:
            trial.stopped, trial.error = "failed", outcome.error or "nothing trained"
            return
        trial.seeds = (*trial.seeds, seed)
        trial.values = (*trial.values, self.score(outcome, trial.steps))

    def _affords(self, steps: int) -> bool:
        return self.state.used + steps <= self.state.budget

    def _untreated_at(self, steps: int) -> float:
        return self.score(self.untreated, steps)

    def _better(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the trials that did better than the untreated run after as many steps, best first."""
        better = [t for t in trials if not t.error and t.value < self._untreated_at(t.steps)]
        return sorted(better, key=lambda trial: trial.value)

    def _verify(self, chosen: Trial) -> bool:
        """Run the treatment and nothing on fresh seeds, and test the paired differences."""
        left = self.state.budget - self.state.used
        steps = min(self.length, left // (2 * FRESH_SEEDS))
        if steps < MIN_STEPS:
            self.state.notes.append("the budget ended before a treatment could be verified; raise it with --budget")
            return False
        treated, untreated = Trial(chosen.treatments, steps), Trial((), steps)
        for seed in range(1, FRESH_SEEDS + 1):
            self._measure(untreated, seed=seed)
            self._measure(treated, seed=seed)
            self.told(self.state)
        self.state.trials += [treated]
        if treated.error or (untreated.error and not untreated.values):
            return False
        self.state.baseline = (*self.state.baseline, *untreated.values)
        gain, spread, p = paired_test(untreated.values, treated.values)
        if p < SIGNIFICANCE and gain >= LEAST_GAIN:
            self.state.winner = Winner(chosen.treatments, gain, spread, p, self.code_of(chosen.treatments))
            return True
        return False


def loss_level(outcome: Outcome, steps: int) -> float:
    """Return the median training loss over the last tenth of the first ``steps`` steps; inf if not finite."""
    if outcome.recording is None or not outcome.recording.traces:
        return math.inf
    trace = main_trace(outcome.recording)
    seen = trace.loss_steps < steps if steps else np.ones(len(trace.losses), dtype=bool)
    losses = trace.losses[seen]
    tail = losses[-max(len(losses) // 10, 5) :]
    return float(np.median(tail)) if len(tail) and np.isfinite(tail).all() else math.inf


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


def paired_test(untreated: Sequence[float], treated: Sequence[float]) -> tuple[float, float, float]:
    """Return gain, its spread over seeds, and the p value that the treated level is not lower.

    One-sided paired t-test on the differences of log levels (of levels, where some are not positive). A treated level
    that is not finite counts against it; an untreated one that is not finite is as bad as any.

    Example:
        >>> gain, spread, p = paired_test((1.0, 1.1, 0.9), (0.1, 0.12, 0.1))
        >>> round(gain, 2), p < 0.05
        (0.89, True)
        >>> paired_test((1.0, 1.1, 0.9), (1.0, 1.1, 0.9))[2]
        1.0
    """
    pairs = list(zip(untreated, treated, strict=False))
    if len(pairs) < 2 or not all(math.isfinite(b) for _, b in pairs):
        return 0.0, 0.0, 1.0
    if any(not math.isfinite(a) for a, _ in pairs):
        worst = max([a for a, _ in pairs if math.isfinite(a)] + [b for _, b in pairs]) * 10 + 1
        pairs = [(a if math.isfinite(a) else worst, b) for a, b in pairs]
    is_positive = all(a > 0 and b > 0 for a, b in pairs)
    differences = [math.log(a / b) if is_positive else a - b for a, b in pairs]
    centre, spread = fmean(differences), stdev(differences)
    if spread == 0:
        p = 0.0 if centre > 0 else 1.0
    else:
        p = _t_tail(centre / (spread / math.sqrt(len(pairs))), len(pairs) - 1)
    return (1 - math.exp(-centre)) if is_positive else centre, spread, p


def _t_tail(t: float, freedom: int) -> float:
    """Return P(T > t) of Student's t with 1 or 2 degrees of freedom in closed form, else by integration."""
    if freedom == 1:
        return 0.5 - math.atan(t) / math.pi
    if freedom == 2:
        return 0.5 * (1 - t / math.sqrt(2 + t * t))
    grid = np.linspace(0, abs(t), 20_001)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    density = np.exp(log_scale - (freedom + 1) / 2 * np.log1p(grid**2 / freedom))
    body = float(np.trapezoid(density, grid))
    return 0.5 - math.copysign(body, t)

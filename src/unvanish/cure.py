"""The closed loop: diagnose a script, try treatments in short trials, keep what is verified.

    untreated run -> findings -> candidates -> successive halving -> fresh seeds against untreated -> verdict

Every trial is the user's script in a process of its own. A treatment is recommended only if it beats the untreated
run on seeds that played no part in choosing it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import numpy as np

from .candidates import MISTAKES, Combination, candidates, combined, mending, with_values
from .diagnose import diagnose
from .records import Findings, Recording, Trace, finite
from .version import VERSION

FRESH_SEEDS = 3
LEAST_GAIN = 0.1  # of the untreated loss; a smaller one is not worth a change
LEAST_METRIC_GAIN = 0.02  # of the untreated level, for a metric that the user names
SIGNIFICANCE = 0.05
RUNG_SHARES = (1.5, 1.0)  # of one run's steps, spent on each rung of the halving
MIN_STEPS = 30
PAST_FAILURE = 1.25  # times the steps until the loss of the untreated run was not finite


NO_BUDGET = "the budget ended before a treatment could be verified; raise it with --budget"


class Request(NamedTuple):
    """One trial that is asked for."""

    treatments: Combination
    steps: int  # 0 = to the end of the script
    seed: int  # 0 = the script's own
    facts: Mapping[str, float]  # of the data, as the untreated run saw it


@dataclass(frozen=True)
class Outcome:
    """What came of one trial.

    ``printed_at``: for each number of bytes printed, the last step that ended with so many: (step, bytes).
    """

    recording: Recording | None
    output: bytes = b""
    error: str = ""
    printed_at: Sequence[tuple[int, int]] = ()

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


@dataclass
class Trial:
    """One combination of treatments and how it did."""

    treatments: Combination
    steps: int
    seeds: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    untreated: float = math.nan  # the level of the untreated run after as many steps
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
    gain: float  # share of the untreated level that went away or was added; a difference where signs vary
    spread: float
    p: float
    code: str = ""
    is_mended: bool = False  # a mistake of the script: judged by its own start, because the losses are not of one kind


@dataclass
class Cure:
    """What was found, tried and verified."""

    findings: Findings
    metric: str
    is_higher_better: bool
    length: int = 0  # steps of one run
    baseline: tuple[float, ...] = ()
    budget: int = 0
    used: int = 0
    trials: list[Trial] = field(default_factory=list)
    winner: Winner | None = None
    error: str = ""  # why nothing could be tried
    has_failed: bool = False  # the script itself, when nothing could be tried
    is_interrupted: bool = False
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
                    "untreated": finite(sign * trial.untreated),
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
                "is_mended": winner.is_mended,
                "code": winner.code,
            },
            "error": self.error or None,
            "is_interrupted": self.is_interrupted,
            "notes": list(self.notes),
        }


Metric = Callable[[Outcome, int], float]  # the level after so many steps; lower is better
RunTrials = Callable[[Sequence[Request]], Iterable[Outcome]]


def cure(
    run: RunTrials,
    *,
    budget: float = 6.0,
    score: Metric | None = None,
    metric: str = "training loss",
    is_higher_better: bool = False,
    told: Callable[[Cure], None] = lambda state: None,
    code_of: Callable[[Combination], str] = lambda combination: "",
    candidates_for: Callable[[Findings], Sequence[Combination]] = candidates,
) -> Cure:
    """Find a treatment that verifiably helps.

    Args:
        run: Runs trials, and gives their outcomes in the order of the requests.
        budget: At most so many times the steps of one run, the untreated one included.
        score: The level of an outcome after so many steps; lower is better. None: the training loss, or for a run that
            overfits the loss on held-out data, where the script measures one.
        metric: What the score is called.
        is_higher_better: The user's metric is maximised (``score`` then returns its negative).
        told: Hears of the state after every trial.
        code_of: The lines to paste for a combination.
        candidates_for: What to try for what was found, in this order.

    Returns:
        All that was tried. The winner passed a one-sided paired t-test (5 %) on `FRESH_SEEDS` fresh seeds, with a gain
        of at least `LEAST_GAIN`; a treatment that does nothing passes at most 5 % of the time. After Ctrl-C what was
        tried until then, with ``is_interrupted``.
    """
    state = Cure(Findings({}, (), (), "inconclusive"), metric, is_higher_better)
    try:
        _Search(run, score or loss_level, told, code_of, state, candidates_for).search(budget)
    except KeyboardInterrupt:
        state.is_interrupted = True
    return state


class _Search:
    """Halving over candidates, then the test of the best ones."""

    def __init__(
        self, run: RunTrials, score: Metric, told: Any, code_of: Any, state: Cure, candidates_for: Any
    ) -> None:
        self.candidates_for = candidates_for
        self.run, self.score, self.told, self.code_of, self.state = run, score, told, code_of, state
        self.rank, self.least = score, MIN_STEPS
        self.facts: dict[str, float] = {}

    def search(self, budget: float) -> None:
        """Run the script untreated, and look for a cure if something is wrong with it."""
        state = self.state
        (untreated,) = self.run([Request((), 0, 0, {})])
        if untreated.recording is not None:
            state.findings = diagnose(untreated.recording)
        if untreated.recording is None or not untreated.steps:
            state.error, state.has_failed = untreated.error or "nothing trained", bool(untreated.error)
            return
        if untreated.error and not state.is_needed:
            state.error, state.has_failed = untreated.error, True
        elif state.findings.verdict == "inconclusive" and not state.is_needed:
            state.error = f"{untreated.steps} steps are too few to judge"
        elif untreated.error:
            state.notes.append(f"the untreated run: {untreated.error}")
        self.untreated = untreated
        self.length = state.length = untreated.steps
        self.least = min(_informative_steps(untreated), self.length)
        if self.score is loss_level and _overfits(state.findings) and math.isfinite(held_out_level(untreated, 0)):
            self.score, state.metric = held_out_level, "held-out loss"
        self.facts = facts_of(untreated.recording)
        state.budget, state.used = int(budget * self.length), self.length
        state.baseline = (self.score(untreated, self.length),)
        self.told(state)
        if not state.is_needed or state.error:
            return
        first = [with_values(combination, self.facts) for combination in self.candidates_for(state.findings)]
        if first and self.score is loss_level and mending(state.findings):
            self._mend(first)
        elif first:
            self.rank = self._rank(first)
            self._choose(first)
        else:
            state.notes.append("no treatment is known for what was found; it is to be mended in the script")

    def _rank(self, first: Sequence[Combination]) -> Metric:
        """Return what short trials are ranked by: the training loss where the metric is printed at the end only."""
        if math.isfinite(self.score(self.untreated, self._rung_steps(len(first), RUNG_SHARES[0]))):
            return self.score
        if self.score not in OWN_SCORES and math.isfinite(self.score(self.untreated, 0)):
            self.state.notes.append(
                "the metric is printed at the end only: short trials are ranked by the training loss, and verifying "
                f"takes whole runs (a budget of {2 * FRESH_SEEDS + 4} runs suits)"
            )
            return loss_level
        return self.score

    def _rung_steps(self, count: int, share: float) -> int:
        return max(self.least, min(self.length, int(share * self.length / count)))

    def _choose(self, first: Sequence[Combination]) -> None:
        """Narrow the candidates down, then verify from the best on until one holds."""
        rung = self._rung([Trial(combination, 0) for combination in first], RUNG_SHARES[0])
        best = self._better(rung)
        pairs = []
        if len(best) > 1 and best[0].value > 0.3 * self._untreated_at(best[0].steps):
            both = combined(best[0].treatments, best[1].treatments)
            pairs = [Trial(both, 0)] if all(both != trial.treatments for trial in rung) else []
        survivors = best[:2] + pairs
        if len(survivors) > 1 and self.least == MIN_STEPS:  # else the steps are needed for the verification
            again = [Trial(trial.treatments, 0) for trial in survivors]
            survivors = self._better(self._rung(again, RUNG_SHARES[1])) or survivors[:1]
        for trial in survivors[:2]:
            if self._verify(trial):
                return

    def _mend(self, first: Sequence[Combination]) -> None:
        """Mend a mistake of the script: alone, unless something on top of it halves the loss.

        What the script called its loss before is no measure of what it is afterwards. So the treated runs are compared
        with each other, and the best with its own start: on fresh seeds the mistake must not be found again, and the
        loss must fall.
        """
        rung = [trial for trial in self._rung([Trial(c, 0) for c in first], RUNG_SHARES[0]) if not trial.error]
        best = sorted(rung, key=lambda trial: trial.value)
        alone = [trial for trial in best if trial.treatments == first[0]]
        if alone and best[0].value > 0.5 * alone[0].value:
            best = alone + [trial for trial in best if trial is not alone[0]]
        for trial in best[:2]:
            if self._verify_mended(trial):
                return

    def _verify_mended(self, chosen: Trial) -> bool:
        """Run the treatment on fresh seeds, look for the mistake, and test whether the loss falls."""
        steps = min(self.length, (self.state.budget - self.state.used) // FRESH_SEEDS)
        if steps < min(MIN_STEPS, self.length):
            self.state.notes.append(NO_BUDGET)
            return False
        treated = Trial(chosen.treatments, steps)
        self.state.trials.append(treated)
        starts: list[float] = []
        mistakes: list[str] = []

        def level(outcome: Outcome, steps: int) -> float:
            assert outcome.recording is not None
            starts.append(start_level(outcome))
            mistakes.extend(f.illness for f in diagnose(outcome.recording) if f.illness in MISTAKES)
            return loss_level(outcome, steps)

        self._measure([(treated, seed) for seed in range(1, FRESH_SEEDS + 1)], level)
        if treated.error or mistakes:
            return False
        treated.untreated = median(starts)
        gain, spread, p = paired_test(starts, treated.values)
        if p >= SIGNIFICANCE or gain < LEAST_GAIN:
            return False
        self.state.winner = Winner(chosen.treatments, gain, spread, p, self.code_of(chosen.treatments), is_mended=True)
        return True

    def _rung(self, trials: list[Trial], share: float) -> list[Trial]:
        """Give each trial an equal part of a share of one run's steps; all but the better half are stopped."""
        steps = self._rung_steps(len(trials), share)
        reserve = 0 if self.least == MIN_STEPS else 4 * self.least  # for the verification on two seeds
        affordable = trials[: max((self.state.budget - self.state.used - reserve) // steps, 0)]
        for trial in affordable:
            trial.steps, trial.untreated = steps, self._untreated_at(steps)
            self.state.trials.append(trial)
        self._measure([(trial, 0) for trial in affordable], self.rank)
        done = [trial for trial in affordable if trial.values]
        for trial in sorted(done, key=lambda trial: trial.value)[max(2, len(done) // 3) :]:
            trial.stopped = trial.stopped or "halved"
        return done

    def _measure(self, runs: Sequence[tuple[Trial, int]], score: Metric) -> None:
        """Run trials on seeds, and note the levels they reach; an untreated run that fails is as bad as any."""
        ends = {trial.steps: 0 if trial.steps >= self.length else trial.steps for trial, _ in runs}
        requests = [Request(trial.treatments, ends[trial.steps], seed, self.facts) for trial, seed in runs]
        for (trial, seed), outcome in zip(runs, self.run(requests), strict=True):
            self.state.used += outcome.steps
            has_failed = outcome.recording is None or bool(outcome.error) or not outcome.steps
            if has_failed:
                trial.stopped, trial.error = "failed", outcome.error or "nothing trained"
            if not has_failed or not trial.treatments:
                trial.seeds = (*trial.seeds, seed)
                trial.values = (*trial.values, math.inf if has_failed else score(outcome, trial.steps))
            self.told(self.state)

    def _untreated_at(self, steps: int) -> float:
        """Return the level of the untreated run; one that comes to nothing in the end is as bad as any before, too."""
        if not math.isfinite(self.rank(self.untreated, 0)):
            return math.inf
        return self.rank(self.untreated, steps)

    def _better(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the trials that did better than the untreated run after as many steps, best first."""
        better = [t for t in trials if not t.error and t.value < self._untreated_at(t.steps)]
        return sorted(better, key=lambda trial: trial.value)

    def _verify(self, chosen: Trial) -> bool:
        """Run the treatment and nothing on fresh seeds, and test the paired differences."""
        left = self.state.budget - self.state.used
        seeds, steps = FRESH_SEEDS, min(self.length, left // (2 * FRESH_SEEDS))
        if steps < self.least:
            seeds, steps = min(FRESH_SEEDS, left // (2 * self.least)), self.least
        if self.rank is not self.score:  # what is printed at the end only takes whole runs
            seeds, steps = min(FRESH_SEEDS, left // (2 * self.length)), self.length
        if steps < min(MIN_STEPS, self.length) or seeds < 2:
            self.state.notes.append(NO_BUDGET)
            return False
        treated, untreated = Trial(chosen.treatments, steps), Trial((), steps)
        self.state.trials.append(treated)
        both = [(trial, seed) for seed in range(1, seeds + 1) for trial in (untreated, treated)]
        self._measure(both, self.score)
        treated.untreated = untreated.value
        if treated.error:
            return False
        self.state.baseline = (*self.state.baseline, *untreated.values)
        gain, spread, p = paired_test(untreated.values, treated.values)
        if p < SIGNIFICANCE and gain >= (LEAST_GAIN if self.score in OWN_SCORES else LEAST_METRIC_GAIN):
            self.state.winner = Winner(chosen.treatments, gain, spread, p, self.code_of(chosen.treatments))
            return True
        return False


def _informative_steps(untreated: Outcome) -> int:
    """Return how long a trial must be to tell anything: past the first loss that was not finite, if there is one."""
    assert untreated.recording is not None
    trace = main_trace(untreated.recording)
    failed = trace.loss_steps[~np.isfinite(trace.losses)]
    return max(MIN_STEPS, int(PAST_FAILURE * failed[0])) if len(failed) else MIN_STEPS


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


OWN_SCORES: tuple[Metric, ...] = (loss_level, held_out_level)


def _overfits(findings: Findings) -> bool:
    """Say whether the first finding is one that the training loss cannot judge."""
    return next((f.illness for f in findings if f.severity != "info"), "") == "overfitting"


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

    One-sided paired t-test on the differences of log levels (of levels, where their signs vary). A treated level
    that is not finite counts against it; an untreated one that is not finite is as bad as any. Levels below 0 are those
    of a metric that is to grow, negated.

    Example:
        >>> gain, spread, p = paired_test((1.0, 1.1, 0.9), (0.1, 0.12, 0.1))
        >>> round(gain, 2), p < 0.05
        (0.89, True)
        >>> paired_test((1.0, 1.1, 0.9), (1.0, 1.1, 0.9))[2]
        1.0
        >>> round(paired_test((-0.5, -0.52), (-1.0, -1.03))[0], 2)  # an accuracy that doubles
        0.99
    """
    pairs = list(zip(untreated, treated, strict=False))
    if len(pairs) < 2 or not all(math.isfinite(b) for _, b in pairs):
        return 0.0, 0.0, 1.0
    if any(not math.isfinite(a) for a, _ in pairs):
        worst = max([a for a, _ in pairs if math.isfinite(a)] + [b for _, b in pairs]) * 10 + 1
        pairs = [(a if math.isfinite(a) else worst, b) for a, b in pairs]
    signs = {math.copysign(1, value) if value else 0 for pair in pairs for value in pair}
    is_ratio = signs in ({1}, {-1})
    differences = [_log_gain(a, b) if is_ratio else a - b for a, b in pairs]
    centre, spread = fmean(differences), stdev(differences)
    if spread == 0:
        p = 0.0 if centre > 0 else 1.0
    else:
        p = _t_tail(centre / (spread / math.sqrt(len(pairs))), len(pairs) - 1)
    if not is_ratio:
        return centre, spread, p
    return (math.expm1(centre) if signs == {-1} else -math.expm1(-centre)), spread, p


def _log_gain(untreated: float, treated: float) -> float:
    """Return the logarithm of the factor by which a level of one sign got better."""
    return math.log(treated / untreated if treated < 0 else untreated / treated)


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

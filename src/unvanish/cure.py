"""The closed loop: diagnose a script, try treatments in short trials, keep what is verified.

    untreated run -> findings -> candidates -> successive halving -> fresh seeds against untreated -> verdict

Every trial is the user's script in a process of its own. A treatment is recommended only if it beats the untreated
run on seeds that played no part in choosing it; the repair of a mistake, if the mistake is gone and the loss falls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from .candidates import Combination, candidates, combined, is_mistake, mending, with_values
from .diagnose import diagnose
from .levels import MIN_STEPS, Outcome, facts_of, held_out_level, informative_steps, loss_level, start_level
from .paired import paired_test
from .records import Findings, finite
from .version import VERSION

FRESH_SEEDS = 3
LEAST_GAIN = 0.1  # of the untreated loss; a smaller one is not worth a change
LEAST_METRIC_GAIN = 0.02  # of the untreated level, for a metric that the user names
SIGNIFICANCE = 0.05
CUT_OFF_SHARE = 0.6  # of the steps within the time limit; treated steps may take longer, and a process has to start
RUNG_SHARES = (1.5, 1.0)  # of one run's steps, spent on each rung of the halving


NO_BUDGET = "the budget ended before a treatment could be verified; raise it with --budget"


class Request(NamedTuple):
    """One trial that is asked for."""

    treatments: Combination
    steps: int  # 0 = to the end of the script
    seed: int  # 0 = the script's own
    facts: Mapping[str, float]  # of the data, as the untreated run saw it


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
            "advice": document["advice"],
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
        if untreated.is_cut_off:
            self.length = max(int(CUT_OFF_SHARE * untreated.steps), 1)
        self.least = min(informative_steps(untreated), self.length)
        if self.score is loss_level and _overfits(state.findings) and math.isfinite(held_out_level(untreated, 0)):
            self.score, state.metric = held_out_level, "held-out loss"
        self.facts = facts_of(untreated.recording)
        state.budget, state.used = int(budget * state.length), state.length
        state.baseline = (self.score(untreated, state.length),)
        self.told(state)
        if not state.is_needed or state.error:
            return
        first = [with_values(combination, self.facts) for combination in self.candidates_for(state.findings)]
        if first and self.score is loss_level and mending(state.findings):
            self._mend(first[0])
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

    def _mend(self, repair: Combination) -> None:
        """Mend a mistake of the script on fresh seeds, look for it, and test whether the loss falls.

        What the script called its loss before is no measure of what it is afterwards: so the loss is compared with its
        own start. Nothing is put on top of the repair; what is wrong beside it shows once it is mended.
        """
        steps = min(self.length, (self.state.budget - self.state.used) // FRESH_SEEDS)
        if steps < min(MIN_STEPS, self.length):
            self.state.notes.append(NO_BUDGET)
            return
        treated = Trial(repair, steps)
        self.state.trials.append(treated)
        starts: list[float] = []
        mistakes: list[str] = []

        def level(outcome: Outcome, steps: int) -> float:
            assert outcome.recording is not None
            starts.append(start_level(outcome))
            mistakes.extend(f.illness for f in diagnose(outcome.recording) if is_mistake(f))
            return loss_level(outcome, steps)

        self._measure([(treated, seed) for seed in range(1, FRESH_SEEDS + 1)], level)
        if treated.error or mistakes:
            return
        treated.untreated = median(starts)
        gain, spread, p = paired_test(starts, treated.values)
        if p >= SIGNIFICANCE or gain < LEAST_GAIN:
            return
        self.state.winner = Winner(repair, gain, spread, p, self.code_of(repair), is_mended=True)

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
        is_whole = not self.untreated.is_cut_off  # else no trial may run to the end of the script
        ends = {trial.steps: 0 if trial.steps >= self.length and is_whole else trial.steps for trial, _ in runs}
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


OWN_SCORES: tuple[Metric, ...] = (loss_level, held_out_level)


def _overfits(findings: Findings) -> bool:
    """Say whether the first finding is one that the training loss cannot judge."""
    return next((f.illness for f in findings if f.severity != "info"), "") == "overfitting"

"""The search for a cure, on trials whose outcome is known because they are made up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests.traces import make_trace
from unvanish import Recording
from unvanish.candidates import FOR_ILLNESS, MAX_CANDIDATES, candidates, combined
from unvanish.cure import Cure, Request, RunTrials, cure
from unvanish.diagnose import diagnose
from unvanish.diagnose.ranking import ORDER
from unvanish.levels import Outcome
from unvanish.paired import paired_test
from unvanish.processes import metric_reader
from unvanish.records import Event, Finding, Findings
from unvanish.treatments import TREATMENTS

STEPS = 600


def one_by_one(run: Callable[[Request], Outcome]) -> RunTrials:
    """Return trials that run one after the other."""
    return lambda requests: map(run, requests)


def trials(levels: dict[tuple[str, ...], float], *, noise: float = 0.05, seed: int = 0) -> RunTrials:
    """Return trials of a script whose units die: the loss each combination keeps to; 1 for others."""
    rng = np.random.default_rng(seed)

    def run(request: Request) -> Outcome:
        count = request.steps or STEPS
        level = levels.get(request.treatments, 1.0) * math.exp(noise * rng.standard_normal())
        dead = {"dead_share": [1.0, 0.2, 0.0]} if not request.treatments else {}
        return Outcome(Recording({}, (make_trace(level, steps=count, measures=dead),)))

    return one_by_one(run)


def test_a_cure_is_found_and_verified() -> None:
    """The treatment that mends the run wins, within the budget, on seeds that played no part in choosing it."""
    state = cure(trials({("he-init",): 0.01}))
    assert state.winner is not None
    assert state.winner.treatments == ("he-init",)
    assert state.winner.gain == pytest.approx(0.99, abs=0.01)
    assert not state.winner.is_mended
    assert state.winner.p < 0.05
    assert state.used <= state.budget == 6 * STEPS
    assert state.trials[-1].seeds == (1, 2, 3)


@pytest.mark.parametrize("is_mended", [True, False])
def test_a_mistake_is_judged_by_its_own_start(is_mended: bool) -> None:
    """Mended, the loss may be higher than the wrong one was: the mistake has to be gone, and the loss to fall."""

    def run(request: Request) -> Outcome:
        count = request.steps or STEPS
        losses = np.geomspace(1.0, 0.1, count) if request.treatments else np.full(count, 0.01)
        is_forgotten = not request.treatments or not is_mended
        facts = {"uncleared_steps": (count - 1) * is_forgotten, "checked_steps": count - 1}
        return Outcome(Recording({}, (make_trace(losses, steps=count, facts=facts),)))

    state = cure(one_by_one(run))
    assert [finding.illness for finding in state.findings] == ["missing-zero-grad"]
    assert (state.winner is not None) == is_mended
    assert state.used <= state.budget
    if state.winner is not None:
        assert state.winner.treatments == ("zero-grad",)
        assert state.winner.is_mended


def test_trials_of_a_run_that_was_cut_off_end_by_themselves() -> None:
    """What came as far as the time limit allows is followed by trials of fewer steps, never by whole runs."""
    asked: list[int] = []
    inner = trials({("he-init",): 0.01})

    def run(requests: Sequence[Request]) -> Iterator[Outcome]:
        for request, outcome in zip(requests, inner(requests), strict=True):
            asked.append(request.steps)
            yield outcome if request.treatments or request.seed else replace(outcome, is_cut_off=True)

    state = cure(run)
    assert state.winner is not None
    assert asked[0] == 0
    assert all(0 < steps <= 0.6 * STEPS for steps in asked[1:])


def test_a_healthy_run_needs_nothing() -> None:
    """One run of the script is all that is spent on a healthy one."""

    def run(request: Request) -> Outcome:
        assert not request.treatments
        return Outcome(Recording({}, (make_trace(steps=STEPS),)))

    state = cure(one_by_one(run))
    assert not state.is_needed
    assert state.winner is None
    assert state.used == STEPS


def test_treatments_that_do_nothing_rarely_win() -> None:
    """Of many searches in which nothing helps, at most 5 % recommend something (3 standard errors allowed)."""
    wins = sum(cure(trials({}, noise=0.3, seed=seed)).winner is not None for seed in range(200))
    assert wins / 200 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)


def test_a_trial_that_fails_is_told_and_the_rest_go_on() -> None:
    """An error in one trial is kept with it; a search in which all fail ends without a winner."""

    def run(requests: Sequence[Request]) -> Iterator[Outcome]:
        for request in requests:
            yield Outcome(None, error="it crashed") if request.treatments else next(iter(trials({})([request])))

    heard: list[int] = []
    state = cure(run, told=lambda so_far: heard.append(len(so_far.trials)))
    assert state.winner is None
    assert {trial.error for trial in state.trials} == {"it crashed"}
    assert {trial.stopped for trial in state.trials} == {"failed"}
    assert heard
    assert isinstance(state, Cure)
    assert state.to_dict()["winner"] is None


@given(st.lists(st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6)), min_size=2, max_size=6))
def test_the_paired_test_is_student_s(pairs: list[tuple[float, float]]) -> None:
    """The p value is that of SciPy's one-sided paired t-test on the logarithms."""
    untreated, treated = zip(*pairs, strict=True)
    differences = np.log(untreated) - np.log(treated)
    _, _, p = paired_test(untreated, treated)
    if np.std(differences) > 1e-9 * max(np.abs(differences).max(), 1e-9):
        truth = stats.ttest_1samp(differences, 0, alternative="greater").pvalue
        assert p == pytest.approx(truth, abs=1e-4)


def test_what_is_not_finite_counts_against_the_treatment_only() -> None:
    """A treated run that blows up never wins; an untreated one that does can be beaten."""
    assert paired_test((1.0, 1.0, 1.0), (0.1, math.inf, 0.1))[2] == 1.0
    assert paired_test((math.inf, math.inf, 1.0), (0.1, 0.1, 0.1))[2] < 0.05


def test_candidates_exist_and_are_bounded() -> None:
    """Every candidate names treatments that exist, every illness that is listed exists, and there are not too many."""
    assert set(FOR_ILLNESS) <= set(ORDER)
    for combinations in FOR_ILLNESS.values():
        for combination in combinations:
            assert all(treatment.partition("=")[0] in TREATMENTS for treatment in combination)
    findings = tuple(Finding(illness, "critical", "", "") for illness in ORDER)
    assert len(candidates(Findings({}, findings, (), "findings"))) == MAX_CANDIDATES


def test_combinations_do_not_contradict_themselves() -> None:
    """Two initialisations or two rates are never applied together."""
    assert combined(("he-init",), ("lsuv-init", "clip-norm=1")) == ("he-init", "clip-norm=1")
    assert combined(("lower-lr=0.1",), ("raise-lr=10",)) == ("lower-lr=0.1",)


def test_trials_of_a_run_that_fails_last_past_its_failure() -> None:
    """A shorter trial could not tell whether a treatment helps; the verification has as many steps too."""
    failure = 200

    def run(request: Request) -> Outcome:
        count = request.steps or STEPS
        losses = np.geomspace(1.0, 0.1, count)
        if not request.treatments:
            losses[failure:] = math.nan
        return Outcome(Recording({}, (make_trace(losses, steps=count),)))

    state = cure(one_by_one(run))
    assert state.winner is not None
    assert state.used <= state.budget
    assert min(trial.steps for trial in state.trials) > failure
    assert all(math.isinf(trial.untreated) for trial in state.trials)


def at_the_end(levels: dict[tuple[str, ...], float]) -> RunTrials:
    """Return trials of a script that prints its metric after its last step only."""
    rng = np.random.default_rng(0)

    def run(request: Request) -> Outcome:
        (outcome,) = trials(levels)([request])
        is_whole = not request.steps
        level = levels.get(request.treatments, 1.0) + 0.001 * rng.standard_normal()
        printed = f"error {level:.4f}".encode() if is_whole else b""
        return Outcome(outcome.recording, printed, printed_at=((request.steps or STEPS, 0),))

    return one_by_one(run)


@pytest.mark.parametrize(("budget", "is_found"), [(12.0, True), (5.0, False)])
def test_a_metric_that_comes_at_the_end_takes_whole_runs(budget: float, is_found: bool) -> None:
    """Short trials are then ranked by the training loss; without the budget for whole runs nothing is recommended."""
    score = metric_reader("error ([0-9.]+)", is_higher_better=False)
    state = cure(at_the_end({("he-init",): 0.01}), budget=budget, score=score, metric="error")
    assert (state.winner is not None) == is_found
    assert state.used <= state.budget
    assert "printed at the end only" in state.notes[0]
    if is_found:
        assert state.trials[-1].steps == STEPS


def test_what_was_printed_by_a_step() -> None:
    """The text of the first steps ends where the step ended; that of all steps has what came after the last one."""
    recording = Recording({}, (make_trace(steps=10),))
    outcome = Outcome(recording, b"one two after", printed_at=((4, 4), (10, 8)))
    assert [outcome.text(steps) for steps in (1, 4, 5, 9)] == ["one ", "one ", "one two ", "one two "]
    assert outcome.text(10) == outcome.text() == "one two after"


def test_an_interrupted_search_keeps_what_it_has() -> None:
    """After Ctrl-C the trials so far are there, and no winner."""

    def run(requests: Sequence[Request]) -> Iterator[Outcome]:
        for request in requests:
            if request.seed:
                raise KeyboardInterrupt
            yield next(iter(trials({("he-init",): 0.01})([request])))

    state = cure(run)
    assert state.is_interrupted
    assert state.winner is None
    assert any(trial.values for trial in state.trials)
    assert state.to_dict()["is_interrupted"] is True


def test_arithmetic_that_left_the_finite_numbers_is_made_safe_in_every_trial() -> None:
    """What a known operation broke is mended first: a lower rate alone might only meet log(0) later."""
    event = Event(5, "non-finite-loss", {"op": "Log", "smallest_input": 0.0, "layer": "log"})
    losses = np.concatenate([np.ones(5), np.full(95, np.nan)])
    findings = diagnose(Recording({}, (make_trace(losses, steps=100, events=(event,)),)))
    assert findings[0].treatments == ("safe-math",)
    tried = candidates(findings)
    assert tried[:2] == (("safe-math",), ("safe-math", "lower-lr=0.1"))
    assert all(combination[0] == "safe-math" for combination in tried)

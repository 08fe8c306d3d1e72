"""The committee machine: its steps are those of plain loops, and coupled replicas solve what a single one cannot."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unvanish import OptionError
from unvanish.replicas.committee import (
    Committee,
    Patterns,
    _best_of,
    correct,
    flip_energy,
    random_patterns,
    train_committee,
    units_to_correct,
    wrong_patterns,
)
from unvanish.replicas.kicks import additive


def sign(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, 1.0, -1.0)


def answer(weights: np.ndarray, x: np.ndarray) -> float:
    """Return what a committee answers to one input, in float64."""
    return float(sign(sign(weights @ x).sum()))


def errors(weights: np.ndarray, inputs: np.ndarray, labels: np.ndarray) -> int:
    return sum(answer(weights, x) != label for x, label in zip(inputs, labels, strict=True))


def chosen_units(sums: np.ndarray, label: float) -> list[int]:
    """Return the units to correct for one pattern, found by trying: wrong ones in order until the majority is right."""
    votes, chosen = sign(sums), []
    for unit in sorted((k for k in range(len(sums)) if sums[k] * label < 0), key=lambda k: abs(sums[k])):
        if votes.sum() * label > 0:
            break
        votes[unit] = label
        chosen.append(unit)
    return chosen


def step(latent: np.ndarray, inputs: np.ndarray, labels: np.ndarray, rate: float) -> np.ndarray:
    """Return the latent weights of one committee after a batch, pattern by pattern."""
    weights, after = sign(latent), latent.copy()
    for x, label in zip(inputs, labels, strict=True):
        for unit in chosen_units(weights @ x, label):
            after[unit] += rate * label * x
    return after


def random_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return latent weights of three committees of five units, and a batch for each."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(3, 5, 11, generator=generator, dtype=torch.float64)
    inputs = torch.randn(3, 30, 11, generator=generator, dtype=torch.float64).sign()
    return latent, inputs, torch.randn(3, 30, generator=generator, dtype=torch.float64).sign()


@given(st.lists(st.integers(-15, 15).map(lambda i: 2 * i + 1), min_size=5, max_size=5), st.sampled_from([-1.0, 1.0]))
def test_the_margin_rule_picks_the_fewest_units_closest_to_right(sums: list[int], label: float) -> None:
    """What is corrected is what trying finds: nothing where the majority is right, else the least that turns it."""
    found = units_to_correct(torch.tensor(sums, dtype=torch.float32).view(1, 5, 1), torch.tensor([[[label]]]))
    assert np.flatnonzero(found.flatten()).tolist() == sorted(chosen_units(np.array(sums, float), label))


def test_a_step_is_that_of_plain_loops() -> None:
    """A batch changes the latent weights of each replica as pattern after pattern would, from the same weights."""
    latent, inputs, labels = random_batch(0)
    expected = [step(*(part.numpy() for part in each), 2.0) for each in zip(latent, inputs, labels, strict=True)]
    correct(latent, inputs, labels, 2.0)
    torch.testing.assert_close(latent, torch.tensor(np.stack(expected)))


def test_wrong_patterns_are_counted() -> None:
    """The count of each committee is that of plain loops."""
    latent, inputs, labels = random_batch(1)
    found = wrong_patterns(latent.sign(), Patterns(inputs[0], labels[0]))
    expected = [errors(each.sign().numpy(), inputs[0].numpy(), labels[0].numpy()) for each in latent]
    assert found.tolist() == expected
    assert len(set(expected)) > 1


def test_training_is_that_of_plain_loops() -> None:
    """Four epochs with kicks give the weights of a float64 training that is written from the formulas."""
    patterns = random_patterns(1.5, inputs=21, units=3, seed=3)
    # a strength at which no latent weight comes to exactly zero, where rounding would choose the sign
    found = train_committee(
        patterns, 3, 5, strength=0.7123, gamma=additive(0.1, 0.05), rate=1.5, batch=16, epochs=4, seed=5
    )
    inputs, labels = (part.double().numpy() for part in patterns)
    generator = torch.Generator().manual_seed(5)
    start = torch.randint(2, (1, 3, 21), generator=generator).double().numpy() * 2 - 1
    latent = np.repeat(start, 5, 0)
    best = (len(labels) + 1, start[0], 0)
    for epoch in range(4):
        orders = torch.rand(5, len(labels), generator=generator).argsort(1).numpy()
        for begin in range(0, len(labels), 16):
            rows = orders[:, begin : begin + 16]
            latent = np.stack([step(h, inputs[own], labels[own], 1.5) for h, own in zip(latent, rows, strict=True)])
            total = sign(latent).sum(0)
            latent = latent + 0.7123 * (np.tanh((0.1 + 0.05 * epoch) * total) - sign(latent))
        for weights in (*sign(latent), sign(sign(latent).sum(0))):
            best = min(best, (errors(weights, inputs, labels), weights, epoch + 1), key=lambda each: each[0])
    assert (found.errors, found.epochs) == (best[0], best[2])
    assert found.weights.tolist() == best[1].tolist()
    assert not found.is_solved  # at this load there is hardly a solution: all four epochs were compared


@pytest.mark.parametrize("seed", range(3))
def test_coupled_replicas_solve_what_uncoupled_ones_do_not(seed: int) -> None:
    """At load .48 seven coupled replicas get every pattern right, and seven independent ones do not."""
    patterns = random_patterns(0.48, inputs=101, seed=seed)
    coupled = train_committee(patterns, gamma=additive(0.05, 0.002), epochs=400, seed=seed)
    uncoupled = train_committee(patterns, form=None, epochs=400, seed=seed)
    assert coupled.is_solved
    assert errors(coupled.weights.double().numpy(), *(part.double().numpy() for part in patterns)) == 0
    assert not uncoupled.is_solved
    assert uncoupled.errors > 4


@pytest.mark.parametrize("replicas", [1, 3])
def test_replicas_that_agree_are_not_kicked_by_the_corrected_form(replicas: int) -> None:
    """One replica, or three that start equal and see the whole set at once, train as one without kicks."""
    patterns = random_patterns(1.0, inputs=21, units=3)
    options = {"units": 3, "epochs": 5, "batch": len(patterns.labels)}
    kicked = train_committee(patterns, replicas=replicas, form="corrected", **options)
    alone = train_committee(patterns, replicas=1, form=None, **options)
    assert kicked.weights.tolist() == alone.weights.tolist()
    assert train_committee(patterns, replicas=replicas, **options).weights.tolist() != alone.weights.tolist()


def test_training_stops_at_the_first_solution() -> None:
    """The epochs are those of the first epoch after which nothing is wrong; one epoch less finds nothing."""
    patterns = random_patterns(0.3, inputs=51)
    found = train_committee(patterns, epochs=300)
    assert found.is_solved
    assert 1 < found.epochs < 300
    before = train_committee(patterns, epochs=found.epochs - 1)
    assert not before.is_solved
    assert train_committee(patterns, epochs=found.epochs).weights.tolist() == found.weights.tolist()


def test_the_majority_counts_only_where_replicas_are_coupled() -> None:
    """Three committees of one unit, each wrong about another pattern, are right together."""
    inputs = torch.ones(3, 3) - 2 * torch.eye(3)
    patterns = Patterns(inputs, torch.ones(3))
    weights = inputs.view(3, 1, 3).clone()  # each sums up to -1 or more on two patterns, and their majority to 1
    assert wrong_patterns(weights, patterns).tolist() == [2, 2, 2]
    assert _best_of(weights, patterns, 4, with_centre=True) == Committee(ANY, 0, 4, True)
    assert _best_of(weights, patterns, 4, with_centre=False) == Committee(ANY, 2, 4, False)


class _Any:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


ANY = _Any()


def test_separate_starts_differ() -> None:
    """With separate starts the replicas are other committees than with a shared one."""
    patterns = random_patterns(1.0, inputs=21, units=3)
    found = [train_committee(patterns, 3, epochs=1, init=init).weights.tolist() for init in ("shared", "separate")]
    assert found[0] != found[1]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.01, 0.1, 1.0]))
def test_the_local_energy_has_known_ends(seed: int, share: float) -> None:
    """With no weight flipped it is the error; with all flipped every answer turns; between, a share of patterns."""
    patterns = random_patterns(0.5, inputs=21, units=3, seed=seed)
    weights = torch.randn(3, 21, generator=torch.Generator().manual_seed(seed)).sign()
    own = int(wrong_patterns(weights[None], patterns)) / len(patterns.labels)
    found = flip_energy(weights, patterns, share, draws=5)
    expected = {0.0: own, 1.0: 1 - own}.get(share, found)
    assert math.isclose(found, expected)
    assert 0 <= found <= 1


def test_the_local_energy_flips_what_it_says() -> None:
    """One unit of three weights, one of them flipped, on patterns that each depend on one: the mean is known.

    Flipping weight i turns the sum of a pattern from 3 to 1, which is right; of one from 1 to -1 or 3.
    """
    weights = torch.ones(1, 3)
    patterns = Patterns(torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, -1.0]]), torch.ones(2))
    # the second pattern sums up to 1; flipping weight 0 or 1 makes it -1: wrong in two of three draws
    assert flip_energy(weights, patterns, 1 / 3, draws=20000) == pytest.approx(1 / 3, abs=0.01)


def test_random_patterns_are_signs_as_many_as_asked() -> None:
    """Their number is the load times the weights; equal seeds give equal patterns, others do not."""
    patterns = random_patterns(0.4, 101, 5, seed=2)
    assert patterns.inputs.shape == (202, 101)
    assert patterns.inputs.abs().eq(1).all()
    assert patterns.labels.abs().eq(1).all()
    assert abs(patterns.inputs.mean()) < 5 / math.sqrt(patterns.inputs.numel())
    assert torch.equal(patterns.inputs, random_patterns(0.4, 101, 5, seed=2).inputs)
    assert not torch.equal(patterns.inputs, random_patterns(0.4, 101, 5, seed=3).inputs)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: random_patterns(0.0), r"random_patterns\(\): load: found 0.0, expected a number above 0"),
        (lambda: random_patterns(0.5, 100), r"random_patterns\(\): inputs: found 100, expected an odd number"),
        (lambda: random_patterns(0.5, 11, 4), r"random_patterns\(\): units: found 4, expected an odd number"),
        (lambda: train_committee(random_patterns(0.5, 11), 2), r"train_committee\(\): units: found 2, expected an odd"),
        (lambda: train_committee(random_patterns(0.5, 11), batch=0), r"batch: found 0, expected at least 1"),
        (lambda: train_committee(random_patterns(0.5, 11), replicas=0), r"replicas: found 0, expected at least 1"),
        (lambda: train_committee(random_patterns(0.5, 11), form="soft"), r"form: found 'soft', expected 'simple'"),
        (lambda: train_committee(random_patterns(0.5, 11), gamma=lambda _: 0.0), r"gamma: found 0.0, expected a numb"),
        (lambda: train_committee(Patterns(torch.ones(3, 4), torch.ones(3))), r"shape\[1\]: found 4, expected an odd"),
        (lambda: train_committee(Patterns(torch.zeros(3, 5), torch.ones(3))), r"patterns: found other numbers than"),
        (lambda: flip_energy(torch.ones(1, 3), random_patterns(0.5, 3, 1), 2.0), r"share: found 2.0, expected a numb"),
    ],
)
def test_wrong_calls_are_refused(make: Callable[[], object], words: str) -> None:
    """What cannot be used is named, with what was expected."""
    with pytest.raises(OptionError, match=words):
        make()

"""Couplings: each force is its formula, obeys the laws that are known of it, and stops at what is not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.test_replicas import CASES, OPTIMIZERS, assert_same, cnn, column, mlp, train_together, weights
from unvanish import Coupling, OptionError, Replicas
from unvanish.replicas import Automatic, exponential
from unvanish.replicas.coupling import Force

numbers = st.floats(-100, 100)
shares = st.floats(0, 1)
FORCES: tuple[Force, ...] = ("elastic", "tanh", "leader", "centre", "outer")


def nesterov(centre: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(centre, lr=0.7, momentum=0.9, nesterov=True)


def couple(replicas: Replicas, strength: Any = 0.3, force: Force | None = "elastic", **options: Any) -> Coupling:
    """Return a coupling of any force, with an outer optimiser where one is needed."""
    return Coupling(replicas, strength, force=force, outer=nesterov if force == "outer" else None, **options)


def losses_of(coupling: Coupling, *values: float) -> Tensor | None:
    """Return losses where the force asks for them: the last replica leads if none are given."""
    n = coupling.replicas.n
    return torch.tensor(values or [float(n - i) for i in range(n)]) if coupling.force == "leader" else None


def centre_of(coupling: Coupling) -> np.ndarray:
    """Return the weights of the coupling's centre."""
    return np.concatenate([p.detach().flatten().numpy() for p in coupling.centre().parameters()])


def set_centre(coupling: Coupling, value: Tensor) -> None:
    """Put the centre of a coupling of one-layer replicas somewhere."""
    coupling.load_state_dict({**coupling.state_dict(), "centre": {"weight": value}})


# --- each force is its formula


def walk(force: Force, strength: float, steps: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where separate nets start, and where replicas and centre are after some steps of coupling alone."""
    torch.manual_seed(0)
    replicas = Replicas(mlp().double(), n=4, init="separate")
    start = weights(replicas)
    coupling = couple(replicas, strength, force)
    for _ in range(steps):
        coupling.step(losses_of(coupling))
    return start, weights(replicas), centre_of(coupling)


def test_the_leader_is_followed() -> None:
    """Each replica closes a share of its gap to the one with the lowest loss, which stays."""
    start, after, _ = walk("leader", 0.3)
    np.testing.assert_allclose(after, start[3] + 0.7**6 * (start - start[3]), rtol=1e-12, atol=1e-14)
    assert np.array_equal(after[3], start[3])


def test_replicas_meet_their_centre_in_turns() -> None:
    """Replica after replica gives a share of its gap to a centre that starts as their mean (Zhang et al. 2015)."""
    w, after, found = walk("centre", 0.3)
    c = w.mean(0)
    for _ in range(6):
        for a in range(4):
            gap = w[a] - c
            w[a], c = w[a] - 0.3 * gap, c + 0.3 * gap
    np.testing.assert_allclose(after, w, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found, c, rtol=1e-12, atol=1e-14)


def test_the_outer_optimiser_moves_the_centre() -> None:
    """The centre walks by Nesterov's momentum along its distance to the mean; replicas close a share of their gap."""
    w, after, found = walk("outer", 0.3)
    c, velocity = w.mean(0), np.zeros(w.shape[1])
    for _ in range(6):
        gradient = c - w.mean(0)
        velocity = 0.9 * velocity + gradient
        c = c - 0.7 * (gradient + 0.9 * velocity)
        w = w + 0.3 * (c - w)
    np.testing.assert_allclose(after, w, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(found, c, rtol=1e-10, atol=1e-13)


def test_the_leader_is_chosen_by_all_losses_since_the_last_pull() -> None:
    """Losses add up over skipped steps and begin anew after a pull; one that is nan never leads."""
    replicas = column(0.0, 1.0, 2.0)
    coupling = Coupling(replicas, 1.0, every=2, force="leader")
    for losses in ([1.0, 5.0, 9.0], [9.0, 2.0, math.nan]):
        coupling.step(torch.tensor(losses))
    assert weights(replicas)[:, 0].tolist() == [1.0, 1.0, 1.0]
    with torch.no_grad():
        replicas.stacked.weight[:, 0, 0] = torch.tensor([0.0, 1.0, 2.0])
    for losses in ([3.0, 3.0, 1.0], [3.0, 3.0, 1.0]):
        coupling.step(torch.tensor(losses))
    assert weights(replicas)[:, 0].tolist() == [2.0, 2.0, 2.0]


# --- laws


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-15), (torch.float32, 1e-6)])
def test_linear_synchronous_forces_add_up_to_nothing(dtype: torch.dtype, close: float) -> None:
    """L1: in every layer the moves of the replicas sum to zero, relative to the sum of their sizes."""
    torch.manual_seed(0)
    replicas = Replicas(cnn().to(dtype), n=5, init=lambda i: cnn().to(dtype))
    before = {name: p.detach().clone() for name, p in replicas.named_parameters()}
    Coupling(replicas, 0.3).step()
    for name, p in replicas.named_parameters():
        moves = (p.detach() - before[name]).double()
        if moves.abs().sum() > 0:  # norms start equal
            assert float(moves.sum(0).norm() / moves.norm()) <= close, name


@given(st.lists(numbers, min_size=1, max_size=6), shares, numbers)
def test_what_replicas_give_their_centre_takes(values: list[float], strength: float, centre: float) -> None:
    """With a centre of its own the sum of all replicas and the centre stays."""
    replicas = column(*values)
    coupling = Coupling(replicas, strength, force="centre")
    set_centre(coupling, torch.tensor([[centre]], dtype=torch.float64))
    coupling.step()
    assert weights(replicas).sum() + centre_of(coupling)[0] == pytest.approx(sum(values) + centre, rel=1e-12, abs=1e-11)


def test_another_strength_may_be_set() -> None:
    """From then on it counts; what is no share is refused, and the old one stays."""
    replicas = column(0.0, 2.0)
    coupling = Coupling(replicas, 0.5)
    with pytest.raises(OptionError, match=r"strength: found 1\.5, expected a number from 0 to 1"):
        coupling.strength = 1.5
    coupling.step()
    assert weights(replicas).ravel().tolist() == [0.5, 1.5]
    coupling.strength = 1.0
    coupling.step()
    assert weights(replicas).ravel().tolist() == [1.0, 1.0]
    assert coupling.strength == 1.0


@pytest.mark.parametrize("force", FORCES)
def test_strength_zero_and_equal_replicas_change_no_bit(force: Force) -> None:
    """Nothing is pulled at strength 0, and equal replicas that stand at their centre have nowhere to go.

    The mean of n equal numbers may differ from them in the last bits, of which a pull of a tenth leaves none.
    """
    for replicas, strength in ((Replicas(mlp(), n=3, init="separate"), 0.0), (Replicas(mlp(), n=3), 0.1)):
        before = weights(replicas)
        coupling = couple(replicas, strength, force)
        for _ in range(3):
            coupling.step(losses_of(coupling))
        assert np.array_equal(before, weights(replicas))


@pytest.mark.parametrize("force", FORCES)
@pytest.mark.parametrize("n", [3, 7, 16])
def test_a_full_pull_leaves_equal_replicas_equal(force: Force, n: int) -> None:
    """They end in the same bits, within rounding of where they were."""
    replicas = Replicas(mlp(), n=n)
    before = weights(replicas)
    coupling = couple(replicas, 1.0, force)
    coupling.step(losses_of(coupling))
    after = weights(replicas)
    assert (after == after[:1]).all()
    np.testing.assert_allclose(after, before, rtol=4 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("is_after", [True, False])
@pytest.mark.parametrize(("n", "curvature", "strength"), [(3, 1.0, 0.0), (3, 1.0, 0.3), (5, 2.0, 0.1), (2, 0.5, 0.6)])
def test_stationary_variances_of_both_orders(n: int, curvature: float, strength: float, is_after: bool) -> None:
    """L4: variance of the centre and spread on a quadratic, with the pull after the step and at the old point.

    With A = rate times curvature, noise of variance 1 and pull k, the centre has rate² / (n A (2 - A)) in both orders.
    The spread is (1 - 1/n) rate² times (1 - k)² / (1 - (1 - k)² (1 - A)²) with the pull after the step, and times
    1 / (B (2 - B)) with B = A + k where the pull is taken before it.
    """
    size, rate = 20_000, 0.3
    torch.manual_seed(0)
    replicas = Replicas(nn.Linear(size, 1, bias=False), n=n)
    with torch.no_grad():
        replicas.stacked.weight.zero_()
    coupling = Coupling(replicas, strength)
    optimizer = torch.optim.SGD(replicas.parameters(), rate)
    for _ in range(60):
        w = replicas.stacked.weight
        optimizer.zero_grad()
        (0.5 * curvature * w.square() + torch.randn_like(w) * w).sum().backward()
        for step in (optimizer.step, coupling.step) if is_after else (coupling.step, optimizer.step):
            step()
    a, keep = rate * curvature, (1 - strength) ** 2
    b = a + strength
    spread = keep / (1 - keep * (1 - a) ** 2) if is_after else 1 / (b * (2 - b))
    after = weights(replicas)
    centre = after.mean(0)
    # 20,000 draws know a variance to sqrt(2/20,000) = 1 %
    assert centre.var() == pytest.approx(rate**2 / (n * a * (2 - a)), rel=0.04)
    assert ((after - centre) ** 2).mean() == pytest.approx((1 - 1 / n) * rate**2 * spread, rel=0.04)


@pytest.mark.parametrize("pull", [0.1, 1.0, 2.0, 3.0])
def test_replicas_that_see_each_other_move_have_a_hidden_rate(pull: float) -> None:
    """L5: of two replicas updated in turns the consensus walks 4/(4 - pull) times too far; synchronous ones do not.

    Two weights under the same constant push, in turns as the first text of the idea has it, in plain numbers: the
    gap shrinks by (1 - pull/2)² a round. `Coupling` under the same push walks at the push itself.
    """
    push, w = 1.0, [0.3, -0.2]
    for _ in range(300):
        before = w[0] + w[1], w[0] - w[1]
        for a in (0, 1):
            w[a] += push + pull * (sum(w) / 2 - w[a])
    assert (w[0] + w[1] - before[0]) / 2 == pytest.approx(push * 4 / (4 - pull), rel=1e-6)
    apart = [0.5, -0.5]
    for a in (0, 1):
        apart[a] += pull * (sum(apart) / 2 - apart[a])
    assert apart[0] - apart[1] == pytest.approx((1 - pull / 2) ** 2, abs=1e-12)
    replicas = column(0.3, -0.2)
    coupling = Coupling(replicas, min(pull, 1.0))
    for _ in range(20):
        with torch.no_grad():
            replicas.stacked.weight += push
        coupling.step()
    assert weights(replicas).mean() == pytest.approx(0.05 + 20 * push, rel=1e-12)


def sweep(p: int, rate: float, pull: float, *, is_after: bool) -> np.ndarray:
    """Return the linear map of one round of p replicas and their centre on a quadratic of curvature 1.

    Each column of the weights is one unit vector of (replica 1, ..., replica p, centre).
    """
    replicas = Replicas(nn.Linear(p + 1, 1, bias=False).double(), n=p)
    coupling = Coupling(replicas, pull, force="centre")
    units = torch.eye(p + 1, dtype=torch.float64)
    with torch.no_grad():
        replicas.stacked.weight[:, 0] = units[:p]
    set_centre(coupling, units[p:])
    optimizer = torch.optim.SGD(replicas.parameters(), rate)
    (0.5 * replicas.stacked.weight.square()).sum().backward()
    for step in (optimizer.step, coupling.step) if is_after else (coupling.step, optimizer.step):
        step()
    return np.vstack([weights(replicas), centre_of(coupling)])


def radius(matrix: np.ndarray) -> float:
    return float(np.abs(np.linalg.eigvals(matrix)).max())


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8, 16, 64])
def test_stability_region_of_elastic_averaging(p: int) -> None:
    """L7: with the gradient of the old point, stable if and only if 0 <= a <= (4 - 2 rate)/(4 - rate), whatever p.

    Zhang, Choromanska & LeCun 2015, section 3.1, by the eigenvalues of our own map. Two replicas are stable a little
    beyond it.
    """
    for rate in (0.05, 0.5, 1.0, 1.5, 1.95):
        bound = (4 - 2 * rate) / (4 - rate)
        for share in (0.0, 0.3, 0.9, 1.0):
            assert radius(sweep(p, rate, share * bound, is_after=False)) <= 1 + 1e-7, (rate, share)
        if p != 2:
            assert radius(sweep(p, rate, min(1.03 * bound, 1.0), is_after=False)) > 1 + 1e-4, rate


@pytest.mark.parametrize("p", [1, 2, 5, 16])
def test_a_pull_after_the_step_is_always_stable(p: int) -> None:
    """With the pull after the step, as `Coupling.step` is meant, no strength up to 1 is unstable that SGD is not."""
    for rate in (0.05, 0.5, 1.0, 1.5, 1.95):
        for pull in (0.01, 0.3, 0.7, 1.0):
            assert radius(sweep(p, rate, pull, is_after=True)) <= 1 + 1e-7, (rate, pull)


@pytest.mark.parametrize("n", [1, 3])
def test_known_values_of_diloco(n: int) -> None:
    """L8: weights at 1 under gradient 2, inner SGD of rate 1, outer SGD of rate 2, in two fragments that take turns.

    The values are those of the tests of torchft (test_fixtures), without delay: a fragment is set each six steps.
    """
    fragments = [column(*[1.0] * n) for _ in range(2)]
    couplings = [Coupling(each, 1.0, force="outer", outer=lambda c: torch.optim.SGD(c, lr=2.0)) for each in fragments]
    inner = [torch.optim.SGD(each.parameters(), lr=1.0) for each in fragments]
    seen: list[dict[int, float]] = [{}, {}]
    for step in range(1, 16):
        for which, optimizer in enumerate(inner):
            fragments[which].stacked.weight.grad = torch.full_like(fragments[which].stacked.weight, 2.0)
            optimizer.step()
            if step % 6 == (3, 0)[which]:
                couplings[which].pull(1.0)
                (value,) = set(weights(fragments[which])[:, 0].tolist())
                seen[which][step] = value
    assert seen == [{3: -11, 9: -35, 15: -59}, {6: -23, 12: -47}]


# --- settings that are other methods


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 8, 7, dtype=torch.float64), torch.randint(3, (3, 8))


def trained(coupling: Callable[[Replicas], Coupling], steps: int, init: Any = "shared") -> tuple[Replicas, Coupling]:
    """Train three replicas on batches of their own with momentum."""
    torch.manual_seed(0)
    replicas = Replicas(mlp().double(), n=3, init=init)
    optimizer = OPTIMIZERS["sgd"](replicas.parameters())
    coupled = coupling(replicas)
    for _ in range(steps):
        x, y = batch()
        optimizer.zero_grad()
        losses = replicas.losses(F.cross_entropy, x, y, batches="separate")
        losses.sum().backward()
        optimizer.step()
        coupled.step(losses)
    return replicas, coupled


def trained_by_hand(steps: int, average_every: int) -> list[nn.Module]:
    """Train three plain models on the same batches, and set them to their mean each so many steps."""
    torch.manual_seed(0)
    first = mlp().double()
    models = [Replicas(first, n=1).replica(0) for _ in range(3)]
    optimizers = [OPTIMIZERS["sgd"](model.parameters()) for model in models]
    for step in range(1, steps + 1):
        x, y = batch()
        for model, optimizer, xi, yi in zip(models, optimizers, x, y, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(xi), yi).backward()
            optimizer.step()
        if step % average_every == 0:
            with torch.no_grad():
                for each in zip(*(model.parameters() for model in models), strict=True):
                    average = torch.stack(each).mean(0)
                    for p in each:
                        p.copy_(average)
    return models


def test_full_strength_now_and_then_is_local_sgd() -> None:
    """Strength 1 each H steps is what plain models do that are averaged each H steps (Stich 2019)."""
    replicas, _ = trained(lambda r: Coupling(r, 1.0, every=4), 10)
    for i, model in enumerate(trained_by_hand(10, average_every=4)):
        assert_same(replicas.replica(i), model, rtol=1e-10, atol=1e-13)


def test_an_outer_optimiser_of_rate_one_is_local_sgd() -> None:
    """L8: DiLoCo with outer rate 1 and no momentum sets the replicas to their mean."""
    local, _ = trained(lambda r: Coupling(r, 1.0, every=4), 12)
    outer, coupling = trained(
        lambda r: Coupling(r, 1.0, every=4, force="outer", outer=lambda c: torch.optim.SGD(c, lr=1.0)), 12
    )
    for i in range(3):
        assert_same(local.replica(i), outer.replica(i), rtol=1e-10, atol=1e-13)
    assert_same(coupling.centre(), outer.centre(), rtol=1e-12, atol=1e-14)


def test_the_centre_of_uncoupled_replicas_is_a_soup() -> None:
    """Uncoupled, the centre is the mean of the weights of plain models (Wortsman et al. 2022)."""
    replicas, coupling = trained(lambda r: Coupling(r, force=None), 10)
    models = trained_by_hand(10, average_every=99)
    for soup in (replicas.centre(), coupling.centre()):
        for p, *parts in zip(soup.parameters(), *(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(p, torch.stack(parts).mean(0), rtol=1e-10, atol=1e-13)


def test_uncoupled_replicas_predict_as_an_ensemble() -> None:
    """Uncoupled, the ensemble's prediction is the mean of those of plain models."""
    replicas, _ = trained(lambda r: Coupling(r, force=None), 10)
    x = torch.randn(5, 7, dtype=torch.float64)
    mean = torch.stack([model(x) for model in trained_by_hand(10, average_every=99)]).mean(0)
    torch.testing.assert_close(replicas.predict(x, "ensemble"), mean.detach(), rtol=1e-10, atol=1e-13)


def test_without_compounding_a_pull_is_the_strength_itself() -> None:
    """With compound=False each tenth step is w <- 0.99 w + 0.01 c, as PAPA does (Jolicoeur-Martineau et al. 2024)."""
    replicas = column(1.0, 2.0, 6.0)
    coupling = Coupling(replicas, 0.01, every=10, compound=False)
    for _ in range(20):
        coupling.step()
    expected = np.array([1.0, 2.0, 6.0])
    for _ in range(2):
        expected = 0.99 * expected + 0.01 * expected.mean()
    np.testing.assert_allclose(weights(replicas)[:, 0], expected, rtol=1e-13)


# --- automatic strength


@pytest.mark.parametrize(("every", "compound"), [(1, True), (4, True), (4, False)])
def test_the_first_automatic_pull_is_a_share_of_the_way(every: int, compound: bool) -> None:
    """The first pull is as long as stated relative to what the optimiser moved; then the strength grows."""
    torch.manual_seed(0)
    replicas = Replicas(mlp().double(), n=3, init="separate")
    rule = Automatic(share=0.2, growth=9.0, steps=2 * every)
    coupling = Coupling(replicas, rule, every=every, compound=compound)
    optimizer = OPTIMIZERS["sgd"](replicas.parameters())
    gaps = []

    def period() -> tuple[np.ndarray, np.ndarray]:
        """Return the weights before the pull at the end of a period, and after it."""
        for step in range(every):
            x, y = batch()
            optimizer.zero_grad()
            replicas.loss(F.cross_entropy, x, y, batches="separate").backward()
            optimizer.step()
            before = weights(replicas)
            coupling.step()
            assert step == every - 1 or np.array_equal(before, weights(replicas))
        return before, weights(replicas)

    start = weights(replicas)
    for number in range(4):
        before, after = period()
        if number == 0:
            assert np.linalg.norm(after - before) == pytest.approx(0.2 * np.linalg.norm(before - start), rel=1e-9)
        gaps.append(np.linalg.norm(after - after.mean(0)) / np.linalg.norm(before - before.mean(0)))
    first = 1 - gaps[0] ** (1 / every if compound else 1)
    for number, gap in enumerate(gaps[1:], 1):
        steps = range(number * every, (number + 1) * every)
        strengths = [min(first * 9.0 ** min(step / (2 * every), 1), 1) for step in steps]
        expected = math.prod(1 - s for s in strengths) if compound else 1 - strengths[-1]
        assert gap == pytest.approx(expected, rel=1e-9)


def test_an_automatic_strength_waits_for_a_gap_and_is_at_most_all_of_it() -> None:
    """Equal replicas are not pulled; a way far longer than the gap closes the gap, no more."""
    replicas = column(1.0, 1.0)
    coupling = Coupling(replicas, Automatic(share=0.5))
    for push, expected in ((2.0, [3.0, 3.0]), (torch.tensor([5.0, 5.1]), [8.05, 8.05])):
        with torch.no_grad():
            replicas.stacked.weight[:, 0, 0] += push
        coupling.step()
        assert weights(replicas)[:, 0].tolist() == pytest.approx(expected)


# --- resume


SCHEDULES: dict[str, Callable[[], Any]] = {
    "constant": lambda: 0.2,
    "rising": lambda: exponential(0.01, 0.5, 10),
    "automatic": lambda: Automatic(0.3, growth=5.0, steps=10),
}


@pytest.mark.parametrize("stop", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("force", ["leader", "centre", "outer"])
def test_every_force_resumes_in_the_same_bits(force: Force, schedule: str, stop: int, tmp_path: Path) -> None:
    """A run stopped before or after its first pull goes on from its file as if it had not been stopped."""

    def begin() -> tuple[Replicas, torch.optim.Optimizer, Coupling]:
        replicas = Replicas(mlp(), n=3, init=lambda i: mlp())
        coupling = couple(replicas, SCHEDULES[schedule](), force, every=3)
        return replicas, OPTIMIZERS["adamw"](replicas.parameters()), coupling

    def train(replicas: Replicas, optimizer: torch.optim.Optimizer, coupling: Coupling, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            losses = replicas.losses(
                F.cross_entropy, torch.randn(3, 8, 7), torch.randint(3, (3, 8)), batches="separate"
            )
            losses.sum().backward()
            optimizer.step()
            coupling.step(losses)

    torch.manual_seed(0)
    whole = begin()
    train(*whole, stop)
    torch.save([each.state_dict() for each in whole] + [torch.get_rng_state()], tmp_path / "checkpoint.pt")
    train(*whole, 6)
    torch.manual_seed(7)
    again = begin()
    *states, random = torch.load(tmp_path / "checkpoint.pt")
    for each, state in zip(again, states, strict=True):
        each.load_state_dict(state)
    torch.set_rng_state(random)
    train(*again, 6)
    assert np.array_equal(weights(again[0]), weights(whole[0]))
    assert np.array_equal(centre_of(again[2]), centre_of(whole[2]))


def test_losses_since_the_last_pull_are_resumed() -> None:
    """A coupling that goes on from a state knows who led before it was stopped."""
    replicas = column(0.0, 1.0)
    stopped = Coupling(replicas, 1.0, every=2, force="leader")
    stopped.step(torch.tensor([9.0, 1.0]))
    again = Coupling(replicas, 1.0, every=2, force="leader")
    again.load_state_dict(stopped.state_dict())
    again.step(torch.tensor([2.0, 3.0]))  # by this step alone the first would lead
    assert weights(replicas)[:, 0].tolist() == [1.0, 1.0]


# --- what is not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("force", FORCES)
def test_a_lost_replica_is_left_out(force: Force, bad: float, caplog: pytest.LogCaptureFixture) -> None:
    """Replicas beside one that is not finite walk bit for bit as without it; it stays as it is, and is named once."""
    models = [mlp() for _ in range(3)]
    with_it, without = (
        Replicas(models[0], n=len(chosen), init=[models[i] for i in chosen].__getitem__)
        for chosen in ([0, 1, 2], [0, 2])
    )
    couplings = [couple(replicas, 0.3, force) for replicas in (with_it, without)]
    if force in ("centre", "outer"):  # these start at the mean, of which the lost one was a part
        couplings[1].load_state_dict(couplings[0].state_dict())
    with torch.no_grad():
        with_it.stacked[0].weight[1, 2, 3] = bad
    lost = weights(with_it)[1]
    with caplog.at_level(logging.WARNING, "unvanish"):
        for _ in range(3):
            couplings[0].step(losses_of(couplings[0], 1.0, 0.0, 2.0))
            couplings[1].step(losses_of(couplings[1], 1.0, 2.0))
    assert np.array_equal(weights(with_it)[[0, 2]], weights(without))
    assert np.array_equal(weights(with_it)[1], lost, equal_nan=True)
    assert_same(couplings[0].centre(), couplings[1].centre())
    assert couplings[0].lost == {1: 1}
    (line,) = caplog.messages
    assert line.startswith(
        "Coupling: replica 1 holds nan or infinity since step 1 and is left out; 2 of 3 are coupled."
    )


@pytest.mark.parametrize(
    ("force", "optimizer_name"),
    [*((force, "adamw") for force in FORCES), ("elastic", "sgd"), ("elastic", "rmsprop")],
)
def test_a_lost_replica_starts_again_from_the_centre(force: Force, optimizer_name: str) -> None:
    """After a reset it has the centre's weights and the others' statistics, and a cleared part of the optimiser."""
    torch.manual_seed(0)
    case = CASES["cnn with batch norm"]
    replicas = Replicas(case.make(), n=3)
    optimizer = OPTIMIZERS[optimizer_name](replicas.parameters())
    train_together(replicas, case, optimizer, 3)
    coupling = couple(replicas, 0.1, force)
    with torch.no_grad():
        replicas.stacked[0].bias[1] = math.nan
    coupling.step(losses_of(coupling))
    others = [replicas.replica(i) for i in (0, 2)]
    kept = {key: value.clone() for key, value in optimizer.state[replicas.stacked[0].weight].items()}
    coupling.reset(1, optimizer)
    assert coupling.lost == {}
    for i, model in zip((0, 2), others, strict=True):
        assert_same(replicas.replica(i), model)
    for name, p in replicas.replica(1).named_parameters():
        assert torch.equal(p, coupling.centre().get_parameter(name)) or force not in ("centre", "outer"), name
    for name in ("running_mean", "running_var"):
        found, *parts = (getattr(model[1], name) for model in (replicas.replica(1), *others))
        torch.testing.assert_close(found, torch.stack(parts).mean(0))
    for key, value in optimizer.state[replicas.stacked[0].weight].items():
        if value.dim():
            assert value[1].count_nonzero() == 0, key
            assert torch.equal(value[[0, 2]], kept[key][[0, 2]]), key
    train_together(replicas, case, optimizer, 2, coupling if force != "leader" else None)
    assert np.isfinite(weights(replicas)).all()


def test_a_reset_clears_an_optimiser_of_each_replicas_own_parameters() -> None:
    """Where each replica has parameters of its own in the memory of the stacked ones, only those of one start anew."""
    replicas = Replicas(mlp(), n=2)
    own = [[nn.Parameter(p.detach()[i]) for p in replicas.parameters()] for i in range(2)]
    optimizer = torch.optim.Adam([p for each in own for p in each])
    for p in (p for each in own for p in each):
        p.grad = torch.ones_like(p)
    optimizer.step()
    Coupling(replicas).reset(1, optimizer)
    assert all(p in optimizer.state and p.grad is not None for p in own[0])
    assert not any(p in optimizer.state or p.grad is not None for p in own[1])


def test_when_all_are_lost_nothing_is_pulled() -> None:
    """Without a finite replica the coupling waits, and a reset has nothing to start from."""
    replicas = column(math.nan, math.inf)
    coupling = Coupling(replicas, 0.5)
    coupling.step()
    assert coupling.lost == {0: 1, 1: 1}
    with pytest.raises(OptionError, match=r"Coupling.reset\(\): i: found no finite weights but those of replica 0"):
        coupling.reset(0)


def test_a_lost_replica_that_is_loaded_anew_is_coupled_again() -> None:
    """What is finite again takes part again, and would be named again."""
    replicas = column(0.0, math.nan, 2.0)
    coupling = Coupling(replicas, 1.0)
    coupling.step()
    with torch.no_grad():
        replicas.stacked.weight[1] = 4.0
    coupling.step()
    assert coupling.lost == {}
    assert weights(replicas)[:, 0].tolist() == pytest.approx([2.0, 2.0, 2.0])


# --- mistakes of use


def test_one_replica_is_said_to_be_alone(caplog: pytest.LogCaptureFixture) -> None:
    """A coupling of one replica changes no bit and says so once; one with a centre of its own is at work."""
    with caplog.at_level(logging.WARNING, "unvanish"):
        for force in FORCES:
            replicas = column(1.0)
            coupling = couple(replicas, 0.5, force)
            with torch.no_grad():
                replicas.stacked.weight.fill_(3.0)
            coupling.step(losses_of(coupling))
            assert (weights(replicas).item() == 3.0) == (force in ("elastic", "tanh", "leader")), force
    assert caplog.messages == ["Coupling: one replica is its own mean; the coupling changes nothing."] * 3


def run(optimizer: Callable[[nn.Module, Replicas], torch.optim.Optimizer], steps: int = 6, **options: Any) -> Replicas:
    """Train replicas by an optimiser of whatever parameters, with steps of accumulation or losses that blow up."""
    torch.manual_seed(0)
    model = mlp()
    replicas = Replicas(model, n=2)
    coupling = Coupling(replicas, 0.1)
    made = optimizer(model, replicas)
    for step in range(steps):
        made.zero_grad()
        for _ in range(options.get("accumulate", 1)):
            loss = replicas.loss(F.cross_entropy, torch.randn(4, 7), torch.randint(3, (4,)))
            (loss * options.get("factor", 1.0)).backward()
        if step >= options.get("left_out", 0):
            made.step()
        coupling.step()
    return replicas


def test_an_optimiser_of_other_parameters_is_noticed() -> None:
    """If the weights stand still although they have gradients, the second step says what is wrong."""
    with pytest.raises(OptionError, match=r"found gradients, but weights that did not move in two steps, expected"):
        run(lambda model, replicas: torch.optim.SGD(model.parameters(), 0.1), steps=2)
    with pytest.raises(OptionError, match=r"Write optimizer = torch.optim.SGD\(replicas.parameters\(\), lr=0.1\)"):
        run(lambda model, replicas: torch.optim.SGD(replicas.replica(0).parameters(), 0.1), steps=2)


@pytest.mark.parametrize("options", [{}, {"accumulate": 4}, {"left_out": 5, "factor": math.inf}])
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_right_optimiser_is_not_blamed(rate: float, options: dict[str, Any]) -> None:
    """A rate of zero, accumulated gradients and steps left out by mixed precision raise nothing."""
    run(lambda model, replicas: torch.optim.SGD(replicas.parameters(), rate), **options)


def deep(normalisation: Callable[[int], nn.Module] = lambda width: nn.Tanh(), layers: int = 7) -> nn.Module:
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(4, 4), normalisation(4))))


@pytest.mark.parametrize(
    ("make", "options", "start"),
    [
        (
            lambda: Replicas(mlp(), 2, "separate"),
            {"strength": exponential(0.01, 0.1, 3)},
            "Coupling: the strength rises",
        ),
        (lambda: Replicas(mlp(), 2, "separate"), {"strength": exponential(0.1, 0.01, 3)}, ""),
        (lambda: Replicas(mlp(), 2, "separate"), {}, ""),
        (lambda: Replicas(mlp(), 2), {"strength": exponential(0.01, 0.1, 3)}, ""),
        (
            lambda: Replicas(deep(), 2, "separate"),
            {},
            "Coupling: replicas of 7 layers without normalisation start apart",
        ),
        (lambda: Replicas(deep(), 2, "separate"), {"force": None}, ""),
        (lambda: Replicas(deep(nn.LayerNorm), 2, "separate"), {}, ""),
        (lambda: Replicas(deep(layers=6), 2, "separate"), {}, ""),
        (lambda: Replicas(deep(), 2), {}, ""),
    ],
)
def test_starts_that_do_not_fit_together_are_warned_of(
    make: Callable[[], Replicas], options: dict[str, Any], start: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Separate starts are warned of once where the pull grows, and in deep nets without norms; nothing else is."""
    with caplog.at_level(logging.WARNING, "unvanish"):
        coupling = Coupling(make(), **options)
        for _ in range(4):
            coupling.step()
    assert len(caplog.messages) == bool(start)
    assert not start or caplog.messages[0].startswith(start)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Coupling(column(0), force="outer"), r"Coupling\(\): outer: found None with force='outer', expected a"),
        (
            lambda: Coupling(column(0), outer=nesterov),
            r"outer: found <function nesterov.*with force='elastic', expected",
        ),
        (
            lambda: couple(column(0, 1), force="leader").step(),
            r"Coupling.step\(\): losses: found none, expected one loss",
        ),
        (
            lambda: couple(column(0, 1), force="leader").step(torch.zeros(3)),
            r"losses: found a tensor of shape \(3,\), expected one loss for each of 2 replicas",
        ),
        (
            lambda: Coupling(column(0)).load_state_dict(couple(column(0), force="centre").state_dict()),
            r"Coupling.load_state_dict\(\): force: found 'centre', expected 'elastic' as here",
        ),
        (lambda: Coupling(column(0, 1)).reset(2), r"replica\(\): i: found 2, expected a replica from 0 to 1"),
        (lambda: Automatic(share=0.0), r"Automatic\(\): found share=0.0, growth=1.0, steps=1, expected finite numbers"),
        (lambda: Automatic(growth=-1.0), r"Automatic\(\): found share=0.1, growth=-1.0"),
    ],
)
def test_wrong_calls_are_refused(make: Callable[[], object], words: str) -> None:
    """What cannot be used is named, with what was expected."""
    with pytest.raises(OptionError, match=words):
        make()

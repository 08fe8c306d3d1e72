"""Frozen layers in front of a model: which, how long, whether their rows come again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import unvanish
from tests.nets import watching
from unvanish.recomputed import MAX_ENTRIES, MAX_FRONTS, _factors, row_numbers

ROWS = torch.arange(60.0).reshape(20, 3) / 7


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Takes(nn.Module):
    """A linear layer and what follows it, that take some seconds."""

    def __init__(self, clock: Clock, seconds: float, *then: nn.Module, sizes: tuple[int, int] = (3, 3)) -> None:
        super().__init__()
        self.linear, self.then = nn.Linear(*sizes), nn.Sequential(*then)
        self.clock, self.seconds = clock, seconds

    def forward(self, x: Tensor) -> Tensor:
        output = self.then(self.linear(x))
        self.clock.now += self.seconds
        return output


def batches(epochs: int, size: int = 4) -> Iterator[Tensor]:
    """Yield shuffled batches of the same 20 rows."""
    own = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        yield from (ROWS[rows] for rows in torch.randperm(len(ROWS), generator=own).split(size))


def front_of(
    model: nn.Module,
    clock: Callable[[], float],
    inputs: Iterator[Tensor] | None = None,
    *,
    step: Callable[[Tensor], Tensor] | None = None,
    after: Callable[[], object] = lambda: None,
) -> dict[str, Any] | None:
    """Train what learns in a model for eight epochs; return what the record says of its frozen front."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss_of = step or (lambda x: model(x).square().mean())
    with watching(every=1, clock=clock) as watch:
        for x in batches(8) if inputs is None else inputs:
            optimizer.zero_grad()
            loss_of(x).backward()
            optimizer.step()
            after()
    assert not watch.failure
    facts = watch.recording().traces[0].facts
    front: dict[str, Any] | None = facts.get("frozen_front")
    return front


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


# Rows ---------------------------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 2**31), width=st.integers(4, 40))
@settings(max_examples=15, deadline=None)
def test_equal_rows_have_equal_numbers_and_others_do_not(dtype: torch.dtype, seed: int, width: int) -> None:
    """A row has the same number in any batch, at any place and with any strides; numbers differ where rows do."""
    own = torch.Generator().manual_seed(seed)
    batch = torch.randint(0, 2, (16, width), generator=own).to(dtype)
    numbers = row_numbers(batch)
    order = torch.randperm(16, generator=own)
    transposed = batch[order].t().contiguous().t()
    assert numbers is not None
    assert torch.equal(numbers[order], row_numbers(transposed))
    same_rows = (batch[:, None] == batch[None]).all(2)
    assert torch.equal(same_rows, numbers[:, None] == numbers[None])


def test_numbers_of_long_rows_are_read_all_over_the_row() -> None:
    """Of a row with more entries than are read, the last ones count as the first do."""
    one = torch.zeros(3, 2, 10 * MAX_ENTRIES)
    one[1, 0, :100] = 1.0
    one[2, 1, -100:] = 1.0
    assert len(set(row_numbers(one).tolist())) == 3


def test_what_has_no_rows_has_no_numbers() -> None:
    """Sparse, complex, empty and distant tensors are not read; one number is one row."""
    assert row_numbers(torch.eye(3).to_sparse()) is None
    assert row_numbers(torch.ones(2, dtype=torch.complex64)) is None
    assert row_numbers(torch.empty(0, 3)) is None
    assert row_numbers(torch.empty(2, 3, device="meta")) is None
    assert row_numbers(torch.tensor(1.0)).shape == (1,)


def test_numbers_leave_random_numbers_alone() -> None:
    """The factors are drawn elsewhere."""
    _factors.cache_clear()
    before = torch.get_rng_state()
    row_numbers(ROWS)
    assert torch.equal(torch.get_rng_state(), before)


# Which layers, and how long -------------------------------------------------------------------------------


def test_the_share_is_the_time_of_the_frozen_calls_over_that_of_the_step() -> None:
    """Two frozen layers of 1 s and 2 s under a head of 0.5 s and half a second of other work make 3 s of 4 s."""
    clock = Clock()
    model = nn.Sequential(frozen(Takes(clock, 1.0)), frozen(Takes(clock, 2.0, nn.ReLU())), Takes(clock, 0.5))

    def other_work() -> None:
        clock.now += 0.5

    front = front_of(model, clock, after=other_work)
    assert front["layers"] == ["0.linear", "1.linear"]
    assert front["border"] == "2.linear"
    assert (front["seconds"], front["step_seconds"], front["share_of_step"]) == (3.0, 4.0, 0.75)
    assert (front["batch_norms"], front["is_random"], front["is_changed"], front["is_apart"]) == (
        [],
        False,
        False,
        False,
    )
    assert front["rows_a_step"] == 4.0
    assert front["last_step"] == 36  # every fourth sample looks at the forward pass


def test_time_inside_the_watch_belongs_to_nobody() -> None:
    """With a watch that takes as long as it likes the share stays what it is."""
    clock = Clock()

    class Slow(Clock):
        """Each time the watch looks, it also takes 100 s; the training does not see them."""

        calls = 0

        def __call__(self) -> float:
            self.calls += 1
            return clock.now + 100.0 * (self.calls // 2)  # of two looks, at begin and end of a callback

    model = nn.Sequential(frozen(Takes(clock, 3.0)), Takes(clock, 1.0))
    front = front_of(model, Slow())
    assert front["seconds"] == pytest.approx(3.0)
    assert front["step_seconds"] == pytest.approx(4.0)


@pytest.mark.parametrize("by", ["requires_grad", "freeze_to", "no_grad"])
def test_all_ways_to_freeze_are_seen(by: str) -> None:
    """Frozen by hand, by `freeze_to`, or by hand and called without gradients: the same front."""
    clock = Clock()
    trunk, head = Takes(clock, 3.0), Takes(clock, 1.0)
    model = nn.Sequential(trunk, head)
    if by == "freeze_to":
        unvanish.freeze_to(model, 1)
    else:
        frozen(trunk)

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = trunk, head

        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(by != "no_grad"):
                features = self.trunk(x)
            return self.head(F.relu(features))

    front = front_of(Inner(), clock)
    assert front["layers"] == ["trunk.linear"]
    assert front["share_of_step"] == 0.75


def test_a_trunk_that_is_a_model_of_its_own() -> None:
    """A trunk called without gradients, and a head called on its output: one front, apart."""
    clock = Clock()
    trunk, head = frozen(Takes(clock, 3.0)), Takes(clock, 1.0)

    def step(x: Tensor) -> Tensor:
        with torch.no_grad():
            features = trunk(x)
        return head(features.reshape(-1, 3)).square().mean()

    front = front_of(head, clock, step=step)
    assert front["is_apart"]
    assert (front["layers"], front["share_of_step"]) == (["linear"], 0.75)
    assert front["equal_pairs"] > 0


def test_a_teacher_is_no_trunk() -> None:
    """What learns does not learn from the output of a teacher, but from what the teacher got too."""
    clock = Clock()
    teacher, student = frozen(Takes(clock, 3.0)), Takes(clock, 1.0)

    def step(x: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(x)
        return F.mse_loss(student(x), target)

    assert front_of(student, clock, step=step) is None


def test_a_model_that_learns_elsewhere_is_no_trunk() -> None:
    """A generator that is called without gradients, for the step of the discriminator, is not frozen."""
    clock = Clock()
    generator, discriminator = Takes(clock, 3.0), Takes(clock, 1.0)

    def step(x: Tensor) -> Tensor:
        with torch.no_grad():
            drawn = generator(x)
        return discriminator(drawn).square().mean()

    assert front_of(discriminator, clock, step=step) is None


def test_a_trunk_with_two_heads_counts_once() -> None:
    """Two models that learn from one output of a trunk do not make it two passes."""
    clock = Clock()
    trunk, heads = frozen(Takes(clock, 3.0)), nn.ModuleList([Takes(clock, 1.0), Takes(clock, 1.0)])

    def step(x: Tensor) -> Tensor:
        features = trunk(x)
        return heads[0](features).square().mean() + heads[1](features).square().mean()

    front = front_of(heads, clock, step=step)
    assert (front["seconds"], front["step_seconds"], front["rows_a_step"]) == (3.0, 5.0, 4.0)


def test_steps_that_take_no_time_have_no_share() -> None:
    """Where a clock is too coarse nothing is divided by it."""
    clock = Clock()
    front = front_of(nn.Sequential(frozen(Takes(clock, 0.0)), Takes(clock, 0.0)), clock)
    assert front["samples"] > 0
    assert front["share_of_step"] is None


@pytest.mark.parametrize("which", ["nothing frozen", "top frozen", "middle frozen", "bias learns", "inputs learn"])
def test_without_a_frozen_part_in_front_there_is_none(which: str) -> None:
    """A frozen layer above one that learns needs its graph: there is nothing to keep."""
    clock = Clock()
    model = nn.Sequential(Takes(clock, 1.0), Takes(clock, 1.0), Takes(clock, 1.0))
    if which in ("top frozen", "middle frozen"):
        frozen(model[1 if which == "middle frozen" else 2])
    elif which == "bias learns":
        model[0].linear.weight.requires_grad_(False)
    elif which == "inputs learn":
        frozen(model[:2])
    inputs = (x.requires_grad_(which == "inputs learn") for x in batches(8))
    assert front_of(model, clock, inputs) is None


def test_evaluations_do_not_count_as_passes_of_the_training() -> None:
    """An evaluation of the whole model between steps adds to the time of the step, not to that of the front."""
    clock = Clock()
    model = nn.Sequential(frozen(Takes(clock, 3.0)), Takes(clock, 1.0))

    def evaluate() -> None:
        with torch.no_grad():
            model.eval()(ROWS)
        model.train()

    front = front_of(model, clock, after=evaluate)
    assert (front["seconds"], front["step_seconds"]) == (3.0, 8.0)
    assert front["rows_a_step"] == 4.0


def test_passes_of_accumulated_gradients_add_up() -> None:
    """Two backward passes to a step are two passes through the front."""
    clock = Clock()
    model = nn.Sequential(frozen(Takes(clock, 3.0)), Takes(clock, 1.0))

    def step(x: Tensor) -> Tensor:
        model(x[:2]).square().mean().backward()
        return model(x[2:]).square().mean()

    front = front_of(model, clock, step=step)
    assert (front["seconds"], front["step_seconds"], front["rows_a_step"]) == (6.0, 8.0, 4.0)


@pytest.mark.parametrize(("thawing", "expected"), [(30, (["0.linear", "1.linear"], 0, 28)), (8, (["0.linear"], 8, 36))])
def test_a_front_that_thaws_is_counted_apart(thawing: int, expected: tuple[list[str], int, int]) -> None:
    """The front of most steps is told, with the steps at which it was there."""
    clock = Clock()
    model = nn.Sequential(Takes(clock, 1.0), Takes(clock, 1.0), Takes(clock, 1.0))
    frozen(model[:2])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with watching(every=1, clock=clock) as watch:
        for number, x in enumerate(batches(8)):
            if number == thawing:
                model[1].requires_grad_(True)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    front = watch.recording().traces[0].facts["frozen_front"]
    assert (front["layers"], front["step"], front["last_step"]) == expected
    assert not front["is_changed"]  # what it learnt after it thawed is another matter


def test_the_number_of_fronts_is_bounded() -> None:
    """A model that freezes other layers all the time does not make the record grow."""
    clock = Clock()
    model = nn.Sequential(*(Takes(clock, 1.0) for _ in range(MAX_FRONTS + 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with watching(every=1, clock=clock) as watch:
        for number, x in enumerate(batches(8)):
            frozen(model[: 1 + number % (MAX_FRONTS + 2)])
            model[1 + number % (MAX_FRONTS + 2) :].requires_grad_(True)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        player = next(iter(watch._players.values()))
        assert len(player.fronts._fronts) == MAX_FRONTS


# Whether it gives the same again ----------------------------------------------------------------------------


def test_rows_that_come_again_tell_how_many_there_are() -> None:
    """Each of 20 rows equals one of 20: of all pairs with rows that came before, one in 20 is equal."""
    clock = Clock()
    front = front_of(nn.Sequential(frozen(Takes(clock, 3.0)), Takes(clock, 1.0)), clock)
    assert front["row_pairs"] == 20 * front["equal_pairs"]


@pytest.mark.parametrize("rows", ["one epoch", "noise", "stream"])
def test_rows_that_are_new_never_come_again(rows: str) -> None:
    """In a first epoch, behind random augmentation and in an endless stream no pair is equal."""
    clock, own = Clock(), torch.Generator().manual_seed(1)
    inputs = {
        "one epoch": lambda: batches(1, size=1),
        "noise": lambda: (x + 0.01 * torch.randn(x.shape, generator=own) for x in batches(8)),
        "stream": lambda: (torch.randn(4, 3, generator=own) for _ in range(40)),
    }[rows]()
    front = front_of(nn.Sequential(frozen(Takes(clock, 3.0)), Takes(clock, 1.0)), clock, inputs)
    assert front["row_pairs"] > 0
    assert front["equal_pairs"] == 0


@pytest.mark.parametrize("is_training", [True, False])
def test_batch_norms_that_use_the_batch_are_named(is_training: bool) -> None:
    """A frozen batch norm in training mode is named, one in evaluation mode is not."""
    clock = Clock()
    trunk = frozen(Takes(clock, 3.0, nn.BatchNorm1d(3), nn.ReLU())).train(is_training)
    front = front_of(nn.Sequential(trunk, Takes(clock, 1.0)), clock)
    assert front["batch_norms"] == (["0.then.0"] if is_training else [])


@pytest.mark.parametrize("place", ["in the front", "function", "on top", "evaluation mode"])
def test_random_numbers_below_a_frozen_layer_are_noticed(place: str) -> None:
    """Dropout in the front is noticed whether a module or a function does it; on top of the front it is outside."""
    clock = Clock()

    class Slow(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            clock.now += 5.0
            return super().forward(x)

    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            clock.now += 5.0
            return F.dropout(x, 0.5, self.training)

    drop = Drops() if place == "function" else Slow()
    layers = [frozen(Takes(clock, 2.0)), frozen(Takes(clock, 1.0)), Takes(clock, 1.0)]
    layers.insert(2 if place == "on top" else 1, drop.train(place != "evaluation mode"))
    front = front_of(nn.Sequential(*layers), clock)
    assert front["is_random"] == (place in ("in the front", "function"))
    assert front["seconds"] == (3.0 if place == "on top" else 8.0)


@pytest.mark.parametrize("how", ["data", "copy_", "not at all"])
def test_weights_that_change_by_hand_are_noticed(how: str) -> None:
    """A moving average of other weights is not frozen, however it is written."""
    clock = Clock()
    trunk = frozen(Takes(clock, 3.0))
    weight = trunk.linear.weight

    def average() -> None:
        if how == "data":
            weight.data.mul_(0.99)
        elif how == "copy_":
            with torch.no_grad():
                weight.copy_(weight * 0.99)

    front = front_of(nn.Sequential(trunk, Takes(clock, 1.0)), clock, after=average)
    assert front["is_changed"] == (how != "not at all")


def test_a_name_is_given_only_where_all_before_it_is_frozen() -> None:
    """`freeze_to` goes by the order in which a model lists its layers: a head that is listed first is not named."""
    clock = Clock()

    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.other, self.head, self.trunk = Takes(clock, 1.0), Takes(clock, 1.0), frozen(Takes(clock, 3.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.head(self.trunk(x)))

    front = front_of(Reversed(), clock)
    assert front["layers"] == ["trunk.linear"]
    assert front["border"] == ""


# Laws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("mode", [True, False])
def test_a_training_with_a_frozen_trunk_is_the_same_bit_for_bit(every: int, mode: bool) -> None:
    """Losses, weights, buffers, random numbers and hooks are those of the training that nobody watches."""

    def train(watched: bool) -> tuple[list[float], dict[str, Tensor], Tensor, int]:
        torch.manual_seed(5)
        model = nn.Sequential(
            nn.Linear(3, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(8, 8),
            nn.Dropout(0.1),
            nn.Linear(8, 1),
        )
        frozen(model[:5]).train(mode)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
        losses = []

        def steps() -> None:
            for x in batches(6):
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())

        if watched:
            with unvanish.watch(model, optimizer, every=every, folder=None) as run:
                steps()
            assert run.recording().traces[0].facts["frozen_front"]["samples"] > 5
        else:
            steps()
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        return losses, model.state_dict(), torch.get_rng_state(), hooks

    (losses, state, random, hooks), (their_losses, their_state, their_random, their_hooks) = train(True), train(False)
    assert losses == their_losses
    assert state.keys() == their_state.keys()
    assert all(torch.equal(state[name], their_state[name]) for name in state)
    assert torch.equal(random, their_random)
    assert hooks == their_hooks == 0


def test_outputs_are_let_go_when_a_step_is_no_longer_sampled() -> None:
    """What a frozen model gave, and nothing learnt from, does not wait for the next sample."""
    clock = Clock()
    teacher, student = frozen(Takes(clock, 3.0)), Takes(clock, 1.0)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    outputs: list[weakref.ref[Tensor]] = []
    with watching(every=1000, clock=clock):
        for x in batches(3):  # the first ten steps are sampled
            optimizer.zero_grad()
            answer = student(x)
            target = teacher(x)
            outputs.append(weakref.ref(target))
            F.mse_loss(answer, target).backward()
            optimizer.step()
        del answer, target
        assert not any(ref() is not None for ref in outputs)


def test_nothing_is_kept_alive() -> None:
    """When a training lets go of model and data, so has the watch."""
    clock = Clock()
    trunk, head = frozen(Takes(clock, 3.0)), Takes(clock, 1.0)
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-3)
    outputs: list[weakref.ref[Tensor]] = []
    with watching(every=1, clock=clock) as watch:
        for x in batches(3):
            with torch.no_grad():
                features = trunk(x)
            outputs.append(weakref.ref(features))
            head(features).square().mean().backward()
            optimizer.step()
        gone = weakref.ref(trunk), weakref.ref(trunk.linear.weight), weakref.ref(head)
        del trunk, head, optimizer, features, x
        gc.collect()
        assert [ref() for ref in (*gone, *outputs)] == [None] * (3 + len(outputs))
        assert not watch.failure

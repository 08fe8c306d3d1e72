"""Thawing by a schedule, rates for each layer, and how deep to reuse."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.collections import PathCollection
from torch import Tensor, nn
from torch.nn import functional as F

from tests.nets import Tied
from tests.test_freeze import OPTIMIZERS, Residual, cnn, mlp
from unvanish import OptionError
from unvanish.reuse.depths import Depth, Depths, try_depths
from unvanish.reuse.gradual import GradualThaw
from unvanish.reuse.rates import layer_rates, rate_table


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    """Take three steps from a seed, and return a loss that goes up and down."""
    torch.manual_seed(seed)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(torch.randn(6, 2, 8, 8)), torch.randint(3, (6,)))
        loss.backward()
        optimizer.step()
    return loss.item()


def test_a_schedule_thaws_one_layer_after_the_other() -> None:
    """After each `every` evaluations one layer more learns, from the top; then it says stop."""
    model = mlp()
    thawing = GradualThaw(model, torch.optim.SGD(model.parameters(), 0.1), every=2)
    learning = []
    for _ in range(6):
        learning.append([m.weight.requires_grad for m in (model[0], model[3], model[5])])
        stops = thawing.step(1.0)
    assert learning == [[False, False, True]] * 2 + [[False, True, True]] * 2 + [[True, True, True]] * 2
    assert stops


def test_a_plateau_thaws_the_next_layer() -> None:
    """Only evaluations in a row without improvement count, nan is none, and each phase has patience of its own."""
    model = mlp()
    thawing = GradualThaw(model, torch.optim.SGD(model.parameters(), 0.1), borders=(-1, 0), patience=2)
    phases = []
    for loss in (3.0, 4.0, 2.0, math.nan, 2.0, 1.0, 5.0):
        assert not thawing.step(loss)
        phases.append(thawing.phase)
    assert phases == [0, 0, 0, 0, 1, 1, 1]
    assert thawing.step(5.0)
    assert thawing.best == 1.0


def test_each_phase_starts_from_the_best_weights() -> None:
    """Weights, buffers and momentum are those of the best evaluation; so are the weights at the end."""
    torch.manual_seed(0)
    model = cnn()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    thawing = GradualThaw(model, optimizer, borders=(-1, 1), every=3)
    states = []
    for seed, loss in enumerate((3.0, 1.0, 2.0)):
        epoch(model, optimizer, seed)
        states.append(copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"])))
        thawing.step(loss)
    best, momentum = states[1]
    assert not all(torch.equal(best[name], states[2][0][name]) for name in best)
    for name, value in model.state_dict().items():
        assert torch.equal(value, best[name]), name
    now = optimizer.state_dict()["state"]
    assert now.keys() == momentum.keys() != set()
    assert all(torch.equal(now[key]["momentum_buffer"], momentum[key]["momentum_buffer"]) for key in now)
    for loss in (4.0, 5.0, 6.0):
        epoch(model, optimizer, 7)
        stops = thawing.step(loss)
    assert stops
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_resuming_in_a_schedule_gives_the_same_bits(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """Saved after any evaluation and resumed with new objects, the run ends in the same bits."""

    def fresh() -> list[Any]:
        torch.manual_seed(3)
        model = cnn()
        optimizer = make(layer_rates(model, 0.05, factor=0.5))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.8**epoch)
        return [model, optimizer, schedule, GradualThaw(model, optimizer, (-1, 1, 0), every=2)]

    def play(parts: list[Any], start: int, end: int) -> None:
        model, optimizer, schedule, thawing = parts
        for number in range(start, end):
            loss = epoch(model, optimizer, number)
            schedule.step()
            thawing.step(loss)

    through = fresh()
    play(through, 0, 6)
    for stop in (1, 2, 3, 5):
        first, second = fresh(), fresh()
        play(first, 0, stop)
        states = pickle.loads(pickle.dumps([part.state_dict() for part in first]))
        for part, state in zip(second, states, strict=True):
            part.load_state_dict(state)
        play(second, stop, 6)
        for name, value in through[0].state_dict().items():
            assert torch.equal(second[0].state_dict()[name], value), (stop, name)


@pytest.mark.parametrize("options", [{}, {"every": 1, "patience": 1}, {"every": 0}, {"patience": 1.5}])
def test_a_schedule_needs_one_length(options: Any) -> None:
    """Either a number of evaluations or a patience."""
    model = mlp()
    with pytest.raises(OptionError, match="expected one of them, a whole number from 1 on"):
        GradualThaw(model, torch.optim.SGD(model.parameters(), 0.1), **options)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("make", [mlp, cnn, Residual, Tied, lambda: nn.LSTM(3, 4)])
@pytest.mark.parametrize("weight_decay", [None, 0.1])
def test_rates_fall_by_a_factor_a_layer(make: Callable[[], nn.Module], weight_decay: float | None) -> None:
    """The rate is lr * factor**depth; each parameter once; decay on matrices only; any optimiser takes the groups."""
    model = make()
    optimizer = torch.optim.AdamW(layer_rates(model, 0.1, factor=0.5, weight_decay=weight_decay))
    placed = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(placed) == len({*placed}) == len(list(model.parameters()))
    rates = list(dict.fromkeys(group["lr"] for group in optimizer.param_groups))
    assert rates == [0.1 * 0.5**depth for depth in range(len(rates))][::-1]
    if weight_decay is not None:
        for group in optimizer.param_groups:
            decays = group["weight_decay"] > 0
            assert all(p.dim() > 1 for p in group["params"]) or not decays
    assert len(rate_table(optimizer).splitlines()) == 1 + len(optimizer.param_groups)


def test_a_step_moves_each_layer_by_its_rate() -> None:
    """With plain SGD the move of a layer is its rate times its gradient."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(layer_rates(model, 0.9, factor=1 / 3))
    before = [layer.weight.detach().clone() for layer in model]
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    for layer, old, rate in zip(model, before, (0.1, 0.3, 0.9), strict=True):
        torch.testing.assert_close(layer.weight, old - rate * layer.weight.grad)


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"lr": 0.1, "factor": -1.0}, {"lr": 0.1, "weight_decay": math.nan}])
def test_rates_that_cannot_be_used(options: Any) -> None:
    """The message names the argument."""
    with pytest.raises(OptionError, match=rf"layer_rates\(\): {list(options)[-1]}: found"):
        layer_rates(mlp(), **options)


def test_depths_reuse_exactly_the_lowest_layers() -> None:
    """Below the depth are the learnt weights, above it new ones; frozen layers do not learn, tuned ones do."""
    learnt = mlp()
    seen: list[tuple[list[bool], list[bool]]] = []

    def fit(model: nn.Module) -> float:
        layers = [(model[i], learnt[i]) for i in (0, 3, 5)]
        seen.append(([torch.equal(a.weight, b.weight) for a, b in layers], [a.weight.requires_grad for a, _ in layers]))
        return float(len(seen))

    depths = try_depths(lambda: copy.deepcopy(learnt), fit, seeds=(0,))
    yes, no = True, False
    assert seen == [
        ([no, no, no], [yes, yes, yes]),
        ([yes, no, no], [no, yes, yes]), ([yes, no, no], [yes, yes, yes]),
        ([yes, yes, no], [no, no, yes]), ([yes, yes, no], [yes, yes, yes]),
    ]  # fmt: skip
    assert [(row.layers, row.way) for row in depths.rows] == [
        (0, "tuned"), (1, "frozen"), (1, "tuned"), (2, "frozen"), (2, "tuned"),
    ]  # fmt: skip
    assert depths.best is depths.rows[0]
    assert str(depths).splitlines()[1].endswith("best")


def test_depths_draw_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every seed of every depth is a point at its loss; without a place to draw to, or matplotlib, it says so."""
    depths = Depths((
        Depth(0, "tuned", (4.0, 3.0)), Depth(1, "frozen", (1.0, 2.0)), Depth(1, "tuned", (2.5, 0.5)),
        Depth(2, "frozen", (9.0, 8.0)),
    ))  # fmt: skip
    text = depths.draw(tmp_path / "a.svg").read_text()
    assert text.count("<use") >= sum(len(row.losses) for row in depths.rows)
    for word in ("from scratch", "frozen", "tuned", "lowest layers reused", "held-out loss"):
        assert f"<!-- {word} -->" in text
    points, bars = drawn(depths, tmp_path)
    assert sorted(points) == sorted(loss for row in depths.rows for loss in row.losses)
    assert sorted(bars) == sorted(row.median for row in depths.rows)
    with pytest.raises(OptionError, match=r"Depths.draw\(\): file: found .*expected a file that can be written"):
        depths.draw(tmp_path / "a.unknown")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OptionError, match=r"Depths.draw\(\): found no matplotlib.*pip install 'unvanish\[plot\]'"):
        depths.draw(tmp_path / "b.png")


def drawn(depths: Depths, folder: Path) -> tuple[list[float], list[float]]:
    """Return the losses of all points of a picture, and the medians that lines join."""
    kept: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *args, **options: kept.append(figure))
        depths.draw(folder / "a.png")
    (axis,) = kept[0].axes
    points = [
        loss for cloud in axis.collections if isinstance(cloud, PathCollection) for _, loss in cloud.get_offsets()
    ]
    return points, [loss for bar in axis.containers for loss in bar.lines[0].get_ydata()]


def test_depths_find_where_reuse_helps() -> None:
    """A task that needs the learnt lowest layer and another second one is best served by reusing one layer."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 1)]
    learnt = nn.Sequential(*layers)
    with torch.no_grad():
        learnt[0].weight.normal_()
        learnt[2].weight.zero_()  # what it has learnt there is of no use
    x, fresh = torch.randn(2, 64, 8)
    signs = torch.tensor([1.0, -1.0]).repeat(4).unsqueeze(1)

    def target(inputs: Tensor) -> Tensor:
        return F.relu(inputs @ learnt[0].weight.detach().T) @ signs

    def fit(model: nn.Module) -> float:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
        for _ in range(150):
            optimizer.zero_grad()
            F.mse_loss(model(x), target(x)).backward()
            optimizer.step()
        with torch.no_grad():
            return F.mse_loss(model(fresh), target(fresh)).item()

    depths = try_depths(lambda: copy.deepcopy(learnt), fit, ways=("frozen",))
    assert depths.best.layers == 1
    assert all(loss < least for loss in depths.rows[1].losses for least in depths.rows[0].losses)


def test_a_layer_that_cannot_be_drawn_anew_is_named() -> None:
    """Parameters without a reset are refused."""
    with pytest.raises(OptionError, match=r"layer '1': found no reset_parameters\(\)"):
        try_depths(lambda: nn.Sequential(nn.Linear(2, 2), Residual()), lambda model: 0.0)

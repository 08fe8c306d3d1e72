"""Later remedies: clipping by history, a rate per layer, fewer units, augmentation, logits in regression."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unvanish
from unvanish.treatments.gradients import AUTO_HISTORY


def one_weight(lr: float = 1.0, **settings: float) -> tuple[nn.Module, nn.Parameter, torch.optim.Optimizer]:
    """Return a model of one number, and plain descent on it."""
    weight = nn.Parameter(torch.zeros(1))
    return nn.ParameterList([weight]), weight, torch.optim.SGD([weight], lr=lr, **settings)


def step_with(weight: nn.Parameter, optimizer: torch.optim.Optimizer, grad: float) -> float:
    """Take a step with a gradient that is given, and return how far the weight moved."""
    before = float(weight.detach())
    weight.grad = torch.tensor([float(grad)])
    optimizer.step()
    return before - float(weight.detach())


# --- clip-norm=auto


def test_the_limit_is_the_tenth_percentile_of_the_norms() -> None:
    """Plain descent at rate 1 then moves by min(norm, percentile 10 of all norms until now), by NumPy in float64."""
    model, weight, optimizer = one_weight()
    norms = np.random.default_rng(0).lognormal(0, 2, 60)
    with unvanish.treat(model, optimizer, "clip-norm=auto"):
        for place, norm in enumerate(norms):
            limit = np.percentile(norms[: place + 1], 10)
            assert step_with(weight, optimizer, norm) == pytest.approx(min(norm, limit), rel=1e-3)


def test_the_history_forgets() -> None:
    """Norms of a loud beginning leave the history: then a quiet step is not clipped to less than itself."""
    model, weight, optimizer = one_weight()
    with unvanish.treat(model, optimizer, "clip-norm=auto"):
        for _ in range(200):
            step_with(weight, optimizer, 1e-3)
        assert step_with(weight, optimizer, 1.0) == pytest.approx(1e-3, rel=1e-2)
        for _ in range(AUTO_HISTORY):
            step_with(weight, optimizer, 1.0)
        assert step_with(weight, optimizer, 1.0) == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_as_if_it_had_not_been(bad: float) -> None:
    """Steps with nan or infinity between the others change neither weights nor momentum nor history."""
    norms = [3.0, 1.0, 8.0, 2.0, 5.0]
    paths = []
    for is_disturbed in (False, True):
        model, weight, optimizer = one_weight(lr=0.1, momentum=0.9, weight_decay=0.1)
        with unvanish.treat(model, optimizer, "clip-norm=auto"):
            for norm in norms:
                if is_disturbed:
                    assert step_with(weight, optimizer, bad) == 0
                step_with(weight, optimizer, norm)
        paths.append(float(weight.detach()))
    assert paths[0] == paths[1] != 0


def test_zero_gradients_do_not_hold_the_later_ones_at_zero() -> None:
    """A norm of 0 does not enter the history."""
    model, weight, optimizer = one_weight()
    with unvanish.treat(model, optimizer, "clip-norm=auto"):
        for _ in range(20):
            step_with(weight, optimizer, 0.0)
        assert step_with(weight, optimizer, 4.0) == pytest.approx(4.0, rel=1e-3)


# --- layerwise-rates


def deep() -> nn.Sequential:
    """Return three layers with a norm between them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def groups_by_hand(model: nn.Sequential, lr: float, factor: float) -> list[dict[str, object]]:
    """Return parameter groups with a rate per layer; the norm goes with the layer before it."""
    parts = [[*model[0].parameters(), *model[1].parameters()], list(model[3].parameters()), list(model[5].parameters())]
    return [{"params": part, "lr": lr * factor ** (2 - place)} for place, part in enumerate(parts)]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr, momentum=0.5),
}


@pytest.mark.parametrize("factor", [0.5, 1.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scaled_moves_are_rates_of_groups(name: str, factor: float) -> None:
    """Under a scheduler that was made before, training equals parameter groups with a rate per layer, to rounding."""
    torch.manual_seed(1)
    x, y, lr = torch.randn(32, 4).double(), torch.randn(32, 1).double(), 0.01
    ours, theirs = deep().double(), deep().double()
    a, b = OPTIMIZERS[name](ours.parameters(), lr), OPTIMIZERS[name](groups_by_hand(theirs, lr, factor), lr)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step) for o in (a, b)]
    with unvanish.treat(ours, a, f"layerwise-rates={factor}"):
        for _ in range(15):
            for model, optimizer, schedule in zip((ours, theirs), (a, b), schedules, strict=True):
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                schedule.step()
        assert len(a.param_groups) == len(schedules[0].base_lrs) == 1
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_a_factor_of_one_changes_nothing() -> None:
    """With the same rate for all layers training is bit-identical to training without."""
    x = torch.randn(16, 4)
    ends = []
    for treatments in ((), ("layerwise-rates=1",)):
        model = deep()
        optimizer = torch.optim.Adam(model.parameters())
        with unvanish.treat(model, optimizer, *treatments):
            for _ in range(5):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


def test_undone_rates_are_those_of_before() -> None:
    """After leaving, a step is the step that it would have been; a weight that is frozen never moves."""
    model = deep()
    model[3].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    frozen = model[3].weight.clone()
    with unvanish.treat(model, optimizer, "layerwise-rates=0.1"):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    assert torch.equal(model[3].weight, frozen)
    before, grad = model[0].weight.detach().clone(), model[0].weight.grad
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before - 0.1 * grad)


def test_a_shared_weight_has_the_rate_of_its_last_layer() -> None:
    """The first and the last layer share a weight: it learns at the full rate, the one between at the factor."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[2].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    with unvanish.treat(model, optimizer, "layerwise-rates=0.25"):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    for factor, p, old in zip((1.0, 0.25), model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old - factor * p.grad)


def test_one_layer_has_no_rates_per_layer() -> None:
    """A single matrix is refused, and the message says what to use."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(unvanish.TreatmentError, match=r"found 1 layers .* expected at least two.*'lower-lr'"),
        unvanish.treat(model, optimizer, "layerwise-rates"),
    ):
        pytest.fail("it was applied")

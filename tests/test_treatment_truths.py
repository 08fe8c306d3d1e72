"""Later remedies: clipping by history, rates per layer, hidden units, augmentation, logits in regression."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import unvanish
from unvanish.treatments import parse_treatment
from unvanish.treatments.gradients import AUTO_HISTORY
from unvanish.treatments.normalise import precise_bn


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


# --- limit-units


class Skip(nn.Module):
    """A layer whose units two others read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.a(x))
        return self.c(hidden + F.relu(self.b(hidden)))


class Functional(nn.Module):
    """Activations, pooling and flattening as calls; a branch of the output in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.line, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 16, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1)  # (batch, 8 * 4 * 4)
        return {"logits": self.head(F.relu(self.line(x)))}


WITH_UNITS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 1)), (16, 4), ["0"]),
    "words": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (16, 5, 4), ["0"]),
    "convolutional": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 1),
        ),
        (16, 3, 8, 8), ["0", "2"],
    ),
    "line": (
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 1)),
        (16, 3, 9), ["0"],
    ),
    "functional": (Functional, (16, 3, 8, 8), ["conv", "line"]),
    "skip": (Skip, (16, 4), []),
}  # fmt: skip


def with_dead_units(net: str) -> tuple[nn.Module, Tensor, list[nn.Module]]:
    """Return a model whose makers of units have dead units 2 and 5, a batch, and these layers."""
    torch.manual_seed(0)
    make, shape, names = WITH_UNITS[net]
    model = make()
    layers = [model.get_submodule(name) for name in names]
    with torch.no_grad():
        for layer in layers:
            layer.bias.fill_(10.0)  # the others are awake
            layer.bias[[2, 5]] = -100.0
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias[[2, 5]] = -100.0
    return model, torch.randn(shape), layers


def outputs_of(model: nn.Module, x: Tensor) -> Tensor:
    """Return the outputs of a model, in a mode without dropout."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        output = model.eval()(x)
    for module, mode in modes:
        module.training = mode
    return output["logits"] if isinstance(output, dict) else output


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, *, steps: int = 3) -> None:
    """Take some steps."""
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(x)
        output = output["logits"] if isinstance(output, dict) else output
        (output - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("net", [name for name in WITH_UNITS if name != "skip"])
def test_dead_units_go_and_the_outputs_stay(net: str, is_training: bool) -> None:
    """Exactly the dead units are silenced, with what reads them; the outputs on the batch are the same."""
    model, x, layers = with_dead_units(net)
    model.train(is_training)
    reference = outputs_of(model, x)
    with unvanish.treat(model, None, "limit-units", inputs=(x,)) as changes:
        (change,) = changes
        assert change.preserves_function
        assert change.layers == tuple(WITH_UNITS[net][2])
        for layer in layers:
            silent = layer.weight.flatten(1).abs().amax(1) == 0
            assert silent.nonzero().flatten().tolist() == [2, 5]
        torch.testing.assert_close(outputs_of(model, x), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("net", [name for name in WITH_UNITS if name != "skip"])
def test_silent_units_stay_silent_and_come_back(net: str) -> None:
    """Momentum and decay do not wake them; undoing brings their weights back bit for bit, and no others."""
    model, x, layers = with_dead_units(net)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9, weight_decay=0.1)
    train(model, optimizer, x)  # momentum that points at the units
    before = [layer.weight[[2, 5]].clone() for layer in layers]
    with unvanish.treat(model, optimizer, "limit-units=0.5", inputs=(x,)):
        chosen = [(layer.weight.flatten(1).abs().amax(1) == 0).nonzero().flatten() for layer in layers]
        train(model, optimizer, x)
        for layer, units in zip(layers, chosen, strict=True):
            assert len(units) == 4
            assert {2, 5} <= set(units.tolist())
            assert not layer.weight[units].any()
            assert not layer.bias[units].any()
        trained = model.get_parameter(list(first)[-1]).detach().clone()
    for layer, rows in zip(layers, before, strict=True):
        assert torch.equal(layer.weight[[2, 5]], rows)
    assert torch.equal(model.get_parameter(list(first)[-1]), trained)  # what was learnt meanwhile stays


def test_the_units_with_the_largest_effect_stay() -> None:
    """Of units with effects 4, 1, 3, 2 a share of a half keeps the first and the third."""
    model = nn.Sequential(nn.Linear(1, 4, bias=False), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0], [1.0], [1.0], [2.0]]))
        model[2].weight.copy_(torch.tensor([[-2.0, 1.0, 3.0, 1.0]]))
    with unvanish.treat(model, None, "limit-units=0.5", inputs=(torch.ones(3, 1),)):
        assert model[0].weight.flatten().tolist() == [2.0, 0.0, 1.0, 0.0]
        assert model[2].weight.flatten().tolist() == [-2.0, 0.0, 3.0, 0.0]


def test_units_that_move_less_than_a_rounding_are_idle() -> None:
    """A unit with outgoing weights of 1e-9 goes without a value; one with 1e-3 stays."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2))
    x = torch.randn(16, 4)
    with torch.no_grad():
        model[2].weight[:, 3], model[2].weight[:, 4] = 1e-9, 1e-3
    with unvanish.treat(model, None, "limit-units", inputs=(x,)):
        assert model[2].weight.abs().amax(0).eq(0).nonzero().flatten().tolist() == [3]


def test_a_layer_that_is_dead_as_a_whole_is_left() -> None:
    """Silencing every unit would leave nothing that can learn."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    with (
        pytest.raises(unvanish.TreatmentError, match=r"no unit to silence in 1 hidden layer,.*limit-units=0\.5"),
        unvanish.treat(model, None, "limit-units", inputs=(torch.randn(4, 4),)),
    ):
        pytest.fail("it was applied")


def test_units_with_two_readers_are_left() -> None:
    """A skip connection reads the units too: the network is refused, and nothing changes."""
    model, x, _ = with_dead_units("skip")
    with (
        pytest.raises(unvanish.TreatmentError, match=r"one other such layer reads.*Nothing was changed"),
        unvanish.treat(model, None, "limit-units=0.5", inputs=(x,)),
    ):
        pytest.fail("it was applied")


def test_weights_with_a_second_use_are_noticed() -> None:
    """An autoencoder whose decoder is the transposed encoder is refused: its outputs would change."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.b(F.relu(self.a(x))), self.a.weight)

    torch.manual_seed(0)
    model = Tied()
    with torch.no_grad():
        model.a.bias[1] = -100.0
    before = [p.detach().clone() for p in model.parameters()]
    with (
        pytest.raises(unvanish.TreatmentError, match=r"used elsewhere too. Nothing was changed"),
        unvanish.treat(model, None, "limit-units", inputs=(torch.randn(8, 4),)),
    ):
        pytest.fail("it was applied")
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("value", ["0", "1", "-0.5", "nan", "all"])
def test_a_share_is_a_share(value: str) -> None:
    """Values outside (0, 1) are refused in words."""
    with pytest.raises(unvanish.TreatmentError, match=r"expected a share of the units in \(0, 1\)"):
        parse_treatment(f"limit-units={value}")


# --- dead units alone


def rest_of(model: nn.Module, layers: list[nn.Module]) -> list[Tensor]:
    """Return the weights of units other than 2 and 5 in some layers."""
    others = [0, 1, 3, 4, 6, 7]
    return [parameter.detach()[others].clone() for layer in layers for parameter in (layer.weight, layer.bias)]


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("identifier", ["he-init", "xavier-init", "lecun-init", "orthogonal-init"])
@pytest.mark.parametrize("net", ["linear", "words", "convolutional", "line", "functional"])
def test_dead_units_wake_and_nothing_else_changes(net: str, identifier: str, is_training: bool) -> None:
    """Outputs on the batch and the weights of other units stay; the dead ones are awake, and wait for a gradient."""
    model, x, layers = with_dead_units(net)
    model.train(is_training)
    reference, rest = outputs_of(model, x), rest_of(model, layers)
    with unvanish.treat(model, None, f"{identifier}=dead", inputs=(x,)) as changes:
        (change,) = changes
        assert change.preserves_function
        assert change.what == f"{2 * len(layers)} of {2 * len(layers)} dead units are awake again"
        assert change.layers == tuple(WITH_UNITS[net][2])
        torch.testing.assert_close(outputs_of(model, x), reference, rtol=1e-5, atol=1e-5)
        # A weight of a unit in the next layer changes only where it reads a unit that was dead: there it is 0.
        for old, new in zip(rest, rest_of(model, layers), strict=True):
            assert bool(((old == new) | (new == 0)).all())
        with pytest.raises(unvanish.TreatmentError, match="found no dead unit"):
            unvanish.treat(model, None, f"{identifier}=dead", inputs=(x,)).keep()


@pytest.mark.parametrize("make", [partial(torch.optim.SGD, momentum=0.9), torch.optim.Adam])
@pytest.mark.parametrize("net", ["linear", "convolutional", "functional"])
def test_the_optimiser_forgets_what_was_replaced_and_undoing_brings_it_back(
    net: str, make: Callable[..., torch.optim.Optimizer]
) -> None:
    """Moments of dead units are zero, the others stay; undone at once, weights, buffers and moments are as before."""
    model, x, layers = with_dead_units(net)
    optimizer = make(model.parameters(), lr=1e-5)
    train(model, optimizer, x)
    for kept in optimizer.state.values():  # as if the units had been awake before
        for name, value in kept.items():
            kept[name] = value + 1 if name != "step" else value
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    states = deepcopy(optimizer.state_dict()["state"])
    with unvanish.treat(model, optimizer, "he-init=dead", inputs=(x,)):
        for layer in layers:
            for name, memory in optimizer.state[layer.weight].items():
                if name != "step":
                    assert memory[[2, 5]].eq(0).all()
                    assert memory[[0, 1, 3, 4, 6, 7]].any()
    for name, value in model.state_dict().items():
        assert torch.equal(value, tensors[name]), name
    for place, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, states[place][name]), (place, name)


def test_undoing_keeps_what_the_others_have_learnt() -> None:
    """After some steps only what was replaced goes back."""
    model, x, _ = with_dead_units("linear")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    dead = model[0].weight[[2, 5]].clone()
    with unvanish.treat(model, optimizer, "he-init=dead", inputs=(x,)):
        train(model, optimizer, x)
        assert model[0].weight.grad[[2, 5]].any()  # they learn
        learnt = rest_of(model, [model[0]])
    assert torch.equal(model[0].weight[[2, 5]], dead)
    assert all(map(torch.equal, learnt, rest_of(model, [model[0]])))


def test_drawn_weights_have_the_variance_of_the_whole_start() -> None:
    """2 / fan in for he-init, 1 / fan in for lecun-init, in a convolution over channels times positions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3))
    with torch.no_grad():
        model[0].bias[:48] = -100.0
    for identifier, truth in (("he-init", 2 / 144), ("lecun-init", 1 / 144), ("xavier-init", 2 / (144 + 64 * 9))):
        with unvanish.treat(model, None, f"{identifier}=dead", inputs=(torch.randn(4, 16, 8, 8),)):
            assert float(model[0].weight.detach()[:48].var()) == pytest.approx(truth, rel=0.08)
            assert not model[0].bias[:48].any()
            assert not model[2].weight[:, :48].any()


def test_layers_that_are_dead_one_after_the_other_wake_together() -> None:
    """What a dead layer reads of a dead layer is drawn too; only the last one's readers are zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.bias.fill_(-100.0)
    x = torch.randn(64, 4)
    reference = model(x)
    with unvanish.treat(model, None, "he-init=dead", inputs=(x,)) as changes:
        assert next(iter(changes)).what == "32 of 32 dead units are awake again"
        torch.testing.assert_close(model(x), reference, rtol=0, atol=0)
        assert model[2].weight.ne(0).all()
        assert not model[4].weight.any()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, optimizer, x, steps=20)
        assert model[0].weight.grad.any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: model[0].bias.data.fill_(10.0), "found no dead unit in 1 hidden layer.*'he-init'"),
        (lambda model: model[0].requires_grad_(False), "found no trained linear or convolutional layer"),
    ],
)
def test_nothing_to_wake_is_said(change: Callable[[nn.Module], object], words: str) -> None:
    """Where no unit is dead, or where dead ones are frozen, the treatment is refused."""
    model, x, _ = with_dead_units("linear")
    change(model)
    with pytest.raises(unvanish.TreatmentError, match=f"(?s){words}"):
        unvanish.treat(model, None, "he-init=dead", inputs=(x,)).keep()


def test_waking_needs_a_batch() -> None:
    """Without one the words say how to give it."""
    model, _, _ = with_dead_units("linear")
    with pytest.raises(unvanish.TreatmentError, match=r"found no batch.*'he-init=dead', inputs=\(x,\)"):
        unvanish.treat(model, None, "he-init=dead").keep()


def test_units_that_are_awake_with_huge_weights_kill_the_others_again() -> None:
    """The limit of a new start of dead units alone: after a step at rate 10 it fails where one of all weights helps."""
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = x[:, :2].abs().sum(1, keepdim=True)
    errors = {}
    for treatment in ("he-init=dead", "he-init"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
        with unvanish.treat(model, None, "he-init") as changes:
            changes.keep()
        for rate, steps in ((10.0, 1), (0.05, 20)):
            fit(model, x, y, rate, steps)
        with unvanish.treat(model, None, treatment, inputs=(x,)):
            fit(model, x, y, 0.05, 300)
            errors[treatment] = float((model(x) - y).detach().square().mean() / y.var())
    assert errors["he-init"] < 0.1
    assert not errors["he-init=dead"] < 0.9  # nan is not less


def fit(model: nn.Module, x: Tensor, y: Tensor, rate: float, steps: int) -> None:
    """Take some steps of plain descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()


# --- augmentation


AUGMENTATIONS = ("augment-rotate", "augment-noise", "augment-smooth", "augment-mirror", "augment-rotate-crop")


class Seeing(nn.Module):
    """Hands out the images that reached it, and has a weight and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.drop = nn.Parameter(torch.ones(1)), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.drop(self.scale * x.flatten(1).mean(1))


def varied(treatment: str, images: Tensor) -> Tensor:
    """Return what a treated model in training sees of these images."""
    model = Seeing()
    with unvanish.treat(model, None, treatment, inputs=(images,)):
        model(images)
    return model.seen


@pytest.mark.parametrize("treatment", AUGMENTATIONS)
def test_images_are_varied_only_in_training(treatment: str) -> None:
    """In training each image of a batch changes in its own way; in evaluation, and without gradients, none does."""
    torch.manual_seed(0)
    model, images = Seeing(), torch.rand(1, 3, 12, 10).repeat(8, 1, 1, 1)
    kept = images.clone()
    with unvanish.treat(model, None, treatment, inputs=(images,)):
        model(images)
        assert model.seen.shape == images.shape
        assert not torch.equal(model.seen, images)
        assert not torch.equal(model.seen, model.seen[:1].expand_as(images))
        first = model.seen
        model(images)
        assert not torch.equal(first, model.seen)
        with torch.no_grad():
            model(images)
        assert model.seen is images
        model.eval()(images)
        assert model.seen is images
    assert torch.equal(images, kept)
    model.train()(images)
    assert model.seen is images


@pytest.mark.parametrize("treatment", AUGMENTATIONS)
def test_other_draws_of_the_training_stay(treatment: str) -> None:
    """The order of the data, dropout, NumPy and Python draw what they would have drawn; the seed gives the images."""
    ends, seen = [], []
    for treatments in ((), (treatment,), (treatment,)):
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        model, images = Seeing(), torch.rand(4, 1, 8, 8)
        draws = []
        with unvanish.treat(model, None, *treatments, inputs=(images,)):
            for _ in range(3):
                output = model(images)
                draws += [(output == 0).tolist(), torch.randperm(9).tolist(), np.random.rand(), random.random()]
        ends.append(draws)
        seen.append(model.seen)
    assert ends[0] == ends[1] == ends[2]
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_mirrored_images_are_flipped() -> None:
    """With share 1 each image is its mirror image; by default about a half are, and the others stay."""
    images = torch.rand(400, 1, 3, 5)
    assert torch.equal(varied("augment-mirror=1", images), images.flip(-1))
    flipped = (varied("augment-mirror", images) == images.flip(-1)).flatten(1).all(1)
    stayed = (varied("augment-mirror", images) == images).flatten(1).all(1)
    assert 150 < int(flipped.sum()) < 250  # five standard deviations
    assert int(flipped.sum()) + int(stayed.sum()) == 400


def test_noise_has_a_share_of_the_spread() -> None:
    """What is added has mean 0 and the given share of the batch's spread, whatever the scale of the pixels."""
    torch.manual_seed(0)
    for scale in (1.0, 255.0):
        images = scale * torch.rand(16, 3, 32, 32)
        noise = varied("augment-noise=0.2", images) - images
        assert float(noise.std()) == pytest.approx(0.2 * float(images.std()), rel=0.02)
        assert abs(float(noise.mean())) < 0.005 * scale


def test_smoothing_averages() -> None:
    """Constant images stay; about half of the others lose spread, none gains any, and the mean stays."""
    torch.manual_seed(0)
    constant = torch.full((8, 1, 9, 9), 3.0)
    torch.testing.assert_close(varied("augment-smooth", constant), constant)
    images = torch.rand(200, 1, 32, 32)
    smooth = varied("augment-smooth=2", images)
    assert (smooth.flatten(1).std(1) <= images.flatten(1).std(1) + 1e-6).all()
    stayed = (smooth == images).flatten(1).all(1)
    assert 65 < int(stayed.sum()) < 135  # five standard deviations
    assert (smooth[~stayed].flatten(1).std(1) < 0.95 * images[~stayed].flatten(1).std(1)).float().mean() > 0.7
    torch.testing.assert_close(smooth.mean(), images.mean(), rtol=1e-2, atol=0)


def bump(height: int, width: int) -> Tensor:
    """Return an image that a turn around its middle does not change."""
    rows, columns = torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2
    return torch.exp(-(rows[:, None] ** 2 + columns**2) / 18)[None, None]


def test_a_turn_keeps_what_is_round() -> None:
    """A round bump stays within the error of interpolation, a bar does not; free corners are 0."""
    round_images = bump(17, 17).repeat(8, 1, 1, 1)
    bound = 2 * (1 / 9) / 8  # two directions, largest second derivative, linear interpolation
    torch.testing.assert_close(varied("augment-rotate=90", round_images), round_images, rtol=0, atol=bound)
    bar = torch.zeros(8, 1, 17, 17)
    bar[..., 8, :] = 1.0
    assert float((varied("augment-rotate=90", bar) - bar).abs().amax()) > 0.5
    ones = varied("augment-rotate=45", torch.ones(64, 1, 17, 17))
    assert float(ones[:, :, 0, 0].min()) == 0.0
    torch.testing.assert_close(ones[:, :, 4:13, 4:13], torch.ones(64, 1, 9, 9))


@pytest.mark.parametrize("shape", [(17, 17), (12, 20), (20, 9)])
@pytest.mark.parametrize("degrees", [30, 180])
def test_a_turned_crop_reads_no_pixel_from_outside(shape: tuple[int, int], degrees: int) -> None:
    """Of a plane it makes a plane, up to the corners, that some corner of one image nearly reaches (exact zoom)."""
    height, width = shape
    rows, columns = torch.meshgrid(
        torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij"
    )
    planes = torch.stack([rows, columns])[None].repeat(64, 1, 1, 1)
    turned = varied(f"augment-rotate-crop={degrees}", planes)
    for dim in (2, 3):
        torch.testing.assert_close(turned.diff(2, dim), torch.zeros_like(turned.diff(2, dim)), rtol=0, atol=1e-4)
    reach = (turned.abs().amax((2, 3)) / torch.tensor([(height - 1) / 2, (width - 1) / 2])).amax(1)
    torch.testing.assert_close(reach, torch.ones(64), rtol=0, atol=1e-4)  # no larger crop would fit
    # distances grow by one factor in all directions: turned, not sheared
    along, down = turned.diff(dim=3)[..., 0, 0], turned.diff(dim=2)[..., 0, 0]
    torch.testing.assert_close((along * down).sum(1), torch.zeros(64), rtol=0, atol=1e-4)
    torch.testing.assert_close(along.norm(dim=1), down.norm(dim=1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        ((), "no batch"),
        ((torch.rand(4, 64),), r"shape \(4, 64\)"),
        ((torch.rand(3, 8, 8),), r"shape \(3, 8, 8\)"),
        ((torch.zeros(4, 3, 8, 8, dtype=torch.uint8),), "torch.uint8"),
        (({"pixels": 1},), "type dict"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(inputs: tuple[object, ...], found: str) -> None:
    """Flat, single, integer and missing images are named, with what was expected."""
    with (
        pytest.raises(unvanish.TreatmentError, match=rf"found .*{found}.*expected floating-point images.*Nothing was"),
        unvanish.treat(Seeing(), None, "augment-rotate", inputs=inputs),
    ):
        pytest.fail("it was applied")


@pytest.mark.parametrize("text", ["augment-rotate=0", "augment-rotate=200", "augment-mirror=2", "augment-noise=-1"])
def test_impossible_amounts_are_refused(text: str) -> None:
    """Angles, shares and scales out of range say so before anything is touched."""
    with pytest.raises(unvanish.TreatmentError, match=r"expected a.*Nothing was changed"):
        parse_treatment(text)


def test_a_missing_kornia_is_one_line_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra the message says what to install."""
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    with (
        pytest.raises(unvanish.TreatmentError, match=r"found none.*Run: pip install 'unvanish\[augment\]'"),
        unvanish.treat(Seeing(), None, "augment-noise", inputs=(torch.rand(2, 1, 4, 4),)),
    ):
        pytest.fail("it was applied")


def test_kornia_is_loaded_only_where_it_is_used() -> None:
    """Neither the package nor its treatments import kornia, nor does naming an augmentation."""
    code = (
        "import sys, unvanish, unvanish.treat, unvanish.inject\n"
        "unvanish.treatments.parse_treatment('augment-rotate')\n"
        "sys.exit(any(name.split('.')[0] == 'kornia' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


# --- logits-loss


def squashed(squash: nn.Module, outputs: int = 1) -> nn.Sequential:
    """Return a small network that ends in a squash."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, outputs), squash)


REGRESSIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "huber": F.huber_loss,
    "l1 of a column": lambda p, y: F.l1_loss(p.squeeze(1), y.squeeze(1)),
    "by hand": lambda p, y: ((y - p) ** 2).mean(),
    "scaled, as with mixed precision": lambda p, y: 1024 * F.mse_loss(p, y),
    "one of two terms": lambda p, y: F.mse_loss(p, y) + 1e-3 * p.square().mean(),
}


@pytest.mark.parametrize("squash", [nn.Sigmoid, nn.Tanh])
@pytest.mark.parametrize("loss", REGRESSIONS)
def test_a_squash_in_regression_is_gone_for_predictions_too(loss: str, squash: type[nn.Module]) -> None:
    """Trained and asked, the network is the very one without the squash; undone, it is squashed again."""
    x, y = torch.randn(32, 3), 5 + torch.randn(32, 1)
    model = squashed(squash())
    plain = squashed(nn.Identity())
    with unvanish.treat(model, None, "logits-loss"):
        for net in (model, plain):
            optimizer = torch.optim.SGD(net.parameters(), lr=1e-5)
            for _ in range(5):
                optimizer.zero_grad()
                REGRESSIONS[loss](net(x), y).backward()
                optimizer.step()
        with torch.no_grad():
            assert torch.equal(model.eval()(x), plain(x))
    with torch.no_grad():
        torch.testing.assert_close(model(x), squash()(plain(x)))


CLASSIFICATIONS: dict[str, tuple[nn.Module, int, Callable[[Tensor], Tensor]]] = {
    "cross-entropy": (nn.Softmax(1), 3, lambda p: F.cross_entropy(p, torch.arange(32) % 3)),
    "two classes": (nn.Sigmoid(), 1, lambda p: F.binary_cross_entropy_with_logits(p, torch.ones(32, 1))),
    "log-probabilities": (nn.LogSoftmax(1), 3, lambda p: F.nll_loss(p, torch.arange(32) % 3)),
    "over the batch": (nn.LogSoftmax(0), 3, lambda p: F.nll_loss(p, torch.arange(32) % 3)),
    "nothing squashed": (nn.Identity(), 3, lambda p: F.nll_loss(p, torch.arange(32) % 3)),
}
ON_LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "two classes": lambda z: F.softplus(-z).mean(),  # -log of the probability of class 1
}


@pytest.mark.parametrize("loss", CLASSIFICATIONS)
def test_a_classifier_gives_logits_and_is_judged_by_them(loss: str) -> None:
    """Trained and asked, the network returns logits; the loss is the cross-entropy of exactly those."""
    squash, outputs, judge = CLASSIFICATIONS[loss]
    model, plain, x = squashed(squash, outputs), squashed(nn.Identity(), outputs), torch.randn(32, 3)
    reference = ON_LOGITS.get(loss, lambda z: F.cross_entropy(z, torch.arange(32) % 3))
    original = F.nll_loss
    with unvanish.treat(model, None, "logits-loss"):
        torch.testing.assert_close(judge(model(x)), reference(plain(x)))
        with torch.no_grad():
            assert torch.equal(model.eval()(x), plain(x))
    assert F.nll_loss is original


def test_nll_loss_of_log_probabilities_is_left_alone() -> None:
    """What sums to one already passes unchanged, bit for bit."""
    logits, target = torch.randn(16, 4), torch.arange(16) % 4
    expected = F.nll_loss(F.log_softmax(logits, 1), target)
    with unvanish.treat(nn.Linear(1, 1), None, "logits-loss"):
        assert torch.equal(F.nll_loss(F.log_softmax(logits, 1), target), expected)


def test_a_relu_before_a_regression_is_dropped() -> None:
    """Targets below 0 can be reached then."""
    model, x = squashed(nn.ReLU()), torch.randn(32, 3)
    with unvanish.treat(model, None, "logits-loss"):
        assert (model(x) < 0).any()
    assert (model(x) >= 0).all()


def test_initialisations_start_norms_and_cells_too() -> None:
    """A shift that kills all units goes, a scale of zeros stays, a cell's recurrent weight is orthogonal."""
    model = nn.ModuleList([nn.BatchNorm2d(3), nn.LayerNorm(3), nn.RNNCell(2, 4)])
    nn.init.constant_(model[0].bias, -5.0)
    nn.init.constant_(model[0].weight, 3.0)
    nn.init.zeros_(model[1].weight)
    with unvanish.treat(model, None, "orthogonal-init"):
        assert torch.equal(model[0].bias, torch.zeros(3))
        assert torch.equal(model[0].weight, torch.ones(3))
        assert torch.equal(model[1].weight, torch.zeros(3))
        square = model[2].weight_hh @ model[2].weight_hh.T
        torch.testing.assert_close(square, torch.eye(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("shape", "target"), [((8, 1), (8,)), ((8,), (8, 1))])
def test_predictions_meet_their_targets_both_ways(shape: tuple[int, ...], target: tuple[int, ...]) -> None:
    """A column meets a vector and a vector a column: the loss is then that of the pairs, and predictions stay."""

    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.line(x).reshape(shape)

    model, x, y = Shaped(), torch.randn(8, 3), torch.randn(8)
    pairs = ((model.line(x).squeeze(1) - y) ** 2).mean()
    with unvanish.treat(model, None, "match-target-shape"):
        torch.testing.assert_close(F.mse_loss(model(x), y.reshape(target)), pairs)
        with torch.no_grad():
            assert model(x).shape == shape


def test_precise_statistics_take_a_data_loader() -> None:
    """A loader yields lists: of inputs alone, or of inputs and targets."""
    x = torch.randn(64, 3) * 2 + 1
    model = nn.Sequential(nn.BatchNorm1d(3))
    for data in (TensorDataset(x), TensorDataset(x, torch.zeros(64))):
        with unvanish.treat(model, None, precise_bn(DataLoader(data, batch_size=16))):
            torch.testing.assert_close(model[0].running_mean, x.mean(0))
            torch.testing.assert_close(model[0].running_var, x.var(0, unbiased=True))

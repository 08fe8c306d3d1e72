"""Later remedies: clipping by history, a rate per layer, fewer units, augmentation, logits in regression."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unvanish
from unvanish.treatments import parse_treatment
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

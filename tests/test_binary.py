"""Discrete weights: layers are those of their formulas, kicks the gradient of a centre that is summed out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from unvanish import Coupling, OptionError, Replicas
from unvanish.replicas import additive
from unvanish.replicas.binary import (
    BinaryConv2d,
    BinaryLinear,
    Levels,
    clip_latent_,
    discretise,
    latent_levels,
    signs,
    ternary,
)
from unvanish.replicas.kicks import Form, kick

VALUES: dict[Levels, tuple[float, ...]] = {2: (-1.0, 1.0), 3: (-1.0, 0.0, 1.0)}
every_levels = pytest.mark.parametrize("levels", [2, 3])


def reference(latent: np.ndarray, levels: Levels, is_scaled: bool) -> np.ndarray:
    """Return discrete weights output by output, in float64, as the papers write them."""
    outputs = []
    for row in latent:
        if levels == 2:
            values = np.where(row >= 0, 1.0, -1.0)
        else:
            threshold = 0.7 * np.abs(row).mean()
            values = np.where(row > threshold, 1.0, np.where(row < -threshold, -1.0, 0.0))
        scale = np.abs(row[values != 0]).mean() if is_scaled else 1.0
        outputs.append(scale * values)
    return np.stack(outputs)


def latent(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- layers


@every_levels
@pytest.mark.parametrize("is_scaled", [False, True])
def test_layers_are_ordinary_ones_with_discrete_weights(levels: Levels, is_scaled: bool) -> None:
    """Outputs are those of torch's layers that hold the weights of the formulas, with padding, strides and groups."""
    torch.manual_seed(0)
    linear = BinaryLinear(7, 5, levels=levels, is_scaled=is_scaled, dtype=torch.float64)
    plain = nn.Linear(7, 5, dtype=torch.float64)
    options: dict[str, Any] = {"stride": 2, "padding": 1, "groups": 2, "padding_mode": "circular"}
    conv = BinaryConv2d(4, 6, 3, levels=levels, is_scaled=is_scaled, dtype=torch.float64, **options)
    plain_conv = nn.Conv2d(4, 6, 3, dtype=torch.float64, **options)
    for layer, other, x in ((linear, plain, latent(3, 7)), (conv, plain_conv, latent(2, 4, 9, 9))):
        other.load_state_dict(layer.state_dict())  # the names are those of torch's layers
        weights = reference(layer.weight.detach().numpy(), levels, is_scaled)
        with torch.no_grad():
            other.weight.copy_(torch.tensor(weights))
        torch.testing.assert_close(layer(x), other(x), rtol=1e-12, atol=1e-12)


@every_levels
def test_discrete_weights_are_exact(levels: Levels) -> None:
    """Without scales a weight is one of its levels to the last bit, whatever the latent weight and its precision."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weights = discretise((latent(50, 40) * 1e3 ** latent(50, 1, seed=1)).to(dtype).requires_grad_(), levels)
        assert set(weights.detach().flatten().tolist()) == set(VALUES[levels])
        assert weights.dtype == dtype
    assert signs(torch.tensor([0.0, -0.0, 1e-40, -1e-40])).tolist() == [1.0, 1.0, 1.0, -1.0]
    assert ternary(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


@every_levels
def test_the_gradient_goes_straight_through(levels: Levels) -> None:
    """The latent weights get the gradient of the discrete ones, bit for bit."""
    weights, x = latent(5, 7).requires_grad_(), latent(3, 7, seed=1)
    values = torch.tensor(reference(weights.detach().numpy(), levels, False)).requires_grad_()
    (x @ discretise(weights, levels).T).tanh().sum().backward()
    (x @ values.T).tanh().sum().backward()
    assert torch.equal(weights.grad, values.grad)


@every_levels
def test_the_gradient_of_scaled_weights_is_that_of_their_formula(levels: Levels) -> None:
    """With scale a and values t, g becomes a g + (sum of g t) times the gradient of a, which is t over its count."""
    weights, grad = latent(5, 2, 3).requires_grad_(), latent(5, 2, 3, seed=1)
    discretise(weights, levels, is_scaled=True).backward(grad)
    for row, g, found in zip(weights.detach().numpy(), grad.numpy(), weights.grad.numpy(), strict=True):
        values = reference(row.reshape(1, -1), levels, False).reshape(row.shape)
        taken = values != 0
        scale = np.abs(row[taken]).mean()
        np.testing.assert_allclose(found, scale * g + (g * values).sum() * values / taken.sum(), rtol=1e-12)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 3]), st.floats(-0.5, 0.5))
def test_the_scale_is_the_best_one(seed: int, levels: Levels, change: float) -> None:
    """No other scale brings the discrete weights closer to the latent ones in least squares."""
    weights = latent(1, 20, seed=seed)
    best = discretise(weights, levels, is_scaled=True)
    distance, other = (float((weights - factor * best).square().sum()) for factor in (1, 1 + change))
    assert distance <= other * (1 + 1e-12)


def test_latent_weights_come_back_from_their_limit() -> None:
    """Only binary layers are cut off, in a model and in its replicas; all else is left as it is."""
    model = nn.Sequential(BinaryConv2d(1, 2, 3), nn.Flatten(), BinaryLinear(8, 4, levels=3), nn.Linear(4, 2))
    for each in (model, Replicas(model, n=2)):
        with torch.no_grad():
            for parameter in each.parameters():
                parameter[..., 0] = -3.0
                parameter[..., 1:] = 3.0
        clip_latent_(each, 0.5)
        for name, parameter in each.named_parameters():
            limit = 0.5 if name.removeprefix("stacked.") in ("0.weight", "2.weight") else 3.0
            assert parameter.unique().tolist() == [-limit, limit], name
    assert latent_levels(model) == {"0.weight": 2, "2.weight": 3}
    assert latent_levels(model[0]) == {"weight": 2}


@every_levels
def test_a_layer_learns_the_weights_of_its_teacher(levels: Levels) -> None:
    """From enough examples of a discrete layer another one finds exactly its weights."""
    torch.manual_seed(0)
    teacher, student = (BinaryLinear(15, 4, bias=False, levels=levels, dtype=torch.float64) for _ in range(2))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02)
    assert not torch.equal(discretise(student.weight, levels), discretise(teacher.weight, levels))
    for _ in range(300):
        x = torch.randn(64, 15, dtype=torch.float64)
        optimizer.zero_grad()
        F.mse_loss(student(x), teacher(x).detach()).backward()
        optimizer.step()
        clip_latent_(student)
    assert torch.equal(discretise(student.weight, levels), discretise(teacher.weight, levels))


def small() -> nn.Module:
    return nn.Sequential(
        BinaryConv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(),
        BinaryLinear(12, 5, levels=3, is_scaled=True), nn.Tanh(), nn.Linear(5, 2),
    ).double()  # fmt: skip


@pytest.mark.parametrize("backend", ["loop", "vmap", "batched"])
def test_uncoupled_replicas_are_separate_trainings(backend: Any) -> None:
    """Replicas of a model with binary layers train as plain models do: bit for bit in the loop."""
    torch.manual_seed(0)
    models = [small() for _ in range(3)]
    replicas = Replicas(models[0], n=3, init=lambda i: models[i], backend=backend)
    x, y = latent(4, 3, 6, 1, 4, 4), torch.randint(2, (4, 3, 6))
    for model, own in zip(models, range(3), strict=True):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for step in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x[step, own]), y[step, own]).backward()
            optimizer.step()
            clip_latent_(model)
    optimizer = torch.optim.Adam(replicas.parameters(), lr=0.05)
    for step in range(4):
        optimizer.zero_grad()
        replicas.loss(F.cross_entropy, x[step], y[step], batches="separate").backward()
        optimizer.step()
        clip_latent_(replicas)
    close = {"rtol": 0, "atol": 0} if backend == "loop" else {"rtol": 1e-9, "atol": 1e-10}
    for i, model in enumerate(models):
        for name, value in replicas.replica(i).state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[name], **close, msg=name)


# --- kicks


def free_energy(weights: Tensor, gamma: float, levels: Levels) -> Tensor:
    """Return the logarithm of the sum of exp(-gamma/2 sum_a |W_a - c|^2) over all centres c, one by one."""
    size = weights[0].numel()
    centres = torch.tensor(list(itertools.product(VALUES[levels], repeat=size)), dtype=torch.float64)
    distances = (weights.flatten(1).unsqueeze(1) - centres).square().sum((0, 2))
    return torch.logsumexp(-gamma / 2 * distances, 0)


@every_levels
@pytest.mark.parametrize("gamma", [0.05, 0.7, 3.0])
def test_the_kick_is_the_gradient_of_a_centre_that_is_summed_out(levels: Levels, gamma: float) -> None:
    """Summed over every discrete centre, the log probability of the replicas has gradient gamma times the kick."""
    values = torch.tensor(VALUES[levels], dtype=torch.float64)
    weights = values[torch.randint(len(values), (5, 2, 3), generator=torch.Generator().manual_seed(1))]
    weights.requires_grad_()
    (grad,) = torch.autograd.grad(free_energy(weights, gamma, levels), weights)
    torch.testing.assert_close(gamma * kick(weights.detach(), gamma, levels=levels), grad, rtol=1e-10, atol=1e-12)


def test_the_binary_kick_is_the_gradient_of_log_cosh() -> None:
    """With two levels it is that of log 2 cosh(gamma sum of W) - gamma/2 sum of W², for real weights too."""
    weights = latent(7, 4, 3).requires_grad_()
    total = 0.3 * weights.sum(0)
    energy = (2 * torch.cosh(total)).log().sum() - 0.3 / 2 * weights.square().sum()
    (grad,) = torch.autograd.grad(energy, weights)
    torch.testing.assert_close(0.3 * kick(weights.detach(), 0.3), grad)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 5.0), st.integers(1, 8))
def test_kicks_are_their_formulas(seed: int, gamma: float, n: int) -> None:
    """Each form is the formula in float64; turning all signs turns the kick."""
    weights = latent(n, 6, seed=seed).sign()
    total, own = weights.numpy().sum(0), weights.numpy()
    expected = {
        "simple": np.tanh(gamma * total) - own,
        "corrected": np.tanh(gamma * total) - np.tanh(gamma * n) * own,
        "hard": np.clip(gamma * total, -1, 1) - own,
    }
    for form, force in expected.items():
        np.testing.assert_allclose(kick(weights, gamma, form).numpy(), force, rtol=1e-12, atol=1e-12)
        assert torch.equal(kick(-weights, gamma, form), -kick(weights, gamma, form))


@every_levels
def test_kicks_have_known_limits(levels: Levels) -> None:
    """A small gamma lets all weights soften; a large one asks for the centre; agreeing replicas are left alone."""
    values = torch.tensor(VALUES[levels], dtype=torch.float64)
    weights = values[torch.randint(len(values), (5, 30), generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(kick(weights, 1e-9, levels=levels), -weights, rtol=0, atol=1e-8)
    mean = weights.mean(0)
    nearest = values[(mean.unsqueeze(1) - values).abs().argmin(1)]
    torch.testing.assert_close(kick(weights, 1e3, levels=levels), nearest - weights)
    agreeing = weights[:1].expand(5, 30)
    assert not kick(agreeing, 0.4, "corrected", levels=levels).any()
    assert kick(agreeing, 0.4, levels=levels).any()


# --- coupling


@every_levels
@pytest.mark.parametrize("form", ["simple", "corrected", "hard"])
def test_the_coupling_kicks_latent_weights_and_pulls_the_others(levels: Levels, form: Form) -> None:
    """Latent weights move by strength times the kick of what each output's weights are; biases by the elastic pull."""
    torch.manual_seed(0)
    model = nn.Sequential(BinaryConv2d(2, 3, 3, levels=levels), nn.Flatten(), BinaryLinear(12, 5, levels=levels))
    replicas = Replicas(model.double(), n=3, init="separate")
    before = {name: p.detach().numpy().copy() for name, p in replicas.stacked.named_parameters()}
    coupling = Coupling(replicas, 0.2, force="binary", gamma=additive(0.3, 0.1), form=form)
    coupling.step()
    for name, p in replicas.stacked.named_parameters():
        was = before[name]
        if name.endswith("weight"):
            values = torch.tensor(np.stack([reference(replica, levels, False) for replica in was]))
            force = kick(values, 0.4, form, levels=levels).numpy()  # one step is done
        else:
            force = was.mean(0) - was
        np.testing.assert_allclose(p.detach().numpy(), was + 0.2 * force, rtol=1e-12, atol=1e-12)


def test_scoping_goes_on_where_a_run_is_resumed() -> None:
    """Gamma follows the steps that are done, of a resumed coupling too."""
    moved = []
    for has_break in (False, True):
        torch.manual_seed(0)
        replicas = Replicas(BinaryLinear(4, 3), n=3, init="separate")
        coupling = Coupling(replicas, 0.2, force="binary", gamma=additive(0.1, 0.5))
        for _ in range(4):
            coupling.step()
            if has_break:
                state, coupling = (
                    coupling.state_dict(),
                    Coupling(replicas, 0.2, force="binary", gamma=additive(0.1, 0.5)),
                )
                coupling.load_state_dict(state)
        moved.append(replicas.stacked.weight.clone())
    assert torch.equal(*moved)


# --- wrong calls


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BinaryLinear(2, 2, levels=4), r"BinaryLinear\(\): levels: found 4, expected 2 or 3"),
        (lambda: BinaryConv2d(2, 2, 3, levels=1), r"BinaryConv2d\(\): levels: found 1, expected 2 or 3"),
        (lambda: clip_latent_(nn.Linear(1, 1), 0.0), r"clip_latent_\(\): limit: found 0.0, expected a number above 0"),
        (lambda: kick(torch.ones(2, 1), 0.0), r"kick\(\): gamma: found 0.0, expected a number above 0"),
        (lambda: kick(torch.ones(2, 1), 1.0, "soft"), r"kick\(\): form: found 'soft', expected 'simple', 'corrected'"),
        (lambda: additive(0.0, 1.0), r"additive\(\): found start 0.0 and step 1.0, expected a start above 0"),
        (lambda: additive(0.1, -1.0), r"additive\(\): found start 0.1 and step -1.0, expected a start above 0"),
        (
            lambda: Coupling(Replicas(nn.Linear(1, 1)), force="binary"),
            r"Coupling\(\): force: found 'binary' for a model without BinaryLinear or BinaryConv2d",
        ),
        (
            lambda: Coupling(Replicas(BinaryLinear(1, 1)), force="binary", gamma=-1.0),
            r"Coupling\(\): gamma: found -1.0, expected a number above 0",
        ),
    ],
)
def test_wrong_calls_are_refused(make: Callable[[], object], words: str) -> None:
    """What cannot be used is named, with what was expected."""
    with pytest.raises(OptionError, match=words):
        make()


def test_layers_say_what_they_are() -> None:
    """The options are shown beside those of torch."""
    assert (
        repr(BinaryLinear(2, 3)) == "BinaryLinear(in_features=2, out_features=3, bias=True, levels=2, is_scaled=False)"
    )
    assert "kernel_size=(3, 3)" in repr(BinaryConv2d(2, 3, 3, levels=3))
    assert repr(BinaryConv2d(2, 3, 3, levels=3)).endswith("levels=3, is_scaled=False)")

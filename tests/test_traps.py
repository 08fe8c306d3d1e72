"""Where watchers usually go wrong: what is recorded must be true in all of these trainings."""

from __future__ import annotations

import math
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unvanish
from unvanish.records import Trace
from unvanish.watch import Watch

from .nets import Checkpointed, Critic, Generator, chain, descend, watching


@pytest.fixture(autouse=True)
def every_sample_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the forward pass in every sample: what is looked at less often is tested by itself."""
    monkeypatch.setattr(sys.modules["unvanish.players"], "FULL_SAMPLES", 1)


@pytest.fixture(autouse=True)
def one_thread_and_a_seed() -> Iterator[None]:
    """Keep sums in one order and random numbers the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def only(watch: Watch) -> Trace:
    """Return the one trace of a watch that did not fail."""
    assert watch.failure == ""
    (trace,) = watch.recording().traces
    return trace


def column(trace: Trace, measure: str, layer: str) -> np.ndarray:
    return trace.measures[measure][:, [item.name for item in trace.layers].index(layer)]


def grad_rms(module: nn.Module) -> float:
    """Return the root mean square gradient of a layer in float64."""
    grads = [p.grad.double().reshape(-1) for p in module.parameters(recurse=False) if p.grad is not None]
    return float(torch.cat(grads).square().mean().sqrt())


def net(width: int = 8, outputs: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, outputs))


# When the gradient is read ------------------------------------------------------------------------------


def test_closure_gradients_are_those_of_this_step() -> None:
    """`optimizer.step(closure)` computes gradients inside the step; these are the ones recorded."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    truth, losses = [], []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.randn(6, 4)).square().mean()
        loss.backward()
        truth.append(grad_rms(model[0]))
        losses.append(loss.item())
        return loss

    with watching(every=1) as watch:
        for _ in range(12):
            optimizer.step(closure)
    trace = only(watch)
    np.testing.assert_allclose(column(trace, "grad_rms", "0"), truth, rtol=1e-5)
    np.testing.assert_allclose(trace.losses, losses)
    np.testing.assert_allclose(column(trace, "alignment", "0"), 1.0, atol=1e-5)


@pytest.mark.parametrize("clip", ["norm", "value", "foreach"])
def test_gradients_are_seen_before_clipping(clip: str) -> None:
    """Clipping hides explosions; the norm recorded is the one before it."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    truth: dict[str, list[float]] = {"0": [], "2": []}
    with watching(every=1) as watch:
        for _ in range(12):
            optimizer.zero_grad()
            (1000 * model(torch.randn(6, 4)).square().mean()).backward()
            for name, values in truth.items():
                values.append(grad_rms(model.get_submodule(name)))
            if clip == "value":
                nn.utils.clip_grad_value_(model.parameters(), 1e-3)
            else:
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3, foreach=clip == "foreach")
            optimizer.step()
    for name, values in truth.items():
        np.testing.assert_allclose(column(only(watch), "grad_rms", name), values, rtol=1e-5)


@pytest.mark.parametrize("every", [1, 10])
def test_accumulation_gives_the_summed_gradient(every: int) -> None:
    """Over four micro-batches the gradient is their sum, the loss their sum, and nothing counts as uncleared."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    truth, losses = [], []
    with watching(every=every) as watch:
        for _ in range(21):
            optimizer.zero_grad()
            total = 0.0
            for _ in range(4):
                loss = model(torch.randn(6, 4)).square().mean() / 4
                loss.backward()
                total += loss.item()
            truth.append(grad_rms(model[0]))
            losses.append(total)
            optimizer.step()
    trace = only(watch)
    np.testing.assert_allclose(column(trace, "grad_rms", "0"), np.array(truth)[trace.steps], rtol=1e-5)
    np.testing.assert_allclose(trace.losses, losses, rtol=1e-6)
    np.testing.assert_allclose(trace.scalars["loss"], np.array(losses)[trace.steps], rtol=1e-6)
    assert trace.facts["uncleared_steps"] == 0


def test_mixed_precision_is_recorded_unscaled() -> None:
    """Gradient and loss are those without the loss scale; the step that overflowed is counted, not recorded."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=3)
    truth, losses, delta = [], [], []
    with watching(every=1) as watch:
        for step in range(14):
            x = torch.randn(6, 4)
            optimizer.zero_grad()
            hidden = model(x)
            loss = hidden.square().mean() * (math.inf if step == 6 else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if step != 6:
                truth.append(grad_rms(model[0]))
                losses.append(loss.item())
                delta.append(float((2 * hidden.detach().double() / hidden.numel()).norm()))
            scaler.step(optimizer)
            scaler.update()
    trace = only(watch)
    assert trace.total_steps == 13
    assert trace.facts["skipped_steps"] == 1
    np.testing.assert_allclose(trace.losses, losses, rtol=1e-6)
    np.testing.assert_allclose(column(trace, "grad_rms", "0"), truth, rtol=1e-4)
    np.testing.assert_allclose(column(trace, "delta_norm", "2"), delta, rtol=1e-4)
    assert not np.nansum(trace.measures["nonfinite"])


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam], ids=["SGD", "Adam"])
def test_steps_that_a_fused_optimiser_leaves_out_are_counted(make: Any) -> None:
    """A fused optimiser gets scaled gradients and skips by itself: one skipped step, no number of it recorded."""
    model = net()
    optimizer = make(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    truth, losses = [], []
    with watching(every=1) as watch:
        for step in range(8):
            optimizer.zero_grad()
            loss = model(torch.randn(6, 4)).square().mean() * (math.inf if step == 5 else 1.0)
            scale = scaler.get_scale()
            scaler.scale(loss).backward()
            if step != 5:
                truth.append(grad_rms(model[0]) / scale)
                losses.append(loss.item())
            scaler.step(optimizer)
            scaler.update()
    trace = only(watch)
    assert trace.total_steps == 7
    assert trace.facts["skipped_steps"] == 1
    np.testing.assert_allclose(trace.losses, losses, rtol=1e-6)
    np.testing.assert_allclose(column(trace, "grad_rms", "0"), truth, rtol=1e-4)


def test_scaled_and_unscaled_losses_may_alternate() -> None:
    """Where one network trains with a loss scale and another without, both are recorded as they are."""
    scaled, plain = net(), net()
    to_scaled, to_plain = torch.optim.Adam(scaled.parameters()), torch.optim.SGD(plain.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    truth: dict[str, list[float]] = {"Adam": [], "SGD": []}
    losses: dict[str, list[float]] = {"Adam": [], "SGD": []}
    with watching(every=1) as watch:
        for _ in range(6):
            for model, optimizer in ((scaled, to_scaled), (plain, to_plain)):
                optimizer.zero_grad()
                loss = model(torch.randn(6, 4)).square().mean()
                if model is scaled:
                    scaler.scale(loss).backward()
                    scaler.unscale_(optimizer)
                else:
                    loss.backward()
                truth[type(optimizer).__name__].append(grad_rms(model[0]))
                losses[type(optimizer).__name__].append(loss.item())
                if model is scaled:
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
    assert watch.failure == ""
    for trace in watch.recording().traces:
        (name, *_) = (layer.name for layer in trace.layers if layer.is_optimised)
        np.testing.assert_allclose(trace.losses, losses[trace.name], rtol=1e-6)
        np.testing.assert_allclose(column(trace, "grad_rms", name), truth[trace.name], rtol=1e-4)


def test_a_disabled_scaler_changes_nothing() -> None:
    """`GradScaler(enabled=False)`, as scripts on a CPU use it, leaves losses and steps as they are."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = []
    with watching() as watch:
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(torch.randn(6, 4)).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
    trace = only(watch)
    assert trace.facts["skipped_steps"] == 0
    np.testing.assert_allclose(trace.losses, losses, rtol=1e-6)


def test_retained_and_differentiable_graphs_are_read() -> None:
    """Two backward passes through one graph add up; a gradient penalty (double backward) is recorded."""
    model = net(outputs=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    truth = []
    with watching(every=1) as watch:
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(torch.randn(6, 4)).square().mean()
            loss.backward(retain_graph=True)
            loss.backward()
            truth.append(grad_rms(model[0]))
            optimizer.step()
        for _ in range(4):
            optimizer.zero_grad()
            x = torch.randn(6, 4, requires_grad=True)
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            slope.square().mean().backward()
            truth.append(grad_rms(model[0]))
            optimizer.step()
    np.testing.assert_allclose(column(only(watch), "grad_rms", "0"), truth, rtol=1e-5)


def test_create_graph_in_backward_is_harmless() -> None:
    """`backward(create_graph=True)` is watched like any other, without a graph of our own growing on it."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watching(every=1) as watch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using backward.. with create_graph=True", UserWarning)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(6, 4)).square().mean().backward(create_graph=True)
            optimizer.step()
            for parameter in model.parameters():
                parameter.grad = None
    assert np.isfinite(column(only(watch), "delta_norm", "2")).all()


# Who steps --------------------------------------------------------------------------------------------


def test_each_optimiser_has_its_own_trace() -> None:
    """Of a GAN, each trace has its own losses, steps and layers, with activations and flow of its network."""
    maker, critic = Generator(), Critic()
    to_maker, to_critic = torch.optim.Adam(maker.parameters()), torch.optim.SGD(critic.parameters(), 0.1)
    losses: dict[str, list[float]] = {"Adam": [], "SGD": []}
    one, zero = torch.ones(16, 1), torch.zeros(16, 1)
    with watching(every=1) as watch:
        for step in range(24):
            fake = maker(torch.randn(16, 4))
            to_critic.zero_grad()
            loss = F.binary_cross_entropy_with_logits(critic(torch.randn(16, 2)), one)
            loss = loss + F.binary_cross_entropy_with_logits(critic(fake.detach()), zero)
            loss.backward()
            to_critic.step()
            losses["SGD"].append(loss.item())
            if step % 2:
                continue
            to_maker.zero_grad()
            loss = F.binary_cross_entropy_with_logits(critic(fake), one)
            loss.backward()
            to_maker.step()
            losses["Adam"].append(loss.item())
    traces = {trace.facts["optimizer"]: trace for trace in watch.recording().traces}
    assert watch.failure == ""
    assert {name: trace.total_steps for name, trace in traces.items()} == {"Adam": 12, "SGD": 24}
    for name, trace in traces.items():
        np.testing.assert_allclose(trace.losses, losses[name], rtol=1e-6)
        assert trace.facts["uncleared_steps"] == 0
        owned = {layer.name for layer in trace.layers if layer.is_optimised}
        elsewhere = {layer.name for layer in trace.layers if layer.is_optimised_elsewhere}
        assert owned == ({"0", "2"} if name == "Adam" else {"Critic.0", "Critic.2"})
        assert elsewhere == {"0", "2", "Critic.0", "Critic.2"} - owned
        for layer in owned:
            assert np.isfinite(column(trace, "update_ratio", layer)).all()
            assert np.isfinite(column(trace, "grad_rms", layer)).all()
            assert np.isfinite(column(trace, "activation_std", layer)).all()
    maker_trace = traces["Adam"]
    for layer in ("0", "2"):
        assert np.isfinite(column(maker_trace, "log2_flow", layer)).all()
    assert np.isfinite(column(maker_trace, "dead_share", "0")).all()


def test_two_optimisers_after_one_backward_share_the_loss() -> None:
    """Encoder and decoder with an optimiser each, one loss: both traces have every loss."""
    encoder, decoder = nn.Linear(4, 3), nn.Linear(3, 4)
    optimizers = [torch.optim.SGD(encoder.parameters(), 0.1), torch.optim.Adam(decoder.parameters())]
    losses = []
    with watching(every=1) as watch:
        for _ in range(12):
            x = torch.randn(5, 4)
            loss = F.mse_loss(decoder(encoder(x)), x)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.item())
    assert watch.failure == ""
    for trace in watch.recording().traces:
        np.testing.assert_allclose(trace.losses, losses, rtol=1e-6)
        owned = [layer.name for layer in trace.layers if layer.is_optimised]
        assert len(owned) == 1
        assert np.isfinite(column(trace, "update_ratio", owned[0])).all()
        assert np.isfinite(column(trace, "grad_rms", owned[0])).all()
        assert trace.facts["uncleared_steps"] == 0


def test_a_model_trained_twice_has_two_traces() -> None:
    """A second optimiser for the same model begins a second trace; the first one's stays as it was."""
    model = net()
    losses = []
    with watching(every=1) as watch:
        for make in (torch.optim.SGD, torch.optim.Adam):
            optimizer = make(model.parameters(), lr=0.01)
            losses.append(descend(model, optimizer, torch.randn(5, 4), torch.zeros(5, 2), 12))
    assert watch.failure == ""
    traces = watch.recording().traces
    assert [trace.name for trace in traces] == ["SGD", "Adam"]
    for trace, expected in zip(traces, losses, strict=True):
        np.testing.assert_allclose(trace.losses, expected, rtol=1e-6)
        assert [layer.name for layer in trace.layers] == ["0", "2"]
        assert np.isfinite(trace.measures["update_ratio"]).all()


def test_parameters_added_to_the_optimiser_later_are_watched() -> None:
    """`add_param_group`, as when layers are unfrozen on the way, makes the layer one of the trace's own."""
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), 0.1)
    with watching(every=1) as watch:
        descend(model, optimizer, torch.randn(5, 4), torch.zeros(5, 2), 4)
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": list(model[0].parameters())})
        descend(model, optimizer, torch.randn(5, 4), torch.zeros(5, 2), 4)
    trace = only(watch)
    assert trace.layer("0").is_optimised
    assert list(np.isfinite(column(trace, "update_ratio", "0"))) == [False] * 4 + [True] * 4


def test_training_without_an_optimiser_of_torch_holds_nothing() -> None:
    """A loop that updates by hand gives no trace, and waiting losses do not pile up."""
    weight = torch.ones(1, requires_grad=True)
    with watching() as watch:
        for _ in range(5000):
            (weight * 2).sum().backward()
            weight.grad = None
        assert len(watch._pending.values) <= 4096
    assert watch.failure == ""
    assert watch.recording().traces == ()


# What an update is -------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_update_ratio_is_exact_for_small_layers(make: Any, maximize: bool) -> None:
    """Norm of the applied update over that of the weights, and the cosine between update and descent."""
    model = net()
    optimizer = make(model.parameters(), lr=0.01, maximize=maximize)
    ratios, cosines = [], []
    with watching(every=1) as watch:
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.randn(6, 4)).square().mean().backward()
            flat = lambda: torch.cat([p.detach().double().reshape(-1) for p in model[0].parameters()])  # noqa: E731
            before, grad = flat(), torch.cat([p.grad.double().reshape(-1) for p in model[0].parameters()])
            optimizer.step()
            update = flat() - before
            ratios.append(float(update.norm() / before.norm()))
            cosines.append(float(-update @ grad / update.norm() / grad.norm()))
    trace = only(watch)
    np.testing.assert_allclose(column(trace, "update_ratio", "0"), ratios, rtol=1e-4)
    np.testing.assert_allclose(column(trace, "alignment", "0"), cosines, atol=1e-3)
    if make is torch.optim.SGD:
        np.testing.assert_allclose(column(trace, "alignment", "0"), -1 if maximize else 1, atol=1e-4)
    assert trace.facts["maximize"] is maximize


@pytest.mark.parametrize("gain", [0.5, 1.0, 4.0])
def test_flow_is_the_product_of_the_gains(gain: float) -> None:
    """Along a linear chain of gain g the gradient is g**depth: every gain is log2 g, the flow their sum."""
    depth = 9
    model = chain(gain, depth)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with watching(every=1) as watch:
        descend(model, optimizer, torch.randn(5, 6), torch.zeros(5, 6), 3, lambda y, t: y.sum())
    trace = only(watch)
    for number in range(depth):
        np.testing.assert_allclose(
            column(trace, "log2_flow", str(number)), math.log2(gain) * (depth - 1 - number), atol=1e-4
        )
        if number:
            np.testing.assert_allclose(column(trace, "log2_gain", str(number)), math.log2(gain), atol=1e-4)


# What activations do -----------------------------------------------------------------------------------

DEAD_AND_SATURATED = {
    # name: (function, module, which values let no gradient pass, which are saturated)
    "relu": (F.relu, nn.ReLU, lambda z: z <= 0, np.zeros_like),
    "relu_method": (lambda z: z.relu(), None, lambda z: z <= 0, np.zeros_like),
    "relu_in_place": (lambda z: F.relu_(z), lambda: nn.ReLU(inplace=True), lambda z: z <= 0, np.zeros_like),
    "clamp": (lambda z: torch.clamp(z, min=0), None, lambda z: z <= 0, np.zeros_like),
    "relu6": (F.relu6, nn.ReLU6, lambda z: z <= 0, lambda z: z >= 6),
    "tanh": (torch.tanh, nn.Tanh, np.zeros_like, lambda z: np.abs(np.tanh(z)) >= 0.975),
    "sigmoid": (torch.sigmoid, nn.Sigmoid, np.zeros_like, lambda z: np.abs(1 / (1 + np.exp(-z)) - 0.5) >= 0.4873),
    "gelu": (F.gelu, nn.GELU, lambda z: z <= -3, np.zeros_like),
}  # fmt: skip


class Functional(nn.Module):
    """Linear, a function, linear."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 16), nn.Linear(16, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


@pytest.mark.parametrize(
    ("name", "written"),
    [(n, w) for n, how in DEAD_AND_SATURATED.items() for w in ("function", "module") if w == "function" or how[1]],
)
def test_dead_and_saturated_shares_are_exact(name: str, written: str) -> None:
    """On a net smaller than the sampling block the shares equal those of plain numpy."""
    function, module, is_dead, is_saturated = DEAD_AND_SATURATED[name]
    model = Functional(function if written == "function" else module())
    with torch.no_grad():
        model.first.bias[:4] = -8.0  # some units are dead or saturated for every example
        model.first.weight.mul_(3)
    x = torch.randn(12, 4)
    with torch.no_grad():
        z = F.linear(x, model.first.weight, model.first.bias).numpy()
    dead, saturated = is_dead(z).astype(bool), is_saturated(z).astype(bool)
    with watching(every=1) as watch:
        descend(model, torch.optim.SGD(model.parameters(), 0.0), x, torch.zeros(12, 1), 2)
    trace = only(watch)
    np.testing.assert_allclose(column(trace, "dead_share", "first"), dead.all(0).mean(), atol=1e-6)
    np.testing.assert_allclose(column(trace, "zero_share", "first"), dead.mean(), atol=1e-6)
    np.testing.assert_allclose(column(trace, "saturated_share", "first"), saturated.mean(), atol=1e-6)
    assert trace.layer("first").activation == {"relu_method": "relu", "relu_in_place": "relu", "clamp": "relu"}.get(
        name, name
    )


# Layers that are hard to see ------------------------------------------------------------------------------


def test_unused_and_frozen_layers_are_told_apart() -> None:
    """A layer without gradient has none recorded; a frozen one is not trainable; both keep their weights."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 4)
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(self.frozen(x))

    model = Net()
    with watching(every=1) as watch:
        descend(model, torch.optim.AdamW(model.parameters()), torch.randn(5, 4), torch.zeros(5, 1), 12)
    trace = only(watch)
    assert [layer.name for layer in trace.layers if not layer.is_trainable] == ["frozen"]
    assert np.isnan(column(trace, "grad_rms", "unused")).all()
    assert np.isnan(column(trace, "grad_rms", "frozen")).all()
    assert np.isfinite(column(trace, "grad_rms", "used")).all()
    assert (column(trace, "update_ratio", "unused") == 0).all()
    assert trace.layer("unused").position == -1
    assert trace.layer("frozen").position >= 0


def test_layers_in_a_plain_list_are_found() -> None:
    """Modules that a model keeps in a Python list run but are not registered; they are named by the list."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = [nn.Linear(4, 4), nn.Linear(4, 4)]
            self.parts = {"a": nn.Linear(4, 4)}
            self.head = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = torch.relu(block(x))
            return self.head(self.parts["a"](x))

    model = Net()
    with watching(every=1) as watch:
        descend(model, torch.optim.SGD(model.parameters(), 0.1), torch.randn(5, 4), torch.zeros(5, 1), 6)
    trace = only(watch)
    registered = {layer.name: layer.is_registered for layer in trace.layers}
    assert registered == {"head": True, "blocks[0]": False, "blocks[1]": False, "parts['a']": False}
    assert not trace.layer("blocks[0]").is_optimised


def test_layer_names_may_hold_any_characters() -> None:
    """Names with quotes, blanks, markup and other scripts come through unchanged, also through the file."""
    names = ["a b", "<b>&\"'", "слой", "层", "0", "x" * 300]
    model = nn.Sequential()
    for name in names:
        model.add_module(name, nn.Linear(3, 3))
    with watching(every=1) as watch:
        descend(model, torch.optim.SGD(model.parameters(), 0.1), torch.randn(5, 3), torch.zeros(5, 3), 3)
    assert [layer.name for layer in only(watch).layers] == names


# Cleared gradients ---------------------------------------------------------------------------------------

CLEARING = {
    "missing": (lambda model, optimizer: None, True),
    "set_to_none": (lambda model, optimizer: optimizer.zero_grad(), False),
    "zeros": (lambda model, optimizer: optimizer.zero_grad(set_to_none=False), False),
    "model": (lambda model, optimizer: model.zero_grad(), False),
    "by hand": (lambda model, optimizer: [p.grad.zero_() for p in model.parameters() if p.grad is not None], False),
    "del": (lambda model, optimizer: [setattr(p, "grad", None) for p in model.parameters()], False),
}  # fmt: skip


@pytest.mark.parametrize("place", ["first", "after forward", "last", "closure"])
@pytest.mark.parametrize("how", CLEARING)
def test_uncleared_gradients_are_counted_exactly(how: str, place: str) -> None:
    """Without `zero_grad` every step but the first is counted; with any way of clearing, none."""
    clear, is_missing = CLEARING[how]
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def closure() -> Tensor:
        clear(model, optimizer)
        loss = model(torch.randn(6, 4)).square().mean()
        loss.backward()
        return loss

    with watching() as watch:
        for _ in range(17):
            if place == "closure":
                optimizer.step(closure)
                continue
            if place == "first":
                clear(model, optimizer)
            loss = model(torch.randn(6, 4)).square().mean()
            if place == "after forward":
                clear(model, optimizer)
            loss.backward()
            optimizer.step()
            if place == "last":
                clear(model, optimizer)
    assert only(watch).facts["uncleared_steps"] == (16 if is_missing else 0)


def test_uncleared_gradients_of_one_of_two_optimisers_are_counted() -> None:
    """After one backward two optimisers step; only the one whose gradients stay is counted."""
    one, two = nn.Linear(3, 3), nn.Linear(3, 1)
    optimizers = [torch.optim.Adam(one.parameters()), torch.optim.SGD(two.parameters(), 0.01)]
    with watching() as watch:
        for _ in range(12):
            optimizers[0].zero_grad()
            two(one(torch.randn(4, 3))).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
    counts = {trace.name: trace.facts["uncleared_steps"] for trace in watch.recording().traces}
    assert counts == {"Adam": 0, "SGD": 11}


# Scales, predictions, targets ------------------------------------------------------------------------------

HAND_WRITTEN = {
    "mse_loss": (lambda y, t: F.mse_loss(y, t), "mse"),
    "square": (lambda y, t: ((y - t) ** 2).mean(), "mse"),
    "square, target first": (lambda y, t: ((t - y) ** 2).mean(), "mse"),
    "method": (lambda y, t: (y - t).square().sum(), "mse"),
    "product": (lambda y, t: ((y - t) * (y - t)).mean(), "mse"),
    "absolute": (lambda y, t: (y - t).abs().mean(), "l1"),
    "norm": (lambda y, t: torch.linalg.vector_norm(y - t), "l2"),
    "smooth": (lambda y, t: F.smooth_l1_loss(y, t), "smooth-l1"),
    "huber": (lambda y, t: F.huber_loss(y, t), "huber"),
    "squeezed": (lambda y, t: ((y.squeeze(-1) - t.squeeze(-1)) ** 2).mean(), "mse"),
    "flattened": (lambda y, t: ((y.view(-1) - t.view(-1)) ** 2).mean(), "mse"),
    "column": (lambda y, t: ((y[:, 0] - t[:, 0]) ** 2).mean(), "mse"),
}


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_scales_of_input_output_and_target_are_seen(name: str) -> None:
    """Input, output and target have the scales of plain numpy, whichever way the loss is written."""
    loss_fn, kind = HAND_WRITTEN[name]
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(20, 3) * torch.tensor([1.0, 50.0, 0.01]) + 7
    y = torch.randn(20, 1) * 30 + 200
    with torch.no_grad():
        prediction = model(x).numpy()
    with watching(every=1) as watch:
        descend(model, torch.optim.SGD(model.parameters(), 0.0), x, y, 3, loss_fn)
    trace = only(watch)
    truth = {
        "input_rms": np.sqrt((x.numpy() ** 2).mean()),
        "input_std_max": x.numpy().std(0, ddof=1).max(),
        "input_std_min": x.numpy().std(0, ddof=1).min(),
        "output_mean": prediction.mean(),
        "target_mean": y.mean().item(),
        "target_std": y.numpy().std(),
        "target_min": y.min().item(),
        "target_max": y.max().item(),
        "error_mean": prediction.mean() - y.mean().item(),
        "batch": 20.0,
    }
    for scalar, value in truth.items():
        np.testing.assert_allclose(trace.scalars[scalar], value, rtol=2e-3, err_msg=scalar)
    assert trace.facts["loss_kind"] == kind


def test_a_loss_that_is_not_finite_is_located() -> None:
    """The log of zero inside a user's module: the event names the module and the operation, once."""

    class Logarithm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.log, self.head = nn.Linear(3, 3), Logarithm(), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.log(torch.relu(self.body(x)) + self.shift))

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    x = torch.randn(8, 3)
    with watching(every=1) as watch:
        for step in range(6):
            model.shift = 1.0 if step < 4 else 0.0
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    (event,) = only(watch).events
    assert event.kind == "non-finite-loss"
    assert event.step == 4
    assert event.details["op"] == "Log"
    assert event.details["layer"] == "log"


# Odd parameters and models ------------------------------------------------------------------------------


def test_a_million_entries_are_sampled_well() -> None:
    """Of a large weight the norm is exact and the sampled update ratio within 10 percent."""
    model = nn.Linear(1024, 1024)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ratios, norms = [], []
    with watching(every=1) as watch:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 1024)).square().mean().backward()
            before = model.weight.detach().double().clone()
            norms.append(grad_rms(model))
            optimizer.step()
            ratios.append(float((model.weight.detach().double() - before).norm() / before.norm()))
    trace = only(watch)
    np.testing.assert_allclose(column(trace, "grad_rms", "Linear"), norms, rtol=1e-3)
    np.testing.assert_allclose(column(trace, "update_ratio", "Linear"), ratios, rtol=0.1)


def test_three_thousand_parameters_are_watched() -> None:
    """A model of 1500 layers is watched up to the limit, and says how many layers were left out."""
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(1500)])
    with watching() as watch:
        descend(model, torch.optim.SGD(model.parameters(), 0.01), torch.randn(2, 1), torch.zeros(2, 1), 2)
    trace = only(watch)
    assert len(trace.layers) + watch.recording().run["layers_left_out"] == 1500
    assert np.isfinite(trace.measures["update_ratio"]).all()


class Odd(nn.Module):
    """A linear layer beside parameters of a rare kind."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.rare, self.linear = parameter, nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        extra = torch.view_as_real(self.rare).sum() if self.rare.is_complex() else self.rare.sum()
        return self.linear(x) + extra.to(x.dtype)


RARE = {
    "zero size": lambda: nn.Parameter(torch.zeros(0, 3)),
    "no dimension": lambda: nn.Parameter(torch.tensor(0.5)),
    "complex": lambda: nn.Parameter(torch.ones(2, dtype=torch.complex64)),
    "double": lambda: nn.Parameter(torch.ones(2, dtype=torch.float64)),
    "transposed": lambda: nn.Parameter(torch.randn(5, 4).t()),
    "expanded": lambda: nn.Parameter(torch.randn(4, 6)[:, ::2]),
    "channels last": lambda: nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)),
}


@pytest.mark.parametrize("kind", RARE)
def test_rare_parameters_are_no_trouble(kind: str) -> None:
    """Beside a parameter of a rare kind the others are still measured exactly."""
    model = Odd(RARE[kind]())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    truth = []
    with watching(every=1) as watch:
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).square().mean().backward()
            truth.append(grad_rms(model.linear))
            optimizer.step()
    np.testing.assert_allclose(column(only(watch), "grad_rms", "linear"), truth, rtol=1e-5)


def test_lazy_modules_are_met_when_they_have_weights() -> None:
    """A lazy layer turns into an ordinary one at its first call and is watched from then on."""
    model = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(1))
    optimizer = None
    with watching(every=1) as watch:
        for _ in range(6):
            loss = model(torch.randn(4, 3)).square().mean()
            optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    trace = only(watch)
    assert [(layer.name, layer.kind, layer.parameters) for layer in trace.layers] == [
        ("0", "Linear", 20),
        ("2", "Linear", 6),
    ]
    assert np.isfinite(column(trace, "update_ratio", "0")[1:]).all()


def test_sparse_embedding_gradients_are_measured() -> None:
    """A sparse gradient has the norm of its dense form; the layers behind it are seen as well."""
    model = nn.Sequential(nn.Embedding(30, 4, sparse=True), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    truth = []
    with watching(every=1) as watch:
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randint(30, (8,))).square().mean().backward()
            truth.append(float(model[0].weight.grad.to_dense().double().square().mean().sqrt()))
            optimizer.step()
    np.testing.assert_allclose(column(only(watch), "grad_rms", "0"), truth, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_precision_are_measured(dtype: torch.dtype) -> None:
    """A whole model in another precision has finite measures that match float64 arithmetic."""
    model = net().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    truth = []
    with watching(every=1) as watch:
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(6, 4, dtype=dtype)).square().mean().backward()
            truth.append(grad_rms(model[0]))
            optimizer.step()
    np.testing.assert_allclose(column(only(watch), "grad_rms", "0"), truth, rtol=1e-2)
    assert np.isfinite(column(only(watch), "delta_norm", "0")).all()


def test_double_precision_as_default_is_no_trouble() -> None:
    """`torch.set_default_dtype(torch.float64)`, usual in physics, does not break the rings."""
    torch.set_default_dtype(torch.float64)
    try:
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Linear(1, 1).requires_grad_(False))
        with watching(every=1) as watch:
            descend(model, torch.optim.Adam(model.parameters()), torch.randn(5, 3), torch.zeros(5, 1), 12)
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.isfinite(column(only(watch), "update_ratio", "0")).all()


def test_a_model_first_run_in_inference_mode_is_watched() -> None:
    """A trial run under `inference_mode` before training does not spoil what is recorded later."""
    model = net()
    with watching(every=1) as watch:
        with torch.inference_mode():
            model(torch.randn(2, 4))
        descend(model, torch.optim.SGD(model.parameters(), 0.1), torch.randn(5, 4), torch.zeros(5, 2), 3)
    assert np.isfinite(column(only(watch), "activation_std", "0")).all()


def test_models_under_no_grad_only_are_not_trained() -> None:
    """Evaluation alone gives no trace; a teacher that only predicts appears as a layer that is not optimised."""
    teacher, student = nn.Linear(3, 2), nn.Linear(3, 2)
    with watching(every=1) as watch, torch.no_grad():
        for _ in range(5):
            teacher(torch.randn(2, 3))
    assert watch.recording().traces == ()
    assert watch.recording().steps == 0
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    with watching(every=1) as watch:
        for _ in range(5):
            x = torch.randn(2, 3)
            with torch.no_grad():
                y = teacher(x)
            optimizer.zero_grad()
            F.mse_loss(student(x), y).backward()
            optimizer.step()
    trace = only(watch)
    assert sum(layer.is_optimised for layer in trace.layers) == 1
    (name,) = (layer.name for layer in trace.layers if layer.is_optimised)
    assert np.isfinite(column(trace, "update_ratio", name)).all()


def test_evaluation_between_steps_is_not_taken_for_training() -> None:
    """A validation pass under `no_grad` between two steps leaves activations and losses those of training."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    x = torch.randn(6, 4)
    with watching(every=1) as watch:
        for _ in range(4):
            with torch.no_grad():
                model.eval()
                F.mse_loss(model(1000 * torch.randn(6, 4)), torch.zeros(6, 2))
                model.train()
            descend(model, optimizer, x, torch.zeros(6, 2), 1)
    assert column(only(watch), "activation_rms", "0").max() < 10


def test_forward_passes_without_a_step_hold_no_memory() -> None:
    """Many forward passes with gradients on but no step (a feature extraction) keep no graph alive."""
    model = nn.Sequential(nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 2))
    freed = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.token = Token()
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    class Token:
        def __del__(self) -> None:
            freed.append(1)

    x = torch.randn(4, 50, requires_grad=True)
    with watching(every=1) as watch:
        for _ in range(40):
            model(Noted.apply(x))
        assert len(freed) >= 38
    assert watch.failure == ""


def test_training_in_a_thread_is_watched() -> None:
    """A training in a thread of its own is recorded like one in the main thread."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watching(every=1) as watch:
        thread = threading.Thread(target=descend, args=(model, optimizer, torch.randn(5, 4), torch.zeros(5, 2), 12))
        thread.start()
        thread.join()
    trace = only(watch)
    assert trace.total_steps == 12
    assert np.isfinite(column(trace, "delta_norm", "2")).all()


def test_checkpointed_layers_have_a_place_in_the_order_of_calls() -> None:
    """Activation checkpointing hides the graph, not the fact that a layer was called."""
    for reentrant in (False, True):
        model = Checkpointed(reentrant=reentrant)
        with watching(every=1) as watch:
            descend(
                model, torch.optim.SGD(model.parameters(), 0.1), torch.randn(6, 8, requires_grad=True),
                torch.zeros(6, 3), 3,
            )  # fmt: skip
        trace = only(watch)
        assert all(layer.position >= 0 for layer in trace.layers)
        assert np.isfinite(trace.measures["grad_rms"]).all()


def test_transforms_and_tracing_are_left_alone() -> None:
    """Under `vmap`, `jit.trace`, fake tensors and dispatch modes nothing is sampled and nothing breaks."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx import symbolic_trace
    from torch.utils.flop_counter import FlopCounterMode

    model = net()
    x = torch.randn(5, 4)
    with FlopCounterMode(display=False) as bare:
        model(x)
    with watching(every=1) as watch:
        torch.vmap(model)(x)
        torch.func.jacrev(model)(x[0])
        torch.func.grad(lambda z: model(z).sum())(x)
        symbolic_trace(model)
        with FlopCounterMode(display=False) as counted:
            model(x)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model(torch.empty(5, 4))
        descend(model, torch.optim.SGD(model.parameters(), 0.1), x, torch.zeros(5, 2), 3)
    assert counted.get_total_flops() == bare.get_total_flops()
    np.testing.assert_array_equal(only(watch).scalars["batch"], 5)
    assert np.isfinite(column(only(watch), "activation_std", "0")).all()


def test_a_compiled_step_function_is_watched_by_its_weights() -> None:
    """With the whole forward pass compiled without graph breaks no hook is traced; weights are seen all the same."""
    torch.compiler.reset()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    forward = torch.compile(lambda x: model(x).square().mean(), backend="aot_eager", fullgraph=True)
    with watching(every=1) as watch:
        for _ in range(12):
            optimizer.zero_grad()
            forward(torch.randn(5, 4)).backward()
            optimizer.step()
    trace = only(watch)
    assert [layer.name for layer in trace.layers] == ["0", "2"]
    assert np.isfinite(column(trace, "update_ratio", "0")[2:]).all()


# Many models ---------------------------------------------------------------------------------------------


def test_models_that_are_done_are_let_go(tmp_path: Any) -> None:
    """Thirty models in a row: each is freed as soon as the script drops it, and each trace has its own layers."""
    import gc
    import weakref

    alive: list[weakref.ref[Any]] = []
    truth = []
    gc.collect()
    gc.disable()
    try:
        with watching(every=1, folder=tmp_path / "run") as watch:
            for number in range(30):
                model = nn.Sequential(nn.Linear(4, 6 + number), nn.ReLU(), nn.Linear(6 + number, 1))
                optimizer = torch.optim.Adam(model.parameters())
                alive += [weakref.ref(model), weakref.ref(optimizer), weakref.ref(model[0].weight)]
                losses = descend(model, optimizer, torch.randn(8, 4), torch.zeros(8, 1), 5 + number % 9)
                truth.append((losses, grad_rms(model[0]), 6 + number))
                del model, optimizer
                gone = [reference() is None for reference in alive]
                assert all(gone), f"model {number}: {gone[-3:]}"
        assert watch.failure == ""
    finally:
        gc.enable()
    for recording in (watch.recording(), unvanish.read_recording(tmp_path / "run")):
        assert len(recording.traces) == 30
        for trace, (losses, last, width) in zip(recording.traces, truth, strict=True):
            np.testing.assert_allclose(trace.losses, losses, rtol=1e-6)
            assert list(trace.steps) == list(range(len(losses)))
            assert [layer.parameters for layer in trace.layers] == [5 * width, width + 1]
            assert all(layer.is_optimised for layer in trace.layers)
            np.testing.assert_allclose(trace.measures["grad_rms"][-1, 0], last, rtol=1e-4)
            assert np.isfinite(trace.measures["update_ratio"]).all()
            assert np.isfinite(trace.measures["activation_std"]).all()
            assert np.isfinite(trace.measures["dead_share"][:, 0]).all()


def test_a_closed_watch_holds_no_model() -> None:
    """Keeping the handle of a run that is over does not keep its model."""
    import weakref

    runs, alive = [], []
    for _ in range(3):
        model = net()
        with unvanish.watch(model, folder=None) as run:
            descend(model, torch.optim.SGD(model.parameters(), 0.1), torch.randn(5, 4), torch.zeros(5, 2), 4)
        runs.append(run)
        alive.append(weakref.ref(model))
        del model
    assert [reference() for reference in alive] == [None] * 3
    assert [run.recording().steps for run in runs] == [4] * 3

"""Replicas: uncoupled they are separate trainings; what the coupling does is known exactly."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import unvanish
from tests.nets import Reader, Tied
from unvanish import Coupling, OptionError, Replicas
from unvanish.replicas import exponential
from unvanish.replicas.stack import mean


@dataclass(frozen=True)
class Case:
    """A network, a batch for it, and its loss."""

    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[Any, Any]]
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy


def classes(*shape: int, count: int = 3) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(*shape), torch.randint(count, (shape[0],)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5), nn.ReLU(), nn.Linear(5, 3))


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 13), nn.ReLU(), nn.Dropout(0.4), nn.Linear(13, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.Conv2d(5, 3, 3), nn.BatchNorm2d(3),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3),
    )  # fmt: skip


def tokens() -> tuple[Tensor, Tensor]:
    words = torch.randint(12, (10,))
    return words, words.roll(1)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3))


def gpt2() -> nn.Module:
    import transformers as t

    config = t.GPT2Config(
        vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return t.GPT2LMHeadModel(config).train()


def sentences() -> tuple[dict[str, Tensor], None]:
    words = torch.randint(5, 50, (4, 6))
    return {"input_ids": words, "labels": words}, None


CASES = {
    "mlp": Case(mlp, classes(8, 7)),
    "one example": Case(mlp, classes(1, 7)),  # matrix times vector: another kernel
    "dropout": Case(dropping, classes(8, 7)),
    "cnn with batch norm": Case(cnn, classes(6, 2, 8, 8)),
    "lstm": Case(Reader, lambda: (torch.randint(20, (8, 6)), torch.randint(3, (8,)))),
    "tied": Case(Tied, tokens),
    "transformer layer": Case(encoder, classes(5, 4, 6)),
    "gpt2": Case(gpt2, sentences, lambda output, _: output.loss),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01),
}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))


def call(model: nn.Module, x: Any) -> Any:
    return model(**x) if isinstance(x, dict) else model(x)


def joined(batches: list[Any]) -> Any:
    """Put the batches of replicas behind each other along a new first axis."""
    if isinstance(batches[0], dict):
        return {key: torch.stack([batch[key] for batch in batches]) for key in batches[0]}
    return None if batches[0] is None else torch.stack(batches)


def train_alone(models: list[nn.Module], case: Case, optimizer: Any, steps: int) -> None:
    """Train plain models in turns, each on batches of its own."""
    optimizers = [optimizer(model.parameters()) for model in models]
    for _ in range(steps):
        batches = [case.batch() for _ in models]
        for model, own, (x, y) in zip(models, optimizers, batches, strict=True):
            own.zero_grad()
            case.loss_fn(call(model, x), y).backward()
            own.step()


def train_together(
    replicas: Replicas, case: Case, optimizer: Any, steps: int, coupling: Coupling | None = None
) -> None:
    """Train replicas, each on batches of its own, drawn as in `train_alone`."""
    together = optimizer(replicas.parameters()) if callable(optimizer) else optimizer
    for _ in range(steps):
        xs, ys = zip(*(case.batch() for _ in range(replicas.n)), strict=True)
        together.zero_grad()
        replicas.loss(case.loss_fn, joined(list(xs)), joined(list(ys)), batches="separate").backward()
        together.step()
        if coupling:
            coupling.step()


def assert_same(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    """Compare parameters and buffers: bit for bit, unless a tolerance is given."""
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def column(*values: float) -> Replicas:
    """Return replicas of one weight each, in float64."""
    replicas = Replicas(nn.Linear(1, 1, bias=False).double(), n=len(values))
    with torch.no_grad():
        replicas.stacked.weight[:, 0, 0] = torch.tensor(values, dtype=torch.float64)
    return replicas


def weights(replicas: Replicas) -> np.ndarray:
    """Return all trained numbers, one row a replica."""
    rows = [p.detach().flatten(1) for p in replicas.parameters()]
    return torch.cat(rows, 1).numpy().copy()


# --- law 4: what replicas are without coupling


@every_optimizer
@every_case
def test_one_replica_is_ordinary_training(case: Case, optimizer: Any) -> None:
    """One replica trains bit for bit as the plain model does: weights, buffers, random numbers."""
    torch.manual_seed(0)
    model = case.make()
    replicas = Replicas(model, n=1)
    torch.manual_seed(1)
    train_alone([model], case, optimizer, steps=5)
    drawn = torch.get_rng_state()
    torch.manual_seed(1)
    train_together(replicas, case, optimizer, steps=5)
    assert_same(replicas.replica(0), model)
    assert torch.equal(drawn, torch.get_rng_state())


@every_optimizer
@every_case
def test_uncoupled_replicas_are_separate_trainings(case: Case, optimizer: Any) -> None:
    """Three replicas, started apart and given batches of their own, are three plain trainings bit for bit."""
    torch.manual_seed(0)
    models = [case.make() for _ in range(3)]
    replicas = Replicas(models[0], n=3, init=lambda i: models[i], backend="loop")
    torch.manual_seed(1)
    train_alone(models, case, optimizer, steps=5)
    torch.manual_seed(1)
    train_together(replicas, case, optimizer, steps=5, coupling=Coupling(replicas, strength=0.0))
    for i, model in enumerate(models):
        assert_same(replicas.replica(i), model)


@every_case
def test_the_loss_is_the_sum_over_replicas(case: Case) -> None:
    """One shared batch gives the sum of the plain losses, and each replica the gradients of its own."""
    torch.manual_seed(0)
    models = [case.make().eval() for _ in range(3)]
    replicas = Replicas(models[0], n=3, init=lambda i: models[i], backend="loop").eval()
    x, y = case.batch()
    loss = replicas.loss(case.loss_fn, x, y)
    loss.backward()
    alone = [case.loss_fn(call(model, x), y) for model in models]
    torch.testing.assert_close(loss, torch.stack(alone).sum(), rtol=0, atol=0)
    sum(alone).backward()
    for name, parameter in replicas.stacked.named_parameters():
        grads = torch.stack([model.get_parameter(name).grad for model in models])
        torch.testing.assert_close(parameter.grad, grads, rtol=0, atol=0)


def in_double(case: Case) -> Case:
    """Return the case in float64, where rounding is far below any other difference."""

    def batch() -> tuple[Any, Any]:
        x, y = case.batch()
        return (x.double() if isinstance(x, Tensor) and x.is_floating_point() else x), y

    return Case(lambda: case.make().double(), batch, case.loss_fn)


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"dropout", "lstm"}))
def test_vmap_equals_the_loop(name: str) -> None:
    """Both back ends train to the same weights and buffers, to rounding."""
    case = in_double(CASES[name])
    torch.manual_seed(0)
    models = [case.make() for _ in range(3)]
    trained = []
    for backend in ("loop", "vmap"):
        replicas = Replicas(models[0], n=3, init=lambda i: models[i], backend=backend)
        torch.manual_seed(1)
        train_together(replicas, case, OPTIMIZERS["sgd"], steps=4)
        trained.append(replicas)
    assert trained[1]._chosen == {(True, True): "vmap"}
    for i in range(3):
        assert_same(trained[0].replica(i), trained[1].replica(i), rtol=1e-9, atol=1e-10)


class Branching(nn.Module):
    """Goes one way or the other, by its data."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) if x.mean().item() > 0 else self.down(x)


class Projecting(Reader):
    """A recurrent classifier whose states are projected."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 10, batch_first=True, proj_size=8)


REFUSED = {
    ("vmap", Branching): "vmap cannot run this model (RuntimeError: ",
    ("vmap", Projecting): "vmap cannot run this model (RuntimeError: ",
    ("batched", Branching): "batched cannot run this model (TraceError: ",
    ("batched", Projecting): "batched cannot run this model (a projected recurrence)",
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("backend", ["vmap", "batched", "auto"])
@pytest.mark.parametrize("make", [Branching, Projecting])
def test_what_a_back_end_cannot_do_falls_back_and_says_so(
    make: Any, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A pass that vmap or the rules of operations refuse, forward or backward, runs in the loop; one line tells why."""
    torch.manual_seed(0)
    case = Case(make, classes(5, 4) if make is Branching else CASES["lstm"].batch)
    plain = Replicas(case.make(), n=2, backend="loop")
    replicas = Replicas(plain.replica(0), n=2, backend=backend)
    for each in (plain, replicas):
        torch.manual_seed(1)
        with caplog.at_level(logging.WARNING, "unvanish"):
            train_together(each, case, OPTIMIZERS["sgd"], steps=3)
    assert replicas._chosen == {(True, True): "loop"}
    for i in range(2):
        assert_same(plain.replica(i), replicas.replica(i))
    (line,) = caplog.messages
    for name in ("batched", "vmap") if backend == "auto" else (backend,):
        assert REFUSED[name, make] in line
    assert line.endswith("). The loop is used; with backend='loop' nothing is tried.")


class Remembering(nn.Module):
    """Leaves vmap silently wrong: what it keeps outside of its buffers is shared by all replicas."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * (1 if self.calls % 2 else 2)


@pytest.mark.parametrize("backend", ["vmap", "batched"])
def test_other_numbers_are_not_used(backend: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The trial compares losses, gradients and buffers with those of the loop."""
    replicas = Replicas(Remembering(), n=2, backend=backend)
    x, y = classes(5, 4)()
    with caplog.at_level(logging.WARNING, "unvanish"):
        replicas.loss(F.cross_entropy, x, y)
    assert "it gives other numbers than separate models" in caplog.text


@pytest.mark.parametrize("backend", ["vmap", "batched", "auto"])
def test_the_trial_leaves_no_trace(backend: str) -> None:
    """Choosing a back end leaves weights, buffers, gradients and random numbers as they were."""
    torch.manual_seed(0)
    drops = nn.Identity() if backend == "auto" else nn.Dropout(0.2)  # seeds of dropout would be drawn, and stay
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), drops, nn.Linear(6, 3))
    fresh, tried = (Replicas(net, n=3, backend=backend) for _ in range(2))
    x, y = classes(8, 4)()
    tried.loss(F.cross_entropy, x, y)
    fresh.load_state_dict(tried.state_dict())  # with the choice, so that nothing is tried
    tried = Replicas(net, n=3, backend=tried._chosen[True, True])
    after = []
    for replicas in (fresh, tried):
        for i in range(3):
            replicas.load_replica(i, net)
        torch.manual_seed(2)
        loss = replicas.loss(F.cross_entropy, x, y)
        loss.backward()
        after.append((loss.detach(), *(p.grad for p in replicas.parameters()), torch.get_rng_state()))
        assert replicas.stacked[1].num_batches_tracked.tolist() == [1, 1, 1]
    for one, other in zip(*after, strict=True):
        assert torch.equal(one, other)


def test_what_is_fastest_does_not_change_what_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back ends that are chosen by time drop the same units after the same seed; another seed drops others."""
    net = nn.Sequential(nn.Linear(4, 60), nn.Dropout(0.5), nn.Linear(60, 3)).double()
    x, y = classes(8, 4)()
    losses = {}
    for seed, chosen in itertools.product((0, 1), ("loop", "batched")):
        monkeypatch.setattr("unvanish.replicas.replicas.choose", lambda *args, measure, chosen=chosen: chosen)
        replicas = Replicas(net, n=3)
        torch.manual_seed(seed)
        losses[seed, chosen] = torch.stack([replicas.losses(F.cross_entropy, x.double(), y) for _ in range(3)])
        assert len(set(losses[seed, chosen].flatten().tolist())) == 9
    for seed in (0, 1):
        torch.testing.assert_close(losses[seed, "loop"], losses[seed, "batched"], rtol=1e-12, atol=0)
    assert not torch.allclose(losses[0, "loop"], losses[1, "loop"])


@pytest.mark.parametrize("backend", ["loop", "vmap", "batched", "auto"])
@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_replica_that_is_lost_when_the_back_end_is_chosen(backend: Any, lost: float) -> None:
    """The others lose and learn as they do alone, whatever is compared meanwhile."""
    torch.manual_seed(0)
    models = [mlp() for _ in range(3)]
    replicas = Replicas(models[0], n=3, init=models.__getitem__, backend=backend)
    with torch.no_grad():
        replicas.stacked[0].weight[1] = lost
    x, y = CASES["mlp"].batch()
    losses = replicas.losses(F.cross_entropy, x, y)
    losses.sum().backward()
    assert not losses[1].isfinite()
    for i in (0, 2):
        alone = F.cross_entropy(models[i](x), y)
        alone.backward()
        torch.testing.assert_close(losses[i], alone)
        torch.testing.assert_close(replicas.stacked[0].weight.grad[i], models[i][0].weight.grad)


def test_deterministic_algorithms_choose_the_loop() -> None:
    """Where every run must give the same bits, no measurement decides."""
    torch.use_deterministic_algorithms(True)
    try:
        replicas = Replicas(mlp(), n=3)
        replicas.loss(F.cross_entropy, *CASES["mlp"].batch())
    finally:
        torch.use_deterministic_algorithms(False)
    assert replicas._chosen == {}


@pytest.mark.parametrize("backend", ["loop", "vmap", "batched"])
def test_dropout_differs_between_replicas(backend: str) -> None:
    """Equal replicas on one batch lose by different amounts, because each drops units of its own."""
    torch.manual_seed(0)
    replicas = Replicas(dropping(), n=4, backend=backend)
    losses = replicas.losses(F.cross_entropy, *classes(16, 7)())
    assert len(set(losses.tolist())) == 4
    assert len(set(replicas.eval().losses(F.cross_entropy, *classes(16, 7)()).tolist())) == 1


# --- what stays as it was


@pytest.mark.parametrize("backend", ["loop", "vmap", "batched"])
def test_tied_weights_stay_tied(backend: str) -> None:
    """A shared weight is one parameter with two names, in the replicas and in what is taken out of them."""
    replicas = Replicas(Tied(), n=3, backend=backend)
    train_together(replicas, CASES["tied"], OPTIMIZERS["sgd"], 2, Coupling(replicas, 0.1))
    assert replicas.stacked.head.weight is replicas.stacked.embed.weight
    assert len(list(replicas.parameters())) == 3
    for model in (replicas.replica(1), replicas.centre()):
        assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("force", ["elastic", "tanh"])
@pytest.mark.parametrize("backend", ["loop", "vmap", "batched"])
def test_frozen_parameters_stay_frozen(backend: Any, force: Any) -> None:
    """What is frozen keeps its bits in every replica that is trained and coupled, also where replicas differ in it."""
    models = [mlp() for _ in range(3)]
    for model in models:
        model[0].requires_grad_(False)
    replicas = Replicas(models[0], n=3, init=models.__getitem__, backend=backend)
    train_together(replicas, CASES["mlp"], OPTIMIZERS["sgd"], 3, Coupling(replicas, 0.5, force=force))
    for i, model in enumerate(models):
        replica = replicas.replica(i)
        assert torch.equal(replica[0].weight, model[0].weight)
        assert not replica[0].weight.requires_grad
        assert not torch.equal(replica[2].weight, model[2].weight)


def test_frozen_parameters_are_not_drawn_anew() -> None:
    """Separate starts differ in what trains; frozen layers, and frozen weights of other layers, are the model's."""
    model = mlp()
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    drawn = Replicas(model, n=2, init="separate").replica(1)
    for frozen, other in ((model[0].weight, drawn[0].weight), (model[2].weight, drawn[2].weight)):
        assert torch.equal(frozen, other)
    assert not torch.equal(model[2].bias, drawn[2].bias)


@pytest.mark.parametrize("backend", ["loop", "vmap", "batched"])
def test_a_buffer_that_is_replaced_is_kept(backend: str) -> None:
    """What a forward pass assigns to a buffer, of floats or whole numbers, is found in its replica."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
            self.register_buffer("largest", torch.zeros(()), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + x.shape[0]
            self.largest = torch.maximum(self.largest, x.detach().amax())
            return self.layer(x)

    replicas = Replicas(Counting(), n=2, backend=backend)
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]])
    for _ in range(2):
        replicas.loss(F.mse_loss, x, torch.zeros(2, 1, 1), batches="separate")
    assert replicas.stacked.seen.tolist() == [2, 2]
    assert [replicas.replica(i).largest.item() for i in range(2)] == [2, 3]
    assert replicas.centre().seen.item() == 2
    assert set(replicas.replica(0).state_dict()) == {"layer.weight", "layer.bias", "seen"}


def test_modes_stay_as_they_are() -> None:
    """A norm that the user keeps in evaluation mode stays so in the replicas, after a prediction too."""
    model = cnn()
    model[4].eval()
    replicas = Replicas(model, n=2)
    before = [module.training for module in model.modules()]
    replicas.predict(torch.randn(3, 2, 8, 8), "ensemble")
    for each in (replicas.stacked, replicas.replica(1), replicas.centre([torch.randn(4, 2, 8, 8)])):
        assert [module.training for module in each.modules()] == before
    assert [norm.momentum for norm in (replicas.centre([torch.randn(4, 2, 8, 8)])[k] for k in (1, 4))] == [0.1, 0.1]


def test_the_model_itself_is_not_touched() -> None:
    """Replicas are copies: training them leaves the model that they came from, and what was taken out of them."""
    model = cnn()
    before = copy.deepcopy(model)
    replicas = Replicas(model, n=2)
    taken, copied = replicas.replica(0), copy.deepcopy(replicas)
    train_together(replicas, CASES["cnn with batch norm"], OPTIMIZERS["sgd"], 2)
    for each in (model, taken, copied.replica(1)):
        assert_same(each, before)
    assert not torch.equal(replicas.replica(0)[0].weight, before[0].weight)


@every_case
def test_replicas_are_an_ordinary_module(case: Case) -> None:
    """After training they are copied, pickled, moved to another precision and read back from a state dict."""
    replicas = Replicas(case.make(), n=2)
    train_together(replicas, case, OPTIMIZERS["sgd"], 2)
    again = Replicas(case.make(), n=2)
    again.load_state_dict(replicas.state_dict())
    for other in (copy.deepcopy(replicas), pickle.loads(pickle.dumps(replicas)), again):
        for i in range(2):
            assert_same(other.replica(i), replicas.replica(i))
    assert all(p.dtype == torch.float64 for p in copy.deepcopy(replicas).double().replica(0).parameters())


# --- starts, and what is taken out


def test_separate_starts_differ() -> None:
    """Replica 0 starts as the model; the others are drawn anew, at the scale that their layers have."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 400), nn.BatchNorm1d(400), nn.MultiheadAttention(400, 4))
    replicas = Replicas(model, n=3, init="separate")
    assert_same(replicas.replica(0), model)
    drawn = replicas.stacked[0].weight.detach()
    assert not torch.equal(drawn[1], drawn[2])
    # uniform within 1/sqrt(50): standard deviation 1/sqrt(150); 20 000 draws know it to half a percent
    assert drawn.std(dim=(1, 2)).tolist() == pytest.approx([150**-0.5] * 3, rel=0.02)
    assert replicas.replica(2)[2].out_proj.bias.abs().max() == 0  # as attention draws it, not as its linear part does


def test_each_replica_may_come_from_a_function() -> None:
    """``init`` as a function gives replica i the weights and the buffers of the model that it returns."""
    models = [cnn() for _ in range(3)]
    for i, model in enumerate(models):
        model[1].running_mean.fill_(i)
    replicas = Replicas(cnn(), n=3, init=models.__getitem__)
    for i, model in enumerate(models):
        assert_same(replicas.replica(i), model)
        assert_same(replicas.replica(i - 3), model)


def test_a_replica_can_be_loaded() -> None:
    """`load_replica` takes a model or its state dict, for one replica; a wrong one changes nothing."""
    replicas, model, other = Replicas(cnn(), n=3), cnn(), cnn()
    first = replicas.replica(0)
    replicas.load_replica(1, model)
    replicas.load_replica(2, other.state_dict())
    for i, expected in enumerate((first, model, other)):
        assert_same(replicas.replica(i), expected)
    broken = {**model.state_dict(), "8.bias": torch.zeros(4)}
    words = r"load_replica\(2\): tensor '8.bias': found \(4,\) of float32, expected \(3,\) of float32"
    with pytest.raises(OptionError, match=words):
        replicas.load_replica(2, broken)
    assert_same(replicas.replica(2), other)


def test_the_centre_is_the_mean() -> None:
    """Weights and floating buffers of the centre are those that NumPy averages in float64."""
    models = [cnn().double() for _ in range(3)]
    for model in models:
        model(torch.randn(4, 2, 8, 8, dtype=torch.float64))
    centre = Replicas(models[0], n=3, init=models.__getitem__).centre().state_dict()
    for name, value in centre.items():
        expected = np.mean([model.state_dict()[name].numpy() for model in models], axis=0)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-13, atol=1e-15)
    assert centre["1.num_batches_tracked"] == 1
    assert centre["1.num_batches_tracked"].dtype == torch.int64


def test_the_centre_of_equal_replicas_is_each_of_them() -> None:
    """A mean of equal numbers is that number, to the last bit."""
    torch.manual_seed(0)
    model = mlp()
    assert_same(Replicas(model, n=7).centre(), model)


@pytest.mark.parametrize("shape", [(3, 100_003), (5, 257, 1001), (100_000, 3)])
def test_means_of_large_layers(shape: tuple[int, ...]) -> None:
    """What is averaged block by block is the mean, and exact where all replicas are equal."""
    torch.manual_seed(0)
    stacked = torch.randn(shape)
    expected = stacked.double().mean(0, keepdim=True)
    torch.testing.assert_close(mean(stacked).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(mean(stacked[:1].expand(shape).contiguous()), stacked[:1])


def test_statistics_of_the_centre_are_estimated() -> None:
    """With a loader, batch norms of the centre hold the mean over its batches of what flows through them."""
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))  # noqa: E731
    replicas = Replicas(make(), n=3, init=lambda i: make())
    data = [torch.randn(10, 3) for _ in range(5)]
    weight = replicas.stacked[0].weight.detach().mean(0).double()
    bias = replicas.stacked[0].bias.detach().mean(0).double()
    inner = torch.stack([x.double() @ weight.T + bias for x in data])
    for loader in (data, [[x, None] for x in data], [{"input": x} for x in data]):
        norm = replicas.centre(loader)[2]
        torch.testing.assert_close(norm.running_mean.double(), inner.mean((0, 1)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var.double(), inner.var(1).mean(0), rtol=1e-5, atol=1e-6)
    with pytest.raises(OptionError, match=r"centre\(\): loader: found no batches, expected some"):
        replicas.centre([])


def test_predictions() -> None:
    """The ensemble is the mean of what is read from each replica; the centre predicts as its plain model."""
    models = [dropping() for _ in range(3)]
    replicas = Replicas(models[0], n=3, init=models.__getitem__)
    x = torch.randn(5, 7)
    outputs = torch.stack([model.eval()(x) for model in models]).detach()
    torch.testing.assert_close(replicas.predict(x, "ensemble"), outputs.mean(0))
    read = lambda output: output.softmax(-1)  # noqa: E731
    torch.testing.assert_close(replicas.predict(x, "ensemble", read=read), outputs.softmax(-1).mean(0))
    torch.testing.assert_close(replicas.predict(x, "centre"), replicas.centre().eval()(x))
    torch.testing.assert_close(replicas.predict(x), replicas.predict(x, "ensemble"), rtol=0, atol=0)
    assert all(torch.equal(one, outputs[i]) for i, one in enumerate(replicas.eval()(x)))
    assert not replicas.training


def test_an_output_that_is_no_tensor_asks_for_read() -> None:
    """Models that return more than a tensor need to be told what the prediction is."""
    replicas = Replicas(gpt2(), n=2)
    words = {"input_ids": torch.randint(5, 50, (2, 4))}
    with pytest.raises(OptionError, match=r"predict\(\): read: found CausalLMOutput\w+, expected a tensor"):
        replicas.predict(words)
    for how in ("centre", "ensemble"):
        assert replicas.predict(words, how, read=lambda output: output.logits).shape == (2, 4, 50)


# --- coupling


numbers = st.floats(-100, 100, width=32)
shares = st.floats(0, 1)


@settings(deadline=None)
@given(st.lists(numbers, min_size=1, max_size=6), shares)
def test_the_elastic_pull_leaves_the_centre(values: list[float], strength: float) -> None:
    """Pulls add up to nothing, each gap is (1 - strength) times what it was."""
    replicas = column(*values)
    Coupling(replicas, strength).step()
    centre, after = np.mean(values), weights(replicas)[:, 0]
    assert after.mean() == pytest.approx(centre, rel=1e-12, abs=1e-11)
    np.testing.assert_allclose(after, (1 - strength) * (np.array(values) - centre) + centre, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_elastic_pull_leaves_the_centre_of_networks(dtype: torch.dtype, close: float) -> None:
    """Relative to the weights, the centre of every layer moves by rounding only."""
    torch.manual_seed(0)
    replicas = Replicas(cnn().to(dtype), n=5, init="separate")
    before = replicas.centre()
    coupling = Coupling(replicas, 0.3)
    for _ in range(10):
        coupling.step()
    for one, other in zip(before.parameters(), replicas.centre().parameters(), strict=True):
        assert (one - other).norm().item() <= close * one.norm().item()


@settings(deadline=None)
@given(st.lists(numbers, min_size=1, max_size=6), st.sampled_from([torch.float32, torch.float64]))
def test_full_strength_makes_all_equal_the_mean(values: list[float], dtype: torch.dtype) -> None:
    """After a pull of strength 1 all replicas are one number, bit for bit, which is their mean to rounding."""
    replicas = column(*values).to(dtype)
    Coupling(replicas, 1.0).step()
    after = weights(replicas)[:, 0]
    assert len(set(after.tolist())) == 1
    assert after[0] == pytest.approx(np.mean(values), rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_tanh_rule_is_its_formula(n: int, scale: float) -> None:
    """Over many steps, replicas walk as NumPy does in float64: all pulled by the mean from before any of them moved."""
    torch.manual_seed(0)
    replicas = Replicas(mlp().double(), n=n, init="separate")
    coupling = Coupling(replicas, 0.7, force="tanh", scale=scale)
    expected = weights(replicas)
    for _ in range(20):
        coupling.step()
        expected = expected + 0.7 * scale * np.tanh((expected.mean(0) - expected) / scale)
        np.testing.assert_allclose(weights(replicas), expected, rtol=1e-12, atol=1e-14)


@settings(deadline=None)
@given(st.lists(st.floats(-1e-4, 1e-4), min_size=2, max_size=6), shares)
def test_tanh_is_elastic_for_small_gaps(values: list[float], strength: float) -> None:
    """For gaps far below the scale the two forces are one: tanh(d) = d - d³/3."""
    one, other = column(*values), column(*values)
    Coupling(one, strength).step()
    Coupling(other, strength, force="tanh").step()
    np.testing.assert_allclose(weights(one), weights(other), rtol=0, atol=(2e-4) ** 3)


def test_tanh_moves_the_centre_of_three() -> None:
    """A replica far away pulls less than its share: of two the centre stays, of three it moves."""
    for values, drift in (((0.0, 4.0), 0.0), ((0.0, 0.0, 6.0), (2 * math.tanh(2) - math.tanh(4)) / 3)):
        replicas = column(*values)
        Coupling(replicas, 1.0, force="tanh").step()
        assert weights(replicas).mean() - np.mean(values) == pytest.approx(drift, abs=1e-12)


@settings(deadline=None)
@given(st.lists(numbers, min_size=2, max_size=5), shares, st.integers(1, 8))
def test_skipped_pulls_compound(values: list[float], strength: float, every: int) -> None:
    """One pull after ``every`` steps closes the gaps as that many pulls in a row do, and none comes earlier."""
    often, seldom = column(*values), column(*values)
    each, some = Coupling(often, strength), Coupling(seldom, strength, every=every)
    for step in range(every):
        assert step == 0 or weights(seldom)[:, 0].tolist() == values
        each.step()
        some.step()
    np.testing.assert_allclose(weights(often), weights(seldom), rtol=1e-9, atol=1e-10)


def test_a_schedule_is_called_with_the_steps_done() -> None:
    """A strength that changes is asked at each step, skipped ones too, and compounds as it was then."""
    asked: list[int] = []

    def strength(step: int) -> float:
        asked.append(step)
        return 0.1 * step

    replicas = column(0.0, 2.0)
    coupling = Coupling(replicas, strength, every=3)
    for _ in range(6):
        coupling.step()
    assert asked == [0, 1, 2, 3, 4, 5]
    gap = 2 * (1.0 * 0.9 * 0.8) * (0.7 * 0.6 * 0.5)
    assert np.diff(weights(replicas)[:, 0]) == pytest.approx(gap, rel=1e-12)


@settings(deadline=None)
@given(st.floats(1e-6, 1), st.floats(1e-6, 1), st.integers(1, 50))
def test_exponential_strength(start: float, end: float, steps: int) -> None:
    """It goes from start to end by one factor a step, and stays there."""
    strength = exponential(start, end, steps)
    taken = [strength(step) for step in range(steps + 1)]
    assert (taken[0], taken[-1], strength(10 * steps)) == pytest.approx((start, end, end))
    factors = np.diff(np.log(taken))
    np.testing.assert_allclose(factors, math.log(end / start) / steps, atol=1e-9)


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"strength": 1.0, "force": None}])
def test_no_coupling_changes_no_bit(options: dict[str, Any]) -> None:
    """Strength 0 and no force leave all weights as they are."""
    replicas = Replicas(mlp(), n=3, init="separate")
    before = weights(replicas)
    coupling = Coupling(replicas, **options)
    for _ in range(3):
        coupling.step()
    assert np.array_equal(before, weights(replicas))


@pytest.mark.parametrize("force", ["elastic", "tanh"])
def test_replicas_that_see_the_same_are_one_network(force: Any) -> None:
    """Equal starts and equal batches give, at any strength, the plain training bit for bit."""
    torch.manual_seed(0)
    model = cnn()
    replicas = Replicas(model, n=3, backend="loop")
    coupling = Coupling(replicas, 0.3, force=force)
    alone, together = (OPTIMIZERS["adamw"](each.parameters()) for each in (model, replicas))
    for _ in range(5):
        x, y = CASES["cnn with batch norm"].batch()
        for optimizer, loss in (
            (alone, F.cross_entropy(model(x), y)),
            (together, replicas.loss(F.cross_entropy, x, y)),
        ):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        coupling.step()
    for i in range(3):
        assert_same(replicas.replica(i), model)


def test_order_of_replicas_is_nothing() -> None:
    """Relabelled replicas on relabelled batches end relabelled."""
    torch.manual_seed(0)
    models = [mlp().double() for _ in range(3)]
    batches = [torch.randn(3, 8, 7, dtype=torch.float64) for _ in range(5)]
    ended = []
    for order in ([0, 1, 2], [2, 0, 1]):
        replicas = Replicas(models[0], n=3, init=[models[i] for i in order].__getitem__)
        coupling = Coupling(replicas, 0.2, force="tanh")
        optimizer = OPTIMIZERS["sgd"](replicas.parameters())
        for batch in batches:
            optimizer.zero_grad()
            replicas.loss(lambda output, _: output.square().mean(), batch[order], batches="separate").backward()
            optimizer.step()
            coupling.step()
        ended.append(weights(replicas))
    np.testing.assert_allclose(ended[1], ended[0][[2, 0, 1]], rtol=1e-9, atol=1e-12)


def test_full_strength_is_training_on_the_union_of_batches() -> None:
    """Pulled together after every step, replicas with one start are one network on all their batches (momentum too)."""
    torch.manual_seed(0)
    model = mlp().double()
    replicas = Replicas(model, n=4)
    coupling = Coupling(replicas, 1.0)
    alone, together = (OPTIMIZERS["sgd"](each.parameters()) for each in (model, replicas))
    for _ in range(20):
        x, y = torch.randn(4, 8, 7, dtype=torch.float64), torch.randint(3, (4, 8))
        for optimizer, loss in (
            (alone, F.cross_entropy(model(x.flatten(0, 1)), y.flatten())),
            (together, replicas.loss(F.cross_entropy, x, y, batches="separate")),
        ):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        coupling.step()
    assert_same(replicas.replica(3), model, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("strength", [0.0, 0.05, 0.3])
def test_stationary_variance_on_a_quadratic(strength: float) -> None:
    """With curvature 1, rate A and gradient noise of variance 1, centre and spread have the variances of theory.

    Centre: A²/(N A (2 - A)), whatever the strength k. Spread: (1 - 1/N) (1 - k)² A² / (1 - (1 - k)² (1 - A)²).
    """
    n, size, rate, steps = 3, 20_000, 0.3, 40
    torch.manual_seed(0)
    model = nn.Linear(size, 1, bias=False)
    nn.init.zeros_(model.weight)
    replicas = Replicas(model, n=n)
    coupling = Coupling(replicas, strength)
    optimizer = torch.optim.SGD(replicas.parameters(), rate)
    for _ in range(steps):
        w = replicas.stacked.weight
        optimizer.zero_grad()
        (0.5 * w.square() + torch.randn_like(w) * w).sum().backward()
        optimizer.step()
        coupling.step()
    after = weights(replicas)
    centre = after.mean(0)
    keep = (1 - strength) ** 2
    spread = (1 - 1 / n) * keep * rate**2 / (1 - keep * (1 - rate) ** 2)
    # 20 000 draws know a variance to sqrt(2/20 000) = 1 %
    assert centre.var() == pytest.approx(rate / (n * (2 - rate)), rel=0.04)
    assert ((after - centre) ** 2).mean() == pytest.approx(spread, rel=0.04)


# --- resume


@pytest.mark.parametrize("backend", ["loop", "vmap", "batched", "auto"])
@pytest.mark.parametrize("force", ["elastic", "tanh"])
def test_resume_is_bitwise(force: Any, backend: Any, tmp_path: Path) -> None:
    """A run that is stopped between two pulls and resumed from its file ends in the bits of the whole run."""
    case = CASES["dropout"]

    def start() -> tuple[Replicas, torch.optim.Optimizer, Coupling]:
        replicas = Replicas(case.make(), n=3, init="separate", backend=backend)
        coupling = Coupling(replicas, exponential(0.01, 0.5, 10), every=3, force=force, scale=0.1)
        return replicas, OPTIMIZERS["adamw"](replicas.parameters()), coupling

    torch.manual_seed(0)
    replicas, optimizer, coupling = start()
    train_together(replicas, case, optimizer, 4, coupling)
    parts = {"replicas": replicas, "optimizer": optimizer, "coupling": coupling}
    saved = {name: part.state_dict() for name, part in parts.items()} | {"random": torch.get_rng_state()}
    torch.save(saved, tmp_path / "checkpoint.pt")
    train_together(replicas, case, optimizer, 4, coupling)

    torch.manual_seed(7)
    again, optimizer, coupling = start()
    loaded = torch.load(tmp_path / "checkpoint.pt")
    parts = {"replicas": again, "optimizer": optimizer, "coupling": coupling}
    for name, part in parts.items():
        part.load_state_dict(loaded[name])
    torch.set_rng_state(loaded["random"])
    train_together(again, case, optimizer, 4, coupling)
    for i in range(3):
        assert_same(again.replica(i), replicas.replica(i))


# --- words of refusal


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Replicas("model"), r"Replicas\(\): model: found str, expected a torch.nn.Module"),
        (lambda: Replicas(nn.ReLU()), r"Replicas\(\): model: found no parameters, expected some to train"),
        (lambda: Replicas(nn.LazyLinear(3)), r"Replicas\(\): model: found 'weight' without a shape, expected"),
        (lambda: Replicas(mlp(), n=0), r"Replicas\(\): n: found 0, expected a whole number from 1 on"),
        (lambda: Replicas(mlp(), n=True), r"Replicas\(\): n: found True, expected a whole number"),
        (lambda: Replicas(mlp(), init="apart"), r"Replicas\(\): init: found 'apart', expected 'shared', 'separate'"),
        (lambda: Replicas(mlp(), backend="bmm"), r"Replicas\(\): backend: found 'bmm', expected 'loop', 'vmap'"),
        (
            lambda: Replicas(mlp(), init=lambda i: dropping()),
            r"Replicas\(\): init\(0\): tensor '0.weight': found \(13, 7\) of float32, expected \(11, 7\) of float32",
        ),
        (
            lambda: Replicas(mlp(), init=lambda i: nn.Linear(7, 3)),
            r"Replicas\(\): init\(0\): tensor '0.weight': found nothing, expected \(11, 7\)",
        ),
        (
            lambda: Replicas(nn.ParameterList([torch.zeros(2)]), init="separate"),
            r"Replicas\(\): init='separate': parameter '0': found no reset_parameters\(\) in its module, expected",
        ),
        (lambda: Replicas(mlp(), n=2).replica(2), r"replica\(\): i: found 2, expected a replica from 0 to 1"),
        (lambda: Replicas(mlp()).predict(torch.zeros(1, 7), "vote"), r"predict\(\): how: found 'vote', expected"),
        (lambda: Coupling(mlp()), r"Coupling\(\): replicas: found Sequential, expected Replicas"),
        (lambda: Coupling(column(0), 1.5), r"Coupling\(\): strength: found 1.5, expected a number from 0 to 1"),
        (lambda: Coupling(column(0), math.nan), r"Coupling\(\): strength: found nan, expected a number from 0 to 1"),
        (lambda: Coupling(column(0), lambda step: 2.0).step(), r"Coupling\(\): strength: found 2.0, expected"),
        (lambda: Coupling(column(0), every=0), r"Coupling\(\): every: found 0, expected a whole number from 1 on"),
        (lambda: Coupling(column(0), force="spring"), r"Coupling\(\): force: found 'spring', expected 'elastic'"),
        (lambda: Coupling(column(0), scale=0.0), r"Coupling\(\): scale: found 0.0, expected a finite number above 0"),
        (lambda: exponential(0.0, 1.0, 5), r"exponential\(\): found 0.0 to 1.0 in 5 steps, expected strengths above 0"),
    ],
)
def test_wrong_calls_are_refused(make: Callable[[], object], words: str) -> None:
    """What cannot be used is named, with what was expected."""
    with pytest.raises(OptionError, match=words):
        make()


@pytest.mark.parametrize("backend", ["loop", "vmap", "batched"])
def test_wrong_losses_are_refused(backend: Any) -> None:
    """A loss that is not one number, batches that do not fit and unknown words are refused by each back end."""
    replicas = Replicas(mlp(), n=3, backend=backend)
    x, y = classes(8, 7)()
    with pytest.raises(OptionError, match=r"loss_fn: found a tensor of shape \(8, 3\), expected one number"):
        replicas.loss(lambda output, _: output, x, y)
    with pytest.raises(OptionError, match=r"batches='separate': found a tensor of shape \(8, 7\), expected 3 batches"):
        replicas.loss(F.cross_entropy, x, y, batches="separate")
    with pytest.raises(OptionError, match=r"batches='separate': found a tensor of shape \(2, 8\), expected 3 batches"):
        replicas.loss(F.cross_entropy, x.expand(3, 8, 7), y.expand(2, 8), batches="separate")
    with pytest.raises(ValueError, match=r"Expected input batch_size \(8\) to match target batch_size \(5\)"):
        replicas.loss(F.cross_entropy, x.expand(3, 8, 7), y[:5].expand(3, 5), batches="separate")
    with pytest.raises(OptionError, match=r"batches: found 'own', expected 'shared' or 'separate'"):
        replicas.loss(F.cross_entropy, x, y, batches="own")
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):  # the model's own words
        replicas.loss(F.cross_entropy, x[:, :5], y)


def test_a_buffer_that_grows_is_refused() -> None:
    """Buffers that change their shape cannot be stacked."""

    class Growing(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 1)
            self.register_buffer("past", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.past = torch.cat([self.past, x.detach().mean()[None]])
            return super().forward(x)

    with pytest.raises(OptionError, match=r"buffer 'past': found shape \(2,\) after the forward pass, expected \(1,\)"):
        Replicas(Growing()).loss(F.mse_loss, torch.zeros(3, 2), torch.zeros(3, 1))


def test_the_face() -> None:
    """The package root gives both names."""
    assert unvanish.Replicas is Replicas
    assert unvanish.Coupling is Coupling
    assert repr(Coupling(column(0))) == "Coupling(strength=0.01, every=1, force='elastic', scale=1.0)"
    assert repr(Replicas(nn.Linear(1, 1), n=2)).startswith("Replicas(\n  n=2, backend='auto'")

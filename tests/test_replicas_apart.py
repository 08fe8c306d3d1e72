"""What each replica has for itself: optimisers, learning rates, clipping, random numbers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unvanish import Coupling, OptionError, Replicas


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 3))


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 13), nn.BatchNorm1d(13), nn.ReLU(), nn.Dropout(0.4), nn.Linear(13, 3))


def data(steps: int = 5, n: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Return batches of each replica."""
    torch.manual_seed(1)
    return [(torch.randn(n, 8, 7), torch.randint(3, (n, 8))) for _ in range(steps)]


def alone(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]], i: int) -> None:
    """Train a plain model on the batches of replica ``i``."""
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x[i]), y[i]).backward()
        optimizer.step()


def together(replicas: Replicas, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Train all replicas, each on its batches."""
    for x, y in batches:
        optimizer.zero_grad()
        replicas.loss(F.cross_entropy, x, y, batches="separate").backward()
        optimizer.step()


def assert_equal(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def made(make: Callable[[], nn.Module], n: int = 3) -> list[nn.Module]:
    torch.manual_seed(0)
    return [make() for _ in range(n)]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.1),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "muon": lambda p: torch.optim.Muon(p, 0.1),
}
RATES = (0.3, 0.02, 0.1)


# --- learning rates, and optimisers that work on norms or matrices


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_replica_has_a_learning_rate(name: str) -> None:
    """With groups of its parameters each replica is the plain training at its rate, bit for bit, whatever optimiser."""
    make = (lambda: nn.Linear(7, 3, bias=False)) if name == "muon" else mlp
    optimizer, models, batches = OPTIMIZERS[name], made(make), data()
    replicas = Replicas(models[0], n=3, init=models.__getitem__, backend="loop")
    groups = [{"params": replicas.parameters_of(i), "lr": lr} for i, lr in enumerate(RATES)]
    own = optimizer(groups)
    replicas.check(own)
    together(replicas, own, batches)
    for i, model in enumerate(models):
        alone(model, optimizer([{"params": list(model.parameters()), "lr": RATES[i]}]), batches, i)
        assert_equal(replicas.replica(i), model)


def test_parameters_of_a_replica_are_its_memory() -> None:
    """A change on either side is seen on the other, also after a move to another precision."""
    replicas = Replicas(mlp(), n=3)
    weight = replicas.parameters_of(1)[0]
    for _ in range(2):
        with torch.no_grad():
            weight.fill_(5)
            replicas.stacked[2].weight[1] = 7
        assert (replicas.stacked[0].weight[1] == 5).all()
        assert (replicas.parameters_of(1)[2] == 7).all()
        assert weight.shape == (11, 7)
        replicas.double()
    assert weight is replicas.parameters_of(1)[0]
    assert weight.dtype == torch.float64


def test_gradients_accumulate_on_the_parameters_of_replicas() -> None:
    """Two backward passes add up, and clearing by replicas or by optimiser leaves none."""
    replicas = Replicas(mlp(), n=3)
    plain = copy.deepcopy(replicas)
    parameters = [replicas.parameters_of(i) for i in range(3)]
    for x, y in data(2):
        for each in (replicas, plain):
            each.loss(F.cross_entropy, x, y, batches="separate").backward()
    for j, expected in enumerate(plain.parameters()):
        torch.testing.assert_close(torch.stack([p[j].grad for p in parameters]), expected.grad)
    assert all(p.grad is None for p in replicas.parameters())
    replicas.zero_grad()
    assert all(p.grad is None for each in parameters for p in each)


def test_copies_have_memory_of_their_own() -> None:
    """A copy made after `parameters_of` shares nothing, and gets gradients where its optimiser looks for them."""
    replicas = Replicas(mlp(), n=2)
    weight = replicas.parameters_of(0)[0]
    for other in (copy.deepcopy(replicas), pickle.loads(pickle.dumps(replicas))):
        with torch.no_grad():
            weight.add_(1)
        assert not torch.equal(other.stacked[0].weight[0], weight)
        other.loss(F.cross_entropy, *(part[0] for part in data(1)[0])).backward()
        assert other.stacked[0].weight.grad is not None


def test_frozen_parameters_and_coupling_with_parameters_of_replicas() -> None:
    """Frozen ones stay frozen and need no optimiser; the pull moves the memory that optimisers see."""
    model = mlp()
    model[0].requires_grad_(False)
    replicas = Replicas(model, n=2)
    own = torch.optim.SGD([p for i in range(2) for p in replicas.parameters_of(i) if p.requires_grad], 0.1)
    replicas.check(own)
    coupling = Coupling(replicas, 1.0)
    for x, y in data(3, n=2):
        own.zero_grad()
        replicas.loss(F.cross_entropy, x, y, batches="separate").backward()
        own.step()
        coupling.step()
    assert torch.equal(replicas.replica(0)[0].weight, model[0].weight)
    assert not torch.equal(replicas.replica(0)[2].weight, model[2].weight)
    assert torch.equal(*(replicas.parameters_of(i)[2] for i in range(2)))


# --- which optimisers fit


def optimizers_of_torch() -> list[tuple[str, bool]]:
    by_element = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Rprop", "ASGD")
    return [*((name, True) for name in by_element), ("Adafactor", False), ("LBFGS", False)]


@pytest.mark.parametrize(("name", "fits"), optimizers_of_torch())
def test_optimisers_that_mix_replicas_are_refused(name: str, fits: bool) -> None:
    """What works element by element passes; what sees one stacked tensor is named, with what to write instead."""
    replicas = Replicas(mlp(), n=3)
    optimizer = getattr(torch.optim, name)(replicas.parameters())
    if fits:
        replicas.check(optimizer)
    else:
        words = rf"check\(\): optimizer: found {name}, which moves stacked replicas otherwise than each alone"
        with pytest.raises(OptionError, match=words):
            replicas.check(optimizer)


def test_optimisers_by_norm_of_ones_own_are_found() -> None:
    """It is tried, not looked up: an optimiser that divides by the norm of a tensor mixes replicas."""

    class ByNorm(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float = 0.1) -> None:
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad / p.grad.norm(), alpha=group["lr"])

    replicas = Replicas(mlp(), n=2)
    state = torch.get_rng_state()
    with pytest.raises(OptionError, match="found ByNorm, which moves stacked replicas otherwise"):
        replicas.check(ByNorm(replicas.parameters()))
    replicas.check(ByNorm([p for i in range(2) for p in replicas.parameters_of(i)]))
    assert torch.equal(state, torch.get_rng_state())


def test_optimisers_of_other_parameters_are_refused() -> None:
    """Those of the plain model, of one replica only, or those that get no gradients any more."""
    model = mlp()
    replicas = Replicas(model, n=2)
    words = r"found {} of the {} parameters that get gradients, expected all"
    with pytest.raises(OptionError, match=words.format(0, 4)):
        replicas.check(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(OptionError, match=words.format(2, 4)):
        replicas.check(torch.optim.SGD(replicas.stacked[0].parameters(), 0.1))
    stacked = torch.optim.SGD(replicas.parameters(), 0.1)
    replicas.check(stacked)
    one = torch.optim.SGD(replicas.parameters_of(0), 0.1)
    with pytest.raises(OptionError, match=words.format(4, 8)):
        replicas.check(one)
    with pytest.raises(OptionError, match=words.format(0, 8)):
        replicas.check(stacked)


# --- clipping


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_each_replica_is_clipped_by_its_own_norm(norm_type: float, apart: bool) -> None:
    """Norms and clipped gradients are those of n plain models; one large replica leaves the others as they are."""
    models = made(mlp)
    with torch.no_grad():
        models[1][2].weight.mul_(30)
    replicas = Replicas(models[0], n=3, init=models.__getitem__)
    own = [replicas.parameters_of(i) for i in range(3)] if apart else []
    ((x, y),) = data(1)
    for i, model in enumerate(models):
        F.cross_entropy(model(x[i]), y[i]).backward()
    bound = 1.5 * max(nn.utils.get_total_norm([p.grad for p in models[i].parameters()], norm_type) for i in (0, 2))
    replicas.loss(F.cross_entropy, x, y, batches="separate").backward()
    norms = replicas.clip_grad_norm_(float(bound), norm_type)
    for i, model in enumerate(models):
        torch.testing.assert_close(norms[i], nn.utils.clip_grad_norm_(model.parameters(), float(bound), norm_type))
        for j, p in enumerate(model.parameters()):
            grad = own[i][j].grad if apart else list(replicas.parameters())[j].grad[i]
            torch.testing.assert_close(grad, p.grad)
    assert (norms > bound).tolist() == [False, True, False]


def test_clipping_nothing() -> None:
    """Without gradients all norms are zero."""
    assert Replicas(mlp(), n=2).clip_grad_norm_(1.0).tolist() == [0, 0]


# --- random numbers


class Recurrent(nn.Module):
    """Drops between recurrent layers; the columns of the batch come one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrence, self.head = nn.GRU(1, 6, num_layers=3, dropout=0.4, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrence(x.unsqueeze(2))[0][:, -1])


@pytest.mark.parametrize("make", [dropping, Recurrent])
@pytest.mark.parametrize(("backend", "tolerance"), [("loop", {}), ("batched", {"rtol": 1e-4, "atol": 1e-5})])
def test_seeds_make_replicas_separate_trainings(make: Any, backend: Any, tolerance: dict[str, float]) -> None:
    """With a seed each, n replicas are n plain trainings after `manual_seed`, dropout and batch norm included."""
    models, batches, seeds = made(make), data(), (5, 6, 7)
    replicas = Replicas(models[0], n=3, init=models.__getitem__, backend=backend, seeds=seeds)
    torch.manual_seed(99)
    outside = torch.get_rng_state()
    together(replicas, torch.optim.SGD(replicas.parameters(), 0.1, momentum=0.9), batches)
    assert torch.equal(outside, torch.get_rng_state())
    for i, model in enumerate(models):
        torch.manual_seed(seeds[i])
        alone(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), batches, i)
        assert_equal(replicas.replica(i), model, **tolerance)
    assert backend == "loop" or replicas._chosen == {(True, True): "batched"}


@pytest.mark.parametrize("backend", ["loop", "batched"])
def test_streams_are_resumed(backend: Any) -> None:
    """A resumed run draws on where it was, whatever was drawn outside meanwhile."""
    models, batches = made(dropping), data(6)

    def start() -> tuple[Replicas, torch.optim.Optimizer]:
        replicas = Replicas(models[0], n=3, backend=backend, seeds=range(3))
        return replicas, torch.optim.SGD(replicas.parameters(), 0.1)

    replicas, optimizer = start()
    together(replicas, optimizer, batches[:3])
    saved = copy.deepcopy(replicas.state_dict())
    together(replicas, optimizer, batches[3:])
    again, optimizer = start()
    again.load_state_dict(saved)
    torch.rand(5)
    together(again, optimizer, batches[3:])
    assert_equal(again.stacked, replicas.stacked)


def test_equal_seeds_drop_the_same() -> None:
    """Replicas with one seed lose the same on one batch; with others they do not; predictions of forward follow."""
    x, y = (part[0] for part in data(1)[0])
    replicas = Replicas(nn.Sequential(nn.Linear(7, 50), nn.Dropout(0.5), nn.Linear(50, 3)), n=3, seeds=(1, 1, 2))
    for _ in range(2):
        one, other, third = replicas.losses(F.cross_entropy, x, y).tolist()
        assert one == other != third
    assert torch.equal(*replicas(x)[:2])


# --- words of refusal


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Replicas(mlp(), seeds=(1, 2)), r"Replicas\(\): seeds: found \(1, 2\), expected 3 whole numbers"),
        (lambda: Replicas(mlp(), n=1, seeds=3), r"Replicas\(\): seeds: found 3, expected 1 whole numbers"),
        (
            lambda: Replicas(mlp(), backend="vmap", seeds=range(3)),
            r"Replicas\(\): seeds: found backend='vmap', expected another",
        ),
        (lambda: Replicas(mlp()).parameters_of(3), r"parameters_of\(\): i: found 3, expected a replica from 0 to 2"),
        (lambda: Replicas(mlp()).clip_grad_norm_(0.0), r"clip_grad_norm_\(\): max_norm: found 0.0, expected a number"),
    ],
)
def test_wrong_calls_are_refused(make: Callable[[], object], words: str) -> None:
    """What cannot be used is named, with what was expected."""
    with pytest.raises(OptionError, match=words):
        make()

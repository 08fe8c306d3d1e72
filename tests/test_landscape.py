"""The landscape of replicas: each measure against its closed form, and orders of units that were shuffled."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.nets import Reader
from unvanish import Coupling, OptionError, RecordError, Replicas
from unvanish.replicas.landscape import PARTS, landscape
from unvanish.replicas.landscape.align import Matching, align, permuted
from unvanish.replicas.landscape.curvature import curvature
from unvanish.replicas.landscape.entropy import local_entropy
from unvanish.replicas.landscape.noise import local_energy
from unvanish.replicas.landscape.surface import Surface, Weights
from unvanish.replicas.landscape.units import Unreadable, hidden_units
from unvanish.replicas.stack import named_tensors
from unvanish.terrain import Landscape, read_landscape

Data = list[tuple[Any, Any]]

few = settings(max_examples=15, deadline=None)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


def weights_of(model: nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}


def surface_of(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], data: Data) -> Surface:
    return Surface(copy.deepcopy(model), loss_fn, data)


def numbers(found: Landscape) -> str:
    return replace(found, seconds=0.0).to_json()


class Quadratic:
    """A linear network with squared loss: its Hessian, gradient and minimum are known."""

    def __init__(self, size: int = 5, rows: int = 40) -> None:
        self.x = torch.randn(rows, size, dtype=torch.float64)
        self.y = torch.randn(rows, 1, dtype=torch.float64)
        self.model = nn.Linear(size, 1, bias=False, dtype=torch.float64)
        self.data: Data = [(self.x[:25], self.y[:25]), (self.x[25:], self.y[25:])]  # of unequal sizes
        self.hessian = 2 * self.x.T @ self.x / rows

    @property
    def best(self) -> Weights:
        return {"weight": torch.linalg.lstsq(self.x, self.y).solution.T}

    def loss(self, weights: Weights) -> float:
        return float((self.x @ weights["weight"].T - self.y).square().mean())

    def gradient(self, weights: Weights) -> Tensor:
        return (2 * self.x.T @ (self.x @ weights["weight"].T - self.y) / len(self.x)).flatten()

    def surface(self) -> Surface:
        return surface_of(self.model, F.mse_loss, self.data)


# Overlap and spread --------------------------------------------------------------------------------------


@few
@given(st.integers(2, 5), st.integers(0, 10**6))
def test_spread_is_what_the_mean_lacks_in_norm(n: int, seed: int) -> None:
    """The squared distance to the centre is the mean squared norm less that of the centre, in each layer."""
    torch.manual_seed(seed)
    models = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double() for _ in range(n)]
    found = landscape(
        models, F.mse_loss, [(torch.zeros(1, 3).double(), torch.zeros(1, 2).double())], parts=(), align=False
    )
    for row in found.layers:
        vectors = torch.stack(
            [torch.cat([p.flatten() for p in m.get_submodule(row.name).parameters()]) for m in models]
        )
        norms, centre = vectors.square().sum(1).mean().item(), vectors.mean(0).square().sum().item()
        assert row.parameters == vectors.shape[1]
        assert math.isclose(row.spread * row.parameters, norms - centre, rel_tol=1e-9)
        assert math.isclose(row.relative_spread, (norms - centre) / centre, rel_tol=1e-9)


def test_overlap_is_the_cosine_of_matrices() -> None:
    """Biases do not count where there are matrices; a layer without any is compared as a whole."""
    one, other = (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(2))
    with torch.no_grad():
        one[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        other[0].weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        one[0].bias.fill_(7.0)
        other[0].bias.fill_(-7.0)
    found = landscape([one, other], F.mse_loss, [(torch.randn(3, 2), torch.randn(3, 2))], parts=(), align=False)
    assert math.isclose(found.overlaps[0][1], 0.6, rel_tol=1e-6)
    assert [round(row.overlap, 6) for row in found.layers] == [0.6, 1.0]
    assert found.aligned_overlaps == ()


def test_independent_weights_do_not_overlap() -> None:
    """The overlap of independent matrices has standard deviation one over the root of their size."""
    models = [nn.Linear(100, 100, bias=False) for _ in range(4)]
    found = landscape(models, F.mse_loss, [(torch.zeros(1, 100), torch.zeros(1, 100))], parts=(), align=False)
    pairs = [found.overlaps[i][j] for i in range(4) for j in range(i)]
    assert max(map(abs, pairs)) < 5 / 100


def test_frozen_weights_do_not_count() -> None:
    """Layers that were not trained are equal in all replicas; only a model that is frozen as a whole is compared."""
    models = [nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)]
    data = [(torch.zeros(1, 2), torch.zeros(1, 2))]
    for model in models:
        model[0].requires_grad_(False)
    assert [row.name for row in landscape(models, F.mse_loss, data, parts=()).layers] == ["1"]
    for model in models:
        model.requires_grad_(False)
    assert [row.name for row in landscape(models, F.mse_loss, data, parts=()).layers] == ["0", "1"]


# Heights and barriers ------------------------------------------------------------------------------------


def test_heights_are_those_of_all_examples() -> None:
    """Batches of unequal sizes count by their examples."""
    problem = Quadratic()
    weights = weights_of(problem.model)
    assert math.isclose(problem.surface().height(weights).loss, problem.loss(weights), rel_tol=1e-12)


def test_mistakes_are_counted_where_there_are_classes() -> None:
    """Scores and whole numbers of fitting shapes make classes; ignored targets do not count."""
    scores = torch.tensor([[2.0, 1.0], [2.0, 1.0], [0.0, 1.0], [0.0, 1.0]])

    def mistakes(y: Tensor, output: Tensor = scores) -> float:
        class Constant(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.zeros(()))

            def forward(self, x: Tensor) -> Tensor:
                return output + self.w

        surface = surface_of(Constant(), lambda o, _: o.sum(), [(torch.zeros(4), y)])
        return surface.height({}).mistakes

    assert mistakes(torch.tensor([0, 1, 0, 1])) == 0.5
    assert mistakes(torch.tensor([0, -100, 0, 1])) == pytest.approx(1 / 3)
    assert math.isnan(mistakes(torch.tensor([0.0, 1.0, 0.0, 1.0])))
    assert math.isnan(mistakes(torch.tensor([0, 1, 2, 1])))  # no score for this class
    assert math.isnan(mistakes(torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1]])))
    pixels = scores[:, :, None].expand(4, 2, 3)  # (examples, classes, positions)
    assert mistakes(torch.tensor([0, 1, 0, 1])[:, None].expand(4, 3), pixels) == 0.5


def test_barrier_of_a_known_product() -> None:
    """Of a loss (ab - 1)**2 the way from (1, 1) to (-1, -1) leads through 0, which lies 1 higher."""
    models = [nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)) for _ in range(2)]
    for model, value in zip(models, (1.0, -1.0), strict=True):
        for parameter in model.parameters():
            nn.init.constant_(parameter, value)
    found = landscape(models, F.mse_loss, [(torch.ones(1, 1), torch.ones(1, 1))], parts=["barriers"], points=5)
    (between,) = found.walks(is_aligned=False, to_centre=False)
    assert between.t == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert between.losses == pytest.approx([((1 - 2 * t) ** 2 - 1) ** 2 for t in between.t])
    assert between.barrier == 1.0
    assert math.isnan(between.barrier_mistakes)
    # to the centre: t**2 (2 - t)**2 less t, largest 0.0607 at t = 0.75
    assert [path.losses[-1] for path in found.walks(is_aligned=False, to_centre=True)] == [1.0, 1.0]
    t = 0.75
    assert found.paths[1].barrier == pytest.approx(((1 - t) ** 2 - 1) ** 2 - t)


@few
@given(st.integers(0, 10**6))
def test_a_convex_loss_has_no_barrier(seed: int) -> None:
    """On a quadratic the loss along the way is below the line by t (1 - t) d'Hd / 2."""
    torch.manual_seed(seed)
    problem = Quadratic(3)
    models = [problem.model, nn.Linear(3, 1, bias=False, dtype=torch.float64)]
    found = landscape(models, F.mse_loss, problem.data, parts=["barriers"], points=7, align=False)
    path = found.paths[0]
    gap = (models[0].weight - models[1].weight).detach().flatten()
    bend = float(gap @ problem.hessian @ gap) / 2
    for t, loss in zip(path.t, path.losses, strict=True):
        line = (1 - t) * path.losses[0] + t * path.losses[-1]
        assert line - loss == pytest.approx(t * (1 - t) * bend, abs=1e-9)
    assert path.barrier == 0.0


def test_statistics_of_batch_norms_are_estimated_on_the_way() -> None:
    """A layer before a batch norm may be scaled by 3: the network does not change, and nothing on the way does.

    With averaged statistics it would: the centre of the two would be another network.
    """
    one = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    other = copy.deepcopy(one)
    with torch.no_grad():
        other[0].weight.mul_(3.0)
        other[0].bias.mul_(3.0)
    data = [(5 + 2 * torch.randn(64, 4), torch.randint(2, (64,))) for _ in range(2)]
    found = landscape([one, other], F.cross_entropy, data, parts=["barriers"], points=5)
    losses = found.paths[0].losses
    assert max(losses) - min(losses) < 1e-4
    replicas = Replicas(one, n=2, init=lambda i: (one, other)[i])
    with torch.no_grad():
        stale = [F.cross_entropy(replicas.centre().eval()(x), y).item() for x, y in data]
    assert abs(sum(stale) / 2 - losses[2]) > 0.01


def test_a_single_example_may_be_left_over() -> None:
    """The last batch of a loader may hold one example: it counts in the loss, not in the statistics of norms."""
    models = [nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)) for _ in range(2)]
    x, y = torch.randn(9, 4), torch.randint(2, (9,))
    data = [(x[:8], y[:8]), (x[8:], y[8:])]
    found = landscape(models, F.cross_entropy, data, parts=(), align=False).places[0]
    model = copy.deepcopy(models[0]).train()
    model[1].momentum = 1.0
    model(x[:8])
    assert found.loss == pytest.approx(F.cross_entropy(model.eval()(x), y).item(), rel=1e-5)


def test_pairs_are_limited_and_said() -> None:
    """With more pairs than asked for, they are spread over all, and the report tells how many."""
    models = [nn.Linear(2, 2) for _ in range(5)]
    found = landscape(
        models, F.mse_loss, [(torch.zeros(1, 2), torch.zeros(1, 2))], parts=["barriers"], pairs=3, points=3
    )
    assert [(path.start, path.end) for path in found.walks(is_aligned=False, to_centre=False)] == [
        ("replica 0", "replica 2"),
        ("replica 1", "replica 3"),
        ("replica 2", "replica 4"),
    ]
    assert len(found.walks(is_aligned=False, to_centre=True)) == 5
    assert "3 of 10 pairs" in str(found)


# Local energy, curvature, local entropy ------------------------------------------------------------------


def test_local_energy_of_a_quadratic() -> None:
    """At the minimum it is sigma**2/2 times the sum of h_i w_i**2, and grows with sigma**2 draw by draw."""
    problem = Quadratic()
    surface, weights = problem.surface(), problem.best
    at = surface.height(weights)
    small, large = local_energy(surface, weights, at, (0.1, 0.2), draws=600, seed=0)
    exact = 0.1**2 / 2 * float((problem.hessian.diagonal() * weights["weight"].square()).sum())
    assert abs(small.loss - exact) < 4 * small.loss_uncertainty
    assert small.loss_uncertainty < 0.1 * exact
    assert large.loss == pytest.approx(4 * small.loss, rel=1e-9)
    assert math.isnan(small.mistakes)


def test_local_energy_does_not_see_how_layers_share_their_scale() -> None:
    """A ReLU network is the same when one layer is doubled and the next halved; so is its local energy."""
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled[0].weight.mul_(2.0)
        scaled[0].bias.mul_(2.0)
        scaled[2].weight.div_(2.0)
    data = [(torch.randn(20, 3).double(), torch.randint(2, (20,)))]
    found = []
    for each in (model, scaled):
        surface = surface_of(each, F.cross_entropy, data)
        found.append(local_energy(surface, weights_of(each), surface.height(weights_of(each)), (0.3,), 5, seed=0)[0])
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-9)


@few
@given(st.integers(1, 8), st.integers(0, 10**6))
def test_curvature_of_a_quadratic(size: int, seed: int) -> None:
    """The top eigenvalue is that of the Hessian, which is known, within the stated residual."""
    torch.manual_seed(seed)
    problem = Quadratic(size)
    weights = weights_of(problem.model)
    found = curvature(problem.surface(), weights, seed=1)
    exact = float(torch.linalg.eigvalsh(problem.hessian)[-1])
    assert abs(found.top - exact) <= found.residual + 1e-9 * exact
    assert found.residual <= 1e-3 * exact + 1e-9
    assert found.scaled == pytest.approx(found.top * float(weights["weight"].square().sum()))
    assert found.steps <= size


def test_curvature_of_a_network() -> None:
    """It is the largest eigenvalue of the full Hessian, not that of largest size, also where that is negative."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(12, 3).double(), torch.randint(2, (12,))
    names, values = zip(*model.named_parameters(), strict=True)
    for sign in (1.0, -1.0):

        def loss(*parameters: Tensor, sign: float = sign) -> Tensor:
            output = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))
            return sign * F.cross_entropy(output, y)

        blocks = torch.autograd.functional.hessian(loss, tuple(values))
        full = torch.cat(
            [
                torch.cat([b.flatten(0, -1).reshape(p.numel(), -1) for b in row], 1)
                for p, row in zip(values, blocks, strict=True)
            ]
        )
        surface = surface_of(model, lambda o, t, sign=sign: sign * F.cross_entropy(o, t), [(x, y)])
        found = curvature(surface, weights_of(model), seed=0)
        exact = torch.linalg.eigvalsh(full)
        assert found.top == pytest.approx(float(exact[-1]), abs=2e-3 * float(exact.abs().max()))


def test_a_loss_without_curvature_has_none() -> None:
    """A loss that is linear in the weights has Hessian zero, and says so."""
    model = nn.Linear(2, 1, bias=False)
    found = curvature(surface_of(model, lambda o, _: o.mean(), [(torch.ones(3, 2), None)]), weights_of(model), seed=0)
    assert found.top == 0.0
    assert found.steps == 1


def test_local_entropy_of_a_quadratic() -> None:
    """It is the Gaussian integral, at the minimum and beside it, within its stated error."""
    problem = Quadratic(4)
    surface = problem.surface()
    for weights in (problem.best, {"weight": problem.best["weight"] + 0.1}):
        width = 0.5
        found = local_entropy(surface, weights, problem.loss(weights), width, chains=10, seed=0)
        s = width * float(weights["weight"].square().mean().sqrt())
        b = float(surface.examples)
        matrix = torch.eye(4, dtype=torch.float64) + b * s**2 * problem.hessian
        gradient = problem.gradient(weights)
        pull = (b * s) ** 2 * float(gradient @ torch.linalg.solve(matrix, gradient)) / 2
        exact = -b * problem.loss(weights) + pull - float(torch.logdet(matrix)) / 2
        assert abs(found.value - exact) < 4 * found.uncertainty
        assert found.uncertainty < 0.3
        assert (found.width, found.inverse_temperature) == (width, 40.0)


def test_local_entropy_of_a_flat_loss() -> None:
    """Where the loss is the same everywhere, it is the loss of all examples, without any error."""
    model = nn.Linear(2, 1)
    surface = surface_of(model, lambda o, _: 0 * o.sum() + 0.25, [(torch.ones(8, 2), None)])
    found = local_entropy(surface, weights_of(model), 0.25, width=0.3, chains=3, seed=0)
    assert found.value == pytest.approx(-2.0)
    assert found.uncertainty == pytest.approx(0.0, abs=1e-12)


# Units in another order ----------------------------------------------------------------------------------


class Residual(nn.Module):
    """Convolutions with batch norms around which the input is led, plainly and by a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.one, self.one_norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.two, self.around = nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Conv2d(6, 8, 1, stride=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.one_norm(self.one(x)))
        x = torch.relu(self.two(x) + self.around(x))
        return self.head(x.mean((2, 3)))


class Squeezed(nn.Module):
    """Channels that are weighed by what all of them hold, and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.each = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 3, groups=6)
        self.down, self.up, self.head = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1), nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.each(self.first(x)))
        x = x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(F.max_pool2d(x, 3).view(x.size(0), -1))


class Twice(nn.Module):
    """One layer that is passed twice: its inputs and outputs are the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.again, self.leave = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.again(torch.tanh(self.again(torch.tanh(self.enter(x)))))))


class Attentive(nn.Module):
    """Attention, of which nothing is known here, and a perceptron beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Embedding(11, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.widen, self.narrow = nn.LayerNorm(4), nn.Linear(4, 7), nn.Linear(7, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        x = x + self.attend(x, x, x)[0]
        return self.head(x + self.narrow(F.gelu(self.widen(self.norm(x)))))


class Bag(nn.Module):
    """The mean of embedded words, normalised: all of its units are free."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(11, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(words).mean(1) * 2.0))


class Tying(nn.Module):
    """Weights that are read in both directions: the units of the code are free, but their tensor is used by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.inner = nn.Linear(4, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.inner(F.relu(self.encode(x)))), self.encode.weight.t())


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.PReLU(6), nn.MaxPool2d(2), nn.Conv2d(6, 4, 2), nn.GroupNorm(1, 4),
        nn.GELU(), nn.Flatten(), nn.Linear(4 * 4, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3),
    )  # fmt: skip


def groups_of_channels() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 1), nn.GroupNorm(3, 6), nn.Conv2d(6, 6, 1, groups=2), nn.Conv2d(6, 3, 1))


def weight_normed() -> nn.Module:
    norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def decoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), nn.Unflatten(1, (6, 1)), nn.ConvTranspose1d(6, 5, 3), nn.ReLU(), nn.Conv1d(5, 2, 1)
    )


VECTORS, PICTURES, WORDS = torch.Size((7, 4)), torch.Size((5, 2, 8, 8)), torch.Size((6, 4))
NETS: dict[str, tuple[Callable[[], nn.Module], torch.Size, list[int]]] = {
    "perceptron": (perceptron, VECTORS, [9, 8]),
    "convolutions": (images, PICTURES, [6, 4, 7]),
    "residual": (Residual, PICTURES, [6, 8]),
    "squeezed and depthwise": (Squeezed, PICTURES, [6, 3]),
    "a layer passed twice": (Twice, VECTORS, [5]),
    "attention": (Attentive, WORDS, [7]),
    "bag of words": (Bag, WORDS, [5]),
    "weights used by hand": (Tying, VECTORS, []),
    "groups of channels": (groups_of_channels, PICTURES, []),
    "weight norm": (weight_normed, VECTORS, [5]),
    "decoder": (decoder, VECTORS, [5]),
}
FREE = {name: net for name, net in NETS.items() if net[2]}
every_net = pytest.mark.parametrize(("make", "shape", "sizes"), NETS.values(), ids=list(NETS))
every_free_net = pytest.mark.parametrize(("make", "shape", "sizes"), FREE.values(), ids=list(FREE))


def inputs(shape: torch.Size) -> Tensor:
    return torch.randint(11, shape) if shape == WORDS else torch.randn(shape)


def lived_in(make: Callable[[], nn.Module], shape: torch.Size) -> nn.Module:
    """Return a model whose norms and biases are not all equal, in evaluation mode."""
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model(inputs(shape))
    return model.eval()


def shuffled(model: nn.Module, groups: Any) -> nn.Module:
    """Return the same network with its units in another order."""
    order = tuple(torch.randperm(group.size) for group in groups)
    moved = copy.deepcopy(model)
    tensors = named_tensors(moved)
    with torch.no_grad():
        for name, value in permuted(weights_of(model), groups, order).items():
            tensors[name].copy_(value)
    return moved


@every_net
def test_free_units_are_found_and_are_free(make: Any, shape: torch.Size, sizes: list[int]) -> None:
    """Known operations free the units between them; in another order the network computes the same."""
    model, x = lived_in(make, shape), inputs(shape)
    groups = hidden_units(model, x)
    assert [group.size for group in groups] == sizes
    for _ in range(3):
        torch.testing.assert_close(shuffled(model, groups)(x), model(x), rtol=1e-4, atol=1e-5)


@every_free_net
def test_shuffled_units_are_put_back(make: Any, shape: torch.Size, sizes: list[int]) -> None:
    """A network with its units shuffled is found to be the same one: every weight, and so no barrier."""
    model, x = lived_in(make, shape), inputs(shape)
    groups = hidden_units(model, x)
    models = [weights_of(model), *(weights_of(shuffled(model, groups)) for _ in range(2))]
    aligned = align(models, groups, dict(model.named_parameters()))
    for one in aligned:
        assert all(torch.equal(one[name], value) for name, value in models[0].items())


def test_alignment_takes_the_barrier_away() -> None:
    """Between a network and itself with shuffled units there is a barrier, which alignment shows to be none."""
    x, y = torch.randn(60, 4), torch.randint(3, (60,))
    model = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    other = shuffled(model, hidden_units(model, x))
    found = landscape([model, other], F.cross_entropy, [(x, y)], parts=["barriers"], points=5)
    raw, aligned = (found.walks(is_aligned=one, to_centre=False)[0] for one in (False, True))
    assert raw.barrier > 0.3
    assert raw.barrier_mistakes > 0.1
    assert aligned.barrier == pytest.approx(0.0, abs=1e-7)
    assert found.overlaps[0][1] < 0.7
    assert found.aligned_overlaps[0][1] == pytest.approx(1.0)
    assert found.notes == ()


@few
@given(st.integers(0, 10**6))
def test_one_layer_is_aligned_as_well_as_can_be(seed: int) -> None:
    """With a single group of units the best of all orders is found."""
    torch.manual_seed(seed)
    nets = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2)]
    groups = hidden_units(nets[0], torch.zeros(2, 3))
    names = [name for name, _ in nets[0].named_parameters()]
    one, other = map(weights_of, nets)

    def product(weights: Weights) -> float:
        return sum(float((one[name] * weights[name]).sum()) for name in names)

    orders = map(torch.tensor, itertools.permutations(range(4)))
    best = max(product(permuted(other, groups, (order,))) for order in orders)
    assert product(align([one, other], groups, names)[1]) == pytest.approx(best, abs=1e-5)


@few
@given(st.integers(2, 4), st.integers(0, 10**6))
def test_alignment_never_parts_networks(n: int, seed: int) -> None:
    """The sum of the products of all pairs is no smaller than before, and no network computes something else."""
    torch.manual_seed(seed)
    nets = [perceptron().eval() for _ in range(n)]
    x = torch.randn(5, 4)
    groups = hidden_units(nets[0], x)
    before = list(map(weights_of, nets))
    after = align(before, groups, dict(nets[0].named_parameters()))
    names = Matching(groups, frozenset(dict(nets[0].named_parameters()))).names

    def products(models: list[Weights]) -> float:
        return sum(float((a[k] * b[k]).sum()) for a, b in itertools.combinations(models, 2) for k in names)

    if n == 2:
        assert products(after) >= products(before) - 1e-5
    for net, weights in zip(nets, after, strict=True):
        torch.testing.assert_close(torch.func.functional_call(net, weights, (x,)), net(x), rtol=1e-4, atol=1e-5)


class Branching(nn.Module):
    """A way that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x) if x.sum() > 0 else torch.relu(self.one(x)))


def test_what_cannot_be_read_is_not_aligned_and_said() -> None:
    """A network that no trace can follow, or with nothing free, is measured as it is; a note says why."""
    data = [(torch.randn(6, 4), torch.randint(3, (6,)))]
    with pytest.raises(Unreadable, match=r"torch\.fx cannot trace it"):
        hidden_units(Branching(), data[0][0])
    found = landscape([Branching(), Branching()], F.cross_entropy, data, parts=["barriers"], points=3)
    assert found.aligned_overlaps == ()
    assert not found.walks(is_aligned=True, to_centre=False)
    assert "Units were not aligned: torch.fx cannot trace it" in str(found)
    words = [(torch.randint(20, (6, 5)), torch.randint(3, (6,)))]
    held = landscape([Reader(), Reader()], F.cross_entropy, words, parts=())
    assert held.notes == ("Units were not aligned: none are known to be free to change places.",)
    partly = landscape(
        [Attentive(), Attentive()],
        lambda o, y: F.cross_entropy(o[:, 0], y),
        [(torch.randint(11, (6, 4)), torch.randint(3, (6,)))],
        parts=(),
    )
    assert partly.aligned_overlaps
    assert "'embed', 'attend'" in partly.notes[0]


def test_an_order_that_changes_the_network_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the free units be read wrongly, the outputs tell, and nothing aligned is reported."""
    from unvanish.replicas.landscape import survey
    from unvanish.replicas.landscape.groups import Axis, Units

    monkeypatch.setattr(survey, "hidden_units", lambda *_: (Units(9, (Axis("0.weight", 0, 1),)),))
    data = [(torch.randn(6, 4), torch.randint(3, (6,)))]
    found = landscape([perceptron(), perceptron()], F.cross_entropy, data, parts=())
    assert found.aligned_overlaps == ()
    assert "in another order the network computed something else" in found.notes[0]


# The whole -----------------------------------------------------------------------------------------------


def small_replicas(n: int = 2) -> tuple[Replicas, Data]:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3))
    return Replicas(model, n=n, init="separate"), [(torch.randn(9, 4), torch.randint(3, (9,))) for _ in range(2)]


QUICK: dict[str, Any] = {"points": 3, "sigmas": (0.2,), "draws": 2, "chains": 2}


def test_nothing_is_touched() -> None:
    """Weights, gradients, buffers, modes and every random state are as before, bit for bit."""
    replicas, data = small_replicas()
    replicas.loss(F.cross_entropy, *data[0]).backward()
    replicas.stacked[1].eval()
    models = [replicas.replica(i) for i in range(2)]
    models[1].eval()
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(*map(torch.cat, zip(*data, strict=True))), 6, shuffle=True, generator=generator)

    def state() -> list[Any]:
        holders = (replicas, *models)
        tensors = [t.clone() for m in holders for t in (*m.parameters(), *m.buffers())]
        grads = [p.grad.clone() for m in holders for p in m.parameters() if p.grad is not None]
        modes = [module.training for m in holders for module in m.modules()]
        needed = [p.requires_grad for m in holders for p in m.parameters()]
        states = [torch.get_rng_state(), generator.get_state(), torch.tensor(np.random.get_state()[1].astype(int))]
        return [tensors, grads, modes, needed, states, random.getstate()]

    before = state()
    with torch.no_grad():
        landscape(replicas, F.cross_entropy, loader, **QUICK)
        landscape(models, F.cross_entropy, loader, parts=["barriers", "curvature"], points=3)
    after = state()
    for one, other in zip(before, after, strict=True):
        if isinstance(one, list) and one and isinstance(one[0], Tensor):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        else:
            assert one == other
    assert before[1]


def test_the_same_seed_gives_the_same_numbers() -> None:
    """A shuffling loader and all draws follow the seed; another seed draws other noise."""
    replicas, data = small_replicas()
    loader = DataLoader(TensorDataset(*map(torch.cat, zip(*data, strict=True))), 6, shuffle=True)
    first = landscape(replicas, F.cross_entropy, loader, seed=4, **QUICK)
    torch.rand(7)
    again = landscape(replicas, F.cross_entropy, loader, seed=4, **QUICK)
    other = landscape(replicas, F.cross_entropy, loader, seed=5, parts=["local_energy"], sigmas=(0.2,), draws=2)
    assert numbers(first) == numbers(again)
    assert first.places[0].energies != other.places[0].energies


def test_replicas_and_plain_models_are_the_same() -> None:
    """A list of the replicas as plain models has the landscape of the replicas."""
    replicas, data = small_replicas(3)
    options = {**QUICK, "align": False, "parts": PARTS[:3]}
    stacked = landscape(replicas, F.cross_entropy, data, **options)
    plain = landscape([replicas.replica(i) for i in range(3)], F.cross_entropy, iter(data), **options)
    assert replace(plain, forward=stacked.forward, seconds=stacked.seconds).to_json() == stacked.to_json()


def test_passes_are_counted() -> None:
    """As many forward passes are counted as the network made, and not more than the docstring says."""

    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return super().forward(x)

    data = [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(3)]
    options: dict[str, Any] = {"points": 5, "pairs": 2, "sigmas": (0.1, 0.2), "draws": 3, "chains": 2}
    found = landscape([Counting(3, 2) for _ in range(3)], F.mse_loss, data, align=False, **options)
    assert found.forward == Counting.calls
    heights, checks = 4, 2 * 3 / 3  # of all places; two outputs a model, of one batch each
    most = heights + checks + (2 + 3) * 3 + 4 * 3 * 2 + 30 * 4 + 51 * 4 * 3
    steps = sum(place.curvature.steps for place in found.places)
    assert found.backward == 2 * 3 * steps
    assert found.forward == 3 * (most - 30 * 4 + steps)
    assert found.forward <= 3 * most


def test_parts_can_be_left_out() -> None:
    """Only the parts that were asked for are measured; the text and the picture do without the others."""
    replicas, data = small_replicas()
    for part in PARTS:
        found = landscape(replicas, F.cross_entropy, data, parts=[part], **QUICK)
        place = found.place("centre")
        measured = (bool(found.paths), bool(place.energies), place.curvature is not None, place.entropy is not None)
        assert measured == tuple(each == part for each in PARTS)
        assert str(found)
    with pytest.raises(KeyError):
        found.place("replica 2")


def test_inputs_of_any_kind() -> None:
    """Several arguments, and arguments by name, reach the model; batch norms see them too."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor, more: Tensor) -> Tensor:
            return self.norm(self.one(x + more))

    models = [Sum(), Sum()]
    x, more, y = torch.randn(8, 3), torch.randn(8, 3), torch.randint(3, (8,))
    added = [((x, more), y)]
    named = [({"x": x, "more": more}, y)]
    losses = [landscape(models, F.cross_entropy, data, parts=()).places[0].loss for data in (added, named)]
    assert losses[0] == losses[1]
    assert landscape(models, lambda o, _: o.square().mean(), [{"x": x, "more": more}], parts=()).examples == 8


def test_attention_has_curvature() -> None:
    """The fast kernels of attention have no second derivative; another one is taken for it."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)[:, None]
            return F.scaled_dot_product_attention(x, x, x)

    model, x = Attending().double(), torch.randn(2, 5, 3).double()
    found = curvature(surface_of(model, lambda o, _: o.square().mean(), [(x, None)]), weights_of(model), seed=0)
    assert found.top > 0
    assert found.residual < 1e-3 * found.top


def test_a_kernel_without_second_derivative_is_said() -> None:
    """Where curvature cannot be computed, the rest is, and a note says why."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad.clone()

    models = [nn.Linear(2, 1), nn.Linear(2, 1)]
    found = landscape(
        models, lambda o, _: Once.apply(o).square().mean(), [(torch.ones(3, 2), None)], parts=["curvature"]
    )
    assert found.places[0].curvature is None
    assert "No curvature: " in str(found)


# What comes out ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example() -> Landscape:
    """A landscape with everything in it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        replicas, data = small_replicas(3)
        return landscape(replicas, F.cross_entropy, data, **QUICK)


def test_json_goes_both_ways(example: Landscape, tmp_path: Path) -> None:
    """What is saved into the folder of a run is read back to the same document, without nan."""
    file = example.save(tmp_path)
    assert file == tmp_path / "landscape.json"
    back = read_landscape(tmp_path)
    assert back is not None
    assert back.to_json() == example.to_json()
    assert back.paths[0].barrier == example.paths[0].barrier
    assert str(back) == str(example)
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["paths"][0]["barrier"] == example.paths[0].barrier
    assert read_landscape(tmp_path / "elsewhere") is None


@pytest.mark.parametrize("harm", ["cut", "kind", "type", "missing"])
def test_a_damaged_file_is_refused(example: Landscape, tmp_path: Path, harm: str) -> None:
    """A file that is cut off, of another kind, or without a value is named, and what to do."""
    document = example.to_dict()
    if harm == "kind":
        document["kind"] = "a letter"
    if harm == "type":
        document["places"][0]["loss"] = "high"
    if harm == "missing":
        del document["layers"][0]["spread"]
    text = json.dumps(document)
    (tmp_path / "landscape.json").write_text(text[:-40] if harm == "cut" else text, encoding="utf-8")
    with pytest.raises(RecordError, match=r"report: '.*landscape.json': found a damaged file .*Save it again"):
        read_landscape(tmp_path)


def test_the_report_of_a_run_shows_it(example: Landscape, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`unvanish report` shows the landscape that lies in the folder of the run, as text and as JSON."""
    import unvanish
    from unvanish.cli import main

    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with unvanish.watch(model, optimizer, folder=tmp_path) as run:
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.randn(4, 2)).square().mean().backward()
            optimizer.step()

    def report(*options: str) -> str:
        with pytest.raises(SystemExit):
            main(["report", str(run.folder), *options])
        return capsys.readouterr().out

    assert "landscape" not in report()
    assert "landscape" not in json.loads(report("--json", "-"))
    example.save(run.folder)
    text = report()
    assert "landscape  3 replicas on 18 examples" in text
    assert max(map(len, text.splitlines())) <= 80
    assert json.loads(report("--json", "-"))["landscape"] == json.loads(example.to_json())


def test_text_has_every_number_and_no_command(example: Landscape) -> None:
    """The text names places, layers and parts; control characters in a name are shown, not sent."""
    text = str(example)
    for word in ("replica 2", "centre", "BatchNorm1d", "local entropy", "top eigenvalue", "sigma 0.2", "barrier"):
        assert word in text
    hostile = replace(example, layers=(replace(example.layers[0], name="\x1b[31mred[/bold]"),))
    assert "\x1b" not in str(hostile)
    assert r"\x1b[31mred[/bold]" in str(hostile)
    assert "<pre>" in example._repr_html_()
    many = replace(example, layers=example.layers * 30)
    assert "and 50 more" in str(many)


def test_it_is_drawn(example: Landscape, tmp_path: Path) -> None:
    """A picture is written in the kind that its name says; a loss without classes, or without parts, is drawn too."""
    assert example.draw(tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    x = torch.randn(5, 2)
    bare = landscape([nn.Linear(2, 1), nn.Linear(2, 1)], F.mse_loss, [(x, x[:, :1])], parts=())
    assert b"<svg" in bare.draw(tmp_path / "bare.svg").read_bytes()
    (tmp_path / "folder.png").mkdir()
    for file in ("missing/picture.png", "picture.abc", "picture", "folder.png"):
        with pytest.raises(OptionError, match=r"Landscape.draw\(\): file: found .*Write landscape.draw"):
            bare.draw(tmp_path / file)
    with pytest.raises(OptionError, match=r"Landscape.save\(\): path: found 'No such file or directory'"):
        example.save(tmp_path / "missing" / "file.json")


def test_missing_extras_are_named(example: Landscape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib or scipy the message has the line that installs it."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OptionError, match=r"pip install 'unvanish\[plot\]'"):
        example.draw(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    data = [(torch.randn(6, 4), torch.randint(3, (6,)))]
    with pytest.raises(OptionError, match=r"pip install 'unvanish\[landscape\]'"):
        landscape([perceptron(), perceptron()], F.cross_entropy, data, parts=())
    assert landscape([perceptron(), perceptron()], F.cross_entropy, data, parts=(), align=False).layers


# Bad input -----------------------------------------------------------------------------------------------

BATCH: Data = [(torch.zeros(2, 2), torch.zeros(2, 1))]


@pytest.mark.parametrize(
    ("replicas", "message"),
    [
        (nn.Linear(2, 1), r"replicas: found Linear, expected Replicas or a list"),
        ([nn.Linear(2, 1)], r"replicas: found 1, expected two or more"),
        (Replicas(nn.Linear(2, 1), n=1), r"replicas: found 1, expected two or more"),
        ([nn.Linear(2, 1), "model"], r"replicas: found list, expected Replicas"),
        ([nn.Linear(2, 1), nn.Linear(3, 1)], r"replicas\[1\]: tensor 'weight': found \(1, 3\)"),
        ([nn.Linear(2, 1), Replicas(nn.Linear(2, 1))], r"replicas\[1\]: found Replicas in a list"),
        ([nn.Sequential(nn.Linear(2, 1), kind()) for kind in (nn.Tanh, nn.Softplus)], "found another output"),
    ],
)  # fmt: skip
def test_wrong_replicas_are_refused(replicas: Any, message: str) -> None:
    """What has no landscape is named, and what would have one."""
    with pytest.raises(OptionError, match=message):
        landscape(replicas, F.mse_loss, [(torch.ones(2, 2), torch.zeros(2, 1))], parts=())


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "found no batches"),
        (5, "found int, which gives no batches"),
        ([(torch.zeros(2, 2), torch.zeros(2, 1), 3)], "found as a batch one of 3 parts"),
        (["text"], "found as a batch str"),
        ([(torch.zeros(0, 2), torch.zeros(0, 1))], "found a batch without examples"),
    ],
)
def test_wrong_loaders_are_refused(loader: Any, message: str) -> None:
    """A loader without usable batches is refused before anything is measured."""
    with pytest.raises(OptionError, match=rf"landscape\(\): loader: {message}"):
        landscape([nn.Linear(2, 1), nn.Linear(2, 1)], F.mse_loss, loader)


@pytest.mark.parametrize(
    ("option", "value"),
    [("points", 2), ("pairs", 0), ("draws", 1), ("chains", True), ("seed", -1), ("width", 0.0), ("sigmas", ()),
     ("sigmas", (0.1, math.inf)), ("parts", ["barrier"]), ("draws", 2.5), ("width", math.nan)],
)  # fmt: skip
def test_wrong_options_are_refused(option: str, value: Any) -> None:
    """An option that cannot be used is named with its value."""
    with pytest.raises(OptionError, match=rf"landscape\(\): {option}: found .*, expected .*\. Write {option}="):
        landscape([nn.Linear(2, 1), nn.Linear(2, 1)], F.mse_loss, BATCH, **{option: value})


def test_a_loss_that_is_no_number_is_refused() -> None:
    """Losses of single examples, and replicas that have diverged, are told apart and named."""
    models = [nn.Linear(2, 1), nn.Linear(2, 1)]
    with pytest.raises(OptionError, match=r"loss_fn: found a tensor of shape \(2, 1\), expected one number"):
        landscape(models, lambda o, y: (o - y).square(), BATCH)
    with torch.no_grad():
        models[1].weight.fill_(math.nan)
    with pytest.raises(OptionError, match=r"landscape\(\): replica 1: found the loss nan, expected a finite number"):
        landscape(models, F.mse_loss, BATCH)


def test_overflow_on_the_way_is_shown_as_unknown() -> None:
    """A centre or noise that overflows makes no number; what is finite beside it stays."""
    models = [nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)]
    for model, value in zip(models, (1.0, 3.0), strict=True):
        nn.init.constant_(model.weight, value)
    x = torch.ones(2, 1)
    odd = lambda o, _: torch.where((o - 2.0).abs() < 0.5, torch.nan, 0.0 * o).mean()  # noqa: E731
    found = landscape(models, odd, [(x, x)], **QUICK)
    assert math.isnan(found.place("centre").loss)
    assert math.isnan(found.paths[0].barrier)
    assert found.place("replica 0").loss == 0.0
    assert json.loads(found.to_json())["paths"][0]["barrier"] is None
    assert str(found)


# Real data -----------------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)


def trained(init: Any, strength: float) -> tuple[Replicas, Data]:
    """Train three perceptrons on digits, on batches of their own."""
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    replicas = Replicas(model, n=3, init=init)
    coupling = Coupling(replicas, strength=strength)
    optimizer = torch.optim.SGD(replicas.parameters(), 0.1, momentum=0.9)
    for _ in range(300):
        rows = torch.randint(1200, (3, 64))
        optimizer.zero_grad()
        replicas.loss(F.cross_entropy, x[rows], y[rows], batches="separate").backward()
        optimizer.step()
        coupling.step()
    return replicas, [(x[:1200], y[:1200])]


def test_independent_networks_are_alike_up_to_the_order_of_their_units() -> None:
    """On digits: overlap 0 and a high barrier as they are; much overlap and nearly no barrier when aligned."""
    replicas, data = trained("separate", 0.0)
    found = landscape(replicas, F.cross_entropy, data, parts=["barriers"], points=11)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs(found.overlaps[i][j]) < 0.05
        assert found.aligned_overlaps[i][j] > 0.4
    raw, aligned = (found.walks(is_aligned=one, to_centre=False) for one in (False, True))
    assert min(path.barrier_mistakes for path in raw) > 0.05
    assert max(path.barrier_mistakes for path in aligned) < 0.05
    assert max(path.barrier for path in aligned) < 0.25 * min(path.barrier for path in raw)
    assert found.place("centre").mistakes > 0.1


def test_coupled_networks_are_one() -> None:
    """On digits, from a shared start: they overlap, there is no barrier, and the centre is as good as they are."""
    replicas, data = trained("shared", 0.05)
    found = landscape(replicas, F.cross_entropy, data, parts=["barriers"], points=11)
    assert min(min(row) for row in found.overlaps) > 0.99
    assert max(path.barrier_mistakes for path in found.paths) < 0.005
    assert found.place("centre").mistakes <= 0.01

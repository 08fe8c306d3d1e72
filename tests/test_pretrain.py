"""Pretraining layer by layer: machines against exact enumeration, autoencoders against closed forms, and the whole."""

from __future__ import annotations

import copy
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import unvanish
from unvanish import OptionError, freeze_to
from unvanish.reuse.pretrain import Pretraining, Rbm
from unvanish.reuse.pretrain.autoencoder import Autoencoder
from unvanish.reuse.pretrain.rbm import RbmLearner
from unvanish.reuse.pretrain.rows import Scale
from unvanish.reuse.pretrain.stages import Stage, stages_of
from unvanish.treatments import parse_treatment


def machine(visible: str = "bernoulli", shape: tuple[int, int] = (3, 4)) -> Rbm:
    """Return a machine with weights of order 1, in float64."""
    torch.manual_seed(0)
    h, v = shape
    weight, hidden, seen = (torch.randn(size, dtype=torch.float64) for size in ((h, v), (h,), (v,)))
    return Rbm(weight, hidden, seen, visible)  # type: ignore[arg-type]


def states(count: int) -> Tensor:
    """Return all states of so many bits."""
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=count)), dtype=torch.float64)


def energy(rbm: Rbm, v: Tensor, h: Tensor) -> Tensor:
    """Return E(v, h) as its definition has it, for one pair."""
    own = -v @ rbm.visible_bias if rbm.visible == "bernoulli" else (v - rbm.visible_bias).square().sum() / 2
    return own - h @ rbm.hidden_bias - h @ rbm.weight @ v


def chances(rbm: Rbm) -> Tensor:
    """Return p(v) of each visible state, by enumeration of both layers."""
    v, h = states(len(rbm.visible_bias)), states(len(rbm.hidden_bias))
    weights = torch.stack([torch.stack([torch.exp(-energy(rbm, a, b)) for b in h]).sum() for a in v])
    return weights / weights.sum()


def transitions(rbm: Rbm) -> Tensor:
    """Return the chance of each visible state after one step of Gibbs sampling from each."""
    v, h = states(len(rbm.visible_bias)), states(len(rbm.hidden_bias))
    up = torch.stack([torch.where(h > 0, p, 1 - p).prod(1) for p in rbm.hidden(v)])  # (visible, hidden states)
    down = torch.stack([torch.where(v > 0, p, 1 - p).prod(1) for p in rbm.mean_visible(h)])  # (hidden, visible states)
    return up @ down


@pytest.mark.parametrize("visible", ["bernoulli", "gaussian"])
def test_free_energy_is_the_sum_over_hidden_states(visible: str) -> None:
    """exp(-F(v)) = sum_h exp(-E(v, h)), for each v."""
    rbm = machine(visible)
    v = states(4) if visible == "bernoulli" else torch.randn(16, 4, dtype=torch.float64)
    summed = torch.stack([torch.stack([torch.exp(-energy(rbm, row, h)) for h in states(3)]).sum() for row in v])
    torch.testing.assert_close(torch.exp(-rbm.free_energy(v)), summed, rtol=1e-12, atol=0)


@pytest.mark.parametrize("visible", ["bernoulli", "gaussian"])
def test_conditionals_are_those_of_the_energy(visible: str) -> None:
    """p(h | v) and E(v | h) by enumeration, or, for Gaussian units, where the energy has its minimum."""
    rbm = machine(visible)
    v = states(4)[5]
    weights = torch.stack([torch.exp(-energy(rbm, v, h)) for h in states(3)])
    torch.testing.assert_close(rbm.hidden(v[None])[0], weights @ states(3) / weights.sum())
    h = states(3)[5]
    mean = rbm.mean_visible(h[None])[0]
    if visible == "bernoulli":
        weights = torch.stack([torch.exp(-energy(rbm, row, h)) for row in states(4)])
        torch.testing.assert_close(mean, weights @ states(4) / weights.sum())
    else:
        mean.requires_grad_()
        (slope,) = torch.autograd.grad(energy(rbm, mean, h), [mean])
        torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)


def model_mean(rbm: Rbm, seen: Tensor, rows: Tensor, weights: Tensor) -> list[Tensor]:
    """Return the mean gradient over what the machine dreams: rows with their chances."""
    parts = [rbm.gradient(seen, row[None]) for row in rows]
    return [sum(w * part[i] for w, part in zip(weights, parts, strict=True)) for i in range(3)]  # type: ignore[misc]


def test_gradient_of_the_likelihood_is_exact_for_bits() -> None:
    """With the exact expectation over all states the gradient is autograd's of the enumerated log likelihood."""
    rbm, seen = machine(), states(4)[[1, 6, 6, 11, 14]]
    tensors = [t.requires_grad_() for t in (rbm.weight, rbm.hidden_bias, rbm.visible_bias)]
    log_likelihood = (-rbm.free_energy(seen)).mean() - torch.logsumexp(-rbm.free_energy(states(4)), 0)
    truth = torch.autograd.grad(log_likelihood, tensors)
    with torch.no_grad():
        for found, wanted in zip(model_mean(rbm, seen, states(4), chances(rbm)), truth, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)


def test_gradient_of_the_likelihood_is_exact_for_gaussian_units() -> None:
    """As above: Z in closed form for autograd, and the expectation by Gauss-Hermite quadrature of each hidden state.

    Z = (2 pi)**(n/2) sum_h exp(c.h + b.hW + |hW|**2 / 2), and p(v | h) is normal around b + hW.
    """
    rbm, h = machine("gaussian", (2, 2)), states(2)
    rbm.weight *= 0.5  # smooth enough for so few points
    seen = torch.randn(5, 2, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (rbm.weight, rbm.hidden_bias, rbm.visible_bias)]
    pushed = h @ rbm.weight
    terms = h @ rbm.hidden_bias + pushed @ rbm.visible_bias + pushed.square().sum(1) / 2
    truth = torch.autograd.grad((-rbm.free_energy(seen)).mean() - torch.logsumexp(terms, 0), tensors)
    points, weights = (torch.tensor(each) for each in np.polynomial.hermite_e.hermegauss(24))
    grid = torch.cartesian_prod(points, points)
    area = torch.cartesian_prod(weights, weights).prod(1) / weights.sum() ** 2
    with torch.no_grad():
        rows = torch.cat([rbm.mean_visible(state[None]) + grid for state in h])
        share = torch.cat([p * area for p in torch.softmax(terms, 0)])
        for found, wanted in zip(model_mean(rbm, seen, rows, share), truth, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("k", [1, 3])
def test_chains_go_where_the_exact_transition_leads(k: int) -> None:
    """After k steps each state is met as often as k products of the enumerated transition matrix say, to 5 sigma."""
    rbm, count = machine(), 40_000
    start = 6
    expected = torch.linalg.matrix_power(transitions(rbm), k)[start]
    torch.manual_seed(1)
    ends = rbm.gibbs(states(4)[start].repeat(count, 1), k)
    found = (
        torch.bincount((ends @ torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)).long(), minlength=16) / count
    )
    assert float(((found - expected).abs() / (expected * (1 - expected) / count).sqrt()).max()) < 5


def test_the_machine_keeps_its_own_distribution() -> None:
    """p(v) is what the transition leaves as it is: detailed balance of energy and conditionals."""
    rbm = machine()
    p, step = chances(rbm), transitions(rbm)
    torch.testing.assert_close(p @ step, p, rtol=0, atol=1e-15)
    torch.testing.assert_close(p[:, None] * step, (p[:, None] * step).t(), rtol=0, atol=1e-15)


def test_bias_of_contrastive_divergence_falls_with_k() -> None:
    """The exact mean of CD-k differs from the gradient of the likelihood less and less: it goes to 0 with k."""
    rbm = machine()
    data = torch.zeros(16, dtype=torch.float64)
    data[[1, 6, 11]] = 1 / 3
    seen = states(4)[[1, 6, 11]]
    truth = model_mean(rbm, seen, states(4), chances(rbm))
    errors = []
    for k in (1, 2, 5, 20, 80):
        dreamt = data @ torch.linalg.matrix_power(transitions(rbm), k)
        found = model_mean(rbm, seen, states(4), dreamt)
        errors.append(max(float((a - b).abs().max()) for a, b in zip(found, truth, strict=True)))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.01
    assert errors[-1] < 1e-6


def test_gaussian_samples_have_the_mean_and_spread_of_the_energy() -> None:
    """Given h, visible units are normal around b + hW, with variance 1."""
    rbm, h = machine("gaussian"), torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    torch.manual_seed(0)
    drawn = rbm.sample_visible(h.repeat(40_000, 1))
    torch.testing.assert_close(drawn.mean(0), rbm.visible_bias + rbm.weight[0] + rbm.weight[2], rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(drawn.t()), torch.eye(4, dtype=torch.float64), rtol=0, atol=0.04)


def test_persistent_chains_reach_the_model_and_others_stay_at_the_data() -> None:
    """Without learning a persistent chain forgets the data: what it dreams is distributed as p(v)."""
    rbm = machine()
    learner = RbmLearner(states(4), 3, "bernoulli", k=1, is_persistent=True)
    learner.rbm = rbm
    torch.manual_seed(0)
    rows = states(4)[6].repeat(20_000, 1)
    for _ in range(60):
        dreamt = learner._dream(rows)
    expected = chances(rbm) @ states(4)
    torch.testing.assert_close(dreamt.mean(0), expected, rtol=0, atol=0.02)
    learner.is_persistent = False
    assert float((learner._dream(rows).mean(0) - expected).abs().max()) > 0.05


def test_a_machine_learns_a_distribution() -> None:
    """Trained on two patterns of bits, their exact chances grow from 1/16 each to more than 0.7 together."""
    torch.manual_seed(0)
    rows = states(4)[[3, 12]].repeat(16, 1)
    learner = RbmLearner(rows, 3, "bernoulli", lr=0.1)
    for step in range(600):
        learner.step(rows, step)
    p = chances(learner.rbm)
    assert float(p[3] + p[12]) > 0.7
    assert float(min(p[3], p[12])) > 0.1


def test_the_mean_step_on_bits_is_exact_contrastive_divergence() -> None:
    """On many copies of some bits a step is the gradient with the enumerated chances after k steps."""
    rbm, k = machine(), 2
    torch.manual_seed(0)
    rows = states(4)[[1, 6, 11]].repeat(20_000, 1)
    learner = RbmLearner(rows, 3, "bernoulli", lr=1.0, k=k)
    learner.rbm = Rbm(*(t.clone() for t in (rbm.weight, rbm.hidden_bias, rbm.visible_bias)))
    learner.step(rows, 0)
    reached = torch.linalg.matrix_power(transitions(rbm), k)[[1, 6, 11]].mean(0)
    truth = model_mean(rbm, states(4)[[1, 6, 11]], states(4), reached)
    truth[0] = truth[0] - 1e-4 * rbm.weight  # weight decay
    before = (rbm.weight, rbm.hidden_bias, rbm.visible_bias)
    for now, old, wanted in zip(learner.tensors, before, truth, strict=True):
        torch.testing.assert_close(now - old, wanted, rtol=0, atol=0.01)


def test_chances_are_held_against_chances() -> None:
    """A machine that restores rows of chances exactly does not move by them, although no sample is equal to them."""
    rows = torch.full((64, 4), 0.3, dtype=torch.float64)
    learner = RbmLearner(rows, 3, "bernoulli")
    learner.rbm.weight.zero_()
    learner.step(rows, 0)
    assert float(learner.rbm.weight.abs().max()) < 1e-12
    assert float((learner.rbm.visible_bias - math.log(0.3 / 0.7)).abs().max()) < 1e-12


def binary_digits() -> tuple[np.ndarray[Any, Any], Tensor]:
    """Return handwritten digits as bits."""
    from sklearn.datasets import load_digits

    bits = (load_digits().data > 7).astype(np.float64)
    return bits, torch.tensor(bits)


def test_free_energy_and_features_are_those_of_scikit_learn() -> None:
    """The same weights give the same free energies, hidden probabilities and pseudo-likelihoods."""
    from sklearn.neural_network import BernoulliRBM

    bits, rows = binary_digits()
    peer = BernoulliRBM(n_components=16, n_iter=1, random_state=0).fit(bits[:200])
    rbm = Rbm(*(torch.tensor(each) for each in (peer.components_, peer.intercept_hidden_, peer.intercept_visible_)))
    torch.testing.assert_close(rbm.free_energy(rows[:200]), torch.tensor(peer._free_energy(bits[:200])))
    torch.testing.assert_close(rbm.hidden(rows[:200]), torch.tensor(peer.transform(bits[:200])))
    torch.manual_seed(0)
    ours = [float(rbm.pseudo_likelihood(rows[:200], torch.randint(64, (200,))).mean()) * 64 for _ in range(20)]
    theirs = [float(peer.score_samples(bits[:200]).mean()) for _ in range(20)]
    assert abs(np.mean(ours) - np.mean(theirs)) < 4 * (np.var(ours) / 20 + np.var(theirs) / 20) ** 0.5


def test_learns_as_well_as_scikit_learn() -> None:
    """After as many epochs of persistent chains held-out digits are about as likely under ours as under its machine.

    The pseudo-likelihood of independent pixels is far lower: both have learnt.
    """
    from sklearn.neural_network import BernoulliRBM

    bits, rows = binary_digits()
    peer = BernoulliRBM(n_components=32, learning_rate=0.05, batch_size=20, n_iter=8, random_state=0).fit(bits[:1400])
    theirs = Rbm(*(torch.tensor(each) for each in (peer.components_, peer.intercept_hidden_, peer.intercept_visible_)))
    torch.manual_seed(0)
    learner = RbmLearner(rows[:1400], 32, "bernoulli", lr=0.02, is_persistent=True)
    start = learner.rbm.visible_bias.clone()  # from the mean of each pixel
    for epoch in range(8):
        for chosen in torch.randperm(1400).split(20):
            learner.step(rows[chosen], epoch)
    independent = Rbm(torch.zeros(32, 64).double(), torch.zeros(32).double(), start)
    held_out, each = rows[1400:], torch.arange(64).repeat_interleave(397)
    ours, peers, none = (
        float(rbm.pseudo_likelihood(held_out.repeat(64, 1), each).sum()) / 397
        for rbm in (learner.rbm, theirs, independent)
    )
    assert peers > none + 2, (ours, peers, none)
    assert ours > peers - 0.1 * (peers - none), (ours, peers, none)


def quiet(line: str) -> None:
    """Say nothing."""


def adjoint_layers() -> list[tuple[nn.Module, tuple[int, ...]]]:
    return [
        (nn.Linear(5, 3), (5,)),
        (nn.Conv2d(3, 4, 3), (3, 8, 7)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 8, 7)),
        (nn.Conv2d(4, 6, (3, 2), stride=(3, 2), padding=(2, 0), groups=2), (4, 11, 9)),
        (nn.Conv2d(2, 3, 3, dilation=2, padding=2), (2, 9, 9)),
    ]


@pytest.mark.parametrize(("layer", "shape"), adjoint_layers(), ids=lambda value: str(value).split("(")[0])
def test_the_way_back_is_the_transpose_of_the_way_up(layer: Any, shape: tuple[int, ...]) -> None:
    """<W x, h> = <x, W' h>, whatever stride, padding, dilation and groups."""
    torch.manual_seed(0)
    layer.double()
    stage = Stage("0", layer, (), nn.Identity())
    x = torch.randn(2, *shape, dtype=torch.float64)
    up = stage.project(x, layer.weight, None)
    h = torch.randn_like(up)
    torch.testing.assert_close((up * h).sum(), (x * stage.project_back(h, layer.weight, x)).sum())


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Linear(4, 3, bias=False), nn.Conv2d(2, 3, 3, padding=1)])
def test_a_scale_goes_into_the_weights_exactly(layer: Any) -> None:
    """The layer does to rows as they are what it was taught to do to standardised ones."""
    torch.manual_seed(0)
    layer.double()
    rows = 5 + 20 * torch.randn(64, *((4,) if isinstance(layer, nn.Linear) else (2, 6, 6)), dtype=torch.float64)
    rows[:, 0] *= 1e-2
    rows[:, 1] = 4.0  # does not vary
    scale, stage = Scale.of(rows, layer, "gaussian"), Stage("0", layer, (), nn.Tanh())
    bias = torch.zeros(3, dtype=torch.float64) if layer.bias is None else layer.bias
    weight, moved = scale.into(layer.weight, bias)
    torch.testing.assert_close(stage.respond(rows, weight, moved), stage.respond(scale.apply(rows), layer.weight, bias))
    torch.testing.assert_close(scale.undo(scale.apply(rows)), rows)
    if isinstance(layer, nn.Linear):
        assert layer.bias is not None or torch.equal(moved, bias)
        expected = torch.tensor([1.0, 0 if layer.bias is not None else 1, 1, 1]).double()
        torch.testing.assert_close(scale.apply(rows).square().mean(0), expected, rtol=0.05, atol=1e-12)


def test_steps_of_the_autoencoder_are_those_of_adam() -> None:
    """Ten steps without noise equal those of torch's Adam on the loss as it is written."""
    torch.manual_seed(0)
    layer, rows = nn.Linear(6, 3).double(), torch.rand(20, 6, dtype=torch.float64)
    ours = Autoencoder(Stage("0", layer, (), nn.Sigmoid()), rows, "bernoulli", lr=0.01, corruption=0.0)
    w, c, b = (nn.Parameter(tensor.clone()) for tensor in ours.tensors)
    adam = torch.optim.Adam([w, c, b], lr=0.01)
    for _ in range(10):
        adam.zero_grad()
        restored = torch.sigmoid(torch.sigmoid(rows @ w.t() + c) @ w + b)
        F.binary_cross_entropy(restored, rows, reduction="sum").div(20).backward()
        adam.step()
        ours.step(rows, 0)
    for found, wanted in zip(ours.tensors, (w, c, b), strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-9, atol=1e-12)


def test_a_linear_autoencoder_finds_the_principal_subspace() -> None:
    """Without activation and noise the rows of the weights span the first principal components.

    Those of the standardised rows: that is what is learnt, and what the weights hold once their scale is taken out.
    """
    torch.manual_seed(0)
    rows = torch.randn(400, 2) @ torch.randn(2, 8) + 0.1 * torch.randn(400, 8) + 3
    layer = nn.Linear(8, 2)
    unvanish.pretrain([layer], rows, "autoencoder", corruption=0, held_out=0, epochs=60, lr=0.02, tell=quiet)
    std = rows.std(0)
    principal = torch.linalg.eigh(((rows - rows.mean(0)) / std).t().cov()).eigenvectors[:, -2:]
    learnt = torch.linalg.qr((layer.weight.detach() * std).t()).Q
    cosines = torch.linalg.svdvals(principal.t() @ learnt)
    assert float(cosines.min()) > 0.999


def test_noise_is_what_an_untied_linear_autoencoder_must_undo() -> None:
    """The loss that steps minimise is that of restoring whole rows from rows with hidden entries.

    Of one unit and two equal inputs of variance 1, with a share q hidden, the best weights restore less than all:
    for v = w (1, 1) and decoder u = (d, d) the mean loss has its minimum where d w = 1 / (2 - q).
    """
    torch.manual_seed(0)
    rows = torch.randn(4000, 1, dtype=torch.float64).repeat(1, 2)
    stage, q = Stage("0", nn.Linear(2, 1).double(), (), nn.Identity()), 0.5
    learner = Autoencoder(stage, rows, "gaussian", lr=0.01, corruption=q, is_tied=False)
    for _ in range(600):
        learner.step(rows, 0)
    weight, _, _, decoder = learner.tensors
    product = decoder.t() @ weight  # from inputs to what is restored
    torch.testing.assert_close(product, torch.full_like(product, 1 / (2 - q)), rtol=0.05, atol=0)


# The whole: in place, in order, and nothing else. -----------------------------------------------------------


def patterns(count: int = 120, width: int = 12) -> Tensor:
    """Return rows of a few correlated bits."""
    torch.manual_seed(7)
    return (torch.rand(count, 3) > 0.5).float().repeat_interleave(width // 3, 1)


def stack() -> nn.Sequential:
    torch.manual_seed(1)
    lower = nn.Sequential(nn.Linear(12, 8), nn.Sigmoid(), nn.Dropout(0.5))
    return nn.Sequential(lower, nn.Linear(8, 6), nn.Sigmoid(), nn.Linear(6, 2))


BRIEF: dict[str, Any] = {"epochs": 3, "tell": quiet}


@pytest.mark.parametrize("method", ["rbm", "autoencoder"])
def test_it_writes_in_place_and_touches_nothing_else(method: str) -> None:
    """Hidden layers have new values in the same tensors; head, modes, gradients and optimiser are as they were."""
    model = stack()
    model[0][2].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(patterns()).sum().backward()
    before = copy.deepcopy(model)
    grads = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    held = [p.data_ptr() for group in optimizer.param_groups for p in group["params"]]
    modes = [m.training for m in model.modules()]
    done = unvanish.pretrain(model, patterns(), method, **BRIEF)
    assert [layer.name for layer in done.layers] == ["0.0", "1"]
    assert held == [p.data_ptr() for p in model.parameters()]
    for (name, p), q, grad in zip(model.named_parameters(), before.parameters(), grads, strict=True):
        assert torch.equal(p, q) is name.startswith("3."), name
        assert torch.equal(p.grad, grad), name
        assert p.requires_grad, name
    assert modes == [m.training for m in model.modules()]


@pytest.mark.parametrize("method", ["rbm", "autoencoder"])
def test_the_random_state_decides_all(method: str) -> None:
    """The same seed gives the same bits, another seed others."""
    weights, rows = [], patterns()
    for seed in (0, 0, 1):
        model = stack()
        torch.manual_seed(seed)
        unvanish.pretrain(model, rows, method, **BRIEF)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["1.weight"], weights[2]["1.weight"])


def test_all_kinds_of_data_are_the_same_rows() -> None:
    """A tensor, a data set and a loader of pairs give the same weights."""
    rows = patterns()
    pairs = TensorDataset(rows, torch.arange(len(rows)))
    weights = []
    for data in (rows, pairs, DataLoader(pairs, batch_size=50), [rows[:70], rows[70:]]):
        model = stack()
        torch.manual_seed(0)
        unvanish.pretrain(model, data, **BRIEF)
        weights.append(model[1].weight)
    assert all(torch.equal(weight, weights[0]) for weight in weights)


def test_each_layer_reads_the_features_of_the_one_below() -> None:
    """The second layer learns as it does alone, from what the first, already trained, computes without dropout."""
    model, rows = stack(), patterns()
    unvanish.pretrain(model, rows, "autoencoder", layers=1, **BRIEF)
    model.eval()
    below = model[0](rows).detach()
    model.train()
    torch.manual_seed(5)
    unvanish.pretrain([model[1], model[2]], below, "autoencoder", visible="bernoulli", **BRIEF)
    alone = model[1].weight.detach().clone()
    freeze_to(model, 1)  # draws nothing, so that both begin with the same random numbers
    torch.manual_seed(5)
    unvanish.pretrain(model, rows, "autoencoder", **BRIEF)
    assert torch.equal(model[1].weight, alone)


@pytest.mark.parametrize("method", ["rbm", "autoencoder"])
def test_frozen_layers_keep_every_bit(method: str) -> None:
    """What `freeze_to` has frozen is read through and left."""
    model = stack()
    freeze_to(model, 1)
    before = model[0][0].weight.clone()
    done = unvanish.pretrain(model, patterns(), method, **BRIEF)
    assert torch.equal(model[0][0].weight, before)
    assert "frozen" in str(done.layers[0])
    assert done.layers[1].restored is None
    assert model[1].weight.requires_grad


@pytest.mark.parametrize("method", ["rbm", "autoencoder"])
def test_cached_features_pretrain_as_the_layers_below_them_do(tmp_path: Path, method: str) -> None:
    """Pretraining on what a frozen trunk was cached for is pretraining the whole model through its frozen layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Sigmoid(), nn.Linear(8, 6), nn.Sigmoid(), nn.Linear(6, 2))
    rows = patterns()
    trunk = freeze_to(model, 1)
    cached = unvanish.cache_features(trunk, TensorDataset(rows, torch.arange(len(rows))), tmp_path, tell=quiet)
    weights = []
    for layers, data in ((model, rows), ([model[2], model[3]], cached)):
        torch.manual_seed(3)
        unvanish.pretrain(layers, data, method, **BRIEF)
        weights.append(model[2].weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1])


def test_no_optimiser_and_no_backward_is_seen() -> None:
    """A watch around it sees the training alone: pretraining has no step and no loss of its own."""
    model, rows = stack(), patterns()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unvanish.watch(model, optimizer, every=1, folder=None) as run:
        unvanish.pretrain(model, rows, "autoencoder", **BRIEF)
        for _ in range(3):
            optimizer.zero_grad()
            model(rows).square().mean().backward()
            optimizer.step()
    assert len(run.recording().traces) == 1
    assert run.recording().steps == 3


@pytest.mark.parametrize("method", ["rbm", "autoencoder"])
def test_units_of_gaussian_inputs_do_not_matter(method: str) -> None:
    """Inputs in other units, with other zeros, give the same features by the same random numbers; they are learnt."""
    rows = 5 + 2 * patterns(200).double() + 0.1 * torch.randn(200, 12, dtype=torch.float64)
    other = rows * torch.logspace(-2, 3, 12) + torch.linspace(-50, 50, 12)
    features = []
    for data in (rows, other):
        model = stack().double()
        torch.manual_seed(0)
        lr = 0.05 if method == "autoencoder" else 0.02
        done = unvanish.pretrain(model, data, method, layers=1, epochs=15, lr=lr, tell=quiet)
        assert done.layers[0].visible == "gaussian"
        assert done.layers[0].unexplained[-1] < 0.3
        features.append(model.eval()[0](data))
    torch.testing.assert_close(features[0], features[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["rbm", "autoencoder"])
def test_other_precisions(dtype: torch.dtype, method: str) -> None:
    """Weights keep their dtype; those of half precision learn in float32."""
    model = stack().to(dtype)
    unvanish.pretrain(model, patterns().to(dtype), method, **BRIEF)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_layers_of_a_sequence_without_biases() -> None:
    """A layer reads the last dimension, whatever stands before it; one without a bias stays without."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 6, bias=False), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
    done = unvanish.pretrain(model, 3 * torch.randn(40, 5, 12), "autoencoder", **BRIEF)
    assert model[0].bias is None
    assert done.layers[0].visible == "gaussian"
    assert done.layers[1].restored is not None
    assert done.layers[1].restored.shape == (4, 5, 12)  # a tenth of the rows is held out


def test_convolutions_with_pooling() -> None:
    """A stack of convolutions learns, and restores as far as nothing was pooled."""
    torch.manual_seed(0)
    x = torch.rand(40, 1, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.ReLU(), nn.Flatten(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 2),
    )  # fmt: skip
    done = unvanish.pretrain(model, x, "autoencoder", **BRIEF)
    assert [layer.name for layer in done.layers] == ["0", "3", "6"]
    assert [layer.visible for layer in done.layers] == ["bernoulli", "gaussian", "gaussian"]
    assert done.layers[0].restored is not None
    assert done.layers[0].restored.shape == (4, 1, 8, 8)
    assert done.layers[1].restored is None
    assert all(layer.unexplained[-1] < layer.unexplained[0] for layer in done.layers)


@pytest.mark.parametrize("method", ["rbm", "autoencoder"])
def test_every_layer_learns_to_restore(method: str) -> None:
    """Three bits shown four times each: both layers restore held-out rows, and the examples through both."""
    model, lines = stack(), []
    torch.manual_seed(0)
    lr = 0.05 if method == "autoencoder" else 0.3
    done = unvanish.pretrain(model, patterns(400), method, epochs=20, lr=lr, patience=20, tell=lines.append)
    assert len([line for line in lines if "held-out" in line]) == 2
    assert str(done).count("layer") == 2
    for layer in done.layers:
        assert layer.unexplained[layer.best] == min(layer.unexplained[1:])
        assert layer.unexplained[layer.best] < 0.2, layer
    restored = done.layers[1].restored
    assert restored is not None
    assert float(((restored > 0.5) == (done.examples > 0.5)).float().mean()) > 0.95
    assert math.isnan(done.layers[0].gap) is (method == "autoencoder")


def test_it_stops_when_nothing_is_gained_and_keeps_the_best() -> None:
    """On noise there is nothing to learn for long: the layer stops early, with the weights of its best epoch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 1))
    done = unvanish.pretrain(model, torch.rand(200, 6), "autoencoder", lr=0.1, epochs=200, patience=2, tell=quiet)
    (layer,) = done.layers
    assert len(layer.unexplained) - 1 == layer.best + 2 < 200


def test_restored_examples_are_drawn(tmp_path: Path) -> None:
    """As pictures where they have such a shape, else as curves; without a screen."""
    square = nn.Sequential(nn.Linear(16, 4), nn.Sigmoid(), nn.Linear(4, 1))
    done = unvanish.pretrain(square, torch.rand(60, 16), **BRIEF)
    assert done.draw(tmp_path / "a.png").stat().st_size > 1000
    curves = unvanish.pretrain(stack(), patterns(), **BRIEF)
    assert curves.draw(tmp_path / "b.png", shape=(3, 4)).exists()
    assert curves.draw(tmp_path / "c.svg").exists()
    with pytest.raises(OptionError, match=r"shape: found \(5, 5\), expected .* of 12 numbers"):
        curves.draw(tmp_path / "d.png", shape=(5, 5))
    with pytest.raises(OptionError, match="expected a file that can be written"):
        curves.draw(tmp_path / "d.unknown")
    assert isinstance(curves, Pretraining)


def shared() -> nn.Sequential:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.Sigmoid(), second, nn.Sigmoid(), nn.Linear(4, 1))


def sigmoids() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 1))


@pytest.mark.parametrize(
    ("model", "data", "options", "words"),
    [
        (sigmoids(), torch.rand(9, 4), {"method": "gan"}, "method: found 'gan'"),
        (sigmoids(), torch.rand(9, 4), {"epochs": 0}, "epochs: found 0"),
        (sigmoids(), torch.rand(9, 4), {"k": 1.5}, "k: found 1.5"),
        (sigmoids(), torch.rand(9, 4), {"lr": -1.0}, "lr: found -1.0"),
        (sigmoids(), torch.rand(9, 4), {"corruption": 1.0}, "corruption: found 1.0"),
        (sigmoids(), torch.rand(9, 4), {"held_out": 1}, "held_out: found 1"),
        (sigmoids(), torch.rand(9, 4), {"visible": "binary"}, "visible: found 'binary'"),
        (sigmoids(), torch.rand(9, 4) * 3, {"visible": "bernoulli"}, "expected inputs between 0 and 1"),
        (sigmoids(), torch.rand(9, 4), {"layers": 3}, "layers: found 3, expected a whole number from 1 to 2"),
        (sigmoids(), torch.rand(9, 5), {}, r"rows of shape \(5,\), expected what layer '0' reads"),
        (sigmoids(), torch.ones(9, 4, dtype=torch.uint8), {}, "found torch.uint8"),
        (sigmoids(), torch.full((9, 4), math.nan), {}, "found nan or infinity"),
        (sigmoids(), [], {}, "found list with no batch"),
        (sigmoids(), [{"x": torch.rand(9, 4)}], {}, "found batches of dict"),
        (sigmoids(), [torch.rand(9, 4), torch.rand(9, 5)], {}, "inputs of several shapes"),
        (sigmoids(), 3, {}, "found int with no batch"),
        (sigmoids(), torch.rand(99, 4) * 9, {"lr": 1e30}, "lr: found 1e"),
        (nn.Sequential(nn.Linear(4, 1)), torch.rand(9, 4), {}, "layers: found None, .* more than the head"),
        (nn.LSTM(4, 4), torch.rand(9, 4), {}, "found LSTM"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.rand(9, 4), {}, "found BatchNorm1d '1'"),
        (nn.Sequential(nn.ReLU()), torch.rand(9, 4), {}, "no linear or convolutional layer"),
        (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)), torch.rand(9, 4), {}, "Linear with Tanh"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), torch.rand(9, 4), {}, "Linear with no activation"),
        (shared(), torch.rand(9, 4), {}, "found one weight in two layers"),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Sigmoid(), nn.Linear(4, 1)),
            torch.rand(9, 4), {}, "found ParametrizedLinear '0'",
        ),
        (
            nn.Sequential(nn.Conv2d(1, 1, 3, padding="same"), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1)),
            torch.rand(9, 1, 4, 4), {"method": "autoencoder"}, "found padding='same'",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_pretrained_is_refused(model: Any, data: Any, options: dict[str, Any], words: str) -> None:
    """Wrong arguments, data and models are refused in words, before anything is changed."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(OptionError, match=rf"^pretrain\(\): .*{words}") as error:
        unvanish.pretrain(model, data, **{**BRIEF, **options})
    assert "Nothing was changed" in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_stages_skip_what_learns_nothing() -> None:
    """Dropout is left out, flattening and pooling stand before the layer, and the head is left alone."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(8, 4), nn.Tanh(),
        nn.Linear(4, 2), nn.LogSigmoid(),
    )  # fmt: skip
    found = stages_of(model, None, "autoencoder")
    assert [stage.name for stage in found] == ["0", "5"]
    assert [type(module).__name__ for module in found[1].before] == ["MaxPool2d", "Flatten"]
    assert type(found[1].activation) is nn.Tanh


# As a treatment. ----------------------------------------------------------------------------------------------


class Calls(nn.Module):
    """Sigmoids written as calls of three kinds, dropout, and images that it flattens itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.drop(torch.sigmoid(self.a(images.flatten(1))))
        return self.head(F.sigmoid(self.c(self.b(x).sigmoid())))


def images(count: int) -> Tensor:
    return torch.rand(count, 1, 4, 4)


def test_the_treatment_finds_layers_by_what_they_compute() -> None:
    """Whatever way activations are written, hidden layers are pretrained, the head is not, and all is undone."""
    torch.manual_seed(0)
    model = Calls()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(images(8)).sum().backward()
    optimizer.step()
    before, memory = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    text = "greedy-pretraining=rbm,200"
    with unvanish.treat(model, optimizer, text, inputs=(images(200),)) as changes:
        (change,) = changes
        assert change.layers == ("a", "b", "c")
        assert change.what == "3 layers pretrained (rbm) on 200 rows"
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]) is name.startswith("head"), name
        assert [p in optimizer.state for p in model.parameters()] == [False] * 6 + [True] * 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[i]["momentum_buffer"], memory["state"][i]["momentum_buffer"]) for i in range(8))


def test_other_activations_get_autoencoders() -> None:
    """A rectifier is no sigmoid: layers learn as autoencoders; machines are refused in words."""
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
    x = torch.randn(60, 16)
    with unvanish.treat(model, None, "greedy-pretraining=autoencoder,60", inputs=(x,)) as changes:
        assert next(iter(changes)).what == "2 layers pretrained (autoencoder) on 60 rows"
    refused = pytest.raises(unvanish.TreatmentError, match="expected Linear with Sigmoid")
    with refused, unvanish.treat(model, None, "greedy-pretraining=rbm,60", inputs=(x,)):
        pass


def test_the_treatment_waits_for_enough_rows() -> None:
    """With a small batch it learns from the inputs of the training, once, and leaves the random numbers alone."""
    from unvanish.treatments.pretraining import greedy_pretraining

    torch.manual_seed(0)
    model, plain = (sigmoids().train() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    batches = [torch.rand(10, 4) for _ in range(6)]
    with unvanish.treat(model, None, greedy_pretraining("rbm", 30), inputs=(batches[0],)) as changes:
        assert next(iter(changes)).what == "1 layer to be pretrained (rbm) once 30 rows were seen"
        same = []
        model.eval()(torch.rand(100, 4))  # held-out data
        with torch.no_grad():
            model.train()(torch.rand(100, 4))
        for batch in batches:
            drawn = torch.get_rng_state()
            same.append(torch.equal(model(batch), plain(batch)))
            assert torch.equal(torch.get_rng_state(), drawn)
        assert same == [True, True, False, False, False, False]
    assert torch.equal(model(batches[0]), plain(batches[0]))


def test_a_backward_pass_that_is_due_goes_on() -> None:
    """Where a loss of several forward passes is on its way when the layers are pretrained, it still has gradients."""
    hidden = (nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.Sigmoid())
    model = nn.Sequential(*hidden, nn.Linear(4, 1))  # the second weight is needed on the way back
    with unvanish.treat(model, None, "greedy-pretraining=rbm,20", inputs=(torch.rand(10, 4),)):
        loss = sum(model(torch.rand(10, 4)).square().mean() for _ in range(3))
        assert isinstance(loss, Tensor)
        loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 1)), (), "found none, expected some"),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)), (images(60),), "found Conv2d"),
        (nn.Sequential(nn.Linear(4, 1)), (torch.rand(60, 4),), "no trained linear layer"),
        (shared(), (torch.rand(60, 4),), "one weight in two layers"),
    ],
)
def test_a_network_without_such_layers_is_refused(model: nn.Module, inputs: tuple[Tensor, ...], words: str) -> None:
    """It says what stands at the bottom, and changes nothing."""
    before = copy.deepcopy(model.state_dict())
    refused = pytest.raises(unvanish.TreatmentError, match=rf"^treat\(\): 'greedy-pretraining'.*{words}")
    with refused as error, unvanish.treat(model, None, "greedy-pretraining=autoencoder,60", inputs=inputs):
        pass
    assert "Nothing was changed" in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("text", ["greedy-pretraining=gan", "greedy-pretraining=rbm,many", "greedy-pretraining=rbm,1"])
def test_wrong_values_of_the_treatment_are_refused(text: str) -> None:
    """A method or number that makes no sense is refused when it is named."""
    with pytest.raises(unvanish.TreatmentError, match="expected 'rbm' or 'autoencoder'"):
        parse_treatment(text)


def test_inputs_that_turn_bad_do_not_end_the_training(caplog: pytest.LogCaptureFixture) -> None:
    """Where the collected rows hold nan, the layers stay, and the log says why."""
    model = sigmoids()
    with unvanish.treat(model, None, "greedy-pretraining=rbm,40", inputs=(torch.rand(10, 4),)):
        before = model[0].weight.clone()
        for _ in range(8):
            model(torch.full((10, 4), math.nan))
        assert torch.equal(model[0].weight, before)
    assert caplog.text.count("found nan or infinity") == 1


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_transfer_fills_the_lowest_layers(tmp_path: Path, suffix: str) -> None:
    """Layers of the same names and shapes are filled from below, buffers too; a new head stays; all is undone."""
    from safetensors.torch import save_file

    def net(classes: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Sigmoid(), nn.Linear(6, classes))

    torch.manual_seed(0)
    old, model = net(9), net(2)
    old(torch.randn(20, 4))  # statistics
    file = tmp_path / f"old,trained.{suffix}"
    save_file(old.state_dict(), file) if suffix == "safetensors" else torch.save({"model": old.state_dict()}, file)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    before, memory = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with unvanish.treat(model, optimizer, f"transfer={file}") as changes:
        (change,) = changes
        assert change.what == f"2 of 3 layers filled from old,trained.{suffix}, up to '1'"
        for name, value in model.state_dict().items():
            wanted = before if name.startswith("3") else old.state_dict()
            assert torch.equal(value, wanted[name]), name
        assert model[0].weight not in optimizer.state
        assert model[3].weight in optimizer.state
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for i, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, memory["state"][i][key]) for key, value in entry.items())


def test_transfer_stops_at_the_first_layer_that_differs(tmp_path: Path) -> None:
    """Nothing above a layer of another shape is taken, although it would fit."""
    old = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 1))
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(6, 1))
    wrapped = {f"module.{name}": value for name, value in old.state_dict().items()}  # as data parallelism names them
    torch.save(wrapped, tmp_path / "old.pt")
    last = model[3].weight.clone()
    with unvanish.treat(model, None, f"transfer={tmp_path / 'old.pt'}") as changes:
        assert next(iter(changes)).layers == ("0",)
        assert torch.equal(model[0].weight, old[0].weight)
        assert torch.equal(model[3].weight, last)


class Payload:
    """Runs when it is unpickled by someone who trusts the file."""

    def __reduce__(self) -> Any:
        return (print, ("ran",))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (None, "FileNotFoundError"),
        (lambda file: file.write_bytes(b"no weights"), "found .*Error"),
        (lambda file: torch.save({"0.weight": Payload()}, file), "UnpicklingError"),
        (lambda file: torch.save({"other": torch.zeros(1)}, file), "no '0.weight'"),
        (lambda file: torch.save({"0.weight": torch.zeros(3, 3)}, file), r"of shape \(3, 3\) where \(4, 4\) is needed"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    tmp_path: Path, write: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing, damaged, hostile or foreign: it says what it found, runs nothing and changes nothing."""
    file, model = tmp_path / "old.pt", sigmoids()
    if write is not None:
        write(file)
    before = copy.deepcopy(model.state_dict())
    refused = pytest.raises(unvanish.TreatmentError, match=rf"(?s)'transfer': file .*{words}.*Nothing was changed")
    with refused, unvanish.treat(model, None, f"transfer={file}"):
        pass
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "ran" not in capsys.readouterr().out


SCRIPT = """
import sys, torch
from torch import nn
torch.manual_seed(0)
x = (torch.rand(400, 3) > 0.5).float().repeat_interleave(4, 1)
y = x[:, :1]
layers = [nn.Linear(12, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 1)]
model = nn.Sequential(*layers)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
for step in range(40):
    rows = torch.randint(400, (64,))
    loss = nn.functional.mse_loss(model(x[rows]), y[rows])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print("largest", layers[2].weight.abs().max().item())
"""


def test_a_script_is_pretrained_without_being_changed(tmp_path: Path) -> None:
    """`run --treat` pretrains on what the script feeds its model; the record sees the script's own steps only."""
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [
        sys.executable, "-m", "unvanish", "run", "--treat", "greedy-pretraining=rbm,600", "--fail-on", "never",
        "--no-record", "--json", "-", "train.py",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"]["steps"] == 40
    largest = float(done.stderr.split("largest ")[1].split()[0])
    assert largest > 1, "weights of the second layer stayed where torch draws them, below 0.36"

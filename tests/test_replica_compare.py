"""Comparisons are fair: equal cost, equal data, equal starts; and the controls are what they are called."""

from __future__ import annotations

import copy
import json
import math
import statistics
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unvanish import OptionError
from unvanish.replicas import STANDARD_METHODS, Comparison, Method, Replicas, compare, coupled
from unvanish.replicas.compare import explained_percent
from unvanish.replicas.comparison import Row
from unvanish.replicas.controls import Job, sharpness_aware_gradient, train_one, train_replicas, train_sam, train_swa

COUNT = {"examples": 0}


class Counting(nn.Module):
    """A perceptron with batch norm that counts the examples whose gradient passes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        output = self.net(x)
        if output.requires_grad:
            output.register_hook(self._count)
        return output

    @staticmethod
    def _count(grad: Tensor) -> None:
        COUNT["examples"] += len(grad)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def classes(seed: int, rows: int = 40) -> tuple[Tensor, Tensor]:
    order = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=order)
    return x, x[:, :3].argmax(1)


def sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr)


def make_job(steps: int = 12, batch: int = 4, lr: float = 0.1, make: Any = plain, **other: Any) -> Job:
    torch.manual_seed(3)
    x, y = classes(0)
    values = {
        "starts": tuple(make() for _ in range(3)), "loss_fn": F.cross_entropy, "x": x, "y": y,
        "batches": torch.randint(len(x), (steps, batch)), "optimizer": sgd, "lr": lr, "read": lambda output: output,
    }  # fmt: skip
    return Job(**(values | other))


SMALL: dict[str, Any] = {
    "steps": 12,
    "batch": 5,
    "seeds": 3,
    "tuning_seeds": 1,
    "rates": (0.1, 0.03),
    "progress": False,
}


# --- equal cost


@pytest.mark.parametrize("method", STANDARD_METHODS, ids=lambda method: method.name)
def test_every_method_costs_the_same_gradients(method: Method) -> None:
    """Counted at the model, each training takes the gradient of exactly steps x batch examples."""
    spent = []

    def on_run(run: dict[str, Any]) -> None:
        spent.append(COUNT["examples"])
        COUNT["examples"] = 0

    COUNT["examples"] = 0
    result = compare(Counting, F.cross_entropy, classes(0), classes(1), methods=[method], on_run=on_run, **SMALL)
    assert set(spent) == {12 * 5}
    assert {row.evaluations for row in result.rows} == {12 * 5}


def test_a_budget_that_cannot_be_shared_out_is_refused() -> None:
    """A number of steps that n replicas or SAM cannot spend to the last is named with the next that they can."""
    with pytest.raises(OptionError, match=r"steps: found 20, expected a multiple of 6.*Write steps=24\."):
        compare(plain, F.cross_entropy, classes(0), classes(1), steps=20)


# --- equal data and starts


def test_all_methods_see_the_same_batches_and_starts() -> None:
    """For a seed, every method is given bit for bit the same job, and another one for another seed."""
    jobs: dict[str, list[Job]] = {"one": [], "two": []}

    def fit(job: Job, name: str) -> Any:
        jobs[name].append(job)
        return train_one(job)

    methods = [Method(name, partial(fit, name=name)) for name in jobs]
    compare(plain, F.cross_entropy, classes, lambda seed: classes(seed + 1), methods=methods, **SMALL)
    assert len(jobs["one"]) == 2 + 3  # rates for tuning, seeds for the report; both choose the same rate
    for one, two in zip(jobs["one"], jobs["two"], strict=True):
        assert torch.equal(one.batches, two.batches)
        assert torch.equal(one.x, two.x)
        for a, b in zip(one.starts, two.starts, strict=True):
            assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))
    assert not torch.equal(jobs["one"][-1].batches, jobs["one"][-2].batches)
    assert not torch.equal(jobs["one"][-1].x, jobs["one"][-2].x)


def test_each_row_is_seen_equally_often() -> None:
    """Batches are random orders of all rows behind each other: after whole epochs every row was seen as often."""
    seen = []

    def fit(job: Job) -> Any:
        seen.append(job.batches)
        return train_one(job)

    settings = SMALL | {"steps": 24}
    compare(plain, F.cross_entropy, classes(0), classes(1), methods=[Method("one", fit)], **settings)
    assert torch.equal(seen[-1].flatten().bincount(), torch.full((40,), 24 * 5 // 40))


def test_the_union_of_the_replicas_batches_is_the_large_batch() -> None:
    """Replicas that are pulled wholly together after every step are one network on batches n times as large."""
    job, same = (make_job(make=lambda: plain().double(), x=classes(0)[0].double()) for _ in range(2))
    replicas = train_replicas(job, init="shared", strength=1.0)
    union = train_one(same, is_union=True)
    x = classes(1)[0].double()
    for readout in ("centre", "ensemble"):
        torch.testing.assert_close(replicas[readout](x), union[""](x), rtol=1e-10, atol=1e-12)


def test_the_small_start_has_the_mean_of_the_starts() -> None:
    """The control of separate starts begins at their mean: for normal weights the scale over the root of n."""

    def drawn() -> nn.Module:
        layer = nn.Linear(300, 300, bias=False)
        nn.init.normal_(layer.weight)
        return layer

    data = {"x": torch.zeros(40, 300), "y": torch.zeros(40, 300), "loss_fn": F.mse_loss}  # no gradient: w stays
    predict = train_one(make_job(make=drawn, **data), is_union=True, start="mean")[""]
    found = predict(torch.eye(300))
    torch.testing.assert_close(found, sum(start.weight.T.detach() for start in make_job(make=drawn).starts) / 3)
    assert found.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.02)


def test_a_method_without_effect_differs_by_exactly_zero() -> None:
    """The control under another name has a paired difference of 0 with an error of 0, seed by seed."""
    methods = [*STANDARD_METHODS[:1], Method("again", train_one, {"": "one network"})]
    result = compare(Counting, F.cross_entropy, classes, lambda seed: classes(seed + 1), methods=methods, **SMALL)
    assert result.paired("again", "one network") == (0.0, 0.0)
    assert statistics.stdev(result["again"].scores) > 0  # seeds do differ


# --- the controls are what they are called


@pytest.mark.parametrize("rho", [0.0, 0.05, 0.7])
def test_sam_takes_the_gradient_where_the_theory_says(rho: float) -> None:
    """On L = w'Hw/2 the gradient is H(w + rho Hw/|Hw|), and the weights are left bit for bit."""
    half = torch.tensor([[2.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False).double()
    w = model.weight.detach().clone().flatten()

    def quadratic(output: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (model.weight @ half @ model.weight.T).squeeze()

    gradient = sharpness_aware_gradient(model, quadratic, rho)
    gradient(torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1))
    slope = half @ w
    expected = half @ (w + rho * slope / slope.norm())
    assert model.weight.grad is not None
    torch.testing.assert_close(model.weight.grad.flatten(), expected, rtol=1e-12, atol=0)
    assert torch.equal(model.weight.detach().flatten(), w)


def test_sam_without_a_radius_is_plain_training_for_half_as_long() -> None:
    """With radius 0 SAM is gradient descent on the first half of the batches."""
    job, half = make_job(), make_job()
    half = Job(**(vars(half) | {"batches": half.batches[:6]}))
    x = classes(1)[0]
    torch.testing.assert_close(train_sam(job, rho=0.0)[""](x), train_one(half)[""](x), rtol=0, atol=0)


def test_sam_keeps_the_batch_norms_of_its_first_pass() -> None:
    """Running statistics and counters move once a step, by the pass at the weights themselves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    alone = copy.deepcopy(model)
    x, y = classes(0)
    alone(x)
    sharpness_aware_gradient(model, F.cross_entropy, 0.5)(x, y)
    for found, expected in zip(model.buffers(), alone.buffers(), strict=True):
        assert torch.equal(found, expected)


def test_swa_predicts_with_the_mean_of_the_weights() -> None:
    """SWA is the mean of the weights after each of the last quarter of the steps, at a constant rate."""
    job, same = (make_job(steps=16) for _ in range(2))
    model, seen = same.starts[0], []
    optimizer = sgd(model.parameters(), same.lr)
    for rows in same.batches:
        optimizer.zero_grad()
        F.cross_entropy(model(same.x[rows]), same.y[rows]).backward()
        optimizer.step()
        seen.append([p.detach().clone() for p in model.parameters()])
    with torch.no_grad():
        for p, values in zip(model.parameters(), zip(*seen[-4:], strict=True), strict=True):
            p.copy_(torch.stack(values).mean(0))
    x = classes(1)[0]
    torch.testing.assert_close(train_swa(job)[""](x), model(x).detach(), rtol=1e-5, atol=1e-6)


def test_the_independent_ensemble_is_n_plain_trainings() -> None:
    """Uncoupled replicas from separate starts are networks trained alone, each on every n-th batch, averaged."""
    job, same = make_job(), make_job()
    x = classes(1)[0]
    alone = []
    for i, start in enumerate(same.starts):
        own = Job(**(vars(same) | {"starts": (start,), "batches": same.batches[i::3]}))
        alone.append(train_one(own)[""](x))
    found = train_replicas(job, init="separate", force=None, readouts=("ensemble",))[""](x)
    torch.testing.assert_close(found, torch.stack(alone).mean(0))


def test_a_centre_gets_batch_norms_of_its_own() -> None:
    """With batch norm the centre is read out with statistics estimated on the training data, not with averaged ones."""
    job = make_job(make=Counting)
    x = classes(1)[0]
    found = train_replicas(job, init="shared", force=None)["centre"](x)
    again = make_job(make=Counting)
    replicas = Replicas(again.starts[0], 3)
    optimizer = sgd(replicas.parameters(), again.lr)
    for step, rows in enumerate(again.rounds):
        optimizer.param_groups[0]["lr"] = again.lr * 0.5 * (1 + math.cos(math.pi * step / 4))
        optimizer.zero_grad()
        replicas.loss(F.cross_entropy, again.x[rows], again.y[rows], batches="separate").backward()
        optimizer.step()
    torch.testing.assert_close(found, replicas.centre(again.x.split(4)).eval()(x).detach())
    assert not torch.allclose(found, replicas.centre().eval()(x))


# --- choice of the learning rate


def test_the_rate_is_chosen_on_training_rows_that_were_held_out() -> None:
    """Each method takes the rate with the best held-out score; test data and reported seeds have no say."""
    seen: list[tuple[float, int]] = []

    def fit(job: Job) -> Any:
        seen.append((job.lr, len(job.x)))
        return {"": lambda x: torch.full((len(x), 1), job.lr)}

    def closeness(predictions: Tensor, targets: Tensor) -> float:
        return -float((predictions - targets).abs().mean())

    x, best = torch.zeros(40, 1), torch.full((40, 1), 0.03)
    data = {"train_data": (x, best), "test_data": (x, torch.full((40, 1), 0.1))}  # the test data would rather have 0.1
    settings = SMALL | {"rates": (0.1, 0.03, 0.01)}
    result = compare(
        lambda: nn.Linear(1, 1), F.mse_loss, **data, methods=[Method("m", fit)], score=closeness, **settings
    )
    assert result["m"].lr == 0.03
    assert not result["m"].at_edge
    assert result["m"].scores == pytest.approx([-0.07] * 3)
    assert seen == [(0.01, 30), (0.03, 30), (0.1, 30), *[(0.03, 40)] * 3]


def test_training_that_leaves_the_finite_numbers_is_never_chosen() -> None:
    """A rate that gives nan loses to any other; if all do, the scores are nan and the JSON has null."""
    broken = {0.03}

    def fit(job: Job) -> Any:
        value = math.nan if job.lr in broken else 0.0
        return {"": lambda x: torch.full((len(x), 3), value)}

    def run() -> Comparison:
        return compare(plain, F.cross_entropy, classes(0), classes(1), methods=[Method("m", fit)], **SMALL)

    assert run()["m"].lr == 0.1
    broken.add(0.1)
    assert math.isnan(run()["m"].mean)
    assert json.loads(run().to_json())["rows"][0]["scores"] == [None, None, None]


# --- the table


def test_the_table_has_mean_spread_and_paired_difference() -> None:
    """Mean, standard deviation, and the mean of the differences with its standard error, by their formulas."""
    rows = (
        Row("a", None, 0.1, False, 60, (1.0, 2.0, 6.0), 1.0),
        Row("b", "a", 0.1, True, 60, (2.0, 4.0, 6.0), 1.0),
    )
    same = {"score": "accuracy_percent", "n": 3, "seeds": 3, "steps": 12, "batch": 5}
    result = Comparison(rows, same)
    assert result["a"].mean == 3.0
    assert result["a"].spread == pytest.approx(math.sqrt(7))
    assert result.paired("b", "a") == (1.0, pytest.approx(1 / math.sqrt(3)))
    assert "+1.00 ± 0.58  a" in str(result)
    assert "0.1*" in str(result)
    row = json.loads(result.to_json())["rows"][1]
    assert (row["difference"], row["error"]) == (1.0, pytest.approx(1 / math.sqrt(3)))


def test_a_control_that_was_not_trained_leaves_a_gap() -> None:
    """A row whose control is not in the table is shown without a difference, and with null in the JSON."""
    same = {"score": "accuracy_percent", "n": 3, "seeds": 2, "steps": 12, "batch": 5}
    result = Comparison((Row("b", "a", 0.1, True, 60, (2.0, 4.0), 1.0),), same)
    assert "±" not in str(result).splitlines()[1]
    assert json.loads(result.to_json())["rows"][0]["difference"] is None


def test_the_same_seed_gives_the_same_table() -> None:
    """A comparison is a function of its arguments: the caller's random state neither matters nor changes."""

    def drawn(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)  # of all
        return torch.randn(40, 6), torch.randint(3, (40,))

    def run() -> str:
        settings = SMALL | {"methods": STANDARD_METHODS[-3:]}
        result = compare(plain, F.cross_entropy, drawn, classes(1), **settings)
        return "\n".join(f"{row.name} {row.lr} {row.scores}" for row in result.rows)

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert run() == first


def test_progress_goes_to_standard_error_only(capsys: pytest.CaptureFixture[str]) -> None:
    """Each method reports once on standard error; standard output stays empty."""
    settings = SMALL | {"progress": True, "methods": STANDARD_METHODS[:2]}
    compare(plain, F.cross_entropy, classes(0), classes(1), **settings)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("compare: ") == 2


def test_regression_is_scored_by_the_explained_variance() -> None:
    """With real targets the score is 100 (1 - error / variance): 0 for their mean, 100 for a solved linear task."""
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    data = (x, x @ torch.tensor([[1.0], [-1.0], [0.5], [0.0]]))
    settings = SMALL | {"steps": 300, "batch": 16, "methods": STANDARD_METHODS[:1]}
    result = compare(lambda: nn.Linear(4, 1), F.mse_loss, data, data, **settings)
    assert result["one network"].mean == pytest.approx(100, abs=0.01)
    y = 3 * data[1]
    assert explained_percent(y.mean().expand_as(y), y) == pytest.approx(0, abs=1e-4)
    assert explained_percent(y + y.std(correction=0) / 2, y) == pytest.approx(75, abs=1e-4)


# --- bad input


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"n": 1}, r"n: found 1, expected a whole number from 2 on\. Write n=3\."),
        ({"seeds": 0}, "seeds: found 0, expected a whole number from 1 on"),
        ({"batch": 2.0}, r"batch: found 2\.0, expected a whole number"),
        ({"rates": ()}, r"rates: found \(\), expected different learning rates above 0"),
        ({"rates": (0.1, 0.1)}, "rates: found .* expected different"),
        ({"rates": (-0.1,)}, "rates: found .* above 0"),
        ({"held_out": 1.0}, r"held_out: found 1\.0, expected a share"),
        ({"methods": []}, r"methods: found \[\], expected at least one"),
        ({"methods": [coupled("shared")] * 2}, "each with a name of its own"),
        (
            {"train_data": torch.zeros(3)},
            r"train_data: found \(3,\), expected two tensors .* Write train_data=\(x, y\)",
        ),
        ({"test_data": (torch.zeros(3, 1), torch.zeros(4, 1))}, r"test_data: found \(3, 1\), \(4, 1\), expected two"),
        ({"train_data": lambda seed: None}, "train_data: found NoneType, expected two tensors"),
        ({"make_model": plain()}, "make_model: found Sequential, expected a function that returns a new model"),
        ({"make_model": lambda: 3}, "make_model: found a function that returns int"),
    ],
)
def test_what_cannot_be_used_is_refused(changed: dict[str, Any], words: str) -> None:
    """A wrong argument is named at once, before any training, with what was found, expected, and to be written."""
    values: dict[str, Any] = {
        "make_model": plain, "loss_fn": F.cross_entropy, "train_data": classes(0), "test_data": classes(1), **SMALL,
    }  # fmt: skip
    with pytest.raises(OptionError, match=words):
        compare(**(values | changed), on_run=lambda run: pytest.fail("trained"))

"""Replicas by hand-batched operations: the numbers of the loop, to rounding; what has no rule says so."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unvanish import Coupling, Replicas
from unvanish.replicas import BinaryConv2d, BinaryLinear
from unvanish.replicas.choice import Backend, choose

SGD = {"lr": 0.05, "momentum": 0.9}


class Residual(nn.Module):
    """Additions in place and not, functional layers, shapes that are read, a parameter and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        self.register_buffer("shift", torch.full((4, 1, 1), 0.5))
        self.head = nn.Linear(4 * 9 + 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        y = self.second(x)
        y += x
        y = torch.tanh(y) * self.scale[:, None, None] + self.shift / y.shape[1]
        pooled = F.max_pool2d(y, 2)
        wide = pooled.view(pooled.size(0), -1)
        return self.head(torch.cat([wide, y.mean(dim=(2, 3))], dim=1)).sub(1.0)


class Attending(nn.Module):
    """A transformer's block written by hand, with a position table and an optional mask."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 8), nn.Parameter(torch.randn(5, 8))
        self.norm, self.keys = nn.LayerNorm(8), nn.Linear(8, 24, bias=False)
        self.out, self.rms, self.head = nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 3)

    def forward(self, words: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.words(words) + self.places
        batch, time, width = x.shape
        parts = self.keys(self.norm(x)).view(batch, time, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], mask)
        x = x + self.out(y.transpose(1, 2).reshape(batch, time, width))
        weights = torch.softmax(x @ x.transpose(-2, -1), dim=-1)
        return self.head(torch.matmul(weights, self.rms(x))[:, -1])


class Twice(nn.Module):
    """Reads the output of a layer again after an activation has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act, self.last, self.head = nn.Linear(7, 6), nn.ReLU(), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.head(self.last(self.act(y) - y))


class Recurrent(nn.Module):
    """A recurrence of which all outputs and the last states are used."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.recurrence = kind(7, 4, **options)
        ways = 2 if self.recurrence.bidirectional else 1
        self.head = nn.Linear(ways * 4 + 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, states = self.recurrence(x if self.recurrence.batch_first else x.transpose(0, 1))
        rows = outputs if self.recurrence.batch_first else outputs.transpose(0, 1)
        hidden, cell = states if isinstance(self.recurrence, nn.LSTM) else (states, states)
        return self.head(torch.cat([rows.mean(1), hidden[-1] + 2 * cell[0]], 1))


def images(*shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(6, *shape, dtype=torch.float64), torch.randint(3, (6,)))


def mlp(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(7, 6), *between, nn.Linear(6, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, Tensor]]]] = {
    "one layer": (lambda: nn.Linear(7, 3), images(7)),
    "read again": (Twice, images(7)),
    "without biases": (lambda: nn.Sequential(nn.Linear(7, 4, bias=False), nn.Linear(4, 3, bias=False)), images(7)),
    "norms of rows": (lambda: mlp(nn.BatchNorm1d(6), nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.GELU()), images(7)),
    "norms without weights": (
        lambda: mlp(nn.BatchNorm1d(6, affine=False), nn.LayerNorm(6, bias=False), nn.ELU(inplace=True)),
        images(7),
    ),
    "no running statistics": (lambda: mlp(nn.BatchNorm1d(6, track_running_stats=False), nn.SiLU()), images(7)),
    "rows of rows": (
        lambda: nn.Sequential(nn.Linear(7, 4), nn.Softmax(-1), nn.Flatten(), nn.Linear(20, 3), nn.LogSoftmax(1)),
        images(5, 7),
    ),
    "signals": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, stride=2),
            nn.BatchNorm1d(4),
            nn.MaxPool1d(2),
            nn.Dropout(0.0),
            nn.Flatten(),
            nn.Linear(8, 3),
        ),
        images(2, 10),
    ),
    "images": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, dilation=2),
            nn.BatchNorm2d(6),
            nn.LeakyReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 3),
        ),
        images(1, 12, 12),
    ),
    "groups": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, 3, groups=4),
            nn.GroupNorm(2, 8),
            nn.Upsample(scale_factor=2),
            nn.AvgPool2d(2),
            nn.Conv2d(8, 4, 1, groups=2),
            nn.Unflatten(1, (2, 2)),
            nn.Flatten(),
            nn.Linear(64, 3),
        ),
        images(4, 6, 6),
    ),
    "volumes": (
        lambda: nn.Sequential(nn.Conv3d(1, 3, 2), nn.BatchNorm3d(3), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(3, 3)),
        images(1, 3, 3, 3),
    ),
    "binary weights": (
        lambda: nn.Sequential(
            BinaryConv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            BinaryConv2d(4, 3, 2, levels=3, is_scaled=True),
            nn.Flatten(),
            BinaryLinear(27, 5, bias=False),
            nn.BatchNorm1d(5),
            nn.Tanh(),
            BinaryLinear(5, 3, levels=3, is_scaled=True),
        ),
        images(2, 6, 6),
    ),
    "residual": (Residual, images(3, 6, 6)),
    "lstm": (lambda: Recurrent(nn.LSTM, batch_first=True), images(5, 7)),
    "lstm, two layers, both ways, without biases": (
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True, bias=False),
        images(5, 7),
    ),
    "gru, two layers": (lambda: Recurrent(nn.GRU, num_layers=2, batch_first=True), images(5, 7)),
    "gru, both ways": (lambda: Recurrent(nn.GRU, bidirectional=True), images(5, 7)),
    "recurrence of tanh": (lambda: Recurrent(nn.RNN, batch_first=True, bidirectional=True), images(5, 7)),
    "recurrence of relu": (lambda: Recurrent(nn.RNN, nonlinearity="relu", num_layers=2), images(5, 7)),
    "attention": (Attending, lambda: (torch.randint(11, (6, 5)), torch.randint(3, (6,)))),
    "attention with a mask": (
        Attending,
        lambda: (
            {"words": torch.randint(11, (6, 5)), "mask": torch.randn(6, 1, 5, 5, dtype=torch.float64)},
            torch.randint(3, (6,)),
        ),
    ),
}
every_net = pytest.mark.parametrize("net", NETS.values(), ids=list(NETS))


def joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], dict):
        return {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
    return torch.stack(parts)


def both(make: Callable[[], nn.Module], n: int = 3, **options: Any) -> tuple[Replicas, Replicas]:
    """Return the same replicas with both back ends, in float64."""
    models = [make().double() for _ in range(n)]
    return tuple(
        Replicas(models[0], n=n, init=models.__getitem__, backend=backend, **options)  # type: ignore[return-value]
        for backend in ("loop", "batched")
    )


def assert_close(loop: Replicas, batched: Replicas) -> None:
    """Compare all tensors, to what rounding in float64 can make."""
    expected = loop.stacked.state_dict()
    for name, found in batched.stacked.state_dict().items():
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("batches", ["shared", "separate"])
@every_net
def test_batched_equals_the_loop(net: Any, batches: Any) -> None:
    """Trained with momentum, then evaluated, replicas have the weights, buffers and losses of the loop."""
    make, batch = net
    torch.manual_seed(0)
    replicas = both(make)
    optimizers = [torch.optim.SGD(each.parameters(), **SGD) for each in replicas]
    for _ in range(4):
        parts = [batch() for _ in range(3)]
        x, y = parts[0] if batches == "shared" else (joined([x for x, _ in parts]), joined([y for _, y in parts]))
        for each, optimizer in zip(replicas, optimizers, strict=True):
            optimizer.zero_grad()
            each.loss(F.cross_entropy, x, y, batches=batches).backward()
            optimizer.step()
    loop, batched = replicas
    assert_close(loop, batched)
    with torch.no_grad():
        losses = [each.eval().losses(F.cross_entropy, x, y, batches=batches) for each in replicas]
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-10)
    assert batched._chosen == {(True, True): "batched", (False, False): "batched"}


def test_modes_of_layers_count() -> None:
    """A norm that is switched to evaluation later is so at the next loss."""
    torch.manual_seed(0)
    replicas = both(NETS["images"][0])
    x, y = NETS["images"][1]()
    for each in replicas:
        each.loss(F.cross_entropy, x, y)
        each.stacked[4].eval()
    losses = [each.losses(F.cross_entropy, x, y) for each in replicas]
    torch.testing.assert_close(*losses)
    assert_close(*replicas)
    assert replicas[1].stacked[4].num_batches_tracked.tolist() == [1, 1, 1]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross entropy": F.cross_entropy,
    "cross entropy with smoothing": nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=2),
    "weighted cross entropy": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)),
    "summed cross entropy": nn.CrossEntropyLoss(reduction="sum"),
    "a lambda": lambda output, y: F.cross_entropy(output, y) + output.square().mean(),
    "of one output": lambda output, _: output.logsumexp(1).mean(),
}


@pytest.mark.parametrize("batches", ["shared", "separate"])
@pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=list(LOSSES))
def test_losses_of_classes(loss_fn: Any, batches: Any) -> None:
    """Every loss function gives each replica its own number and gradient, also where rows are left out of the mean."""
    torch.manual_seed(0)
    replicas = both(lambda: nn.Sequential(nn.Linear(7, 3)))
    x = torch.randn(3, 8, 7, dtype=torch.float64)
    y = torch.tensor([[0, 1, 2, 2, 2, 0, 1, 2], [0, 1, 0, 1, 2, 0, 1, 0], [2, 2, 2, 2, 2, 2, 2, 1]])
    if loss_fn is F.cross_entropy:
        y = torch.where(y == 2, -100, y)
    data = (x, y) if batches == "separate" else (x[0], y[0])
    losses = [each.losses(loss_fn, *data, batches=batches) for each in replicas]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.sum().backward()
    torch.testing.assert_close(*(each.stacked[0].weight.grad for each in replicas))
    assert replicas[1]._chosen == {(True, True): "batched"}


@pytest.mark.parametrize("shape", [(8, 3), (1, 3), (3,)])
@pytest.mark.parametrize(
    "loss_fn", [F.mse_loss, nn.MSELoss(), nn.MSELoss(reduction="sum"), nn.L1Loss(), F.smooth_l1_loss]
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_losses_of_numbers(loss_fn: Any, shape: tuple[int, ...]) -> None:
    """Targets broadcast against the output of one replica, as they do alone."""
    torch.manual_seed(0)
    replicas = both(lambda: nn.Sequential(nn.Linear(7, 3)))
    x, y = torch.randn(3, 8, 7, dtype=torch.float64), torch.randn(3, *shape, dtype=torch.float64)
    torch.testing.assert_close(*(each.losses(loss_fn, x, y, batches="separate") for each in replicas))
    assert replicas[1]._chosen == {(True, True): "batched"}
    torch.testing.assert_close(*(each.losses(loss_fn, x[0], y[0]) for each in replicas))


def test_several_outputs() -> None:
    """A model may return a dict of tensors; what all replicas share is the same for each."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(7, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"output": self.layer(x), "input": x}

    torch.manual_seed(0)
    x, _ = images(7)()
    losses = [
        each.losses(lambda output, _: (output["output"].sum(1) * output["input"].sum(1)).mean(), x)
        for each in both(Two)
    ]
    torch.testing.assert_close(*losses)


class Odd(nn.Module):
    """A layer and then what is given."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(7, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "PReLU": (lambda: mlp(nn.PReLU()), "(PReLU)"),
    "cumulative batch norm": (lambda: mlp(nn.BatchNorm1d(6, momentum=None)), "(a batch norm with momentum=None)"),
    "function": (lambda: Odd(lambda x: torch.cumsum(x, 1)), "(cumsum)"),
    "method": (lambda: Odd(lambda x: x.cumsum(1)), "(cumsum)"),
    "noise": (lambda: Odd(lambda x: x + torch.randn_like(x)), "(randn_like)"),
    "branch": (lambda: Odd(lambda x: x if x.sum() > 0 else -x), "(TraceError: symbolically traced variables"),
    "constant tensor": (lambda: Odd(lambda x: x + torch.ones(3)), "the tensor '_tensor_constant0'"),
    "hooks": (lambda: hooked(), "(hooks on Linear)"),
}


def hooked() -> nn.Module:
    model = mlp()
    model[0].register_forward_hook(lambda module, x, y: 2 * y)
    return model


@pytest.mark.parametrize("case", REFUSED.values(), ids=list(REFUSED))
def test_what_has_no_rule_says_so(case: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The loop is used and the reason is logged; nothing is left on the model by the attempt."""
    make, reason = case
    torch.manual_seed(0)
    model = make()
    replicas = Replicas(model, n=2, backend="batched")
    before = set(vars(replicas.stacked))
    with caplog.at_level(logging.WARNING, "unvanish"):
        replicas.loss(F.cross_entropy, torch.randn(4, 7), torch.randint(3, (4,)))
    assert reason in caplog.text
    assert replicas._chosen == {(True, True): "loop"}
    assert set(vars(replicas.stacked)) == before


def test_a_call_of_another_shape_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    """A single row, after batches, is computed by the loop, and said so."""
    torch.manual_seed(0)
    loop, batched = both(lambda: nn.Sequential(nn.Linear(7, 3)))
    x, y = images(7)()
    batched.loss(F.cross_entropy, x, y)
    with caplog.at_level(logging.WARNING, "unvanish"):
        losses = [each.losses(F.cross_entropy, x[0], y[0]) for each in (loop, batched)]
    torch.testing.assert_close(*losses)
    assert "batched cannot run this call (a linear layer without a batch). The loop is used for it." in caplog.text


def test_hooks_that_come_later_run(caplog: pytest.LogCaptureFixture) -> None:
    """A hook on a layer is not passed over: the loop is used while it is there, and said so once."""
    torch.manual_seed(0)
    replicas = Replicas(mlp(), n=2, backend="batched")
    x, y = torch.randn(4, 7), torch.randint(3, (4,))
    first = replicas.losses(F.cross_entropy, x, y)
    handle = replicas.stacked[1].register_forward_hook(lambda module, inputs, output: 3 * output)
    with caplog.at_level(logging.WARNING, "unvanish"):
        hooked = [replicas.losses(F.cross_entropy, x, y) for _ in range(2)]
    assert not torch.allclose(hooked[0], first)
    assert len(caplog.messages) == 1
    handle.remove()
    assert torch.equal(replicas.losses(F.cross_entropy, x, y), first)


def test_copies_make_plans_of_their_own() -> None:
    """After copying and pickling, plans are made anew: the copy computes with its own weights."""
    torch.manual_seed(0)
    replicas = Replicas(mlp(), n=2, backend="batched")
    x, y = torch.randn(4, 7), torch.randint(3, (4,))
    first = replicas.losses(F.cross_entropy, x, y)
    for other in (copy.deepcopy(replicas), pickle.loads(pickle.dumps(replicas))):
        with torch.no_grad():
            other.stacked[1].bias += torch.tensor([5.0, 0.0, 0.0])
        assert not torch.allclose(other.losses(F.cross_entropy, x, y), first)
        torch.testing.assert_close(replicas.losses(F.cross_entropy, x, y), first)


@pytest.mark.parametrize("backend", ["batched", "vmap"])
def test_one_replica_in_each_back_end(backend: Any) -> None:
    """One replica alone is no special case."""
    torch.manual_seed(0)
    model = NETS["images"][0]().double()
    loop, other = Replicas(model, n=1), Replicas(model, n=1, backend=backend)
    x, y = NETS["images"][1]()
    torch.testing.assert_close(*(each.loss(F.cross_entropy, x, y) for each in (loop, other)))
    assert_close(loop, other)
    assert other._chosen == {(True, True): backend}


class Table(nn.Module):
    """Has a parameter of whole numbers beside one that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.tensor([1, 0, 2]), requires_grad=False)
        self.layer = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.places


@pytest.mark.parametrize("backend", ["loop", "vmap", "batched"])
def test_parameters_of_whole_numbers_stay(backend: Any) -> None:
    """They are stacked, used by each replica, and neither trained nor pulled."""
    torch.manual_seed(0)
    model = Table().double()
    replicas = Replicas(model, n=2, backend=backend)
    optimizer = torch.optim.SGD(replicas.parameters(), **SGD)
    coupling = Coupling(replicas, 0.5)
    x, y = images(7)()
    for _ in range(3):
        optimizer.zero_grad()
        loss = replicas.loss(F.cross_entropy, x, y)
        loss.backward()
        optimizer.step()
        coupling.step()
    assert replicas.stacked.places.tolist() == [[1, 0, 2]] * 2
    assert replicas.centre().places.dtype == torch.int64
    plain = torch.optim.SGD(model.parameters(), **SGD)
    for _ in range(3):
        plain.zero_grad()
        alone = F.cross_entropy(model(x), y)
        alone.backward()
        plain.step()
    torch.testing.assert_close(loss / 2, alone)


def test_the_fastest_is_taken_and_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured in turns, the smallest time wins; unmeasured, the first that works."""
    stacked, now = nn.Linear(1, 1), [0.0]
    monkeypatch.setattr("unvanish.replicas.choice._now", lambda _: now[0])
    seconds: dict[Backend, float] = {"loop": 0.03, "batched": 0.06, "vmap": 0.0}

    def losses(name: Backend) -> Tensor:
        now[0] += seconds[name]
        return stacked(torch.ones(1))

    assert choose(stacked, losses, ["batched", "vmap"], measure=True) == "vmap"
    assert choose(stacked, losses, ["batched", "vmap"], measure=False) == "batched"
    seconds["vmap"] = 0.09
    assert choose(stacked, losses, ["batched", "vmap"], measure=True) == "loop"


@pytest.mark.parametrize("backend", ["batched", "vmap"])
def test_mixed_precision_is_compared_in_its_own(backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    """Under autocast back ends agree to its digits, not to those of float32: none is refused for that."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    replicas, loop = Replicas(net, n=16, backend=backend), Replicas(net, n=16, backend="loop")
    x, y = torch.randn(64, 64), torch.randint(10, (64,))
    with torch.autocast("cpu", torch.bfloat16), caplog.at_level(logging.WARNING, "unvanish"):
        found, expected = (each.losses(F.cross_entropy, x, y) for each in (replicas, loop))
    assert replicas._chosen == {(True, True): backend}
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.0)
    assert caplog.messages == []


class Counting(nn.Module):
    """Counts in Python, by its output: nothing that can be written down once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y * int((y > 0).sum())


def test_auto_takes_what_works(caplog: pytest.LogCaptureFixture) -> None:
    """A layer of one's own is left to the loop; a perceptron of many replicas is not."""
    torch.manual_seed(0)
    reader = Replicas(Counting(), n=2, backend="auto")
    with caplog.at_level(logging.WARNING, "unvanish"):
        reader.loss(F.cross_entropy, torch.randn(8, 7), torch.randint(3, (8,)))
    assert reader._chosen == {(True, True): "loop"}
    assert len(caplog.messages) == 1
    replicas = Replicas(mlp(nn.ReLU()), n=32, backend="auto")
    replicas.loss(F.cross_entropy, torch.randn(4, 7), torch.randint(3, (4,)))
    assert replicas._chosen[True, True] in ("batched", "vmap")

"""Treatments: what they change, what they keep, and that they leave no trace when they are undone."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unvanish
from unvanish.treatments import TREATMENTS, parse_treatment
from unvanish.treatments.initialise import GAINS, initial_fans
from unvanish.treatments.loop import standardise_inputs, standardise_targets


class Functional(nn.Module):
    """Activations written as calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(F.relu(self.a(x)))))


class Convolutional(nn.Module):
    """Convolutions, a batch norm, in-place activations."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Recurrent(nn.Module):
    """A layer with gates."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Shared(nn.Module):
    """One weight, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.second(F.gelu(self.first(x)))))


class Block(nn.Module):
    """Norms that are attributes; a shortcut reads what stands before the last norm's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + x)


class Attentive(nn.Module):
    """torch's own transformer layer behind an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(12, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(tokens)).mean(1))


class Logits(nn.Module):
    """A network of the library transformers that returns its logits only."""

    def __init__(self, kind: str, **config: Any) -> None:
        super().__init__()
        import transformers

        config_of = getattr(transformers, {"Bert": "BertConfig", "GPT2": "GPT2Config"}.get(kind[:4], "ViTConfig"))
        self.net = getattr(transformers, kind)(config_of(**config))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).logits


def bert() -> nn.Module:
    """Return a tiny encoder with a head for three classes."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return Logits("BertForSequenceClassification", vocab_size=12, max_position_embeddings=8, num_labels=3, **sizes)


def gpt2() -> nn.Module:
    """Return a tiny decoder whose head is its embedding."""
    tokens = {"vocab_size": 12, "bos_token_id": 0, "eos_token_id": 0}
    return Logits("GPT2LMHeadModel", n_embd=8, n_layer=1, n_head=2, n_positions=8, **tokens)


def vit() -> nn.Module:
    """Return a tiny vision transformer."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return Logits("ViTForImageClassification", image_size=8, patch_size=4, num_labels=3, **sizes)


def residual() -> nn.Module:
    """Return convolutions beside a shortcut."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Block(), nn.Flatten(), nn.Linear(4 * 36, 2))


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def tokens() -> Tensor:
    return torch.randint(12, (16, 5))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "functional": (Functional, numbers(16, 4)),
    "convolutional": (Convolutional, numbers(16, 3, 8, 8)),
    "recurrent": (Recurrent, numbers(16, 5, 4)),
    "shared": (Shared, numbers(16, 4)),
    "sequential": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Sigmoid(), nn.Linear(6, 1)),
        numbers(16, 4),
    ),
    "residual": (residual, numbers(16, 3, 8, 8)),
    "attentive": (Attentive, tokens),
    "bert": (bert, tokens),
    "gpt2": (gpt2, tokens),
    "vit": (vit, numbers(16, 3, 8, 8)),
}
WITH_VALUES = ("he-init=dead", "limit-units=0.5", "clip-norm=auto", "raise-lr=hold")


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return all that a treatment could leave changed."""
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "groups": [
            {k: v if k != "params" else [id(p) for p in v] for k, v in g.items()} for g in optimizer.param_groups
        ],
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "grads": {n: p.requires_grad for n, p in model.named_parameters()},
        "classes": [type(m) for m in model.modules()],
        "memory": {
            f"{name}: {key}": value.clone()
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        },
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Compare bit for bit."""
    parts = ("tensors", "memory")
    for part in parts:
        assert before[part].keys() == after[part].keys()
        for name, value in before[part].items():
            assert torch.equal(value, after[part][name]), name
    assert {k: v for k, v in before.items() if k not in parts} == {k: v for k, v in after.items() if k not in parts}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("identifier", [*TREATMENTS, *WITH_VALUES])
def test_undoing_restores_everything(net: str, identifier: str) -> None:
    """Applied and left, or refused, a treatment leaves weights, momentum, hooks, modes and classes as they were."""
    torch.manual_seed(0)
    make, batch = NETS[net]
    model, x = make().eval(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = everything(model, optimizer)
    reference = model(x)
    facts = {"target_mean": 3.0, "target_std": 2.0}
    refused = ""
    try:
        with unvanish.treat(model, optimizer, identifier, inputs=(x,), facts=facts) as changes:
            (change,) = changes
            output = model(x)
            assert output.shape[0] == x.shape[0]
            if change.preserves_function:
                torch.testing.assert_close(output, reference, rtol=1e-5, atol=1e-5)
    except unvanish.TreatmentError as error:
        refused = str(error)
    assert not refused or "Nothing was changed" in refused
    assert_same(before, everything(model, optimizer))


@pytest.mark.parametrize("net", NETS)
def test_an_exception_inside_undoes_too(net: str) -> None:
    """Leaving by an exception restores as leaving does."""
    make, _ = NETS[net]
    model = make().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = everything(model, optimizer)
    with pytest.raises(KeyError, match="inside"), unvanish.treat(model, optimizer, "he-init", "clip-norm=1"):
        raise KeyError("inside")
    assert_same(before, everything(model, optimizer))


def test_one_that_cannot_apply_undoes_those_before_it() -> None:
    """A refusal half-way leaves nothing half-applied."""
    model = Recurrent()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = everything(model, optimizer)
    with (
        pytest.raises(unvanish.TreatmentError, match="batch-norm"),
        unvanish.treat(model, optimizer, "he-init", "batch-norm"),
    ):
        pytest.fail("it was applied")
    assert_same(before, everything(model, optimizer))


def test_kept_changes_stay() -> None:
    """`keep` makes changes last beyond the ``with``, and `undo` still takes them back."""
    model = Functional()
    before = model.a.weight.clone()
    with unvanish.treat(model, None, "he-init") as changes:
        changes.keep()
    assert not torch.equal(before, model.a.weight)
    changes.undo()
    assert torch.equal(before, model.a.weight)


@pytest.mark.parametrize(
    "text", ["he-int", "clip-norm=-1", "clip-norm=a", "dropout=1.5", "zero-grad=3", "he-init=cube"]
)
def test_wrong_names_and_values_are_refused(text: str) -> None:
    """A treatment that does not exist, or a value that makes no sense, says so before anything is touched."""
    with pytest.raises(unvanish.TreatmentError, match="Nothing was changed"):
        parse_treatment(text)


def test_a_wrong_name_suggests_the_right_one() -> None:
    """A near miss is named."""
    with pytest.raises(unvanish.TreatmentError, match="Did you mean 'he-init'"):
        parse_treatment("he-int")


@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "elu", "mish"])
def test_gains_keep_the_second_moment(name: str) -> None:
    """Gain = 1 / sqrt(E f(z)**2) for standard normal z, by integration over a fine grid in float64."""
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    moment = float(torch.trapezoid(getattr(F, name)(z) ** 2 * density, z))
    assert GAINS[name] == pytest.approx(1 / math.sqrt(moment), rel=1e-3)


def test_fans_of_transposed_convolutions() -> None:
    """A transposed convolution's weight is stored the other way round, and its stride thins out what it meets."""
    layer = nn.ConvTranspose2d(8, 4, 4, stride=2)
    assert initial_fans(layer, layer.weight) == (8 * 16 // 4, 4 * 16)
    plain = nn.Conv2d(8, 4, 3)
    assert initial_fans(plain, plain.weight) == (72, 36)


def test_he_initialisation_keeps_the_variance_of_a_deep_rectifier_net() -> None:
    """Over 30 layers the second moment stays within a factor of 4, where Glorot's falls below 1e-6 (He et al. 2015)."""
    torch.manual_seed(0)
    model = nn.Sequential(*[f() for _ in range(30) for f in (lambda: nn.Linear(256, 256), nn.ReLU)])
    x = torch.randn(64, 256)
    with unvanish.treat(model, None, "he-init"), torch.no_grad():
        assert 0.25 < float(model(x).square().mean() / x.square().mean() * 2) < 4
    with unvanish.treat(model, None, "xavier-init"), torch.no_grad():
        assert float(model(x).square().mean()) < 1e-6


def test_lsuv_gives_every_layer_unit_variance() -> None:
    """After LSUV each layer's output has variance 1 within its tolerance (Mishkin & Matas 2016)."""
    torch.manual_seed(0)
    model = nn.Sequential(*[f() for _ in range(8) for f in (lambda: nn.Linear(64, 64), nn.Tanh)])
    x = torch.randn(256, 64)
    with unvanish.treat(model, None, "lsuv-init", inputs=(x,)), torch.no_grad():
        for layer in model:
            x = layer(x)
            if isinstance(layer, nn.Linear):
                assert float(x.var()) == pytest.approx(1.0, abs=0.15)


def test_clipping_bounds_the_gradient_of_the_step() -> None:
    """The step uses the clipped gradient: the update of plain descent is then lr times the limit at most."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    with unvanish.treat(model, optimizer, "clip-norm=0.01"):
        (1e6 * model(torch.ones(1, 4))).sum().backward()
        optimizer.step()
    moved = math.sqrt(
        sum(float((p - q).detach().square().sum()) for p, q in zip(model.parameters(), before, strict=True))
    )
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_adaptive_clipping_is_not_poisoned_by_nan() -> None:
    """A gradient that is not finite moves nothing, and later steps go on."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unvanish.treat(model, optimizer, "adaptive-clip"):
        before = model.weight.detach().clone()
        (model(torch.ones(1, 4)) * math.nan).sum().backward()
        optimizer.step()
        assert torch.equal(model.weight, before)
        optimizer.zero_grad()
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        assert not torch.equal(model.weight, before)
        assert torch.isfinite(model.weight).all()


def test_rates_change_only_during_the_step() -> None:
    """A scheduler sees its own rate; the step uses the changed one."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    model = nn.ParameterList([parameter])
    with unvanish.treat(model, optimizer, "lower-lr=0.1"):
        parameter.grad = torch.ones(1)
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert float(parameter.detach()) == pytest.approx(-0.1)


def test_inputs_are_standardised() -> None:
    """What reaches the first layer has mean 0 and spread 1 per feature, equal to NumPy's in float64."""
    x = torch.randn(512, 3) * torch.tensor([1e-3, 1.0, 1e4]) + torch.tensor([5.0, -2.0, 1e5])
    seen: list[Tensor] = []
    model = nn.Sequential(nn.Linear(3, 1))
    model[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with unvanish.treat(model, None, standardise_inputs()):
        model(x)
    truth = (x.double().numpy() - x.double().numpy().mean(0)) / x.double().numpy().std(0)
    np.testing.assert_allclose(seen[0].numpy(), truth, rtol=1e-2, atol=2e-2)


def test_targets_are_standardised_without_changing_the_units_of_outputs() -> None:
    """Training with the treatment walks the path of a net trained on standardised targets, outputs scaled back."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 3), 500 + 40 * torch.randn(64, 1)
    first, second = nn.Linear(3, 1), nn.Linear(3, 1)
    second.load_state_dict(first.state_dict())
    a, b = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (first, second))
    with unvanish.treat(first, a, standardise_targets(500.0, 40.0)):
        for _ in range(20):
            a.zero_grad(), b.zero_grad()
            F.mse_loss(first(x), y).backward()
            F.mse_loss(second(x), (y - 500) / 40).backward()
            a.step(), b.step()
        torch.testing.assert_close(first(x), second(x) * 40 + 500, rtol=1e-4, atol=1e-3)


class TwoReaders(nn.Module):
    """A norm that must stay: the layer before it has another reader."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head(self.norm(y) + y)


def _perceptron_with_norms() -> nn.Module:
    hidden = [m for _ in range(3) for m in (nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(4, 2))


# Net, shape of a batch, norms that are folded without a batch, and with one, and norms that stay.
WITH_NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int, int]] = {
    "convolutional": (Convolutional, (16, 3, 8, 8), 1, 1, 0),
    "perceptron": (_perceptron_with_norms, (16, 4), 3, 3, 0),
    "residual": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Block()), (16, 3, 8, 8), 1, 3, 0),
    "two readers": (lambda: nn.Sequential(Block(), TwoReaders()), (16, 4, 8, 8), 0, 2, 1),
}


@pytest.mark.parametrize("net", WITH_NORMS)
def test_folding_batch_norms_keeps_the_outputs(net: str) -> None:
    """Folded, a network predicts the same to 1e-5; a batch finds the norms outside of containers."""
    torch.manual_seed(0)
    make, shape, alone, with_batch, stay = WITH_NORMS[net]
    model = make()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    for _ in range(5):
        model(torch.randn(shape) * 2 + 1)
    model.eval()
    x = torch.randn(shape)
    reference, norms = model(x), sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    for inputs, folded in (((), alone), ((torch.randn(shape),), with_batch)):
        if not folded:
            with pytest.raises(unvanish.TreatmentError, match="inputs=\\(x,\\)"):
                unvanish.treat(model, None, "fold-bn", inputs=inputs).keep()
            continue
        with unvanish.treat(model, None, "fold-bn", inputs=inputs):
            torch.testing.assert_close(model(x), reference, rtol=1e-5, atol=1e-5)
            assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()) == norms - folded
        assert torch.equal(model(x), reference)
    assert norms == with_batch + stay


SCRIPT = """
import torch
from torch import nn

torch.manual_seed(0)
x = torch.randn(256, 4)
y = x.sum(1, keepdim=True)
model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(150):
    batch = torch.randint(256, (32,))
    loss = nn.functional.mse_loss(model(x[batch]), y[batch])
    loss.backward()
    optimizer.step()
print("weight", model[2].bias.item())
"""


def test_an_unmodified_script_is_treated(tmp_path: Path) -> None:
    """`run --treat zero-grad` gives the very numbers of the script with the missing line written in."""
    (tmp_path / "sick.py").write_text(SCRIPT)
    (tmp_path / "mended.py").write_text(
        SCRIPT.replace("    loss.backward()", "    optimizer.zero_grad()\n    loss.backward()")
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "unvanish", "run", "--no-record", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    sick, treated, mended = run("sick.py"), run("--treat", "zero-grad", "sick.py"), run("mended.py")
    assert (sick.returncode, treated.returncode, mended.returncode) == (1, 0, 0), sick.stdout + treated.stderr
    assert "missing-zero-grad" in sick.stdout
    assert "applied: zero-grad" in treated.stderr
    assert treated.stdout.splitlines()[0] == mended.stdout.splitlines()[0] != sick.stdout.splitlines()[0]
    wrong = run("--treat", "zero-gard", "sick.py")
    assert wrong.returncode == 2
    assert "Did you mean 'zero-grad'" in wrong.stderr


@pytest.mark.parametrize("fault", ["negated loss", "maximize"])
def test_descend_gives_the_numbers_of_the_mended_loop(fault: str) -> None:
    """With ``descend``, ten steps uphill are ten steps of the mended loop, bit for bit; undone, they lead uphill."""

    def train(sign: float, treatments: tuple[str, ...], maximize: bool = False) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, maximize=maximize)
        x = torch.randn(16, 3)
        backward = torch.autograd.backward
        with unvanish.treat(model, optimizer, *treatments):
            for _ in range(10):
                optimizer.zero_grad()
                loss = sign * nn.functional.mse_loss(model(x), x[:, :1])
                loss.backward()
                optimizer.step()
        assert torch.autograd.backward is backward
        assert optimizer.param_groups[0]["maximize"] is maximize
        return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()

    mended = train(1.0, ())
    faulty = (-1.0, False) if fault == "negated loss" else (1.0, True)
    assert train(faulty[0], ("descend",), faulty[1]) == mended
    assert train(faulty[0], (), faulty[1]) != mended


def test_early_stopping_holds_the_best_weights() -> None:
    """Once it is time to stop, the weights of the best evaluation come back, and further steps change nothing."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    criterion = nn.MSELoss()
    x = torch.randn(8, 2)
    weights = []
    with unvanish.treat(model, optimizer, unvanish.treatments.regularise.early_stopping(patience=2)):
        for held_out in (3.0, 1.0, 2.0, 4.0, 0.5, 0.1):  # time to stop at the fourth
            with torch.no_grad():
                criterion(torch.tensor([held_out**0.5]), torch.zeros(1))
            weights.append(model.weight.detach().clone())
            optimizer.zero_grad()
            criterion(model(x), x[:, :1]).backward()
            optimizer.step()
    assert torch.equal(model.weight, weights[1])
    assert torch.equal(weights[4], weights[1])
    assert torch.equal(weights[5], weights[1])
    assert not torch.equal(weights[3], weights[1])


EDGES = {  # looked up when they are called, as in a script
    "log": (lambda x: torch.log(x), 0.0),
    "0 log 0": (lambda x: x * x.log(), 0.0),
    "log1p": (lambda x: torch.log1p(x), -1.0),
    "root": (lambda x: torch.sqrt(x), 0.0),
    "power": (lambda x: x**0.5, 0.0),
    "inverse": (lambda x: x**-1, 0.0),
    "0 / 0": (lambda x: x / x, 0.0),
    "1 / 0": (lambda x: 1 / x, 0.0),
    "exp": (lambda x: torch.exp(x), 1000.0),
    "softmax": (lambda x: torch.exp(x) / torch.exp(x).sum(), 1000.0),
    "acos": (lambda x: torch.acos(x), 1.0),
}


@pytest.mark.parametrize("name", EDGES)
def test_safe_math_is_finite_at_the_edge_and_exact_away_from_it(name: str) -> None:
    """At the edge of its domain a function and its slope are finite; away from it nothing changes; nothing remains."""
    function, edge = EDGES[name]
    inside = torch.linspace(0.1, 0.9, 5)

    def value_and_slope(x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_(True)
        y = function(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        return torch.stack([y.detach(), slope])

    bare, at_edge = value_and_slope(inside), value_and_slope(torch.full((1,), edge))
    assert not at_edge.isfinite().all()
    with unvanish.treat(nn.Linear(1, 1), None, "safe-math"):
        assert value_and_slope(torch.full((1,), edge)).isfinite().all()
        assert torch.equal(value_and_slope(inside), bare)
        with torch.no_grad():  # where optimisers work
            assert torch.equal(torch.zeros(1).log(), torch.full((1,), -torch.inf))
    assert torch.equal(torch.log(torch.zeros(1, requires_grad=True)).detach(), torch.full((1,), -torch.inf))


@pytest.mark.parametrize("cell", [nn.RNNCell(3, 8, nonlinearity="relu"), nn.RNN(3, 8, nonlinearity="relu")])
def test_recurrences_of_rectifiers_start_as_the_identity(cell: nn.Module) -> None:
    """A rotation loses about half of what it turns below zero at each step; the identity keeps it (Le et al. 2015)."""
    with unvanish.treat(cell, None, "orthogonal-init"):
        (recurrent,) = (p for name, p in cell.named_parameters() if name.startswith("weight_hh"))
        assert torch.equal(recurrent, torch.eye(8))


def test_zero_grad_gives_the_numbers_of_the_mended_loop() -> None:
    """Cleared too early or never, with ``zero-grad`` ten steps are those of the mended loop; undone, they are not."""
    zero_grad = nn.Module.zero_grad

    def train(place: str, *treatments: str) -> list[float]:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        x = torch.randn(16, 3)
        with unvanish.treat(model, optimizer, *treatments):
            for _ in range(10):
                if place == "before":
                    model.zero_grad()
                loss = nn.functional.mse_loss(model(x), x[:, :1])
                loss.backward()
                if place == "between":
                    optimizer.zero_grad()
                optimizer.step()
            pickle.dumps(model)  # a script may save it whole
            assert "zero_grad" not in vars(model)
        assert nn.Module.zero_grad is zero_grad
        assert "zero_grad" not in vars(optimizer)
        return [p.sum().item() for p in model.parameters()]

    mended = train("before")
    for place in ("before", "between", "never"):
        assert train(place, "zero-grad") == mended
    assert train("between") != mended != train("never")


def test_safe_math_reaches_every_treated_model() -> None:
    """Of two treated models both are safe where gradients are off, and nothing else is."""

    class Log(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.log()

    one, two = Log(), Log()
    edge = torch.zeros(1)
    with unvanish.treat(one, None, "safe-math"), unvanish.treat(two, None, "safe-math"), torch.no_grad():
        assert one(edge).isfinite()
        assert two(edge).isfinite()
        assert not edge.log().isfinite()
    with torch.no_grad():
        assert not two(edge).isfinite()

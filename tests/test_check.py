"""Looking at a model before it trains: what is found, and that nothing is touched."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from unvanish import Findings, OptionError, TargetError, check
from unvanish.cli import main
from unvanish.factory import build, load_factory
from unvanish.records import Finding, Trace


class Rebinding(nn.Module):
    """Puts a new tensor in place of a buffer at each call, and draws from every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        with torch.no_grad():
            self.linear.weight.data.mul_(0.5)
            self.linear.bias.requires_grad_(False)
        self.eval()
        result: Tensor = self.linear(x) * noise
        return result


def partly_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 6))
    model[1].eval()
    model[0].requires_grad_(False)
    return model


def stepping_in_backward() -> nn.Module:
    model = nn.Linear(6, 6)
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "rebinding": Rebinding,
    "partly frozen": partly_frozen,
    "steps in backward": stepping_in_backward,
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 6)),
    "evaluating": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).eval(),
    "spectral norm": lambda: spectral_norm(nn.Linear(6, 6)),
    "double": lambda: nn.Linear(6, 6).double(),
}


def state(model: nn.Module) -> list[Any]:
    """Return everything of a model and the generators that must stay, as bytes and identities."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    flags = [(module.training, len(module._forward_hooks)) for module in model.modules()]
    hooks = [(p.requires_grad, id(p.grad), dict(p._post_accumulate_grad_hooks or {})) for p in model.parameters()]
    generators = [torch.get_rng_state().numpy().tobytes(), random.getstate(), str(np.random.get_state())]
    bits = [(id(t), t.detach().numpy().tobytes()) for t in tensors]
    return [bits, flags, hooks, generators]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("has_grads", [False, True])
def test_nothing_is_touched(name: str, has_grads: bool) -> None:
    """Weights, buffers, gradients, modes, flags, hooks and generators are bit for bit as before, errors or not."""
    model = MODELS[name]()
    x = torch.randn(8, 6, dtype=next(model.parameters()).dtype)
    if has_grads:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
    before = state(model)
    check(model, nn.MSELoss(), (x, torch.zeros_like(x)))
    assert state(model) == before
    check(model)
    assert state(model) == before

    def fails(output: Tensor, target: Tensor) -> Tensor:
        output.sum().backward()
        raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        check(model, fails, (x, x))
    assert state(model) == before


def test_no_optimiser_steps() -> None:
    """A training that steps inside the backward pass takes no step: its momentum stays empty."""
    model, x = nn.Linear(6, 6), torch.randn(8, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    model.weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    check(model, nn.MSELoss(), (x, x), optimizer)
    assert not optimizer.state
    model(x).sum().backward()
    assert optimizer.state


def sigmoid_net(depth: int = 12) -> nn.Sequential:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(16, 16), nn.Sigmoid())]
    return nn.Sequential(*layers, nn.Linear(16, 3))


def test_a_gradient_that_vanishes_is_found_before_training() -> None:
    """The gradient reaches the first layers of a deep sigmoid network by the factors that were measured directly."""
    torch.manual_seed(0)
    model, x, y = sigmoid_net(), torch.randn(32, 16), torch.randint(3, (32,))
    found = check(model, nn.CrossEntropyLoss(), (x, y))
    outputs = []
    value = x
    for layer in model:
        value = layer(value)
        if isinstance(layer, nn.Linear):
            value.retain_grad()
            outputs.append(value)
    nn.functional.cross_entropy(value, y).backward()
    flow = np.log2([float(o.grad.norm() / outputs[-1].grad.norm()) for o in outputs])  # type: ignore[union-attr]
    finding = next(f for f in found if f.illness == "vanishing-gradient")
    assert finding.severity == "warning"
    assert set(finding.layers) == {str(2 * place) for place in range(13) if flow[place] < -13.3}
    assert finding.evidence["log2_flow"] == pytest.approx(flow.min(), abs=0.5)
    assert "before the first step" in finding.why
    assert all(row["update_ratio"] != row["update_ratio"] for row in found.layers)


def test_healthy_models_are_clean() -> None:
    """A network that is initialised well gets no finding, with and without a batch and a loss."""
    torch.manual_seed(0)
    relu = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    batch = (torch.randn(32, 16), torch.randint(3, (32,)))
    optimizer = torch.optim.AdamW(relu.parameters())
    for found in (check(relu), check(relu, nn.CrossEntropyLoss(), batch, optimizer)):
        assert (found.verdict, found.findings) == ("clean", ())
        assert (found.run["kind"], found.run["steps"]) == ("check", 0)


class SideBranch(nn.Module):
    """A gate that hardly matters yet beside a path that does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        result: Tensor = self.last(x + 1e-6 * self.gate(x))
        return result


def test_a_faint_side_branch_is_no_vanishing_gradient() -> None:
    """The gradient vanishes only if the layers from the input on get nothing of it."""
    model = SideBranch()
    found = check(model, nn.MSELoss(), (torch.randn(8, 6), torch.randn(8, 2)))
    assert [row["log2_flow"] < -13.3 for row in found.layers] == [False, True, False]
    assert found.findings == ()


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4 * 26 * 26, 10)  # fits images of 28 x 28 only

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.conv(x).relu().flatten(1))
        return result


class WithLoss(nn.Module):
    """Returns its loss in one of several ways."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.wrap = nn.Linear(5, 2), wrap

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        output = self.linear(x)
        return output if targets is None else self.wrap(output, nn.functional.mse_loss(output, targets))


ONES = (torch.ones(4, 5), torch.ones(4, 2))
BATCHES: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    "pair": ((nn.Linear(5, 2), nn.MSELoss(), ONES), ()),
    "list": ((nn.Linear(5, 2), nn.MSELoss(), list(ONES)), ()),
    "inputs in a tuple": ((nn.Bilinear(5, 5, 2), nn.MSELoss(), ((torch.ones(4, 5),) * 2, torch.ones(4, 2))), ()),
    "dict": ((nn.Linear(5, 2), nn.MSELoss(), {"inputs": torch.ones(4, 5), "labels": torch.ones(4, 2)}), ()),
    "dict of names": ((nn.Linear(5, 2), nn.MSELoss(), {"input": torch.ones(4, 5), "y": torch.ones(4, 2)}), ()),
    "inputs alone": ((nn.Linear(5, 2), None, torch.ones(4, 5)), ("No loss",)),
    "pair without loss": ((nn.Linear(5, 2), None, ONES), ("No loss",)),
    "loss alone": ((WithLoss(lambda o, x: x), None, ONES), ()),
    "loss in a tuple": ((WithLoss(lambda o, x: (o, x)), None, ONES), ()),
    "loss in a dict": ((WithLoss(lambda o, x: {"loss": x}), None, {"x": ONES[0], "targets": ONES[1]}), ()),
    "loss as an attribute": (
        (WithLoss(lambda o, x: SimpleNamespace(loss=x)), None, ONES),
        (),
    ),
    "nothing, linear": ((nn.Linear(5, 2),), ("32 x 5", "No loss")),
    "nothing, images": ((Convolutional(),), ("32 x 1 x 28 x 28", "No loss")),
    "nothing, ids": ((nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 2)),), ("sequences of 16 ids", "No loss")),
    "nothing, sequence": ((nn.LSTM(5, 3),), ("16 x 32 x 5", "No loss")),
    "frozen": ((nn.Linear(5, 2).requires_grad_(False), nn.MSELoss(), ONES), ("no trainable",)),
    "lazy": ((nn.LazyLinear(2), nn.MSELoss(), ONES), ()),
}  # fmt: skip


@pytest.mark.parametrize("name", BATCHES)
def test_forms_of_model_loss_and_batch(name: str) -> None:
    """Each form a user would hand over is measured; what was guessed or missing is told."""
    arguments, notes = BATCHES[name]
    found = check(*arguments)
    assert len(found.layers) >= 1
    assert len(found.notes) == len(notes)
    for part, note in zip(notes, found.notes, strict=True):
        assert part in note
    has_gradient = any(np.isfinite(row["grad_rms"]) for row in found.layers)
    assert has_gradient == (name != "frozen")


def test_a_lazy_model_stays_lazy() -> None:
    """The model that was handed over has not seen the batch."""
    model = nn.LazyLinear(2)
    check(model, nn.MSELoss(), ONES)
    assert torch.nn.parameter.is_lazy(model.weight)


def test_rules_of_ones_own() -> None:
    """`rules` replaces the rules; each gets one sample, no steps, and the name of the optimiser."""

    def mine(trace: Trace) -> Iterator[Finding]:
        assert (trace.total_steps, trace.steps.tolist(), trace.name) == (0, [0], "Adam")
        yield Finding("mine", "critical", "because", "nobody 1999")

    model = nn.Linear(5, 2)
    optimizer = torch.optim.Adam(model.parameters())
    assert [f.illness for f in check(model, None, torch.ones(4, 5), optimizer, rules=(mine,))] == ["mine"]
    assert not optimizer.state


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((3,), r"check\(\): model: found int, expected a torch.nn.Module with parameters"),
        ((nn.ReLU(),), "model: found ReLU without parameters"),
        ((nn.Linear(2, 2), 3), r"loss_fn: found int, expected a function of \(output, target\)"),
        ((nn.Linear(2, 2), None, None, 3), "optimizer: found int, expected a torch.optim.Optimizer or None"),
        ((nn.Linear(2, 2), None, (1, 2, 3)), r"batch: found tuple of 3, expected \(inputs, target\)"),
        ((nn.Linear(2, 2), None, 3), "batch: found int"),
        ((nn.Linear(2, 2), nn.MSELoss(), torch.ones(2, 2)), "batch: found inputs without a target"),
        ((nn.Linear(2, 2), nn.MSELoss()), "batch: found inputs without a target"),
        ((nn.Bilinear(2, 2, 2),), "found None, and no guess for Bilinear passes through the model"),
        ((nn.LazyLinear(2),), "no guess for LazyLinear passes"),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...], words: str) -> None:
    """A wrong call is refused with what was found and what was expected, before anything ran."""
    with pytest.raises(OptionError, match=words):
        check(*arguments)


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Run a command in this process, in a folder of its own; give its code, output and errors."""
    logger = logging.getLogger("unvanish")
    handlers, propagate = logger.handlers[:], logger.propagate
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))

    def run(*arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        return (stop.value.code, *capfd.readouterr())

    yield run
    logger.handlers[:], logger.propagate = handlers, propagate
    sys.modules.pop("factories", None)


FACTORIES = """
print("printed")
import torch
from torch import nn
def model(): return nn.Linear(3, 2)
def whole():
    made = nn.Linear(3, 2)
    return made, nn.MSELoss(), (torch.randn(8, 3), torch.randn(8, 2)), torch.optim.SGD(made.parameters(), lr=0.1)
def deep():
    return nn.Sequential(*[m for _ in range(12) for m in (nn.Linear(8, 8), nn.Sigmoid())])
def raises(): raise KeyError("of the factory")
def exits(): raise SystemExit(9)
def pair(): return nn.Linear(3, 2), nn.MSELoss()
def wrong(): return nn.ReLU()
number = 3
class made:
    model = staticmethod(model)
"""


def test_the_command(shell: Any) -> None:
    """Factories in files and modules are checked; codes, streams and messages are those of the other commands."""
    Path("factories.py").write_text(FACTORIES)
    code, out, err = shell("check", "factories.py:whole")
    assert (code, err) == (0, "")
    assert out.splitlines()[1:2] == ["unvanish  factories.py:whole"]
    assert "before training, one batch" in out
    code, out, err = shell("check", "factories:made.model", "--json", "-")
    assert (code, err) == (0, "")  # the module is there already: nothing is printed again
    assert '"verdict": "clean"' in out
    code, out, _ = shell("check", "factories.py:deep", "--fail-on", "warning", "--quiet")
    assert code == 1
    assert out.splitlines()[-1].startswith("▲ 1 warning: first look at vanishing-gradient in 0")
    for name, words in (("raises", "KeyError: 'of the factory'"), ("exits", "SystemExit: 9")):
        code, _, err = shell("check", f"factories.py:{name}")
        assert code == 3
        assert "Traceback (most recent call last)" in err
        assert words in err
    code, _, err = shell("check", "factories.py:wrong")
    assert code == 3
    assert "model: found ReLU without parameters" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("factories.py", "found no factory in it, expected FILE.py:FACTORY or PKG.MOD:FACTORY"),
        ("nothing.py:model", "file 'nothing.py': found no such file, expected a Python file"),
        ("nothing_here:model", "module 'nothing_here': found nothing of that name"),
        ("factories.py:modle", r"found nothing of that name, expected a function .* Did you mean 'model'\?"),
        ("factories.py:number", "factory 'number' in 'factories.py': found int"),
    ],
)
def test_targets_that_cannot_be_loaded(
    target: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the part that is missing, and what may have been meant."""
    (tmp_path / "factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    with pytest.raises(TargetError, match=words):
        load_factory(target)


@pytest.mark.parametrize("made", [(1, 2), [1, 2, 3], {}, None, "model", 3])
def test_wrong_forms_of_a_factory(made: Any) -> None:
    """What a factory may return stands in the message."""
    with pytest.raises(
        TargetError, match=r"expected a model, \(model, loss_fn, batch\), or \(model, loss_fn, batch, o"
    ):
        build(lambda: made)


def test_missing_imports_of_a_module_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that cannot import something raises that, not that it is missing itself."""
    (tmp_path / "needs_much.py").write_text("import nothing_of_that_name")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'nothing_of_that_name'"):
        load_factory("needs_much:model")


def test_findings_are_what_is_returned() -> None:
    """A check gives the same kind of value as a diagnosis."""
    assert isinstance(check(nn.Linear(2, 2)), Findings)

"""Laws 1, 2 and 8: watching changes nothing, leaving restores everything, failing harms nothing."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unvanish
from unvanish.capture import Capture
from unvanish.errors import OptionError
from unvanish.roster import Roster
from unvanish.trace import Recorder
from unvanish.watch import Watch

from .nets import NETS, Training, watching


@pytest.fixture(autouse=True)
def one_thread():
    """Keep sums in one order, and leave the number of threads as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def global_state() -> dict[str, Any]:
    """Everything of torch that a watch could leave changed."""
    hooks = {
        name: tuple(value)
        for module in (nn.modules.module, importlib.import_module("torch.optim.optimizer"))
        for name, value in vars(module).items()
        if name.startswith("_global") and isinstance(value, dict)
    }
    return {
        **hooks,
        "backward": torch.autograd.backward,
        "tensor_backward": Tensor.backward,
        "scale": torch.amp.GradScaler.scale,
        "step": torch.amp.GradScaler.step,
        "call": nn.Module.__call__,
        "optimizer": torch.optim.Optimizer.step,
        "compile": torch.compile,
        "compiled call": torch._dynamo.OptimizedModule.__call__,
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
    }


def state_of(training: Training) -> dict[str, Any]:
    """Everything a training leaves behind, ready to be compared bit by bit."""
    state: dict[str, Any] = {"random": torch.get_rng_state(), "losses": training.losses, **training.extra}
    for m, model in enumerate(training.models):
        for name, parameter in model.named_parameters(remove_duplicate=False):
            state[f"{m}.{name}"] = parameter.detach()
            state[f"{m}.{name} grad"] = parameter.grad
            state[f"{m}.{name} facts"] = (
                parameter.requires_grad, parameter.is_leaf, sorted(vars(parameter)),
                len(parameter._backward_hooks or ()), len(parameter._post_accumulate_grad_hooks or ()),
            )  # fmt: skip
        for name, buffer in model.named_buffers():
            state[f"{m}.{name} buffer"] = buffer
        for name, module in model.named_modules():
            state[f"{m}.{name} module"] = (
                module.training, sorted(vars(module)), len(module._forward_hooks),
                len(module._forward_pre_hooks), len(module._backward_hooks), len(module._state_dict_hooks),
            )  # fmt: skip
    for number, optimizer in enumerate(training.optimizers):
        state[f"optimizer {number}"] = optimizer.state_dict()
        state[f"optimizer hooks {number}"] = (
            len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks),
        )  # fmt: skip
    return state


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Raise unless both are equal bit by bit."""
    assert type(left) is type(right), where
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype, where
        assert left.shape == right.shape, where
        assert torch.equal(
            left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8)
        ), where
    elif isinstance(left, dict):
        assert list(left) == list(right), where
        for key in left:
            assert_same(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for number, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{where}/{number}")
    else:
        assert left == right or (left != left and right != right), where


def trained(name: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(7)
    return state_of(NETS[name](steps))


SHORT = {"bert", "gpt2", "vit", "resnet", "t5", "llama"}
BARE: dict[str, dict[str, Any]] = {}


def steps_of(name: str) -> int:
    return 7 if name in SHORT else 23


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("name", NETS)
def test_watching_changes_nothing(name: str, every: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Losses, weights, buffers, random state, modes, hooks and optimizer state are bit-identical when watched."""
    steps = steps_of(name)
    if name not in BARE:
        BARE[name] = trained(name, steps)
    before = global_state()
    with watching(every=every, folder=tmp_path / "run" if every == 1 else None) as watch:
        watched = trained(name, steps)
        recording = watch.recording()
    assert_same(watched, BARE[name])
    assert global_state() == before
    assert watch.failure == "", watch.failure
    assert not [r for r in caplog.records if r.name == "unvanish"]
    assert recording.traces
    for trace in recording.traces:
        assert trace.layers
        expected = steps - (name == "amp")
        assert trace.total_steps == expected
        assert list(trace.loss_steps) == list(range(expected))
        due = [s for s in range(expected) if s < 10 or s % every == 0]
        assert list(trace.steps) == due
        owned = [i for i, layer in enumerate(trace.layers) if layer.is_optimised]
        seen = ~torch.isnan(torch.from_numpy(trace.measures["update_ratio"][:, owned]))
        assert seen.any(0).all(), [trace.layers[i].name for i in owned]


def test_watching_named_models_changes_nothing() -> None:
    """The library's `watch(model, optimizer)` leaves a training as it would have been."""

    def train(watched: bool) -> dict[str, Any]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        optimizer = torch.optim.Adam(model.parameters())
        run = unvanish.watch(model, optimizer, folder=None)
        training = Training([model], [optimizer])
        if watched:
            run.__enter__()
        for _ in range(15):
            loss = model(torch.randn(6, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            training.losses.append(loss.detach())
        if watched:
            run.__exit__(None, None, None)
            assert run.recording().steps == 15
        return state_of(training)

    assert_same(train(True), train(False))


def test_leaving_restores_everything_after_an_exception() -> None:
    """An exception in the middle of a step leaves no hook and no wrapped function behind."""
    before = global_state()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(3, 3))  # the second cannot take what the first gives
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), unvanish.watch(model, folder=None):
        model(torch.randn(2, 4))
    assert global_state() == before
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def stumble() -> None:
        with unvanish.watch(model, optimizer, folder=None):
            model(torch.randn(2, 2)).sum().backward()
            optimizer.step()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stumble()
    assert global_state() == before
    assert not model.weight._backward_hooks


def test_watches_may_be_nested_and_left_in_any_order() -> None:
    """Two watches at once both record, and torch is as before whichever is left first."""
    before = global_state()
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for order in (0, 1):
        watches = [Watch(), Watch()]
        for watch in watches:
            watch.attach()
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).sum().backward()
            optimizer.step()
        watches[order].close()
        watches[1 - order].close()
        assert [w.recording().steps for w in watches] == [3, 3]
        assert global_state() == before


def test_a_watch_is_entered_once() -> None:
    """Entering a closed watch again is refused with words that say what to do."""
    run = unvanish.watch(nn.Linear(1, 1), folder=None)
    with run:
        pass
    with pytest.raises(OptionError, match="a watch can be entered once"), run:
        pass


BROKEN = {
    "the clock before a step": ("watch", "_prepare_step"),
    "the clock after a step": ("watch", "_after_step"),
    "before backward": ("watch", "_before_backward"),
    "after backward": ("watch", "_after_backward"),
    "noting a skipped step": ("watch", "_note_skipped"),
    "flushing": ("watch", "_flush"),
    "describing": ("watch", "_describe"),
    "before a call": ("capture", "_enter_model"),
    "after a call": ("capture", "_read_call"),
    "reading the graph": ("capture", "read_graph"),
    "reading gradients": ("capture", "read_gradients"),
    "following a gradient": ("capture", "_note_delta"),
    "removing hooks": ("capture", "disarm"),
    "arming": ("capture", "arm"),
    "naming": ("roster", "called"),
    "writing": ("recorder", "write"),
}


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("place", BROKEN)
def test_a_watch_that_fails_is_switched_off(
    place: str, every: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug in the watch ends watching with one log line; training goes on bit-identical and the record says so."""
    steps, name = 23, "amp"
    if name not in BARE:
        BARE[name] = trained(name, steps)
    before = global_state()
    part, method = BROKEN[place]
    with caplog.at_level(logging.WARNING, "unvanish"):
        owner = {"watch": Watch, "capture": Capture, "roster": Roster, "recorder": Recorder}[part]
        original, calls = getattr(owner, method), []
        fails_at = {"_note_skipped": 1, "disarm": 1}.get(method, 2)

        def broken(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) >= fails_at:
                raise RuntimeError("a bug of ours")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, broken)
        watch = Watch(every=every)
        watch.attach()
        watched = trained(name, steps)
        watch.close()
        recording = watch.recording()
    assert_same(watched, BARE[name])
    if method != "disarm":  # what removes the hooks is what is broken; they do nothing by then
        assert global_state() == before
    assert "a bug of ours" in watch.failure
    assert "a bug of ours" in recording.run["failure"]
    assert len([r for r in caplog.records if "watching stopped" in r.message]) == 1


SCRIPT = Path(__file__).parent / "ddp_script.py"


def test_distributed_training_is_the_same_when_rank_0_records(tmp_path: Path) -> None:
    """Two gloo processes end with the same weights whether watched or not; gradients seen are the averaged ones."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
    for rank in (0, 1):
        bare, watched = (torch.load(tmp_path / f"{kind}-{rank}.pt") for kind in ("bare", "watched"))
        assert_same(watched["weights"], bare["weights"])
        assert_same(watched["losses"], bare["losses"])
    recording = unvanish.read_recording(tmp_path / "run")
    (trace,) = recording.traces
    assert [layer.name for layer in trace.layers] == ["0", "2"]
    averaged = torch.load(tmp_path / "watched-0.pt")["grad_rms"]
    for column, name in enumerate(("0", "2")):
        seen = torch.from_numpy(trace.measures["grad_rms"][:, column].copy())
        torch.testing.assert_close(seen, averaged[name][: len(seen)], rtol=1e-5, atol=0)

"""What watching costs: `unvanish` and its peers on the same three trainings, side by side.

    python bench/overhead.py [--quick] [--net mlp] [--optimizer sgd] [--tools unvanish,wandb] [--json FILE]

Two figures. `ratio`: CPU time of a watched step over that of a bare one. Bare and watched trainings run in two
processes and take turns, A B B A, one sampling period a turn; the median over the pairs with its quartiles.
Bare against bare gives 0.95 to 1.05 on a busy machine, so smaller differences are not shown by it.
`inside`, for ours only: time spent in the watch, by its own clock, over the time of the bare step, over whole
flushes, with the dense first steps left out. It resolves what the ratio cannot; it leaves out the calls of the hooks.
One thread trains: on a machine with nothing else to do this is CPU time, and asking for CPU time itself at each
hook would cost as much as the hooks of an idle watch.

The ratio is of CPU time of the training process: the process that `wandb` starts beside it is not counted.
The peers run where they are installed (`pip install unvanish[bench]`). Nothing goes to the network.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nets import NETS, OPTIMIZERS, Training, training
from torch import Tensor

from unvanish.players import CHECKED_STEPS, DENSE_STEPS
from unvanish.watch import Watch

SLOTS = 8  # samples between two flushes
LEAST_STEPS = 48  # over which the time inside is added up
IDLE = 10**9  # as `every`: attached, but nothing is sampled
AfterBackward = Callable[[Tensor], None]


# The tools: each a context manager that yields what is to be called after every backward pass.


@contextlib.contextmanager
def bare(_training: Training, _every: int) -> Iterator[AfterBackward | None]:
    yield None


@contextlib.contextmanager
def unvanish(training: Training, every: int) -> Iterator[AfterBackward | None]:
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(
            [training.model],
            [training.optimizer],
            every=every,
            folder=Path(folder) / "run",
        )
        watch.attach()
        training.inside = lambda: watch.inside
        try:
            yield None
        finally:
            watch.close()
        if watch.failure:
            raise RuntimeError(watch.failure)


@contextlib.contextmanager
def wandb(training: Training, every: int) -> Iterator[AfterBackward | None]:
    import wandb

    with tempfile.TemporaryDirectory() as folder:
        settings = wandb.Settings(mode="offline", silent=True, console="off", x_disable_stats=True)
        run = wandb.init(project="overhead", dir=folder, settings=settings)
        wandb.watch(training.model, log="gradients", log_freq=every)
        try:
            yield lambda loss: wandb.log({"loss": loss.item()})
        finally:
            run.finish()


@contextlib.contextmanager
def tensorboard(training: Training, _every: int) -> Iterator[AfterBackward | None]:
    from torch.utils.tensorboard import SummaryWriter

    steps = 0

    def write(_loss: Tensor) -> None:
        nonlocal steps
        steps += 1
        for name, parameter in training.model.named_parameters():
            writer.add_histogram(name, parameter, steps)
            writer.add_histogram(f"{name}.grad", parameter.grad, steps)

    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        yield write


@contextlib.contextmanager
def lightning(training: Training, _every: int) -> Iterator[AfterBackward | None]:
    from lightning.pytorch.utilities import grad_norm

    kept: dict[str, float] = {}

    def note(_loss: Tensor) -> None:
        kept.update({name: float(norm) for name, norm in grad_norm(training.model, norm_type=2).items()})

    yield note


@contextlib.contextmanager
def detect_anomaly(_training: Training, _every: int) -> Iterator[AfterBackward | None]:
    with torch.autograd.detect_anomaly():
        yield None


@contextlib.contextmanager
def naive(training: Training, _every: int) -> Iterator[AfterBackward | None]:
    """What most people write by hand: statistics of activations, gradients and weights with `.item()`."""
    kept: dict[str, tuple[float, ...]] = {}

    def note(name: str, tensor: Tensor) -> None:
        t = tensor.detach()
        kept[name] = (t.mean().item(), t.std().item(), t.norm().item(), (t == 0).float().mean().item())

    def hook(name: str) -> Any:
        return lambda _module, _inputs, output: note(name, output) if isinstance(output, Tensor) else None

    def after(_loss: Tensor) -> None:
        for name, parameter in training.model.named_parameters():
            note(name, parameter)
            note(f"{name}.grad", parameter.grad)

    leaves = [(n, m) for n, m in training.model.named_modules() if not list(m.children())]
    handles = [module.register_forward_hook(hook(name)) for name, module in leaves]
    yield after
    for handle in handles:
        handle.remove()


TOOLS = {tool.__name__: tool for tool in (unvanish, wandb, tensorboard, lightning, detect_anomaly, naive)}
NEEDS = {"wandb": "wandb", "tensorboard": "tensorboard", "lightning": "lightning"}


# Two processes that take turns.


def work(pipe: Connection, tool: str, net: str, optimizer: str, every: int) -> None:
    """Make as many steps as asked for; answer with CPU seconds, seconds, and seconds inside the watch."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr  # standard output carries the table only
    one = training(net, optimizer)
    with {"bare": bare, **TOOLS}[tool](one, every) as after_backward:
        while steps := pipe.recv():
            inside, begin, cpu = one.inside(), time.perf_counter(), time.process_time()
            for _ in range(steps):
                one(after_backward)
            pipe.send((time.process_time() - cpu, time.perf_counter() - begin, one.inside() - inside))


class Cost(NamedTuple):
    """What one step took, in seconds."""

    cpu: float
    wall: float
    inside: float


class Worker:
    """A training in its own process.

    Args:
        arguments: Tool, net, optimiser and `every`.
    """

    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, steps: int) -> Cost:
        """Make some steps; return what one of them took."""
        self.pipe.send(steps)
        return Cost(*(seconds / steps for seconds in self.pipe.recv()))

    def close(self) -> None:
        """End the training."""
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(0)
        self.process.join(60)


def measure(tool: str, net: str, optimizer: str, every: int, pairs: int) -> dict[str, Any]:
    """Return the row of one tool on one training."""
    watched, plain = Worker(tool, net, optimizer, every), Worker("bare", net, optimizer, every)
    period = 1 if every == IDLE else every
    try:
        plain(2)
        # Past the dense first steps, and to the beginning of a sampling period; idle is what comes after all checks.
        warm = CHECKED_STEPS if every == IDLE else 2 * DENSE_STEPS
        watched((period * -(-warm // period)) if tool == "unvanish" else 3)
        ratios, base = [], []
        for _ in range(pairs):
            a1, b1, b2, a2 = plain(period), watched(period), watched(period), plain(period)
            ratios.append((b1.cpu + b2.cpu) / (a1.cpu + a2.cpu))
            base += [a1.cpu, a2.cpu]
        row = {"tool": tool, "net": net, "optimizer": optimizer, "every": "idle" if every == IDLE else every}
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        row |= {"ratio": round(middle, 4), "low": round(low, 4), "high": round(high, 4), "inside": None}
        if tool == "unvanish":
            row["inside"] = round(share_inside(watched, plain, every, period), 6)
        return row | {"pairs": pairs, "bare_ms": round(1e3 * statistics.median(base), 3)}
    finally:
        watched.close()
        plain.close()


def share_inside(watched: Worker, plain: Worker, every: int, period: int) -> float:
    """Return the time inside the watch over that of the bare step, over at least one whole flush."""
    parts, steps = 4, (LEAST_STEPS if every == IDLE else max(SLOTS * period, LEAST_STEPS))
    inside = base = 0.0
    for _ in range(parts):
        base += plain(max(steps // parts // 4, 1)).wall
        inside += watched(max(steps // parts, 1)).inside
        base += plain(max(steps // parts // 4, 1)).wall
    return 2 * inside / base


def is_installed(tool: str) -> bool:
    """Say whether what a tool needs is there."""
    if tool not in NEEDS:
        return True
    try:
        importlib.metadata.version(NEEDS[tool])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def circumstances() -> dict[str, Any]:
    """Return what the figures depend on: commit, machine, versions."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    names = ("unvanish", "torch", "wandb", "tensorboard", "lightning")
    versions = {
        d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"] in names
    }
    return {
        "commit": git.stdout.strip(),
        "machine": {"system": platform.platform(), "cpu": _cpu(), "cores": os.cpu_count(), "threads": 1},
        "versions": {"python": platform.python_version(), **versions},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETS, action="append", help="this net only; may be repeated")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, action="append", help="this one only; may be repeated")
    parser.add_argument("--pairs", type=int, default=9, help="pairs of turns for each ratio (default 9)")
    parser.add_argument("--tools", default=",".join(TOOLS), help=f"some of {','.join(TOOLS)}")
    parser.add_argument("--quick", action="store_true", help="the MLP with SGD and 3 pairs only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON too")
    chosen = parser.parse_args()
    if unknown := set(chosen.tools.split(",")) - set(TOOLS):
        parser.error(f"--tools: found {sorted(unknown)}, expected some of {','.join(TOOLS)}")
    chosen.net = chosen.net or (["mlp"] if chosen.quick else list(NETS))
    chosen.optimizer = chosen.optimizer or (["sgd"] if chosen.quick else list(OPTIMIZERS))
    chosen.pairs = min(chosen.pairs, 3) if chosen.quick else max(chosen.pairs, 2)
    return chosen


def main() -> None:
    chosen = options()
    rows = []
    print(f"{'net':<12}{'optimizer':<10}{'tool':<16}{'every':>6}{'ratio':>8}{'low':>8}{'high':>8}{'inside':>10}")
    for net in chosen.net:
        for optimizer in chosen.optimizer:
            for tool in filter(is_installed, chosen.tools.split(",")):
                for every in (IDLE, 10, 1) if tool == "unvanish" else (1,):
                    row = measure(tool, net, optimizer, every, chosen.pairs)
                    rows.append(row)
                    inside = "" if row["inside"] is None else f"{100 * row['inside']:.3f} %"
                    print(
                        f"{net:<12}{optimizer:<10}{tool:<16}{row['every']:>6}{row['ratio']:>8.3f}"
                        f"{row['low']:>8.3f}{row['high']:>8.3f}{inside:>10}",
                        flush=True,
                    )
    if chosen.json:
        chosen.json.write_text(json.dumps({"rows": rows, **circumstances()}, indent=1) + "\n")


if __name__ == "__main__":
    os.environ["WANDB_MODE"] = "offline"
    main()

"""Binary networks on real data: replicas coupled by kicks, beside their matched controls.

    python bench/binary_nets.py [FOLDER] [--tasks digits-few,cifar] [--runs FILE] [--json FILE]

FOLDER may hold cifar10-jpeg.npz. All weights are -1 or 1, trained as latent ones by Adam, which are cut off at 1; batch
norms have no weights. Every training of a task takes the same number of gradients, n replicas together as many as one
network. Learning rates are chosen on held-out training rows, by seeds that are not reported.

The kick of a step is `ratio` times the learning rate, which falls on a cosine, and gamma grows from 0.05 to 2 by equal
steps. Nothing of this is chosen by its result: all settings that were tried are in the table. `centre` is the network
of the mean latent weights, `ensemble` the mean of the predictions.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from overhead import circumstances
from replica_data import Task, tasks
from torch import nn

from unvanish import Coupling, Replicas
from unvanish.replicas import STANDARD_METHODS, BinaryConv2d, BinaryLinear, Comparison, Method, additive, compare
from unvanish.replicas.controls import Job, Predict

N = 3
START, END = 0.05, 2.0  # of gamma
CONTROLS = ("one network", "one network, batch x n", "n independent networks", "replicas, shared, uncoupled")
RATIOS = (0.05, 0.375)  # kick over learning rate; .375 is that of the committee machine


class ClippedAdam(torch.optim.Adam):
    """Adam that cuts all weights off at 1: here all of them are latent."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        done = super().step(closure)
        for group in self.param_groups:
            for weights in group["params"]:
                weights.clamp_(-1, 1)
        return done


def perceptron() -> nn.Module:
    """64-64-64-10 for the digits."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [BinaryLinear(64, 64, bias=False), nn.BatchNorm1d(64, affine=False), nn.Hardtanh()]
    return nn.Sequential(*layers, BinaryLinear(64, 10, bias=False, is_scaled=True))


def convolutions() -> nn.Module:
    """Two convolutions and a linear layer for images of 16 x 16: 4 thousand weights."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 16)):
        layers += [BinaryConv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs, affine=False)]
        layers += [nn.Hardtanh(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), BinaryLinear(256, 10, bias=False, is_scaled=True))


def train_kicked(job: Job, *, init: Literal["shared", "separate"], ratio: float) -> dict[str, Predict]:
    """Train n replicas, each on its share of the batches, with a kick after each step."""
    rounds = job.rounds
    start: Any = "shared" if init == "shared" else job.starts.__getitem__
    replicas = Replicas(job.starts[0], len(job.starts), start, backend="loop")

    def rate(step: int) -> float:
        return 0.5 * job.lr * (1 + math.cos(math.pi * step / len(rounds)))

    gamma = additive(START, (END - START) / len(rounds))
    coupling = Coupling(replicas, lambda step: ratio * rate(step), force="binary", gamma=gamma)
    optimizer = job.optimizer(replicas.parameters(), job.lr)
    for step, rows in enumerate(rounds):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad()
        replicas.loss(job.loss_fn, job.x[rows], job.y[rows], batches="separate").backward()
        optimizer.step()
        coupling.step()
    centre = replicas.centre(job.inputs()).eval()
    with_read: Callable[..., Any] = torch.no_grad()(lambda x: job.read(centre(x)))
    return {"centre": with_read, "ensemble": partial(replicas.predict, how="ensemble", read=job.read)}


def kicked(init: Literal["shared", "separate"], ratio: float) -> Method:
    """Return such replicas as a method, with the controls that match them."""
    against = {"centre": "one network, batch x n", "ensemble": "n independent networks"}
    fit = partial(train_kicked, init=init, ratio=ratio)
    return Method(f"kicked, {init}, ratio {ratio:g}", fit, against)


def run(task: Task, on_run: Callable[[dict[str, Any]], None]) -> Comparison:
    """Compare all methods on a task."""
    methods = [method for method in STANDARD_METHODS if method.name in CONTROLS]
    for init in ("shared", "separate"):
        methods += [kicked(init, ratio) for ratio in RATIOS]
    return compare(
        task.make_model, task.loss_fn, lambda seed: task.split(seed)[0], lambda seed: task.split(seed)[1], n=N,
        steps=task.steps, batch=task.batch, seeds=task.seeds, tuning_seeds=task.tuning_seeds, rates=task.rates,
        methods=methods, on_run=on_run, optimizer=ClippedAdam,
    )  # fmt: skip


def binary_tasks(folder: Path | None) -> dict[str, Task]:
    """Return the tasks whose data are at hand, with binary networks and learning rates for them."""
    known = tasks(folder)
    digits: dict[str, Any] = {"make_model": perceptron, "steps": 900, "seeds": 10, "rates": (0.03, 0.01, 0.003)}
    images: dict[str, Any] = {"make_model": convolutions, "steps": 600, "seeds": 5, "rates": (0.01, 0.003)}
    found = dict.fromkeys(("digits-few", "digits-noisy"), digits) | ({"cifar": images} if "cifar" in known else {})
    return {name: replace(known[name], tuning_seeds=1, **changed) for name, changed in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER")
    parser.add_argument("--tasks", metavar="NAMES", help="some of them, with commas between (default all)")
    parser.add_argument("--runs", type=Path, metavar="FILE", help="append one line for each finished training")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all tables as JSON too")
    chosen = parser.parse_args()
    known = binary_tasks(chosen.folder)
    names = chosen.tasks.split(",") if chosen.tasks else list(known)
    if unknown := set(names) - known.keys():
        parser.error(f"--tasks: found {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
    torch.set_num_threads(1)
    done: dict[str, Any] = {}
    for name in names:
        task = known[name]

        def on_run(one: dict[str, Any], name: str = name) -> None:
            if chosen.runs:
                with chosen.runs.open("a") as file:
                    file.write(json.dumps({"task": name, **one}) + "\n")

        print(f"\n{name}: {task.what}, binary weights", flush=True)
        result = run(task, on_run)
        print(result, flush=True)
        done[name] = result.to_dict()
        if chosen.json:  # after each task, so that nothing is lost
            rows = [{"task": task, **row} for task, each in done.items() for row in each["rows"]]
            chosen.json.write_text(json.dumps({"rows": rows, "tasks": done, **circumstances()}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A deep sigmoid network on handwritten digits, from different starts: the experiment of 2006, on a small scale.

    python bench/pretrain.py [--depth 8] [--seeds 5] [--labels 1400 100] [--jobs 1] [--json FILE] [--picture FILE]

The same network, data, order and optimiser for every start; only the hidden layers begin elsewhere. The learning rate
of each start is the one with the best accuracy on a fifth of the labelled rows, held out, by a seed that is not
reported. Pretraining sees the inputs of all training rows and no label; the training that follows gets so many
labelled rows as --labels says, a table for each number, and takes the same number of steps. The trainings of a start
are replicas that nothing couples, so one pass computes them all. Seconds are processor time of one thread, for one
network.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from overhead import circumstances
from torch import Tensor, nn

import unvanish

WIDTH, TRAINING, BATCH, STEPS, LOOK = 48, 1400, 32, 440, 44  # steps: 10 epochs of 1400 rows
RATES = (0.02, 0.1, 0.5)
TUNING_SEED = 1000


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits, between 0 and 1, and what they are."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)


def network(depth: int, *, activation: type[nn.Module] = nn.Sigmoid, is_normed: bool = False) -> nn.Sequential:
    """Return so many layers, all but the last with an activation."""
    layers: list[nn.Module] = []
    for width in [64] + [WIDTH] * (depth - 2):
        norm = [nn.BatchNorm1d(WIDTH)] if is_normed else []
        layers += [nn.Linear(width, WIDTH), *norm, activation()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def as_torch_draws(depth: int, x: Tensor) -> nn.Module:
    return network(depth)


def with_init(fill: Callable[[Tensor], Any], activation: type[nn.Module] = nn.Sigmoid) -> Any:
    def make(depth: int, x: Tensor) -> nn.Module:
        model = network(depth, activation=activation)
        for layer in model:
            if isinstance(layer, nn.Linear):
                fill(layer.weight)
                nn.init.zeros_(layer.bias)
        return model

    return make


def with_batch_norm(depth: int, x: Tensor) -> nn.Module:
    return network(depth, is_normed=True)


def pretrained(method: Any) -> Any:
    def make(depth: int, x: Tensor) -> nn.Module:
        model = network(depth)
        unvanish.pretrain(model, x, method, epochs=30, batch_size=50, tell=lambda line: None)
        return model

    return make


STARTS: dict[str, Callable[[int, Tensor], nn.Module]] = {
    "torch's own": as_torch_draws,
    "Xavier": with_init(nn.init.xavier_uniform_),
    "He": with_init(nn.init.kaiming_normal_),
    "batch norm": with_batch_norm,
    "stacked RBMs": pretrained("rbm"),
    "stacked autoencoders": pretrained("autoencoder"),
    "ReLU and He": with_init(nn.init.kaiming_normal_, nn.ReLU),
}


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the percentage of right answers."""
    return 100 * float((model.eval()(x).argmax(1) == y).float().mean())


def train(
    starts: list[nn.Module], seeds: list[int], rates: list[float], rows: list[Tensor], test: list[Tensor]
) -> tuple[list[list[float]], float]:
    """Train networks side by side, each on rows and in an order of its own; return test curves, and seconds for one.

    Plain descent with momentum is scaled by its rate: so losses times rates, at rate 1, give each network its own.
    """
    x, y = digits()
    orders = []
    for seed, own in zip(seeds, rows, strict=True):
        chance, batches = torch.Generator().manual_seed(seed), []
        while len(batches) < STEPS:
            shuffled = own[torch.randperm(len(own), generator=chance)]
            batches += [batch for batch in torch.split(shuffled, BATCH) if len(batch) == BATCH]
        orders.append(torch.stack(batches[:STEPS]))
    replicas = unvanish.Replicas(starts[0], n=len(starts), init=lambda i: starts[i], backend="batched")
    optimizer = torch.optim.SGD(replicas.parameters(), lr=1.0, momentum=0.9)
    curves: list[list[float]] = [[] for _ in starts]
    began, spent = time.process_time(), 0.0
    for step, chosen in enumerate(torch.stack(orders, 1), start=1):  # (networks, batch)
        losses = replicas.losses(nn.functional.cross_entropy, x[chosen], y[chosen], batches="separate")
        optimizer.zero_grad()
        (losses * torch.tensor(rates)).sum().backward()
        optimizer.step()
        if step % LOOK == 0:
            paused = time.process_time()
            for i, own in enumerate(test):
                curves[i].append(accuracy(replicas.replica(i), x[own], y[own]))
            spent += time.process_time() - paused
    return curves, (time.process_time() - began - spent) / len(starts)


def runs_of(name: str, depth: int, labels: list[int], seeds: int) -> list[dict[str, Any]]:
    """Train from one start; a network is pretrained once and then trained for each number of labels."""
    torch.set_num_threads(1)
    x, _ = digits()
    networks, spent = [], []
    for seed in (TUNING_SEED, *range(seeds)):
        torch.manual_seed(seed)
        began = time.process_time()
        networks.append(STARTS[name](depth, x[:TRAINING]))
        spent.append(time.process_time() - began)
    held_back, found = torch.arange(TRAINING, len(x)), []
    for count in labels:
        drawn = [torch.randperm(TRAINING, generator=torch.Generator().manual_seed(s))[:count] for s in range(seeds)]
        own = torch.randperm(TRAINING, generator=torch.Generator().manual_seed(TUNING_SEED))[:count]
        judged, learnt = own[: count // 5], own[count // 5 :]
        tries = len(RATES)
        curves, _ = train([networks[0]] * tries, [TUNING_SEED] * tries, [*RATES], [learnt] * tries, [judged] * tries)
        best = max(zip(RATES, curves, strict=True), key=lambda pair: pair[1][-1])[0]
        curves, seconds = train(networks[1:], [*range(seeds)], [best] * seeds, drawn, [held_back] * seeds)
        found += [
            {
                "start": name, "depth": depth, "labels": count, "seed": seed, "lr": best, "accuracy": curve[-1],
                "curve": curve, "seconds_before": before, "seconds": seconds,
            }
            for seed, curve, before in zip(range(seeds), curves, spent[1:], strict=True)
        ]  # fmt: skip
        print(count, row(name, [run for run in found if run["labels"] == count]), file=sys.stderr, flush=True)
    return found


def row(name: str, runs: list[dict[str, Any]]) -> str:
    """Return a line of the table."""
    own = [r for r in runs if r["start"] == name]
    values = [r["accuracy"] for r in own]
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    before, after = (statistics.mean(r[key] for r in own) for key in ("seconds_before", "seconds"))
    return (
        f"| {name} | {own[0]['lr']:g} | {statistics.mean(values):.1f} ± {spread:.1f} "
        f"| {min(values):.1f} to {max(values):.1f} | {before:.1f} + {after:.1f} |"
    )


def table(runs: list[dict[str, Any]]) -> str:
    """Return the table as Markdown: mean and standard deviation over seeds."""
    names = list(dict.fromkeys(r["start"] for r in runs))
    head = "| start | rate | test accuracy, % | from, to | seconds before + training |\n|---|---|---|---|---|"
    return "\n".join((head, *(row(name, runs) for name in names)))


def draw(tables: list[list[dict[str, Any]]], file: Path) -> None:
    """Draw the test accuracy while training, mean and range over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(tables), 4), layout="constrained")
    for axis, runs in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables, strict=True):
        for place, name in enumerate(dict.fromkeys(r["start"] for r in runs)):
            curves = list(zip(*(r["curve"] for r in runs if r["start"] == name), strict=True))
            steps = [LOOK * (i + 1) for i in range(len(curves))]
            axis.plot(steps, [statistics.mean(c) for c in curves], color=f"C{place}", label=name)
            axis.fill_between(steps, [*map(min, curves)], [*map(max, curves)], color=f"C{place}", alpha=0.15)
        axis.set_title(f"{runs[0]['labels']} labels, {runs[0]['depth']} layers")
        axis.set_xlabel("step")
        axis.set_ylabel("test accuracy, %")
        axis.set_ylim(0, 100)
    axis.legend(fontsize="small")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=8, help="layers with weights (default 8)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--labels", type=int, nargs="+", default=[TRAINING, 100], help="rows that have labels")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    given = parser.parse_args()
    with ProcessPoolExecutor(given.jobs) as pool:
        jobs = [pool.submit(runs_of, name, given.depth, given.labels, given.seeds) for name in STARTS]
        runs = [run for job in jobs for run in job.result()]
    tables = [[run for run in runs if run["labels"] == labels] for labels in given.labels]
    for each, labels in zip(tables, given.labels, strict=True):
        print(f"\n{labels} labels, {given.depth} layers, {given.seeds} seeds\n\n{table(each)}")
    if given.json:
        document = {"rows": runs, **circumstances()}
        given.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if given.picture:
        draw(tables, given.picture)


if __name__ == "__main__":
    main()

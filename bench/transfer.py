"""What layers that were learnt on one task are worth on a related one: accuracy against labels and epochs.

    python bench/transfer.py [FOLDER] [--tasks digits cifar] [--seeds 5] [--jobs 1] [--json FILE] [--picture FILE]

digits: a net that tells 0 to 4 learns to tell 5 to 9 (scikit-learn's, 8 x 8). cifar: one that tells six animals learns
to tell four vehicles; FOLDER holds cifar10-jpeg.npz, of which a small part is read. The head is new; below it:

    from scratch        nothing is reused
    frozen              all hidden layers are reused and stay
    cached              the same, learnt from features that were computed once
    gradually thawed    the head learns first, then one more layer from the top in each sixth of the training
    all from the start  all layers are reused and go on learning

Every training takes the same number of steps of Adam, whatever the labels. The rate of each way is the better of two
on rows of the training that have no label otherwise, by a seed that is not reported. Seconds are processor time of
one thread, for the training on the target alone.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from overhead import circumstances
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import unvanish

WAYS = ("from scratch", "frozen", "cached", "gradually thawed", "all from the start")
BATCH, LOOKS = 32, 10
RATES, TUNING_SEED = (0.001, 0.01), 1000
Data = tuple[Tensor, Tensor]


class Task(NamedTuple):
    """Two tasks that a network may share layers for."""

    source: Data
    train: Data
    test: Data
    make: Callable[[int], nn.Sequential]
    source_steps: int
    steps: int
    labels: tuple[int, ...]


def small_net(classes: int) -> nn.Sequential:
    """For 8 x 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, classes),
    )  # fmt: skip


def larger_net(classes: int) -> nn.Sequential:
    """For 16 x 16 pixels in colour."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 64),
        nn.ReLU(), nn.Linear(64, classes),
    )  # fmt: skip


def digits(folder: Path | None) -> Task:
    """0 to 4, then 5 to 9; every third image of the second is for the test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.images[:, None] / 16, dtype=torch.float32), torch.tensor(found.target)
    upper = torch.arange(len(y))[y >= 5]
    is_test = torch.arange(len(upper)) % 3 == 0
    train, test = upper[~is_test], upper[is_test]
    return Task(
        (x[y < 5], y[y < 5]), (x[train], y[train] - 5), (x[test], y[test] - 5), small_net,
        source_steps=300, steps=300, labels=(10, 40, 400),
    )  # fmt: skip


def cifar(folder: Path | None) -> Task:
    """Animals, then vehicles, at half their size: 6000 images of the first, 400 and 1000 of the second."""
    from PIL import Image

    if folder is None:
        raise SystemExit("bench/transfer.py: --tasks cifar: found no folder, expected one with cifar10-jpeg.npz.")
    with np.load(folder / "cifar10-jpeg.npz") as stored:
        jpeg, offsets, labels, is_train = (stored[name] for name in ("jpeg", "offsets", "labels", "is_train"))
        names = [str(name) for name in stored["classes"]]
    is_vehicle = np.isin(labels, [names.index(name) for name in ("airplane", "automobile", "ship", "truck")])

    def read(wanted: np.ndarray[Any, Any], count: int) -> Data:
        rows = np.random.default_rng(0).permutation(np.flatnonzero(wanted))[:count]
        files = (io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes()) for i in rows)
        pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        x = torch.tensor(pixels).permute(0, 3, 1, 2).float() / 255
        own = sorted({*labels[wanted].tolist()})
        y = torch.tensor([own.index(label) for label in labels[rows]])
        return nn.functional.avg_pool2d((x - 0.5) / 0.25, 2), y

    return Task(
        read(~is_vehicle & is_train, 6000), read(is_vehicle & is_train, 400), read(is_vehicle & ~is_train, 1000),
        larger_net, source_steps=600, steps=300, labels=(40, 400),
    )  # fmt: skip


TASKS: dict[str, Callable[[Path | None], Task]] = {"digits": digits, "cifar": cifar}


def epochs(rows: int, steps: int) -> list[Tensor]:
    """Return the rows of each step."""
    batches: list[Tensor] = []
    while len(batches) < steps:
        batches += torch.split(torch.randperm(rows), BATCH)
    return batches[:steps]


def accuracy(model: nn.Module, data: Data) -> float:
    """Return the percentage of right answers."""
    model.eval()
    with torch.no_grad():
        right = float((model(data[0]).argmax(1) == data[1]).float().mean())
    model.train()
    return 100 * right


def train(
    model: nn.Module, data: Any, steps: int, lr: float = 1e-3, *, on_step: Callable[[int], None] = lambda step: None
) -> None:
    """Train with Adam on rows of a data set; the order is drawn from torch's random numbers."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step, rows in enumerate(epochs(len(data), steps)):
        on_step(step)
        x, y = data[rows]
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def learn(way: str, task: Task, learnt: nn.Sequential, labels: int, seed: int, lr: float) -> dict[str, Any]:
    """Train on so many labelled rows of the target in one of the ways."""
    torch.manual_seed(seed)
    model = task.make(int(task.train[1].max()) + 1)
    chosen = torch.randperm(len(task.train[1]))[:labels]
    data: Any = TensorDataset(task.train[0][chosen], task.train[1][chosen])
    if way != "from scratch":
        state = {k: v for k, v in learnt.state_dict().items() if not k.startswith(f"{len(learnt) - 1}.")}
        model.load_state_dict(state, strict=False)
    depth = sum(1 for child in model if next(child.parameters(), None) is not None)
    curve: list[float] = []
    state_of_order, spent = torch.get_rng_state(), 0.0

    def look(step: int) -> None:
        nonlocal spent
        if way == "gradually thawed" and step % (task.steps // 6) == 0:
            unvanish.freeze_to(model, max(depth - 1 - step // (task.steps // 6), 0))
        if step % (task.steps // LOOKS) == 0 and step:
            began = time.process_time()
            curve.append(accuracy(model, task.test))
            spent += time.process_time() - began

    with tempfile.TemporaryDirectory() as folder:
        began, trained = time.process_time(), model
        if way in ("frozen", "cached"):
            trunk = unvanish.freeze_to(model, -1)
        if way == "cached":
            data = unvanish.cache_features(trunk, data, folder, batch_size=BATCH, tell=lambda line: None)
            trained = data.head
        torch.set_rng_state(state_of_order)
        train(trained, data, task.steps, lr, on_step=look)
        seconds = time.process_time() - began - spent
    curve.append(accuracy(model, task.test))
    head = torch.cat([p.detach().flatten() for p in model[-1].parameters()])
    return {
        "way": way, "labels": labels, "seed": seed, "lr": lr, "accuracy": curve[-1], "curve": curve, "seconds": seconds,
        "epochs": task.steps / math.ceil(labels / BATCH), "head": head.tolist() if way in ("frozen", "cached") else [],
    }  # fmt: skip


def source_of(task: Task, seed: int) -> nn.Sequential:
    """Return a network that has learnt the source."""
    torch.set_num_threads(1)
    torch.manual_seed(1000 + seed)
    learnt = task.make(int(task.source[1].max()) + 1)
    train(learnt, TensorDataset(*task.source), task.source_steps)
    return learnt


def tried(name: str, folder: Path | None, lr: float) -> dict[str, float]:
    """Return what each way comes to at a rate, with a middle number of labels, on rows that have none."""
    task = TASKS[name](folder)
    labels = task.labels[len(task.labels) // 2]
    torch.manual_seed(TUNING_SEED)  # `learn` draws its network first, and then its rows
    task.make(int(task.train[1].max()) + 1)
    others = torch.randperm(len(task.train[1]))[labels:]
    task = task._replace(test=(task.train[0][others], task.train[1][others]))
    learnt = source_of(task, TUNING_SEED)
    ways = [way for way in WAYS if way != "cached"]
    return {way: learn(way, task, learnt, labels, TUNING_SEED, lr)["accuracy"] for way in ways}


def runs_of(name: str, folder: Path | None, seed: int, rates: dict[str, float]) -> list[dict[str, Any]]:
    """Return all runs of a seed, which has a source network of its own."""
    task = TASKS[name](folder)
    learnt, runs = source_of(task, seed), []
    for labels in task.labels:
        runs += [{"task": name, **learn(way, task, learnt, labels, seed, rates[way])} for way in WAYS]
        ended = ", ".join(f"{run['way']} {run['accuracy']:.1f}" for run in runs[-len(WAYS) :])
        print(f"{name}: seed {seed}: {labels} labels: {ended}", file=sys.stderr, flush=True)
    return runs


def spread(values: list[float], form: str = ".1f") -> str:
    """Return mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):{form}} ± {deviation:{form}}"


def table(runs: list[dict[str, Any]]) -> str:
    """Return the table as Markdown: test accuracy against labels; seconds at the most labels."""
    labels = sorted({run["labels"] for run in runs})
    lines = [f"| | rate | {' | '.join(f'{n} labels' for n in labels)} | seconds |", "|---" * (len(labels) + 3) + "|"]
    for way in WAYS:
        own = [run for run in runs if run["way"] == way]
        cells = [spread([run["accuracy"] for run in own if run["labels"] == n]) for n in labels]
        seconds = statistics.mean(run["seconds"] for run in own if run["labels"] == labels[-1])
        lines.append(f"| {way} | {own[0]['lr']:g} | {' | '.join(cells)} | {seconds:.2f} |")
    return "\n".join(lines)


def largest_difference(runs: list[dict[str, Any]]) -> float:
    """Return the largest difference between the heads that learnt from frozen layers and from their cache."""
    heads = {(run["way"], run["labels"], run["seed"]): run["head"] for run in runs}
    pairs = ((heads["frozen", *key], head) for (way, *key), head in heads.items() if way == "cached")
    return max(abs(a - b) for first, second in pairs for a, b in zip(first, second, strict=True))


def draw(runs: list[dict[str, Any]], file: Path) -> None:
    """Draw accuracy against labels, and against epochs for a middle number of labels; a row a task."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(run["task"] for run in runs))
    figure = Figure(figsize=(10, 3.8 * len(tasks)), layout="constrained")
    for (left, right), name in zip(figure.subplots(len(tasks), 2, squeeze=False), tasks, strict=True):
        own = [run for run in runs if run["task"] == name]
        labels = sorted({run["labels"] for run in own})
        middle = labels[len(labels) // 2]
        for place, way in enumerate(way for way in WAYS if way != "cached"):  # as frozen, but for its cost
            rows = [run for run in own if run["way"] == way]
            points = [[run["accuracy"] for run in rows if run["labels"] == n] for n in labels]
            style = {"color": f"C{place}", "label": "frozen or cached" if way == "frozen" else way}
            left.plot(labels, [statistics.mean(p) for p in points], "o-", **style)
            left.fill_between(labels, [*map(min, points)], [*map(max, points)], color=f"C{place}", alpha=0.15)
            curves = list(zip(*(run["curve"] for run in rows if run["labels"] == middle), strict=True))
            last = next(run["epochs"] for run in rows if run["labels"] == middle)
            right.plot(
                [last * (i + 1) / len(curves) for i in range(len(curves))], [*map(statistics.mean, curves)], **style
            )
        left.set_xscale("log")
        left.set_xticks(labels, [str(n) for n in labels], minor=False)
        left.set_xticks([], minor=True)
        left.set_xlabel("labels")
        right.set_xlabel(f"epoch, {middle} labels")
        left.set_ylabel(f"{name}: test accuracy, %")
        left.legend(fontsize="small")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["digits"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    given = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with ProcessPoolExecutor(given.jobs) as pool:
        for name in given.tasks:
            found = dict(zip(RATES, pool.map(partial(tried, name, given.folder), RATES), strict=True))
            rates = {way: max(RATES, key=lambda lr: found[lr][way]) for way in found[RATES[0]]}
            rates["cached"] = rates["frozen"]
            print(f"{name}: rates: {rates}", file=sys.stderr, flush=True)
            jobs = [pool.submit(runs_of, name, given.folder, seed, rates) for seed in range(given.seeds)]
            runs += [run for job in jobs for run in job.result()]
    for name in given.tasks:
        own = [run for run in runs if run["task"] == name]
        print(f"\n{name}: test accuracy in %, mean and standard deviation of {given.seeds} seeds\n\n{table(own)}\n")
        print(f"largest difference of a weight, frozen and cached: {largest_difference(own):.1g}", flush=True)
    for run in runs:
        del run["head"]
    if given.json:
        given.json.write_text(json.dumps({"rows": runs, **circumstances()}, indent=2) + "\n", encoding="utf-8")
    if given.picture:
        draw(runs, given.picture)


if __name__ == "__main__":
    main()

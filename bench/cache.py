"""What cached features cost and save, beside no cache, features in memory, `.pt` files, HDF5 and diskcache.

    python bench/cache.py FOLDER [--rows 50000] [--pairs 7] [--epochs 10] [--json FILE]

FOLDER holds `cifar10-jpeg.npz`; the digits are scikit-learn's. Five frozen convolutions with batch norms, and a head
that learns on their 256 (128) features with SGD, batch 128. Whatever is compared takes turns, A B B A, and `ratio`
is the CPU time of A over that of B, the median over the pairs with its quartiles: on one thread with nothing else to
do that is time, and on a busy machine it is not the wait for others. What a disk makes a process wait for is not in
it; after the first epoch all stores here are read from the page cache.

* `first epoch`: `cache_features` into an empty folder and an epoch of the head, over an epoch without a cache.
* `later epoch`: an epoch of the head on cached rows, over one on tensors in memory; for ours and for each peer.
* `opening`: `cache_features` on a finished cache, with all its proofs, over an epoch without a cache.
* `training`: all epochs, computing the features included, over all epochs without a cache, once. `equal` says whether
  the trained weights are equal bit for bit.

Peers are measured where they are installed (`pip install 'unvanish[bench]'`).
"""

from __future__ import annotations

import argparse
import copy
import functools
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from overhead import circumstances
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import unvanish

BATCH = 128
CLASSES = 10


class Task(NamedTuple):
    """Pictures with labels, and a network with a frozen trunk."""

    name: str
    x: Tensor
    y: Tensor
    model: nn.Sequential


def cifar10(folder: Path, rows: int) -> Task:
    """Training pictures of CIFAR-10, and five convolutions."""
    from PIL import Image

    with np.load(folder / "cifar10-jpeg.npz") as file:
        content, offsets, labels = file["jpeg"].tobytes(), file["offsets"], file["labels"]
        chosen = np.nonzero(file["is_train"])[0][:rows]
    pictures = np.stack(
        [np.asarray(Image.open(io.BytesIO(content[offsets[i] : offsets[i + 1]])).convert("RGB")) for i in chosen]
    )
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25)
    return Task("cifar10", x, torch.from_numpy(labels[chosen]).long(), network(3, (16, 32, 32, 64, 64), pool=2))


def digits() -> Task:
    """Scikit-learn's digits, and five convolutions."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    pictures = torch.from_numpy(x).float().reshape(-1, 1, 8, 8).div(8).sub(1)
    return Task("digits", pictures, torch.from_numpy(y).long(), network(1, (32, 64, 64, 32, 32), pool=2))


def network(channels: int, widths: tuple[int, ...], *, pool: int) -> nn.Sequential:
    """Return convolutions with batch norms, halved after the second and the fourth, and a head of two layers."""
    layers: list[nn.Module] = []
    for place, width in enumerate(widths):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        if place in (1, 3):
            layers.append(nn.MaxPool2d(2))
        channels = width
    features = widths[-1] * pool**2
    layers += [nn.AdaptiveAvgPool2d(pool), nn.Flatten(), nn.Linear(features, 256), nn.ReLU(), nn.Linear(256, CLASSES)]
    return nn.Sequential(*layers)


def fresh(task: Task) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """Return a copy of the network with a frozen trunk, and an optimiser."""
    model = copy.deepcopy(task.model).train()
    unvanish.freeze_to(model, -2)
    return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05, momentum=0.9)


def in_memory(task: Task) -> DataLoader[Any]:
    """Return shuffled whole batches of the pictures: the fastest loader there is without a cache."""
    dataset = TensorDataset(task.x, task.y)
    return DataLoader(dataset, batch_size=None, sampler=BatchSampler(RandomSampler(dataset), BATCH, drop_last=False))


def epoch(head: Callable[[Any], Tensor], batches: Any, optimizer: torch.optim.Optimizer) -> None:
    """Learn from each batch once."""
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(head(x), y).backward()
        optimizer.step()


# Where rows can come from: each returns a function that yields the batches of an epoch, and the seconds to write.

Source = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def orders(count: int) -> Iterator[Tensor]:
    return iter(torch.randperm(count).split(BATCH))


def memory(x: Tensor, y: Tensor, folder: Path) -> Source:
    return lambda: ((x[rows], y[rows]) for rows in orders(len(y)))


def pt_files(x: Tensor, y: Tensor, folder: Path) -> Source:
    for row, (features, label) in enumerate(zip(x, y, strict=True)):
        torch.save((features.clone(), label.clone()), folder / f"{row}.pt")

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in orders(len(y)):
            found = [torch.load(folder / f"{row}.pt", weights_only=True) for row in rows.tolist()]
            yield torch.stack([f for f, _ in found]), torch.stack([label for _, label in found])

    return read


def hdf5(x: Tensor, y: Tensor, folder: Path) -> Source:
    import h5py

    with h5py.File(folder / "rows.h5", "w") as file:
        file["x"], file["y"] = x.numpy(), y.numpy()
    opened = h5py.File(folder / "rows.h5")

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in orders(len(y)):
            ordered, back = rows.sort()  # h5py takes rising numbers only
            found = [torch.from_numpy(opened[name][ordered.numpy()]) for name in ("x", "y")]
            place = back.argsort()
            yield found[0][place], found[1][place]

    return read


def disk_cache(x: Tensor, y: Tensor, folder: Path) -> Source:
    import diskcache

    cache = diskcache.Cache(str(folder))
    for row, (features, label) in enumerate(zip(x, y, strict=True)):
        cache[row] = (features.numpy(), int(label))

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in orders(len(y)):
            found = [cache[row] for row in rows.tolist()]
            yield torch.from_numpy(np.stack([f for f, _ in found])), torch.tensor([label for _, label in found])

    return read


PEERS = {"pt files": pt_files, "hdf5": hdf5, "diskcache": disk_cache}


# Measuring -------------------------------------------------------------------------------------------


def seconds(function: Callable[[], Any]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def compare(one: Callable[[], Any], other: Callable[[], Any], pairs: int) -> dict[str, float]:
    """Return the ratio of CPU times, one over other, over turns A B B A."""
    ratios, times = [], []
    for _ in range(pairs):
        a1, b1, b2, a2 = seconds(one), seconds(other), seconds(other), seconds(one)
        ratios.append((a1 + a2) / (b1 + b2))
        times.append(((a1 + a2) / 2, (b1 + b2) / 2))
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "ratio": round(middle, 3),
        "low": round(low, 3),
        "high": round(high, 3),
        "seconds": round(statistics.median(a for a, _ in times), 4),
        "against_seconds": round(statistics.median(b for _, b in times), 4),
        "pairs": pairs,
    }


def several(function: Callable[[], Any], times: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(times):
            function()

    return repeated


def cached(task: Task, model: nn.Sequential, folder: Path) -> Any:
    dataset = TensorDataset(task.x, task.y)
    return unvanish.cache_features(model, dataset, folder, batch_size=BATCH, tell=lambda line: None)


def beginnings(task: Task, pairs: int) -> Iterator[dict[str, Any]]:
    """Yield what a cache costs in the first epoch, and when it is opened again."""
    plain, plain_optimizer = fresh(task)
    uncached = functools.partial(epoch, plain, in_memory(task), plain_optimizer)

    def first_epoch() -> None:
        with tempfile.TemporaryDirectory() as folder:
            features = cached(task, plain, Path(folder))
            epoch(features.head, features.loader(BATCH, shuffle=True), plain_optimizer)

    uncached()
    first_epoch()
    yield {"what": "first epoch", "store": "unvanish", "against": "no cache", **compare(first_epoch, uncached, pairs)}

    with tempfile.TemporaryDirectory() as folder:
        model, _ = fresh(task)
        cached(task, model, Path(folder) / "ours")
        reopen = functools.partial(cached, task, model, Path(folder) / "ours")
        yield {"what": "opening", "store": "unvanish", "against": "no cache", **compare(reopen, uncached, pairs)}


def later_epochs(task: Task, pairs: int) -> Iterator[dict[str, Any]]:
    """Yield what an epoch from each store costs beside tensors in memory."""
    with tempfile.TemporaryDirectory() as folder:
        model, optimizer = fresh(task)
        features = cached(task, model, Path(folder) / "ours")
        x, y = features[list(range(len(features)))]
        head = model[-3:]
        ram = functools.partial(epoch, head, _Again(memory(x, y, Path(folder))), optimizer)
        ours = functools.partial(epoch, features.head, features.loader(BATCH, shuffle=True), optimizer)
        times = max(int(0.25 / max(seconds(several(ram, 2)) / 2, 1e-3)), 1)  # turns of a quarter of a second
        sources: dict[str, tuple[Callable[[], Any], int, float]] = {"unvanish": (ours, times, 0.0)}
        for name, write in PEERS.items():
            place = Path(folder) / name
            place.mkdir()
            began = time.process_time()
            try:
                source = write(x, y, place)
            except ImportError:
                continue
            sources[name] = (functools.partial(epoch, head, _Again(source), optimizer), 1, time.process_time() - began)
        for name, (peer, turns, write_seconds) in sources.items():
            row = compare(several(peer, turns), several(ram, turns), pairs)
            row |= {key: round(row[key] / turns, 5) for key in ("seconds", "against_seconds")}
            extra = {"write_seconds": round(write_seconds, 3)} if write_seconds else {}
            yield {"what": "later epoch", "store": name, "against": "memory", **row, **extra}


class _Again:
    """Yields the batches of a new epoch whenever it is iterated."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.source()


def whole_training(task: Task, epochs: int) -> dict[str, Any]:
    """Train with and without a cache from one seed, and compare the weights."""
    models, times = [], []
    for is_cached in (True, False):
        model, optimizer = fresh(task)
        torch.manual_seed(1)
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            if is_cached:
                features = cached(task, model, Path(folder))
                head, loader = features.head, features.loader(BATCH, shuffle=True)
            else:
                head, loader = model, in_memory(task)
            for _ in range(epochs):
                epoch(head, loader, optimizer)
        times.append(time.process_time() - began)
        models.append(model)
    pairs = list(zip(*(model.state_dict().values() for model in models), strict=True))
    return {
        "what": "training", "store": "unvanish", "against": "no cache", "ratio": round(times[0] / times[1], 3),
        "seconds": round(times[0], 3), "against_seconds": round(times[1], 3), "pairs": 1, "epochs": epochs,
        "equal": all(torch.equal(a, b) for a, b in pairs),
        "largest_difference": max(float((a.double() - b.double()).abs().max()) for a, b in pairs),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where cifar10-jpeg.npz is")
    parser.add_argument("--rows", type=int, default=50_000, help="pictures of CIFAR-10 (default 50000)")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of turns, at least 7 (default 7)")
    parser.add_argument("--epochs", type=int, default=10, help="of the whole training (default 10)")
    parser.add_argument("--tasks", default="digits,cifar10")
    parser.add_argument("--parts", default="first,later,training", help="what to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON too")
    chosen = parser.parse_args()
    if chosen.pairs < 7:
        parser.error(f"--pairs: found {chosen.pairs}, expected at least 7")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tasks = {"digits": digits, "cifar10": functools.partial(cifar10, chosen.folder, chosen.rows)}
    parts: dict[str, Callable[[Task], Any]] = {
        "first": lambda task: beginnings(task, chosen.pairs),
        "later": lambda task: later_epochs(task, chosen.pairs),
        "training": lambda task: [whole_training(task, chosen.epochs)],
    }
    rows = []
    head = f"{'task':<9}{'what':<13}{'store':<10}{'against':<10}{'ratio':>9}{'low':>9}{'high':>9}"
    print(f"{head}{'s':>10}{'against s':>11}")
    for name in chosen.tasks.split(","):
        task = tasks[name]()
        for found in (row for part in chosen.parts.split(",") for row in parts[part](task)):
            row = {"task": name, "samples": len(task.y), **found}
            rows.append(row)
            spread = f"{row.get('low', float('nan')):>9.3f}{row.get('high', float('nan')):>9.3f}"
            print(
                f"{name:<9}{row['what']:<13}{row['store']:<10}{row['against']:<10}{row['ratio']:>9.3f}{spread}"
                f"{row['seconds']:>10.4f}{row['against_seconds']:>11.4f}"
                + (f"  equal: {row['equal']}" if "equal" in row else ""),
                flush=True,
            )
            if chosen.json:
                chosen.json.write_text(json.dumps({"rows": rows, **circumstances()}, indent=1) + "\n")


if __name__ == "__main__":
    main()

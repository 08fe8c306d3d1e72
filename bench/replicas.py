"""What a step of n replicas costs, beside one ordinary step of the single model.

    python bench/replicas.py [--net mlp-small] [--backend batched] [--n 8] [--pairs 9] [--json FILE]

A step is forward pass, backward pass, SGD with momentum and, for replicas, the pull after each step; each replica has
a batch of 64 of its own. Ordinary steps and steps of replicas take turns, A B B A, about 50 ms each; `ratio` is the
median over the pairs with its quartiles. On a processor: one thread, CPU time, so that the wait for others is not
counted; but they use its caches, which costs replicas more. On an accelerator: time until it is done, as it is and with
all but the pull as a CUDA graph.

The second table is the pull alone, on n = 8 replicas of a layer of given size, beside a copy of the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from overhead import circumstances
from torch import Tensor, nn
from torch.nn import functional as F

import unvanish

BATCH, CLASSES = 64, 10
SECONDS = 0.05  # of one turn, at least
COUNTS = (2, 4, 8, 16)
BACKENDS = ("loop", "vmap", "batched", "auto")
SIZES = (10_000, 100_000, 1_000_000)  # weights of one replica in the second table

Step = Callable[[], None]


def perceptron(*widths: int) -> Callable[[], tuple[nn.Module, tuple[int, ...]]]:
    def make() -> tuple[nn.Module, tuple[int, ...]]:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers[:-1]), widths[:1]

    return make


def cnn() -> tuple[nn.Module, tuple[int, ...]]:
    """Two convolutions and two linear layers on 16 x 16 images."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, CLASSES),
    )  # fmt: skip
    return model, (1, 16, 16)


def norms() -> tuple[nn.Module, tuple[int, ...]]:
    """Convolutions with batch norms."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, CLASSES),
    )  # fmt: skip
    return model, (3, 16, 16)


class Recurrent(nn.Module):
    """A recurrence of 20 steps, of which the last output is read."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrence, self.head = kind(8, 32, batch_first=True), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.recurrence(x)[0]
        return self.head(outputs[:, -1])  # type: ignore[no-any-return]


NETS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "mlp-small": perceptron(64, 32, 32, CLASSES),
    "mlp-256": perceptron(64, 256, 256, CLASSES),
    "cnn": cnn,
    "cnn-norms": norms,
    "gru": lambda: (Recurrent(nn.GRU), (20, 8)),
    "lstm": lambda: (Recurrent(nn.LSTM), (20, 8)),
}


def trained(parameters: Any, loss: Callable[[], Tensor]) -> Step:
    optimizer = torch.optim.SGD(parameters, 0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def ordinary(net: str, device: str) -> Step:
    torch.manual_seed(0)
    model, shape = NETS[net]()
    model.to(device)
    x, y = torch.randn(BATCH, *shape, device=device), torch.randint(CLASSES, (BATCH,), device=device)
    return trained(model.parameters(), lambda: F.cross_entropy(model(x), y))


def replicated(net: str, device: str, n: int, backend: Any) -> tuple[Step, unvanish.Coupling]:
    torch.manual_seed(0)
    model, shape = NETS[net]()
    replicas = unvanish.Replicas(model.to(device), n, backend=backend)
    x, y = torch.randn(n, BATCH, *shape, device=device), torch.randint(CLASSES, (n, BATCH), device=device)
    loss = lambda: replicas.loss(F.cross_entropy, x, y, batches="separate")  # noqa: E731
    return trained(replicas.parameters(), loss), unvanish.Coupling(replicas, strength=0.01)


def both(step: Step, coupling: unvanish.Coupling) -> Step:
    def coupled() -> None:
        step()
        coupling.step()

    return coupled


def seconds(step: Step, times: int, device: str) -> float:
    """Return what one step takes: CPU time on a processor, else time until the device is done."""
    if device == "cpu":
        begin = time.process_time()
        for _ in range(times):
            step()
        return (time.process_time() - begin) / times
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(times):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / times


def compared(step: Step, plain: Step, pairs: int, device: str) -> dict[str, Any]:
    """Return the ratio of two steps that take turns."""
    for each in (plain, step):
        seconds(each, 5, device)
    many, some = (max(1, round(SECONDS / seconds(each, 3, device))) for each in (plain, step))
    ratios, base = [], []
    for _ in range(pairs):
        a1, b1 = seconds(plain, many, device), seconds(step, some, device)
        b2, a2 = seconds(step, some, device), seconds(plain, many, device)
        ratios.append((b1 + b2) / (a1 + a2))
        base += [a1, a2]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    spread = {"ratio": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}
    return {**spread, "pairs": pairs, "plain_ms": round(1e3 * statistics.median(base), 4)}


def graphed(step: Step) -> Step:
    """Return the replay of a step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def pull_row(weights: int, pairs: int) -> dict[str, Any]:
    """Return what the pull costs beside a copy of what it changes."""
    replicas = unvanish.Replicas(nn.Linear(weights // 100, 100, bias=False), n=8, init="separate")
    coupling = unvanish.Coupling(replicas, strength=0.01)
    stacked, copy = replicas.stacked.weight, torch.empty_like(replicas.stacked.weight)

    def copied() -> None:
        with torch.no_grad():
            copy.copy_(stacked)

    row = compared(lambda: coupling.pull(0.01), copied, pairs, "cpu")
    return {"bytes": stacked.numel() * stacked.element_size(), "copy_ms": row.pop("plain_ms"), **row}


def rows_of(net: str, device: str, counts: list[int], backends: list[str], pairs: int) -> list[dict[str, Any]]:
    rows = []
    for n, backend in itertools.product(counts, backends):
        plain = ordinary(net, device)
        step, coupling = replicated(net, device, n, backend)
        step()  # chooses the back end, which a graph cannot hold
        row = {"net": net, "device": device, "n": n, "used": coupling.replicas._chosen.get((True, True), "loop")}
        steps = {backend: step}
        if device == "cuda" and backend == "batched":
            steps["batched, graph"] = graphed(step)
        for name, each in steps.items():
            rows.append({**row, "backend": name, **compared(both(each, coupling), plain, pairs, device)})
            show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['net']:<12}{row['device']:<6}{row['n']:>4}  {row['backend']:<16}{row['used']:<9}{row['plain_ms']:>9.3f}"
        f"{row['ratio']:>8.2f}{row['low']:>8.2f}{row['high']:>8.2f}",
        flush=True,
    )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETS, action="append", help="this net only; may be repeated")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="this one only; may be repeated")
    parser.add_argument("--n", type=int, action="append", help="this many replicas only; may be repeated")
    parser.add_argument("--pairs", type=int, default=9, help="pairs of turns for each ratio, at least 7 (default 9)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables as JSON too")
    chosen = parser.parse_args()
    if chosen.pairs < 7:
        parser.error(f"--pairs: found {chosen.pairs}, expected at least 7")
    return chosen


def main() -> None:
    chosen = options()
    torch.set_num_threads(1)
    nets, backends = chosen.net or list(NETS), chosen.backend or list(BACKENDS)
    print(f"{'net':<12}{'on':<6}{'n':>4}  {'backend':<16}{'used':<9}{'plain ms':>9}{'ratio':>8}{'low':>8}{'high':>8}")
    rows = []
    for net in nets:
        rows += rows_of(net, "cpu", chosen.n or list(COUNTS), backends, chosen.pairs)
    if torch.cuda.is_available():
        for net in ("mlp-small", "cnn"):
            rows += rows_of(net, "cuda", [16], backends, chosen.pairs)
    else:
        print("no CUDA device: the rows of an accelerator are missing")
    pulls = [pull_row(weights, chosen.pairs) for weights in SIZES]
    print(f"\n{'pull of bytes':>14}{'copy ms':>10}{'ratio':>8}{'low':>8}{'high':>8}")
    for row in pulls:
        print(f"{row['bytes']:>14}{row['copy_ms']:>10.3f}{row['ratio']:>8.2f}{row['low']:>8.2f}{row['high']:>8.2f}")
    if chosen.json:
        chosen.json.write_text(json.dumps({"rows": rows, "pulls": pulls, **circumstances()}, indent=1) + "\n")


if __name__ == "__main__":
    main()

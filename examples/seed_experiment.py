"""The experiment that this project grew from: as it was first run, and measured with its controls.

    python examples/seed_experiment.py [--seeds 5] [--out FOLDER] [--json FILE] [--small]

Two copies of a network with one hidden layer fit targets of pure noise, each on rows of its own, by

    W_a <- W_a - eta dE/dW_a + eta' tanh(mean_b W_b - W_a)

The first figure of the idea showed the first layer learn about ten times faster under this rule. `as_written` runs it
in the same order, with the same sizes and the same curves. `measured` runs it with `unvanish.Replicas` and looks at
each step twice: after the optimiser, and after the pull. What is left of the gain stands in the tables, beside single
networks with the same start, the same data, or the same number of gradients. docs/replica-story.md tells what it means.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import unvanish

Curves = dict[str, np.ndarray]  # one number a step
WINDOWS = {
    "step 0": slice(0, 1), "1-4": slice(1, 5), "5-9": slice(5, 10), "10-49": slice(10, 50), "all": slice(0, 50),
    "last": slice(49, 50),
}  # fmt: skip
RED, BLUE, ORANGE, GREY = "tab:red", "tab:blue", "tab:orange", "0.45"


@dataclass(frozen=True)
class Size:
    """How large the experiment is; by default as it was first run."""

    rows: int = 64
    inputs: int = 1000
    hidden: int = 100
    outputs: int = 10
    steps: int = 50
    lr: float = 1e-6


def draw_rows(size: Size, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a library of random inputs and targets: there is nothing in it to be learnt."""
    return draw.standard_normal((10 * size.rows, size.inputs)), draw.standard_normal((10 * size.rows, size.outputs))


def pick(size: Size, draw: np.random.Generator) -> np.ndarray:
    """Draw the one batch of a replica, with repetition, from the first tenth of the library, as was done then."""
    return draw.integers(size.rows, size=size.rows)


def draw_weights(size: Size, draw: np.random.Generator) -> list[np.ndarray]:
    """Return the weights of both layers, standard normal."""
    return [draw.standard_normal((size.inputs, size.hidden)), draw.standard_normal((size.hidden, size.outputs))]


# --- as it was first run


def cost_and_grads(weights: list[np.ndarray], x: np.ndarray, y: np.ndarray) -> tuple[float, list[np.ndarray]]:
    """Return the sum of squared errors and its gradient for both layers."""
    before = x @ weights[0]
    hidden = np.maximum(before, 0)
    error = hidden @ weights[1] - y
    back = (2 * error @ weights[1].T) * (before >= 0)
    return float(np.square(error).sum()), [x.T @ back, hidden.T @ (2 * error)]


def as_written(size: Size, seed: int, strength: float) -> Curves:
    """Train two copies as the first code did, and return what it plotted, and what it changed, for copy 1.

    Three things are kept that `measured` mends: copy 2 is pulled to a mean that copy 1 has already moved; what is
    plotted is the mean over all weights, in which signs cancel; and its pull is computed from the weights of after.
    """
    draw = np.random.default_rng(seed)
    x, y = draw_rows(size, draw)
    batches = [pick(size, draw) for _ in range(2)]
    copies = [draw_weights(size, draw) for _ in range(2)]
    curves: dict[str, list[float]] = {}

    def pull(a: int, layer: int) -> np.ndarray:
        return strength * np.tanh((copies[0][layer] + copies[1][layer]) / 2 - copies[a][layer])

    for _ in range(size.steps):
        found = [cost_and_grads(copies[a], x[batches[a]], y[batches[a]]) for a in range(2)]
        steps = [[size.lr * grad for grad in grads] for _, grads in found]
        start = [w.copy() for w in copies[0]]
        for a in range(2):
            for layer in range(2):
                copies[a][layer] = copies[a][layer] - steps[a][layer] + pull(a, layer)
        seen = {"cost": found[0][0]}
        for layer in range(2):
            seen[f"plotted {layer + 1}"] = abs(float(np.mean(steps[0][layer] - pull(0, layer))))
            seen[f"update {layer + 1}"] = float(np.abs(copies[0][layer] - start[layer]).mean())
            seen[f"gradient {layer + 1}"] = float(np.abs(steps[0][layer]).mean())
        for name, value in seen.items():
            curves.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in curves.items()}


# --- measured


class Network(nn.Module):
    """The same network for torch."""

    def __init__(self, weights: list[np.ndarray], scale: float = 1.0) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.tensor(w) * scale) for w in weights)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.first).relu() @ self.second


@dataclass(frozen=True)
class Way:
    """A way to train: so many copies, a pull, a scale of the start, batches in one step of a copy, and steps."""

    name: str
    n: int = 1
    strength: float = 0.0
    scale: float = 1.0
    union: int = 1
    times: int = 1


def ways(n: int) -> tuple[Way, ...]:
    """Return the rule and its controls; all but the last two take the gradient of n batches in each step."""
    small = 1 / math.sqrt(n)
    return (
        Way(f"{n} copies, no pull", n),
        Way(f"{n} copies, the rule", n, strength=1.0),
        Way(f"one, {n} batches", union=n),
        Way(f"one, {n} batches, start / sqrt {n}", union=n, scale=small),
        Way(f"one, start / sqrt {n}, {n} x steps", scale=small, times=n),
        Way(f"one, {n} x steps", times=n),
    )


def measured(size: Size, seed: int, way: Way) -> Curves:
    """Train in one way, and return for each step what the optimiser did, what the pull did, and where the centre went.

    Parts are relative to the weights before the step; cost and parts are means over the copies. A single network that
    makes n times the steps is seen at each n-th of them.
    """
    draw = np.random.default_rng(seed)
    x, y = (torch.tensor(part) for part in draw_rows(size, draw))
    together = max(way.n, way.union, way.times)
    batches = torch.tensor(np.stack([pick(size, draw) for _ in range(together)]))
    starts = [Network(draw_weights(size, draw), way.scale) for _ in range(way.n)]
    fresh = torch.tensor(draw.standard_normal((1000, size.inputs)))
    targets = torch.tensor(draw.standard_normal((1000, size.outputs)))

    def cost(output: Tensor, y: Tensor) -> Tensor:
        return (output - y).square().sum() / way.union  # of 64 rows, however many there are

    replicas = unvanish.Replicas(starts[0], way.n, init=lambda i: starts[i], backend="loop")
    coupling = unvanish.Coupling(replicas, strength=way.strength, force="tanh")
    optimizer = torch.optim.SGD(replicas.parameters(), lr=size.lr)
    curves: dict[str, list[float]] = {}
    for step in range(size.steps * way.times):
        rows = batches[: way.n] if way.times == 1 else batches[step % together][None]
        rows = batches[: way.union].flatten()[None] if way.union > 1 else rows  # (copies, rows)
        optimizer.zero_grad()
        costs = replicas.losses(cost, x[rows], y[rows], batches="separate")
        costs.sum().backward()
        before = _copy(replicas)
        optimizer.step()
        between = _copy(replicas)
        coupling.step()
        if step % way.times == 0:
            seen = {"cost": float(costs.detach().mean()), **_parts(before, between, _copy(replicas))}
            for name, value in seen.items():
                curves.setdefault(name, []).append(value)
    with torch.no_grad():
        new_row = [float((output - targets).square().sum(1).mean()) for output in replicas(fresh)]
    return {name: np.array(values) for name, values in curves.items()} | {"new row": np.array([np.mean(new_row)])}


def _copy(replicas: unvanish.Replicas) -> list[Tensor]:
    return [p.detach().clone() for p in replicas.parameters()]


def _parts(before: list[Tensor], between: list[Tensor], after: list[Tensor]) -> dict[str, float]:
    found = {}
    for layer, (w, optimised, pulled) in enumerate(zip(before, between, after, strict=True), 1):
        size = _norm(w)
        found[f"update {layer}"] = float((pulled - w).abs().mean())
        found[f"gradient {layer}"] = float((optimised - w).abs().mean())
        found[f"optimiser {layer}"] = float((_norm(optimised - w) / size).mean())
        found[f"coupling {layer}"] = float((_norm(pulled - optimised) / size).mean())
        found[f"centre {layer}"] = float((pulled - w).mean(0).norm() / w.mean(0).norm())
        found[f"rms {layer}"] = float(w.square().mean().sqrt())
    return found


def _norm(w: Tensor) -> Tensor:
    return w.flatten(1).norm(dim=1)  # (copies,)


# --- tables


def ratios(one: list[Curves], other: list[Curves], name: str, over: str = "") -> dict[str, tuple[float, float]]:
    """Return mean and spread over seeds of a curve of ``one`` over that of ``other``, for each window of steps."""
    return {
        window: _mean_and_spread(
            [float(a[name][part].mean() / b[over or name][part].mean()) for a, b in zip(one, other, strict=True)]
        )
        for window, part in WINDOWS.items()
    }


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def show_ratios(title: str, rows: dict[str, dict[str, tuple[float, float]]]) -> None:
    print(f"\n{title}\n{'':<46}" + "".join(f"{window:>16}" for window in WINDOWS))
    for name, found in rows.items():
        print(f"{name:<46}" + "".join(f"{_short(*value):>16}" for value in found.values()))


def show_costs(title: str, rows: dict[str, dict[str, tuple[float, float]]]) -> None:
    moments = list(next(iter(rows.values())))
    print(f"\n{title}\n{'':<32}" + "".join(f"{moment:>20}" for moment in moments))
    for name, found in rows.items():
        print(f"{name:<32}" + "".join(f"{_short(*value):>20}" for value in found.values()))


def _short(mean: float, spread: float) -> str:
    return f"{mean:.3g} ± {spread:.1g}"


def costs(runs: list[Curves]) -> dict[str, tuple[float, float]]:
    """Return mean and spread of the cost at three steps, of the cost of a new row, and of the first layer's rms."""
    last = len(runs[0]["cost"]) - 1
    moments = {f"step {step}": [float(run["cost"][step]) for run in runs] for step in (0, min(5, last), last)}
    moments["of a new row"] = [float(run["new row"][0]) for run in runs]
    moments["rms of layer 1"] = [float(run["rms 1"][-1]) for run in runs]
    return {moment: _mean_and_spread(values) for moment, values in moments.items()}


# --- pictures


def draw_first_figure(old: Curves, new: Curves, file: Path) -> None:
    """Draw the figure as it was: what was plotted then, in its colours and with its factors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, curves, title in zip(axes, (old, new), ("old rule", "new rule"), strict=True):
        axis.plot(50 * curves["plotted 1"], color=RED, label="first layer, times 50")
        axis.plot(curves["plotted 2"], color=BLUE, label="second layer")
        axis.plot(curves["cost"] / 1e9, color=ORANGE, label="cost, over 1e9")
        axis.set(title=title, xlabel="iterations")
    axes[0].set_ylabel("learning rate")
    axes[1].legend(frameon=False)
    figure.savefig(file, dpi=120)


def draw_measured(found: dict[str, list[Curves]], n: int, file: Path) -> None:
    """Draw how far the first layer moves, split by cause, and the cost beside its controls."""
    from matplotlib.figure import Figure

    plain, rule, _, small, *_ = (way.name for way in ways(n))

    def mean(name: str, curve: str) -> np.ndarray:
        return np.mean([run[curve] for run in found[name]], axis=0)

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy(mean(rule, "coupling 1"), color=GREY, linestyle="--", label="by the pull")
    left.semilogy(mean(rule, "optimiser 1"), color=RED, label="by the optimiser")
    left.semilogy(mean(plain, "optimiser 1"), color=RED, linestyle=":", label="by the optimiser, no pull")
    left.set(title="how far the first layer moves", xlabel="step", ylabel="of the weights' norm", ylim=(1e-5, 1))
    right.semilogy(mean(rule, "cost"), color=ORANGE, label="the rule")
    right.semilogy(mean(plain, "cost"), color=ORANGE, linestyle=":", label="no pull")
    right.semilogy(mean(small, "cost"), color="black", linestyle="--", label=small)
    right.set(title="cost", xlabel="step")
    for axis in (left, right):
        axis.legend(frameon=False)
    figure.savefig(file, dpi=120)


def repeat(seeds: int, run: Callable[[int], Curves]) -> list[Curves]:
    return [run(seed) for seed in range(seeds)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind (default 5)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path(), help="where the pictures go (default .)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables as JSON too")
    parser.add_argument("--small", action="store_true", help="a tenth of the width, to try it out")
    chosen = parser.parse_args(arguments)
    size = Size(inputs=100, hidden=10) if chosen.small else Size()
    torch.set_num_threads(1)

    old, new = (repeat(chosen.seeds, lambda seed, s=s: as_written(size, seed, s)) for s in (0.0, 1.0))
    names = {
        "what was plotted, layer 1": "plotted 1", "what was plotted, layer 2": "plotted 2",
        "mean size of the update, layer 1": "update 1", "of its gradient part, layer 1": "gradient 1",
        "mean size of the update, layer 2": "update 2", "of its gradient part, layer 2": "gradient 2", "cost": "cost",
    }  # fmt: skip
    first = {row: ratios(new, old, name) for row, name in names.items()}
    show_ratios(f"As written, copy 1: new rule over old rule, mean ± spread of {chosen.seeds} runs", first)
    tables: dict[str, Any] = {"as written": first}

    for n in (2, 5):
        found = {way.name: repeat(chosen.seeds, lambda seed, way=way: measured(size, seed, way)) for way in ways(n)}
        plain, rule, *_ = found
        parts = {
            f"{part}, layer {layer}": ratios(found[rule], found[plain], f"{part} {layer}")
            for layer in (1, 2)
            for part in ("update", "optimiser", "centre")
        }
        within = ratios(found[rule], found[rule], "coupling 1", "optimiser 1")
        parts["under the rule: pull over optimiser, layer 1"] = within
        show_ratios(f"Measured: {rule} over {plain}", parts)
        table = {name: costs(runs) for name, runs in found.items()}
        show_costs("Cost of a batch, mean over the copies", table)
        tables[f"{n} copies"] = {"ratios": parts, "costs": table}
        if n == 2:
            draw_measured(found, n, chosen.out / "first-figure-measured.png")
    draw_first_figure(old[0], new[0], chosen.out / "first-figure.png")
    if chosen.json:
        document = {"size": asdict(size), "seeds": chosen.seeds, "torch": torch.__version__, "tables": tables}
        chosen.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

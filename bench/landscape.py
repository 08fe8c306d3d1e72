"""How replicas of a small network lie to each other after training on real digits, by how they were trained.

Run it with `python bench/landscape.py [--seeds N] [--json FILE] [--draw FOLDER]`. Perceptrons 64-64-64-10 on
scikit-learn's digits, 1200 of them for training and for all measures, 597 to test; SGD with momentum, 64 examples a
step, each replica on batches of its own. Settings: separate starts; a shared start; a shared start, coupled. Printed
are means over seeds with their standard deviations.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import unvanish
from unvanish.replicas.landscape import landscape
from unvanish.terrain import Landscape

REPLICAS, STEPS, BATCH, TRAINING = 3, 400, 64, 1200


class Setting(NamedTuple):
    """How replicas are trained."""

    name: str
    init: Literal["shared", "separate"]
    strength: float


SETTINGS = (
    Setting("separate", "separate", 0.0),
    Setting("shared", "shared", 0.0),
    Setting("coupled", "shared", 0.01),
)


def digits() -> tuple[Tensor, Tensor]:
    """Return images and labels, in a fixed order that is not that of the file."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x, dtype=torch.float32)[order] / 16, torch.tensor(y)[order]


def train(setting: Setting, seed: int, x: Tensor, y: Tensor) -> unvanish.Replicas:
    """Train replicas, each on batches of its own."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    replicas = unvanish.Replicas(model, n=REPLICAS, init=setting.init, backend="loop")
    coupling = unvanish.Coupling(replicas, strength=setting.strength)
    optimizer = torch.optim.SGD(replicas.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        rows = torch.randint(TRAINING, (REPLICAS, BATCH))
        optimizer.zero_grad()
        replicas.loss(F.cross_entropy, x[rows], y[rows], batches="separate").backward()
        optimizer.step()
        coupling.step()
    return replicas


def _mean(values: list[float]) -> float:
    return statistics.fmean(values)


def _over_replicas(read: Callable[[Any], float]) -> Callable[[Landscape], float]:
    return lambda found: _mean([read(place) for place in found.places[:-1]])


def _barrier(*, is_aligned: bool) -> Callable[[Landscape], float]:
    return lambda found: _mean(
        [100 * path.barrier_mistakes for path in found.walks(is_aligned=is_aligned, to_centre=False)]
    )


def _overlap(name: str) -> Callable[[Landscape], float]:
    return lambda found: _mean([getattr(found, name)[i][j] for i in range(REPLICAS) for j in range(i)])


MEASURES: dict[str, Callable[[Landscape], float]] = {
    "overlap": _overlap("overlaps"),
    "overlap, aligned": _overlap("aligned_overlaps"),
    "barrier, % mistakes": _barrier(is_aligned=False),
    "barrier, aligned": _barrier(is_aligned=True),
    "mistakes of the centre, %": lambda found: 100 * found.place("centre").mistakes,
    "rise at sigma 0.3, %": _over_replicas(lambda place: 100 * place.energies[1].mistakes),
    "the same, centre": lambda found: 100 * found.place("centre").energies[1].mistakes,
    "top eigenvalue x norm squared": _over_replicas(lambda place: place.curvature.scaled),
    "the same, centre ": lambda found: found.place("centre").curvature.scaled,  # type: ignore[union-attr]
    "local entropy": _over_replicas(lambda place: place.entropy.value),
    "its error": _over_replicas(lambda place: place.entropy.uncertainty),
    "local entropy, centre": lambda found: found.place("centre").entropy.value,  # type: ignore[union-attr]
}


def measure(setting: Setting, seed: int, x: Tensor, y: Tensor, folder: Path | None) -> dict[str, float]:
    """Return the measures of one training, and how well it predicts."""
    replicas = train(setting, seed, x, y)
    found = landscape(
        replicas, F.cross_entropy, [(x[:TRAINING], y[:TRAINING])], points=11, sigmas=(0.1, 0.3, 0.5), draws=8, chains=3
    )
    if folder is not None and seed == 0:
        found.draw(folder / f"landscape-{setting.name}.png")
    row = {name: read(found) for name, read in MEASURES.items()}
    for how in ("centre", "ensemble"):
        predicted = replicas.predict(x[TRAINING:], how).argmax(1)  # type: ignore[arg-type]
        row[f"test accuracy, {how}, %"] = 100 * float((predicted == y[TRAINING:]).float().mean())
    return row


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--draw", type=Path, help="a folder for the pictures of the first seed")
    options = parser.parse_args()
    x, y = digits()
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for setting in SETTINGS:
            rows.append({"setting": setting.name, "seed": seed, **measure(setting, seed, x, y, options.draw)})
            print(f"seed {seed}, {setting.name}: done", file=sys.stderr, flush=True)
    print(f"{'':32}" + "".join(f"{setting.name:>20}" for setting in SETTINGS))
    for name in list(rows[0])[2:]:
        cells = []
        for setting in SETTINGS:
            values = [row[name] for row in rows if row["setting"] == setting.name]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{_mean(values):>11.4g} ± {spread:<6.2g}")
        print(f"{name:32}" + "".join(cells))
    if options.json is not None:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        facts = {"commit": commit, "machine": platform.machine(), "torch": torch.__version__}
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()

"""A long training under watch: memory, live objects and the file must stop growing.

    python bench/soak.py [--steps 100000] [--folder DIR]

The record is full after 20,000 losses (a shorter run is still filling it); what grows later is a leak, and the
exit code is 1.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from unvanish.watch import Watch

POINTS = 20
SETTLED = 8  # the point from which on nothing may grow: 40 % of the way
# How many times what it was at that point; the log beside the file keeps the size it once had.
ALLOWED = {"memory": 1.05, "objects": 1.05, "file": 1.5}


def resident_mib() -> float:
    """Return the memory that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def file_mib(folder: Path) -> float:
    """Return the size of the record with its log."""
    return sum(file.stat().st_size for file in folder.iterdir()) / 2**20


def soak(steps: int, folder: Path) -> list[tuple[float, float, float]]:
    """Train, print a line at each point, and return memory, objects and file size of each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    inputs = torch.randn(32, 8)
    targets = inputs.sum(1, keepdim=True)
    watch = Watch([model], [optimizer], folder=folder)
    watch.attach()
    points = []
    print(f"{'step':>10}{'RSS MiB':>10}{'objects':>10}{'file MiB':>10}")
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        if step % max(steps // POINTS, 1) == 0:
            gc.collect()
            points.append((resident_mib(), float(len(gc.get_objects())), file_mib(folder)))
            print(f"{step:>10}{points[-1][0]:>10.1f}{points[-1][1]:>10.0f}{points[-1][2]:>10.2f}", flush=True)
    watch.close()
    if watch.failure:
        raise SystemExit(f"watching failed: {watch.failure}")
    print(f"{'closed':>10}{resident_mib():>10.1f}{'':>10}{file_mib(folder):>10.2f}")
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="keep the record here; default: a temporary folder")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        points = soak(chosen.steps, chosen.folder or Path(folder) / "run")
    settled, late = points[SETTLED - 1], points[SETTLED:]
    grown = [
        name
        for i, (name, allowed) in enumerate(ALLOWED.items())
        if late and max(point[i] for point in late) > allowed * settled[i]
    ]
    print("flat" if not grown else f"still growing: {', '.join(grown)}")
    sys.exit(1 if grown else 0)


if __name__ == "__main__":
    main()

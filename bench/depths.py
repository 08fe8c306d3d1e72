"""How many layers to reuse: each depth, frozen and tuned, on a pair of real tasks.

    python bench/depths.py [FOLDER] [--task digits | cifar] [--labels 400] [--seeds 5] [--json FILE] [--picture FILE]

The tasks, the nets and the training are those of `transfer.py`: what has learnt the digits 0 to 4 learns to tell 5 to 9
(cifar: six animals, then four vehicles; FOLDER holds cifar10-jpeg.npz), for 300 steps of Adam at a rate of 0.001.
One network learns the source. The held-out loss is the percentage of wrong answers on the test rows of the target.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from overhead import circumstances
from torch import nn
from torch.utils.data import TensorDataset
from transfer import TASKS, Task, accuracy, source_of, train

from unvanish.reuse.depths import Depths, try_depths


def measure(task: Task, labels: int, seeds: int) -> Depths:
    """Try each depth with so many labelled rows of the target."""
    learnt = source_of(task, 0)
    torch.manual_seed(0)
    chosen = torch.randperm(len(task.train[1]))[:labels]
    rows = TensorDataset(task.train[0][chosen], task.train[1][chosen])

    def with_new_head() -> nn.Module:
        model = task.make(int(task.train[1].max()) + 1)
        state = {k: v for k, v in learnt.state_dict().items() if not k.startswith(f"{len(learnt) - 1}.")}
        model.load_state_dict(state, strict=False)
        return model

    def fit(model: nn.Module) -> float:
        train(model, rows, task.steps)
        return 100 - accuracy(model, task.test)

    return try_depths(with_new_head, fit, seeds=range(seeds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER")
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--labels", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    given = parser.parse_args()
    depths = measure(TASKS[given.task](given.folder), given.labels, given.seeds)
    print(depths)
    if given.json:
        rows = [{**dataclasses.asdict(row), "median": row.median} for row in depths.rows]
        given.json.write_text(json.dumps({"rows": rows, **circumstances()}, indent=2) + "\n", encoding="utf-8")
    if given.picture:
        depths.draw(given.picture)


if __name__ == "__main__":
    main()

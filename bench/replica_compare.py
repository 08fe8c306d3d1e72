"""Coupled replicas beside their matched controls on real data, and a search for a setting in which coupling gains.

    python bench/replica_compare.py [FOLDER] [--tasks digits-noisy,cancer] [--search] [--runs FILE] [--json FILE]

FOLDER may hold auto-mpg.csv and cifar10-jpeg.npz; without it the four other tasks run. Every training of a task takes
the same number of gradients. Learning rates are chosen on held-out training rows, by seeds that are not reported.

With --search, settings of the coupling are tried on seeds of their own. The one with the largest gain over its matched
controls is trained again on the seeds of the report, and only these count: the best of many is best by luck as well.
A coupled row must beat two controls: one network on the union of the batches (the limit of a full pull), and the same
replicas without a pull. --runs appends one line for each finished training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from overhead import circumstances
from replica_data import Task, tasks

from unvanish.replicas import STANDARD_METHODS, Comparison, Method, compare, coupled, exponential
from unvanish.replicas.controls import Job, train_one, train_sam

SEARCH = {"seed": 1000, "seeds": 3, "tuning_seeds": 2}
SEARCH_REPLICAS = (3, 6)
UNION = "one network, batch x n"
CONTROLS = (UNION, "one network, batch x n, start / sqrt n", "n independent networks")


def with_decay(job: Job, decay: float, *, is_union: bool = False) -> dict[str, Any]:
    """Train one network with weight decay: the plainest way to hold back on few rows."""

    def optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=decay)

    return train_one(replace(job, optimizer=optimizer), is_union=is_union)


MORE_METHODS = (
    Method("one network, weight decay 0.01", partial(with_decay, decay=0.01), {"": "one network"}),
    Method(f"{UNION}, weight decay 0.01", partial(with_decay, decay=0.01, is_union=True), {"": UNION}),
    Method("SAM, radius 0.2", partial(train_sam, rho=0.2), {"": "one network"}),
    coupled("shared", 0.1, force="tanh"),  # what the search found on the digits, with six replicas
)


def candidates(pulls: int) -> list[Method]:
    """Return the settings that are searched; schedules last for so many pulls."""
    rising, falling = exponential(1e-3, 0.1, pulls), exponential(0.1, 1e-3, pulls)
    found = []
    for init in ("shared", "separate"):
        found += [coupled(init, strength) for strength in (1e-3, 0.01, 0.1)]
        found += [coupled(init, 0.01, every=16), coupled(init, 0.1, force="tanh")]
        found += [coupled(init, rising, name=f"replicas, {init}, elastic 0.001 to 0.1")]
        found += [coupled(init, falling, name=f"replicas, {init}, elastic 0.1 to 0.001")]
    return found


def run(
    task: Task, methods: tuple[Method, ...], on_run: Callable[[dict[str, Any]], None], **changed: Any
) -> Comparison:
    """Compare methods on a task."""
    settings = {"steps": task.steps, "batch": task.batch, "seeds": task.seeds, "tuning_seeds": task.tuning_seeds}
    return compare(
        task.make_model, task.loss_fn, lambda seed: task.split(seed)[0], lambda seed: task.split(seed)[1],
        methods=methods, rates=task.rates, on_run=on_run, **(settings | changed),
    )  # fmt: skip


def controls_of(result: Comparison, name: str) -> list[str]:
    """Return the rows that a coupled row must beat: its limit of a full pull, and the same without a pull."""
    twin = name.split(", ")[1] + ", uncoupled, " + name.split(", ")[-1]
    names = [result[name].against, "replicas, " + twin]
    return [each for each in names if any(row.name == each for row in result.rows)]


def gain(result: Comparison, name: str) -> float:
    """Return the smaller of the gains over the matched controls."""
    return min(result.paired(name, control)[0] for control in controls_of(result, name))


def search(task: Task, on_run: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Choose a setting on the seeds of the search, and return what it comes to on those of the report."""
    base = tuple(method for method in STANDARD_METHODS if method.name in CONTROLS or "uncoupled" in method.name)
    tried: dict[tuple[int, str], tuple[float, Method]] = {}
    for n in SEARCH_REPLICAS:
        settings = candidates(task.steps // n)
        result = run(task, (*base, *settings), on_run, n=n, **SEARCH)
        for row in result.rows:
            for method in settings:
                if row.name.startswith(method.name + ", "):
                    tried[n, row.name] = (gain(result, row.name), method)
    (n, name), (found, method) = max(tried.items(), key=lambda item: item[1][0])
    report = run(task, (*base, method), on_run, n=n)
    best = max((row for row in report.rows if not row.name.startswith(method.name)), key=lambda row: row.mean)
    beaten = {each: report.paired(name, each) for each in dict.fromkeys((*controls_of(report, name), best.name))}
    print(f"best of {len(tried)} on the {SEARCH['seeds']} seeds of the search: n = {n}, {name}: {found:+.2f}")
    for control, (difference, error) in beaten.items():
        print(f"  on the {task.seeds} seeds of the report: {difference:+.2f} ± {error:.2f} against {control}")
    return {
        "tried": [{"n": n, "name": name, "gain": gained} for (n, name), (gained, _) in tried.items()],
        "chosen": {"n": n, "name": name, "gain": found}, "best_control": best.name,
        "differences": {control: {"mean": mean, "error": error} for control, (mean, error) in beaten.items()},
        "report": report.to_dict(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER")
    parser.add_argument("--tasks", metavar="NAMES", help="some of them, with commas between (default all)")
    parser.add_argument("--search", action="store_true", help="search a setting in which coupling gains")
    parser.add_argument("--replicas", type=int, default=3, help="replicas, without --search (default 3)")
    parser.add_argument("--seeds", type=int, help="seeds of the report (default 10; 3 for CIFAR-10)")
    parser.add_argument("--device", default="cpu", help="for CIFAR-10 (default cpu)")
    parser.add_argument("--runs", type=Path, metavar="FILE", help="append one line for each finished training")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all tables as JSON too")
    chosen = parser.parse_args()
    known = tasks(chosen.folder, chosen.device)
    names = chosen.tasks.split(",") if chosen.tasks else list(known)
    if unknown := set(names) - known.keys():
        parser.error(f"--tasks: found {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
    torch.set_num_threads(1)
    done: dict[str, Any] = {}
    for name in names:
        task = replace(known[name], seeds=chosen.seeds or known[name].seeds)

        def on_run(one: dict[str, Any], name: str = name) -> None:
            if chosen.runs:
                with chosen.runs.open("a") as file:
                    file.write(json.dumps({"task": name, "search": chosen.search, **one}) + "\n")

        print(f"\n{name}: {task.what}", flush=True)
        if chosen.search:
            done[name] = search(task, on_run)
        else:
            result = run(task, (*STANDARD_METHODS, *MORE_METHODS), on_run, n=chosen.replicas)
            print(result, flush=True)
            done[name] = result.to_dict()
        sys.stdout.flush()
        if chosen.json:  # after each task, so that nothing is lost
            rows = [{"task": task, **row} for task, each in done.items() for row in each.get("rows", [])]
            chosen.json.write_text(json.dumps({"rows": rows, "tasks": done, **circumstances()}, indent=1) + "\n")


if __name__ == "__main__":
    main()

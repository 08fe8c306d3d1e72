"""The binary committee machine: coupled replicas against the same replicas uncoupled, and against one committee.

    python bench/committee.py [--load 0.5] [--seeds 3] [--json FILE]

Each seed is a set of random patterns with random labels, `load` times as many as the committee has weights; a run has
solved it when a committee gets all of them right. An epoch is one pass over all patterns by each replica, so the
single committee is given `replicas` times as many epochs as the others. `seconds` is CPU time on one thread, the
median over the runs.

`energy` is the local energy: the share of patterns (in percent) that are wrong after one weight in two hundred is
flipped at random, the mean over the solutions.

With `--json FILE` each run is also appended to FILE.lines when it ends; what is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from overhead import circumstances

from unvanish.replicas.committee import flip_energy, random_patterns, train_committee
from unvanish.replicas.kicks import additive

METHODS = ("coupled", "uncoupled", "single")
FLIPPED = 0.005  # share of the weights, for the local energy


def measure(method: str, seed: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """Train once, and say what came of it."""
    patterns = random_patterns(chosen.load, chosen.size, chosen.units, seed=seed)
    is_single = method == "single"
    start = time.process_time()
    found = train_committee(
        patterns,
        chosen.units,
        1 if is_single else chosen.replicas,
        form=chosen.form if method == "coupled" else None,
        strength=chosen.strength,
        gamma=additive(chosen.gamma, chosen.gamma_step),
        batch=chosen.batch,
        epochs=chosen.epochs * (chosen.replicas if is_single else 1),
        seed=seed,
    )
    seconds = time.process_time() - start
    energy = flip_energy(found.weights, patterns, FLIPPED) if found.is_solved else None
    return {
        **circumstances_of_run(method, seed, chosen),
        "solved": found.is_solved,
        "wrong": found.errors,
        "epochs": found.epochs,
        "seconds": round(seconds, 2),
        "energy": energy,
    }


def circumstances_of_run(method: str, seed: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return what decides the outcome of a run."""
    run = {"method": method, "load": chosen.load, "seed": seed, "size": chosen.size, "units": chosen.units}
    run |= {"replicas": 1 if method == "single" else chosen.replicas, "batch": chosen.batch, "limit": chosen.epochs}
    if method == "coupled":
        run |= {"form": chosen.form, "strength": chosen.strength}
        run |= {"gamma": chosen.gamma, "gamma_step": chosen.gamma_step}
    return run


def measured(method: str, seed: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return a run from the file of lines, or train it and add it there."""
    if not chosen.json:
        return measure(method, seed, chosen)
    file = chosen.json.with_name(chosen.json.name + ".lines")
    wanted = circumstances_of_run(method, seed, chosen)
    for line in file.read_text().splitlines() if file.exists() else ():
        row: dict[str, Any] = json.loads(line)
        if wanted.items() <= row.items():
            return row
    row = measure(method, seed, chosen)
    with file.open("a") as lines:
        lines.write(json.dumps(row) + "\n")
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the runs of one method come to."""
    solved = [row for row in rows if row["solved"]]
    return {
        "runs": len(rows),
        "solved": len(solved),
        "median_epochs": statistics.median(row["epochs"] for row in solved) if solved else None,
        "seconds": round(statistics.median(row["seconds"] for row in rows), 2),
        "mean_wrong": round(statistics.mean(row["wrong"] for row in rows), 2),
        "energy": statistics.mean(row["energy"] for row in solved) if solved else None,
    }


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=float, default=0.5, help="patterns over weights (default 0.5)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default 3)")
    parser.add_argument("--first-seed", type=int, default=0, help="(default 0)")
    parser.add_argument("--size", type=int, default=321, help="inputs of a unit, odd (default 321)")
    parser.add_argument("--units", type=int, default=5, help="units, odd (default 5)")
    parser.add_argument("--replicas", type=int, default=7, help="(default 7)")
    parser.add_argument("--batch", type=int, default=80, help="patterns for one step (default 80)")
    parser.add_argument("--strength", type=float, default=0.75, help="of the kick (default 0.75)")
    parser.add_argument("--gamma", type=float, default=0.05, help="at the start (default 0.05)")
    parser.add_argument("--gamma-step", type=float, default=0.001, help="added at each epoch (default 0.001)")
    parser.add_argument("--form", default="simple", choices=("simple", "corrected", "hard"), help="(default simple)")
    parser.add_argument("--epochs", type=int, default=1500, help="give up after so many (default 1500)")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="(default all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON too")
    chosen = parser.parse_args()
    if chosen.seeds < 1:
        parser.error(f"--seeds: found {chosen.seeds}, expected at least 1")
    return chosen


def main() -> None:
    chosen = options()
    torch.set_num_threads(1)
    rows, summaries = [], {}
    print(f"load {chosen.load}, {chosen.units} units of {chosen.size} inputs, {chosen.replicas} replicas")
    print(f"{'method':<11}{'solved':>8}{'epochs':>9}{'wrong':>8}{'energy':>8}{'seconds':>9}")
    for method in chosen.methods:
        seeds = range(chosen.first_seed, chosen.first_seed + chosen.seeds)
        own = [measured(method, seed, chosen) for seed in seeds]
        rows += own
        found = summaries[method] = summary(own)
        epochs = "-" if found["median_epochs"] is None else f"{found['median_epochs']:.0f}"
        energy = "-" if found["energy"] is None else f"{100 * found['energy']:.2f}"
        print(
            f"{method:<11}{found['solved']:>5}/{found['runs']:<2}{epochs:>9}{found['mean_wrong']:>8.1f}{energy:>8}"
            f"{found['seconds']:>9.1f}",
            flush=True,
        )
    if chosen.json:
        chosen.json.write_text(json.dumps({"rows": rows, **summaries, **circumstances()}, indent=1) + "\n")


if __name__ == "__main__":
    main()

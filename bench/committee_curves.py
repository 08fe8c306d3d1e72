"""Draw what bench/committee.py measured over loads: the share of runs that solve, and how long they take.

    python bench/committee_curves.py FILE... --svg docs/images/committee.svg

Reads the runs of all files, which may be the JSON documents or the lines beside them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

STYLES = {
    "coupled": ("7 coupled replicas", "#1f6fb4", "o", "-"),
    "uncoupled": ("7 independent replicas", "#c0504d", "s", "--"),
    "single": ("one committee", "#7f7f7f", "^", ":"),
}


def points(files: list[Path]) -> dict[str, dict[float, list[dict[str, Any]]]]:
    """Return the rows of all files by method and load."""
    found: dict[str, dict[float, list[dict[str, Any]]]] = {method: defaultdict(list) for method in STYLES}
    for file in files:
        text = file.read_text()
        rows = [json.loads(line) for line in text.splitlines()] if file.suffix == ".lines" else json.loads(text)["rows"]
        for row in rows:
            found[row["method"]][row["load"]].append(row)
    return found


def draw(found: dict[str, dict[float, list[dict[str, Any]]]], svg: Path) -> None:
    mpl.rcParams.update(
        {"svg.hashsalt": "committee", "svg.fonttype": "none", "font.size": 10, "axes.spines.top": False}
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for method, (label, colour, marker, line) in STYLES.items():
        loads = sorted(found[method])
        style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line, "label": label}
        solved = {load: [row["epochs"] for row in found[method][load] if row["solved"]] for load in loads}
        left.plot(loads, [100 * len(solved[load]) / len(found[method][load]) for load in loads], **style)
        some = [load for load in loads if solved[load]]
        medians = [statistics.median(solved[load]) for load in some]
        ranges = [
            [middle - min(solved[load]) for load, middle in zip(some, medians, strict=True)],
            [max(solved[load]) - middle for load, middle in zip(some, medians, strict=True)],
        ]
        right.errorbar(some, medians, yerr=ranges, capsize=2, **style)
    left.set(xlabel="load: patterns / weights", ylabel="runs that solve, %", ylim=(-4, 104))
    right.set(xlabel="load: patterns / weights", ylabel="epochs to a solution", yscale="log")
    left.legend(frameon=False, loc="center", bbox_to_anchor=(0.66, 0.5))
    for axes in (left, right):
        axes.spines["right"].set_visible(False)
        axes.grid(alpha=0.3)
    svg.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(svg, metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--svg", type=Path, required=True, metavar="FILE")
    chosen = parser.parse_args()
    draw(points(chosen.files), chosen.svg)
    print(chosen.svg)


if __name__ == "__main__":
    main()

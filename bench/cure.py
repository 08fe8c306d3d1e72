"""How often does a cure help, and how much does the search cost?

    python bench/cure.py DIR [--seeds 0,1,2] [--by findings,random,recipe] [--jobs 1] [--keep FOLDER] [--json FILE]

DIR holds training scripts and a ``labels.json`` (see bench/cases.py). For every harmed run the search is made, the
winner is applied to the whole script, and the script's own metric is compared with that of the faulty and of the
repaired form. Beside it, with the same budget:

    random   the same search over treatments drawn at random instead of by the findings
    recipe   what is often advised without looking: Adam at 1e-3, standardised inputs, He's initialisation
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cases import Case, list_cases, read_labels

from unvanish.candidates import MAX_CANDIDATES, Combination
from unvanish.cure import Request, cure
from unvanish.levels import facts_of
from unvanish.processes import Trials
from unvanish.records import Findings
from unvanish.treatments import TREATMENTS

RECIPE = Path(__file__).with_name("recipe.py")
WAYS = ("findings", "random", "recipe")


def run_case(case: Case, folder: Path, keep: Path, budget: float, by: str) -> dict[str, Any]:
    """Search a cure for one run, apply it, and return how far it went."""
    answer = keep / f"{case.name}-{by}.json"
    if answer.exists():
        return dict(json.loads(answer.read_text()))
    begin = time.perf_counter()
    row = {"case": case.name, "by": by, "is_harmed": case.is_harmed, "winner": []}
    row |= _recipe(case, folder) if by == "recipe" else _search(case, folder, keep, budget, by)
    if case.is_harmed:
        row["way"] = way(case, row["metric"])
    row |= {"seconds": time.perf_counter() - begin}
    answer.write_text(json.dumps(row))
    return row


def _search(case: Case, folder: Path, keep: Path, budget: float, by: str) -> dict[str, Any]:
    environment = {"SEED": str(case.seed), "FIXED": "1" if case.is_repaired else "0"}
    script = folder / case.label["script"]
    trials = Trials(str(script), [], False, keep / f"{case.name}-{by}", timeout=300, variables=environment)
    options = {"candidates_for": _drawn(case)} if by == "random" else {}
    begin = time.perf_counter()
    try:
        state = cure(trials, budget=budget, **options)
        seconds = time.perf_counter() - begin
        metric = None
        if state.winner is not None and case.is_harmed:
            untreated = trials.run(Request((), 0, 0, {}))
            facts = facts_of(untreated.recording)
            metric = last_metric(trials.run(Request(state.winner.treatments, 0, 0, facts)).text())
    finally:
        trials.close()
    return {
        "found": [finding.illness for finding in state.findings],
        "winner": list(state.winner.treatments) if state.winner else [],
        "used": state.used / max(state.length, 1),
        "times": seconds / max(float(state.findings.run.get("seconds", 0) or 0), 1e-9),
        "notes": state.notes,
        "tried": [(list(t.treatments), t.steps, t.value if t.values else None, t.error) for t in state.trials],
        "metric": metric,
    }


def _drawn(case: Case) -> Any:
    """Return a choice of as many treatments as the search takes, drawn at random."""

    def draw(findings: Findings) -> Sequence[Combination]:
        drawn = random.Random(f"{case.name}").sample(sorted(TREATMENTS), MAX_CANDIDATES)
        return [(treatment,) for treatment in drawn]

    return draw


def _recipe(case: Case, folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "SEED": str(case.seed), "FIXED": "1" if case.is_repaired else "0"}
    done = subprocess.run(
        [sys.executable, str(RECIPE), str(folder / case.label["script"])],
        env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    return {"metric": last_metric(done.stdout), "winner": ["recipe"], "used": 1.0}


def last_metric(output: str) -> float | None:
    """Return the metric that a case prints at its end."""
    lines = [line.split() for line in output.splitlines() if line.startswith("metric ")]
    return float(lines[-1][2]) if lines else None


def way(case: Case, metric: float | None) -> float:
    """Return the share of the way from the faulty to the repaired form's metric; 0 if nothing was applied."""
    if metric is None or metric != metric:
        return 0.0
    faulty, fixed = (case.label[key][str(case.seed)] for key in ("metric_faulty", "metric_fixed"))
    if isinstance(faulty, str) or faulty != faulty:  # the faulty run ended in nan: anything as good as fixed counts
        return 1.0 if (metric >= 0.9 * fixed) == case.label["higher_is_better"] else 0.0
    return (metric - faulty) / (fixed - faulty) if fixed != faulty else 0.0


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--by", default=",".join(WAYS), help=f"some of {','.join(WAYS)}")
    parser.add_argument("--only", default="", help="ids, separated by commas")
    parser.add_argument("--harmed", action="store_true", help="leave the healthy runs out")
    parser.add_argument("--budget", type=float, default=6.0)
    parser.add_argument("--jobs", type=int, default=1, help="so many cases at once")
    parser.add_argument("--keep", type=Path, help="keep trials and answers here; what is there is not run again")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    chosen = options()
    wanted = set(filter(None, chosen.only.split(",")))
    labels = [label for label in read_labels(chosen.folder) if not wanted or label["id"] in wanted]
    cases = list_cases(labels, [int(seed) for seed in chosen.seeds.split(",")])
    todo = [
        (case, by)
        for by in chosen.by.split(",")
        for case in cases
        if case.is_harmed or (by == "findings" and not chosen.harmed)
    ]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(chosen.jobs) as pool:
        keep = (chosen.keep or Path(temporary)).resolve()
        keep.mkdir(parents=True, exist_ok=True)
        waiting = [pool.submit(run_case, case, chosen.folder.resolve(), keep, chosen.budget, by) for case, by in todo]
        rows = []
        for future in waiting:
            row = future.result()
            rows.append(row)
            reached = f"way {row['way']:6.2f}" if row["is_harmed"] else "healthy   "
            winner = "+".join(row["winner"]) or "-"
            print(f"{row['by']:9}{row['case']:36} {reached} used {row['used']:.1f}x {winner}", flush=True)
    for by in chosen.by.split(","):
        print(summary([row for row in rows if row["by"] == by], by))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps({"rows": rows}, indent=1))


def summary(rows: list[dict[str, Any]], by: str) -> str:
    """Return the figures that count, in one line."""
    harmed = [row for row in rows if row["is_harmed"]]
    healthy = [row for row in rows if not row["is_harmed"]]
    cured = sum(row["way"] >= 0.9 for row in harmed)
    better = sum(row["way"] > 1.0 for row in harmed)
    words = f"{by}: reach 90 % of the way {cured}/{len(harmed)}, beat the human fix {better}"
    if healthy:
        words += f"; healthy runs with a recommendation {sum(bool(row['winner']) for row in healthy)}/{len(healthy)}"
    used = [row["used"] for row in harmed] or [0.0]
    words += f"; steps, in trainings: median {statistics.median(used):.1f}, worst {max(used):.1f}"
    times = [row["times"] for row in harmed if "times" in row]
    if times:
        words += f"; time, in trainings: median {statistics.median(times):.1f}, worst {max(times):.1f}"
    return words


if __name__ == "__main__":
    sys.exit(main())

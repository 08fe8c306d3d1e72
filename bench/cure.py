"""How often does a cure help, and how much does the search cost?

    python bench/cure.py DIR [--seeds 0,1,2] [--keep FOLDER] [--json FILE] [--only ID,ID] [--budget 6]

DIR holds training scripts and a ``labels.json`` (see bench/cases.py). For every harmed run the search is made, the
winner is applied to the whole script, and the script's own metric is compared with that of the faulty and of the
repaired form.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cases import Case, list_cases, read_labels

from unvanish.cure import cure
from unvanish.processes import Trials


def run_case(case: Case, folder: Path, keep: Path, budget: float) -> dict[str, Any]:
    """Search a cure for one run, apply it, and return how far it went."""
    answer = keep / f"{case.name}.json"
    if answer.exists():
        return json.loads(answer.read_text())
    os.environ.update(SEED=str(case.seed), FIXED="1" if case.is_repaired else "0")
    trials = Trials(str(folder / case.label["script"]), [], False, keep / case.name, timeout=300)
    begin = time.perf_counter()
    state = cure(trials, budget=budget)
    row: dict[str, Any] = {
        "case": case.name,
        "is_harmed": case.is_harmed,
        "found": [finding.illness for finding in state.findings],
        "winner": list(state.winner.treatments) if state.winner else [],
        "used": state.used / max(state.budget / budget, 1),
        "seconds": time.perf_counter() - begin,
        "notes": state.notes,
        "tried": [(list(t.treatments), t.steps, t.value if t.values else None, t.stopped) for t in state.trials],
    }
    if case.is_harmed:
        metric = _metric(trials(state.winner.treatments, 0, 0, _facts(trials)).output) if state.winner else None
        row |= {"metric": metric, "way": way(case, metric)}
    answer.write_text(json.dumps(row))
    return row


def _facts(trials: Trials) -> dict[str, float]:
    from unvanish.cure import facts_of

    return facts_of(trials((), 0, 0, {}).recording)


def _metric(output: str) -> float | None:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="ids, separated by commas")
    parser.add_argument("--budget", type=float, default=6.0)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    wanted = set(filter(None, options.only.split(",")))
    labels = [label for label in read_labels(options.folder) if not wanted or label["id"] in wanted]
    cases = list_cases(labels, [int(seed) for seed in options.seeds.split(",")])
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        keep = (options.keep or Path(temporary)).resolve()
        keep.mkdir(parents=True, exist_ok=True)
        for case in cases:
            row = run_case(case, options.folder.resolve(), keep, options.budget)
            rows.append(row)
            way_text = f"way {row['way']:6.2f}" if case.is_harmed else "healthy   "
            print(f"{case.name:36} {way_text} used {row['used']:.1f}x {'+'.join(row['winner']) or '-'}", flush=True)
    print(summary(rows))
    if options.json is not None:
        options.json.write_text(json.dumps({"rows": rows}, indent=1))


def summary(rows: list[dict[str, Any]]) -> str:
    """Return the figures that count, in one line."""
    harmed = [row for row in rows if row["is_harmed"]]
    healthy = [row for row in rows if not row["is_harmed"]]
    used = [row["used"] for row in harmed] or [0.0]
    cured = sum(row["way"] >= 0.9 for row in harmed)
    better = sum(row["way"] > 1.0 for row in harmed)
    changed = sum(bool(row["winner"]) for row in healthy)
    return (
        f"harmed runs that reach 90 % of the way {cured}/{len(harmed)}, that beat the human fix {better}; healthy runs "
        f"with a recommendation {changed}/{len(healthy)}; steps used, in runs: median {statistics.median(used):.1f}, "
        f"worst {max(used):.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())

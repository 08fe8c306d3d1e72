"""How often is the diagnosis right, and how often is a healthy run called ill?

    python bench/cases.py DIR [--seeds 0,1,2,3,4] [--jobs 1] [--keep FOLDER] [--json FILE]

DIR holds training scripts and a ``labels.json`` (see `read_labels`). Each script runs unmodified under
``unvanish run``; faulty scripts also in their repaired form (``FIXED=1``). A seed counts as harmed by its
outcome, not by the label of its program.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One run to judge: a script, a form and a seed."""

    label: dict[str, Any]
    is_repaired: bool
    seed: int

    @property
    def name(self) -> str:
        return f"{self.label['id']}-{'fixed' if self.is_repaired else self.label['kind']}-{self.seed}"

    @property
    def is_harmed(self) -> bool:
        harmed = self.label.get("harmed") or {}
        return self.label["kind"] == "faulty" and not self.is_repaired and bool(harmed.get(str(self.seed)))

    @property
    def is_healthy(self) -> bool:
        return self.label["kind"] == "healthy" or (self.is_repaired and bool(self.label.get("fixed_healthy")))


def read_labels(folder: Path) -> list[dict[str, Any]]:
    """Read the cases: id, script, kind, cause, accept, and which seeds are harmed."""
    return json.loads((folder / "labels.json").read_text())["cases"]


def list_cases(labels: list[dict[str, Any]], seeds: list[int]) -> list[Case]:
    """Return the runs that count: harmed faulty ones, repaired healthy ones, healthy ones."""
    forms = [Case(label, repaired, seed) for label in labels for repaired in (False, True) for seed in seeds]
    forms = [case for case in forms if not (case.is_repaired and case.label["kind"] == "healthy")]
    return [case for case in forms if case.is_harmed or case.is_healthy]


def run_case(case: Case, folder: Path, keep: Path) -> dict[str, Any]:
    """Run one script under watch and return what was said about it."""
    answer = keep / f"{case.name}.json"
    if not answer.exists():
        environment = dict(os.environ, SEED=str(case.seed), FIXED="1" if case.is_repaired else "0")
        options = ["--json", str(answer), "--quiet", "--fail-on", "never", "--folder", str(keep / case.name)]
        script = str((folder / case.label["script"]).resolve())
        command = [sys.executable, "-m", "unvanish", "run", *options, script]
        done = subprocess.run(command, env=environment, cwd=keep, capture_output=True, text=True, check=False)
        if not answer.exists():
            raise SystemExit(f"{case.name}: no diagnosis was written\n{done.stderr[-2000:]}")
    return judge(case, json.loads(answer.read_text()))


def judge(case: Case, document: dict[str, Any]) -> dict[str, Any]:
    """Compare a diagnosis with the label."""
    findings = [finding for finding in document["findings"] if finding["severity"] != "info"]
    accepted = {case.label["cause"], *case.label["accept"]}
    top = findings[0]["illness"] if findings else ""
    return {
        "case": case.name,
        "expected": case.label["cause"] or "healthy",
        "top": top,
        "severity": findings[0]["severity"] if findings else "",
        "layer": findings[0]["layer"] if findings else "",
        "is_harmed": case.is_harmed,
        "is_right": top in accepted if case.is_harmed else not findings,
        "has_critical": any(finding["severity"] == "critical" for finding in findings),
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the four figures that count, with their numbers of runs."""
    harmed = [row for row in rows if row["is_harmed"]]
    healthy = [row for row in rows if not row["is_harmed"]]
    return {
        "harmed_runs": len(harmed),
        "detected": sum(bool(row["top"]) for row in harmed) / max(len(harmed), 1),
        "right_cause": sum(row["is_right"] for row in harmed) / max(len(harmed), 1),
        "healthy_runs": len(healthy),
        "false_critical": sum(row["has_critical"] for row in healthy) / max(len(healthy), 1),
        "false_any": sum(bool(row["top"]) for row in healthy) / max(len(healthy), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="keep records here; runs that are there are not repeated")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cases = list_cases(read_labels(options.folder), [int(seed) for seed in options.seeds.split(",")])
    with tempfile.TemporaryDirectory() as temporary:
        keep = (options.keep or Path(temporary)).resolve()
        keep.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(options.jobs) as pool:
            rows = []
            for row in pool.map(lambda case: run_case(case, options.folder, keep), cases):
                rows.append(row)
                print(f"\r{len(rows)}/{len(cases)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    report(rows, options.json)


def report(rows: list[dict[str, Any]], file: Path | None) -> None:
    """Print what went wrong and the summary; write all of it where asked."""
    for row in rows:
        if not row["is_right"]:
            what = "missed or misnamed" if row["is_harmed"] else "false alarm"
            said = f"{row['severity']} {row['top']}" if row["top"] else "nothing"
            print(f"{what:18}  {row['case']:36} expected {row['expected']}, said {said}")
    figures = summarise(rows)
    print(
        f"harmed runs with a finding {figures['detected']:.1%}, right cause first {figures['right_cause']:.1%} "
        f"(of {figures['harmed_runs']}); healthy runs with a critical finding {figures['false_critical']:.1%}, "
        f"with any {figures['false_any']:.1%} (of {figures['healthy_runs']})"
    )
    if file is not None:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        machine = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
        document = {"rows": rows, "summary": figures, "commit": commit.stdout.strip(), **machine}
        file.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()

"""What `unvanish run script.py` costs a whole process, from its start to its exit.

    python bench/process.py [--seconds 30] [--pairs 3] [--json FILE]

Runs a training of about that length bare and watched in turns, and compares the CPU time of the processes
(start, imports, record, diagnosis and report included). Exit code 1 if the median is above 1.05 x + 2 s.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RATIO, SECONDS = 1.05, 2.0  # the most that watching may cost
BENCH = Path(__file__).parent
SCRIPT = f"""
import sys
import torch
sys.path.insert(0, {str(BENCH)!r})
from nets import training
torch.set_num_threads(1)
train = training("mlp", "sgd")
for step in range(int(sys.argv[1])):
    train()
"""


def cpu_seconds(command: list[str], folder: Path) -> float:
    """Run a command to its end and return its CPU time."""
    before = os.times()
    done = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    after = os.times()
    if done.returncode not in (0, 1):  # 1: findings
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr.decode()}")
    return after.children_user + after.children_system - before.children_user - before.children_system


def steps_for(seconds: float, script: Path) -> int:
    """Return how many steps of the script take so long, start left out."""
    few, many = (cpu_seconds([sys.executable, str(script), str(n)], script.parent) for n in (1, 101))
    return max(int(100 * seconds / (many - few)), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the script (default 30)")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "train.py"
        script.write_text(SCRIPT)
        steps = str(steps_for(chosen.seconds, script))
        print(f"{'bare s':>10}{'watched s':>10}{'ratio':>8}{'over':>8}")
        for _ in range(chosen.pairs):
            bare = cpu_seconds([sys.executable, str(script), steps], script.parent)
            watched = cpu_seconds([sys.executable, "-m", "unvanish", "run", str(script), steps], script.parent)
            rows.append({"bare": bare, "watched": watched, "ratio": watched / bare})
            print(f"{bare:>10.2f}{watched:>10.2f}{watched / bare:>8.3f}{watched - bare:>8.2f}", flush=True)
    over = statistics.median(row["watched"] - RATIO * row["bare"] for row in rows)
    print(f"{over:.2f} s above {RATIO} x; allowed: {SECONDS} s")
    if chosen.json:
        chosen.json.write_text(json.dumps({"rows": rows, "steps": int(steps)}, indent=1) + "\n")
    sys.exit(1 if over > SECONDS else 0)


if __name__ == "__main__":
    main()

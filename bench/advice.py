"""Is what `run` advises true? Epochs of the script of docs/reuse.md with and without the cache it advises, in turns.

The share that is stated comes from watched runs of the whole script; the lines that are pasted are those of the
advice. Both read batches in two ways: with a `DataLoader`, which reads sample by sample, and by indexing tensors. A
cache reads whole batches, so against a `DataLoader` it saves more than the frozen layers.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import unvanish

PAGE = Path(__file__).parents[1] / "docs" / "reuse.md"
LOADER = "DataLoader(dataset, 64, shuffle=True)"
INDEXED = "Indexed(*dataset.tensors)"
READING = {"DataLoader": LOADER, "indexed": INDEXED}
CLASS = """
class Indexed:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        return ((self.x[rows], self.y[rows]) for rows in torch.randperm(len(self.x)).split(64))


model = Net()
"""


def script(batches: str) -> tuple[str, str]:
    """Return the script up to its last line, and its last line."""
    found = re.search(r"```python\n# finetune\.py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    lines = found[1].replace("\nmodel = Net()\n", CLASS, 1).replace(LOADER, batches).splitlines()
    return "\n".join(lines[:-1]) + "\n", lines[-1]


def advice(text: str) -> dict[str, Any]:
    """Return what a watched run of a script advises."""
    Path("watched.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "unvanish", "run", "--quiet", "--no-record", "--json", "found.json", "watched.py"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(Path("found.json").read_text(encoding="utf-8"))["advice"][0]
    return found


def seconds(epoch: Callable[[], object]) -> float:
    """Return the CPU time of an epoch; what it prints is dropped."""
    with contextlib.redirect_stdout(io.StringIO()):
        begin = time.process_time()
        epoch()
        return time.process_time() - begin


def measure(reading: str, pairs: int) -> dict[str, Any]:
    """Return the row of one way to read batches."""
    text, last = script(READING[reading])
    found = [advice(text + last) for _ in range(5)]
    shares = sorted(one["share_of_step"] for one in found)
    space: dict[str, Any] = {"unvanish": unvanish}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(text, space)
    exec(found[0]["code"].partition("for f, y")[0].replace("cache/", f"cache-{reading}/"), space)
    plain = eval(READING[reading], space)
    cached, head, train = space["features"].loader(64, shuffle=True), space["features"].head, space["train"]
    ratios = []
    for number in range(pairs + 1):
        times = [
            seconds(lambda chosen=chosen: train(*chosen, 1))
            for chosen in ((space["model"], plain), (head, cached), (head, cached), (space["model"], plain))
        ]
        if number:  # the first is for warming up
            ratios.append((times[1] + times[2]) / (times[0] + times[3]))
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "reading": reading,
        "stated": round(1 - statistics.median(shares), 3),
        "stated_low": round(1 - shares[-1], 3),
        "stated_high": round(1 - shares[0], 3),
        "ratio": round(middle, 3),
        "low": round(low, 3),
        "high": round(high, 3),
        "pairs": pairs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="pairs of turns (default 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON too")
    chosen = parser.parse_args()
    file = None if chosen.json is None else chosen.json.absolute()
    print(f"{'batches':<12}{'stated':>8}{'':>16}{'measured':>10}{'quartiles':>18}")
    rows = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for reading in READING:
            row = measure(reading, max(chosen.pairs, 2))
            rows.append(row)
            stated = f"{row['stated_low']:.2f} to {row['stated_high']:.2f}"
            print(
                f"{reading:<12}{row['stated']:>8.2f}{stated:>16}{row['ratio']:>10.2f}"
                f"{row['low']:>10.2f} to {row['high']:.2f}",
                flush=True,
            )
    if file is not None:
        file.write_text(json.dumps({"rows": rows, "torch": torch.__version__}, indent=1) + "\n")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    main()

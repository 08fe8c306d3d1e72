"""What folding batch norms saves at prediction, on three nets.

    python bench/fold.py [--pairs 15] [--json FILE]

Each net has batch norms with statistics of their own, and predicts one batch in eval mode without gradients, on one
thread. Folded and unfolded predictions take turns, A B B A; `ratio` is the CPU time of a folded one over that of an
unfolded one, the median over the pairs with its quartiles. On one thread with nothing else to do that is time; on a
busy machine it is not the wait for others. `difference` is the largest distance between two outputs,
as a share of the largest output.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nets import training
from overhead import circumstances
from torch import Tensor, nn

import unvanish

SECONDS = 0.2  # of one turn, at least


def residual() -> tuple[nn.Module, Tensor]:
    """The six residual blocks of `nets`."""
    one = training("cnn", "sgd")
    return one.model, one.inputs


def perceptron() -> tuple[nn.Module, Tensor]:
    """784-512x8-10 with a batch norm after each hidden layer, batch 128."""
    layers = [
        module
        for a, b in itertools.pairwise([784, *[512] * 8])
        for module in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.Linear(512, 10)), torch.randn(128, 784)


def plain_cnn() -> tuple[nn.Module, Tensor]:
    """Eight convolutions of 32 to 128 channels in a row, with pooling, on 32 x 32 images, batch 32."""
    layers: list[nn.Module] = []
    for place, (a, b) in enumerate(itertools.pairwise([3, 32, 32, 64, 64, 128, 128, 128, 128])):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        if place % 2:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4, 10)), torch.randn(32, 3, 32, 32)


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "residual": residual,
    "perceptron": perceptron,
    "plain-cnn": plain_cnn,
}


def prepared(net: str) -> tuple[nn.Module, Tensor]:
    """Return a net in eval mode whose norms have statistics, scales and shifts of their own, and a batch."""
    torch.manual_seed(0)
    model, x = NETS[net]()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
        for _ in range(20):
            model(x + 0.1 * torch.randn_like(x))
    return model.eval(), x


@torch.no_grad()
def seconds(model: nn.Module, x: Tensor, times: int) -> float:
    """Return the CPU time of one prediction."""
    begin = time.process_time()
    for _ in range(times):
        model(x)
    return (time.process_time() - begin) / times


def measure(net: str, pairs: int) -> dict[str, Any]:
    """Return the row of one net."""
    plain, x = prepared(net)
    folded, _ = prepared(net)
    norms = sum(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in plain.modules())
    changes = unvanish.treat(folded, None, "fold-bn", inputs=(x,))
    changes.keep()
    left = sum(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in folded.modules())
    with torch.no_grad():
        before, after = plain(x), folded(x)
    times = max(int(SECONDS / max(seconds(plain, x, 2), seconds(folded, x, 2))), 1)
    ratios, unfolded_times, folded_times = [], [], []
    for _ in range(pairs):
        a1, b1, b2, a2 = (seconds(model, x, times) for model in (plain, folded, folded, plain))
        ratios.append((b1 + b2) / (a1 + a2))
        unfolded_times.append((a1 + a2) / 2)
        folded_times.append((b1 + b2) / 2)
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "net": net,
        "norms": norms,
        "folded": norms - left,
        "unfolded_ms": round(1e3 * statistics.median(unfolded_times), 3),
        "folded_ms": round(1e3 * statistics.median(folded_times), 3),
        "ratio": round(middle, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "difference": float((before - after).abs().max() / before.abs().max()),
        "pairs": pairs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="pairs of turns for each net, at least 7 (default 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON too")
    chosen = parser.parse_args()
    if chosen.pairs < 7:
        parser.error(f"--pairs: found {chosen.pairs}, expected at least 7")
    torch.set_num_threads(1)
    rows = []
    head = f"{'net':<12}{'norms':>6}{'folded':>8}{'unfolded ms':>13}{'folded ms':>11}"
    print(f"{head}{'ratio':>8}{'low':>8}{'high':>8}{'difference':>12}")
    for net in NETS:
        row = measure(net, chosen.pairs)
        rows.append(row)
        print(
            f"{net:<12}{row['norms']:>6}{row['folded']:>8}{row['unfolded_ms']:>13.2f}{row['folded_ms']:>11.2f}"
            f"{row['ratio']:>8.3f}{row['low']:>8.3f}{row['high']:>8.3f}{row['difference']:>12.1e}",
            flush=True,
        )
    if chosen.json:
        chosen.json.write_text(json.dumps({"rows": rows, **circumstances()}, indent=1) + "\n")


if __name__ == "__main__":
    main()

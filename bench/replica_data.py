"""The data that coupled replicas are compared on: small sets, where a way to train can matter; a network for each.

What is drawn (rows, wrong labels) is drawn from the seed. Inputs are scaled by what the training rows say.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Split = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """Data, a network for them, and how long it is trained."""

    what: str
    split: Callable[[int], Split]  # of a seed: training rows, test rows
    make_model: Callable[[], nn.Module]
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy
    steps: int = 600
    batch: int = 32
    seeds: int = 10
    tuning_seeds: int = 3
    rates: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01)


def tasks(folder: Path | None, device: str = "cpu") -> dict[str, Task]:
    """Return all tasks whose data are at hand; two need files in a folder."""
    found = {
        "digits-noisy": Task("digits, 400 rows, 20 % wrong labels", _digits(400, 0.2), _perceptron(64, 10)),
        "digits-few": Task("digits, 200 rows", _digits(200, 0.0), _perceptron(64, 10)),
        "cancer": Task(
            "breast cancer, 80 rows, 10 % wrong labels", _cancer, _perceptron(30, 2),
            batch=16, rates=(0.03, 0.01, 0.003, 0.001),
        ),
        "teacher": Task("classes of a random network, 600 rows", _teacher, _perceptron(20, 4)),
    }  # fmt: skip
    if folder and (folder / "auto-mpg.csv").exists():
        split = functools.partial(_mpg, folder / "auto-mpg.csv")
        found["mpg"] = Task(
            "auto-mpg, 100 rows", split, _perceptron(9, 1), F.mse_loss,
            batch=16, tuning_seeds=4, rates=(0.1, 0.03, 0.01, 0.003),
        )  # fmt: skip
    if folder and (folder / "cifar10-jpeg.npz").exists():
        split = functools.partial(_cifar, folder / "cifar10-jpeg.npz", device)
        found["cifar"] = Task(
            "CIFAR-10, 2000 rows, images of 16 x 16", split, lambda: Residual().to(device),
            steps=1260, tuning_seeds=1, rates=(0.3, 0.1, 0.03),
        )  # fmt: skip
    return found


class Residual(nn.Module):
    """A convolution, two residual blocks with batch norm, and a linear layer: 5 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.one, self.two = _branch(8, 8, 1), _branch(8, 16, 2)
        self.shortcut = nn.Conv2d(8, 16, 1, stride=2, bias=False)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.one(x))
        x = F.relu(self.shortcut(x) + self.two(x))  # (batch, 16, 8, 8)
        return self.head(x.mean((2, 3)))


def _branch(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
    )  # fmt: skip


def _perceptron(inputs: int, outputs: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        hidden = nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
        return nn.Sequential(*hidden, nn.Linear(64, outputs))

    return make


def _digits(rows: int, wrong: float) -> Callable[[int], Split]:
    def split(seed: int) -> Split:
        x, y = _sklearn("load_digits")
        return _cut(x / 16, y, rows, seed, wrong)

    return split


def _cancer(seed: int) -> Split:
    x, y = _sklearn("load_breast_cancer")
    return _standardised(_cut(x, y, 80, seed, 0.1))


def _teacher(seed: int) -> Split:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4))
    x = torch.randn(3600, 20)
    with torch.no_grad():
        nn.init.normal_(network[0].weight, std=20**-0.5)
        nn.init.normal_(network[2].weight, std=30**-0.5)
        return _cut(x, network(x).argmax(1), 600, seed)


def _mpg(file: Path, seed: int) -> Split:
    table = torch.tensor(np.genfromtxt(file, delimiter=",", skip_header=1), dtype=torch.float32)
    table = table[~table.isnan().any(1)]
    (x, y), (test_x, test_y) = _standardised(_cut(table[:, 1:], table[:, :1], 100, seed))
    return (x, (y - y.mean()) / y.std()), (test_x, (test_y - y.mean()) / y.std())


@functools.cache
def _cifar_images(file: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Decode a part of CIFAR-10 at half its size: inputs, labels, and which are for training."""
    from PIL import Image

    with np.load(file) as stored:
        jpeg, offsets, labels, is_train = (stored[name] for name in ("jpeg", "offsets", "labels", "is_train"))
    shuffled = np.random.default_rng(0).permutation(len(labels))  # the file may be sorted by class
    chosen = np.concatenate([shuffled[is_train[shuffled]][:10_000], shuffled[~is_train[shuffled]][:2000]])
    images = [
        np.asarray(Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB")) for i in chosen
    ]
    x = torch.tensor(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return F.avg_pool2d((x - 0.5) / 0.25, 2), torch.tensor(labels[chosen]).long(), torch.tensor(is_train[chosen])


def _cifar(file: Path, device: str, seed: int) -> Split:
    x, y, is_train = _cifar_images(file)
    rows = torch.randperm(int(is_train.sum()), generator=torch.Generator().manual_seed(seed))[:2000]
    x, y = x.to(device), y.to(device)
    return (x[is_train][rows], y[is_train][rows]), (x[~is_train], y[~is_train])


@functools.cache
def _sklearn(name: str) -> tuple[Tensor, Tensor]:
    import sklearn.datasets

    x, y = getattr(sklearn.datasets, name)(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y).long()


def _standardised(split: Split) -> Split:
    """Scale inputs by mean and deviation of the training rows."""
    (x, y), (test_x, test_y) = split
    mean, deviation = x.mean(0), x.std(0)
    return ((x - mean) / deviation, y), ((test_x - mean) / deviation, test_y)


def _cut(x: Tensor, y: Tensor, rows: int, seed: int, wrong: float = 0.0) -> Split:
    """Draw training rows and leave the others for the test; make a share of the training labels wrong."""
    order = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(x), generator=order)
    x, y = x[drawn], y[drawn]
    labels = y[:rows].clone()
    if wrong:
        at = torch.rand(rows, generator=order) < wrong
        classes = int(y.max()) + 1
        labels[at] = (labels[at] + torch.randint(1, classes, (int(at.sum()),), generator=order)) % classes
    return (x[:rows], labels), (x[rows:], y[rows:])

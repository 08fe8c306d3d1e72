"""The nets of `tests/golden/write.py` as a user of torch writes them, with what the loader is told beside the file."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unvanish.reuse.weights.readers import apart, dump, keras3
from unvanish.reuse.weights.readers.guard import Budget


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse here: a process for each file takes a quarter of a second; the tests of hostile files have them."""

    def read_tree(form: apart.Form, source: Path | bytes, budget: Budget) -> apart.Entry:
        stream = io.BytesIO()
        dump.main(form, source if isinstance(source, bytes) else str(source), apart.limits(budget), stream)
        stream.seek(0)
        return apart.received(stream, budget)

    monkeypatch.setattr(apart, "read_tree", read_tree)
    monkeypatch.setattr(keras3, "read_tree", read_tree)


class Case(NamedTuple):
    """A net for a golden file.

    `channels`: the input's channels go from last to first; `options`: of `load_weights`.
    """

    build: Callable[[], nn.Module]
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    channels: bool = True


class First(nn.Module):
    """A recurrent layer, of which the outputs are wanted."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class Crop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :-1, :-1]


class LastStep(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0][:, -1]


class BothEnds(nn.Module):
    def __init__(self, inner: nn.GRU) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(list(self.inner(x)[1]), dim=1)


class Swap(nn.Module):
    """Steps of a sequence to the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.block = Block(4, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, padding="same")
        self.bn2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return self.shortcut(x) + self.conv2(F.relu(self.bn2(y)))


class Transformer(nn.Module):
    """Registered in another order than it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        x = self.norm1(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.norm2(x + self.down(F.gelu(self.up(x))))
        return self.head(x.mean(1))


class NnxCnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.fc = nn.Sequential(nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn1(self.conv1(x))).flatten(1))


class NnxRecurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.gru = nn.GRU(4, 4, batch_first=True)
        self.old = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.old(self.gru(self.lstm(x)[0])[0])[0]


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 2),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(24, 6),
        nn.ReLU(),
        nn.Linear(6, 5),
    )


def generator() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 24), nn.BatchNorm1d(24), nn.Unflatten(1, (4, 2, 3)), nn.ConvTranspose2d(4, 3, 3, stride=2)
    )


def flax_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 6),
        nn.ReLU(),
        nn.Linear(6, 3),
    )


def nested() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), nn.Flatten(), nn.Linear(48, 4))


def net_lstm() -> nn.Module:
    return nn.Sequential(
        First(nn.LSTM(4, 6, batch_first=True)), LastStep(nn.LSTM(6, 4, batch_first=True)), nn.Linear(4, 3)
    )


KERAS = {
    "dense": Case(lambda: nn.Linear(4, 4)),
    "conv1d": Case(lambda: nn.Conv1d(4, 4, 3)),
    "conv2d": Case(lambda: nn.Conv2d(3, 3, 3)),
    "conv2d_groups": Case(lambda: nn.Conv2d(4, 4, 3, groups=2)),
    "conv3d": Case(lambda: nn.Conv3d(2, 2, 2)),
    "conv2d_same": Case(lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(2, 3, 3, stride=2))),
    "depthwise": Case(lambda: nn.Conv2d(3, 6, 3, groups=3)),
    "separable": Case(lambda: nn.Sequential(nn.Conv2d(3, 3, 3, groups=3, bias=False), nn.Conv2d(3, 4, 1))),
    "conv2d_transpose": Case(lambda: nn.ConvTranspose2d(3, 3, 3, stride=2)),
    "conv2d_transpose_same": Case(lambda: nn.ConvTranspose2d(3, 3, 4, stride=2, padding=1)),
    "conv2d_transpose_odd": Case(lambda: nn.Sequential(nn.ConvTranspose2d(3, 2, 3, stride=2), Crop())),
    "batch_norm": Case(lambda: nn.BatchNorm2d(3)),
    "batch_norm_bare": Case(lambda: nn.BatchNorm1d(4)),
    "batch_norm_unscaled": Case(lambda: nn.BatchNorm1d(4)),
    "layer_norm": Case(lambda: nn.LayerNorm(4), channels=False),
    "group_norm": Case(lambda: nn.GroupNorm(2, 4)),
    "lstm": Case(lambda: First(nn.LSTM(4, 4, batch_first=True)), channels=False),
    "lstm_two": Case(lambda: First(nn.LSTM(3, 4, num_layers=2, batch_first=True)), channels=False),
    "lstm_both": Case(lambda: First(nn.LSTM(4, 3, bidirectional=True, batch_first=True)), channels=False),
    "gru": Case(lambda: First(nn.GRU(4, 4, batch_first=True)), channels=False),
    "rnn": Case(lambda: First(nn.RNN(4, 4, batch_first=True)), channels=False),
    "time_distributed": Case(lambda: nn.Linear(4, 4), channels=False),
    "attention": Case(Attend, channels=False),
    "embedding": Case(lambda: nn.Embedding(11, 4)),
    "prelu": Case(lambda: nn.PReLU(3)),
    "leaky_relu": Case(lambda: nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU())),
    "flatten": Case(lambda: nn.Sequential(nn.Flatten(), nn.Linear(60, 6))),
    "generator": Case(generator),
    "net_cnn": Case(cnn),
    "net_lstm": Case(net_lstm, channels=False),
    "net_gru": Case(
        lambda: nn.Sequential(BothEnds(nn.GRU(4, 4, bidirectional=True, batch_first=True)), nn.Linear(8, 3)),
        channels=False,
    ),
    "net_transformer": Case(Transformer),
    "net_residual": Case(Residual),
    "net_nested": Case(nested),
}
FLAX = {
    "dense": Case(lambda: nn.Linear(4, 4)),
    "conv": Case(lambda: nn.Conv2d(3, 3, 3)),
    "conv_transpose": Case(lambda: nn.ConvTranspose2d(3, 3, 3, stride=2)),
    "batch_norm": Case(lambda: nn.BatchNorm2d(3)),
    "layer_norm": Case(lambda: nn.LayerNorm(4, eps=1e-6), channels=False),
    "group_norm": Case(lambda: nn.GroupNorm(2, 4, eps=1e-6)),
    "lstm": Case(lambda: First(nn.LSTM(4, 4, batch_first=True)), channels=False),
    "gru": Case(lambda: First(nn.GRU(4, 4, batch_first=True)), channels=False),
    "rnn": Case(lambda: First(nn.RNN(4, 4, batch_first=True)), channels=False),
    "attention": Case(Attend, channels=False),
    "prelu": Case(nn.PReLU),
    "embedding": Case(lambda: nn.Embedding(11, 4)),
    "net_cnn": Case(flax_cnn),
    "nnx_cnn": Case(NnxCnn),
    "nnx_recurrent": Case(NnxRecurrent, channels=False),
}


def onnx_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(80, 3),
    )


FOLDED = {"folded_batch_norm": "identity"}
ONNX = {
    "linear": Case(lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), channels=False),
    "conv_transpose": Case(lambda: nn.ConvTranspose2d(3, 3, 3, 2, 1, 1), channels=False),
    "layer_norm": Case(lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), channels=False),
    "prelu": Case(lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.PReLU(3)), channels=False),
    "lstm": Case(lambda: First(nn.LSTM(4, 3, bidirectional=True, batch_first=True)), channels=False),
    "gru": Case(lambda: First(nn.GRU(4, 4, batch_first=True)), channels=False),
    "net_cnn": Case(onnx_cnn, FOLDED, channels=False),
    "net_cnn_dynamo": Case(onnx_cnn, FOLDED, channels=False),
    "net_cnn_whole": Case(onnx_cnn, channels=False),
}

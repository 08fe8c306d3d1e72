"""The three trainings that the cost of watching is measured on: small batches, where watching costs most.

Synthetic data, so that nothing but the step itself is timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NETS = ("mlp", "cnn", "transformer")
OPTIMIZERS = ("sgd", "adamw")


@dataclass
class Training:
    """A model with its optimiser and one batch; calling it makes one step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: Tensor
    targets: Tensor
    inside: Callable[[], float] = lambda: 0.0  # seconds spent so far in what watches

    def __call__(self, after_backward: Callable[[Tensor], None] | None = None) -> Tensor:
        """Make one training step and return its loss."""
        self.optimizer.zero_grad()
        outputs = self.model(self.inputs)
        loss = F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), self.targets)
        loss.backward()
        if after_backward is not None:
            after_backward(loss)
        self.optimizer.step()
        return loss.detach()


def training(net: str, optimizer: str, *, seed: int = 0) -> Training:
    """Return a fresh training of one of `NETS` with one of `OPTIMIZERS`."""
    torch.manual_seed(seed)
    model, inputs, targets = {"mlp": _mlp, "cnn": _cnn, "transformer": _transformer}[net]()
    if optimizer == "sgd":
        return Training(
            model,
            torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4),
            inputs,
            targets,
        )
    return Training(model, torch.optim.AdamW(model.parameters(), lr=1e-3), inputs, targets)


def _mlp() -> tuple[nn.Module, Tensor, Tensor]:
    """784-512x8-10, batch 128: 2.25 M parameters, each used only 128 times a step."""
    widths = [784, *[512] * 8]
    layers = [f(a, b) for a, b in itertools.pairwise(widths) for f in (nn.Linear, _relu)]
    return nn.Sequential(*layers, nn.Linear(512, 10)), torch.randn(128, 784), torch.randint(10, (128,))


def _relu(_inputs: int, _outputs: int) -> nn.Module:
    return nn.ReLU()


class _Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(y)) + self.shortcut(x))


def _cnn() -> tuple[nn.Module, Tensor, Tensor]:
    """Six residual blocks of 20, 40 and 80 channels on 32 x 32 images, batch 64: 0.27 M parameters."""
    model = nn.Sequential(
        nn.Conv2d(3, 20, 3, 1, 1, bias=False),
        nn.BatchNorm2d(20),
        nn.ReLU(),
        *[_Residual(20, 20, 1) for _ in range(2)],
        _Residual(20, 40, 2),
        _Residual(40, 40, 1),
        _Residual(40, 80, 2),
        _Residual(80, 80, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(80, 10),
    )
    return model, torch.randn(64, 3, 32, 32), torch.randint(10, (64,))


class _LanguageModel(nn.Module):
    """A causal transformer of width 256 with 4 layers."""

    def __init__(self, tokens: int = 64, width: int = 256, length: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True) for _ in range(4)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position  # (batch, length, width)
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return self.head(self.norm(x))


def _transformer() -> tuple[nn.Module, Tensor, Tensor]:
    """Width 256, 4 layers, 64 tokens, batch 16: 3.2 M parameters, each used 1024 times a step."""
    return _LanguageModel(), torch.randint(64, (16, 64)), torch.randint(64, (16 * 64,))

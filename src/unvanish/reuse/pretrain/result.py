"""What a pretraining came to: how much of its input each layer can restore, and pictures of that."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import OptionError
from ..picture import blank, save


@dataclass(frozen=True)
class Learnt:
    """What one layer has learnt.

    Args:
        name: Of the layer.
        visible: What its rows were taken for: ``"bernoulli"`` or ``"gaussian"``; empty if it was frozen and left.
        unexplained: Of held-out rows: mean squared error of what is restored over their variance, before the first
            epoch and after each. 1 is no better than their mean.
        gap: Of a Boltzmann machine: free energy of held-out rows minus that of as many training rows, in nats, at
            the end.
        best: The epoch whose weights are kept.
        seconds: Spent.
        restored: The examples as they are restored from this layer's features, through all layers below; None if
            something on the way, such as pooling, cannot be turned back.
    """

    name: str
    visible: str
    unexplained: tuple[float, ...] = ()
    gap: float = math.nan
    best: int = 0
    seconds: float = 0.0
    restored: Tensor | None = None

    def __str__(self) -> str:
        if not self.visible:
            return f"layer {self.name!r}: frozen, left as it is"
        share = self.unexplained[self.best]
        gap = "" if math.isnan(self.gap) else f", free-energy gap {self.gap:.2f}"
        return (
            f"layer {self.name!r}: {self.visible}, {share:.1%} of held-out rows unexplained at epoch {self.best} "
            f"of {len(self.unexplained) - 1}{gap}, {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class Pretraining:
    """What `pretrain` did, layer by layer.

    Args:
        method: ``"rbm"`` or ``"autoencoder"``.
        layers: Lowest first.
        examples: Some held-out inputs.
    """

    method: str
    layers: tuple[Learnt, ...]
    examples: Tensor

    def __str__(self) -> str:
        return "\n".join((f"pretrained by {self.method}:", *(f"  {layer}" for layer in self.layers)))

    def draw(self, file: str | Path, shape: tuple[int, ...] | None = None) -> Path:
        """Draw held-out examples, and how they are restored from the features of each layer.

        Args:
            file: Ends in .png, .svg or .pdf.
            shape: Of one example as a picture, (height, width) or (channels, height, width); by default its own,
                or the square of so many numbers. Else examples are drawn as curves.

        Raises:
            OptionError: if matplotlib is not there, the shape does not fit, or the file cannot be written.
        """
        shape = _picture_shape(self.examples, shape)
        rows = [("held out", self.examples)]
        rows += [(f"from {layer.name!r}", layer.restored) for layer in self.layers if layer.restored is not None]
        columns = len(self.examples)
        figure = blank("Pretraining.draw()", 1.1 * columns + 1, 1.15 * len(rows))
        cells = figure.subplots(len(rows), columns, squeeze=False)
        for line, (title, examples) in zip(cells, rows, strict=True):
            for cell, example in zip(line, examples, strict=True):
                _draw_one(cell, example, shape)
            line[0].set_ylabel(title, rotation=0, ha="right", va="center")
        return save("Pretraining.draw()", figure, file, "draw('restored.png')")


def _picture_shape(examples: Tensor, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    size = examples[0].numel()
    if shape is not None:
        if math.prod(shape) != size or len(shape) not in (2, 3):
            raise OptionError(
                f"Pretraining.draw(): shape: found {shape!r}, expected (height, width) or (channels, height, width) of "
                f"{size} numbers. Leave it out to see curves or squares."
            )
        return shape
    if examples.dim() == 4 and examples.shape[1] in (1, 3):
        return tuple(examples.shape[1:])
    if examples.dim() == 3:
        return tuple(examples.shape[1:])
    side = math.isqrt(size)
    return (side, side) if side * side == size and side > 3 else None


def _draw_one(cell: Any, example: Tensor, shape: tuple[int, ...] | None) -> None:
    cell.set_xticks([])
    cell.set_yticks([])
    numbers = example.detach().float().cpu()
    if shape is None:
        cell.plot(numbers.flatten().numpy(), linewidth=0.8)
        return
    picture = numbers.reshape(shape)
    if picture.dim() == 3:
        picture = picture.movedim(0, -1).squeeze(-1)
    if picture.dim() == 3:
        low, high = picture.min(), picture.max()
        picture = (picture - low) / (high - low).clamp(min=1e-12)
    cell.imshow(picture.numpy(), cmap="gray")

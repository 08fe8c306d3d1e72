"""How layers are pretrained: the settings of `pretrain`, checked, and what makes a layer learn by them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor

from ...errors import OptionError
from .autoencoder import Autoencoder
from .rbm import RbmLearner, Visible
from .stages import Stage

Method = Literal["rbm", "autoencoder"]


class Learner(Protocol):
    """What makes a layer learn: a Boltzmann machine or an autoencoder."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Weight, hidden bias, and what else learns."""

    def step(self, rows: Tensor, epoch: int) -> None:
        """Learn from a batch."""

    def reconstruct(self, rows: Tensor) -> Tensor:
        """Restore rows from their features."""

    def decode(self, hidden: Tensor, like: Tensor) -> Tensor:
        """Restore rows, shaped as some others, from features."""

    def gap(self, seen: Tensor, held_out: Tensor) -> float:
        """Say how much less likely held-out rows are."""


@dataclass(frozen=True)
class Settings:
    """How layers learn; see `pretrain`."""

    method: Method
    epochs: int
    batch_size: int
    lr: float | None
    k: int
    persistent: bool
    corruption: float
    tied: bool
    patience: int
    tell: Callable[[str], object]

    def learner(self, stage: Stage, rows: Tensor, visible: Visible) -> Learner:
        """Return what makes a layer learn from rows."""
        has_bias = stage.layer.bias is not None
        if self.method == "autoencoder":
            return Autoencoder(
                stage, rows, visible, lr=self.lr, corruption=self.corruption, is_tied=self.tied, has_bias=has_bias
            )
        hidden = stage.layer.weight.shape[0]
        return RbmLearner(rows, hidden, visible, lr=self.lr, k=self.k, is_persistent=self.persistent, has_bias=has_bias)

    def check(self, visible: Visible | None, held_out: float) -> None:
        """Refuse what cannot be used.

        Raises:
            OptionError: naming it.
        """

        def refuse(name: str, found: object, expected: str, example: str) -> OptionError:
            return OptionError(
                f"pretrain(): {name}: found {found!r}, expected {expected}. Nothing was changed. Write {example}."
            )

        if self.method not in get_args(Method):
            raise refuse("method", self.method, "'rbm' or 'autoencoder'", "method='autoencoder'")
        if visible not in (None, *get_args(Visible)):
            raise refuse("visible", visible, "'bernoulli', 'gaussian' or None", "visible='gaussian'")
        for name in ("epochs", "batch_size", "k", "patience"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise refuse(name, number, "a whole number above 0", f"{name}=10")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise refuse("lr", self.lr, "a number above 0", "lr=0.01")
        if not 0 <= self.corruption < 1:
            raise refuse("corruption", self.corruption, "a share from 0 to below 1", "corruption=0.25")
        if not 0 <= held_out < 1:
            raise refuse("held_out", held_out, "a share from 0 to below 1", "held_out=0.1")


def kind_of(rows: Tensor, visible: Visible | None) -> Visible:
    """Return what inputs are taken for.

    Raises:
        OptionError: if they are said to be between 0 and 1 and are not.
    """
    is_between = bool((rows >= 0).all() and (rows <= 1).all())
    if visible == "bernoulli" and not is_between:
        raise OptionError(
            f"pretrain(): visible: found 'bernoulli' for inputs from {float(rows.min()):.3g} to "
            f"{float(rows.max()):.3g}, expected inputs between 0 and 1. Nothing was changed. Use visible='gaussian'."
        )
    return visible or ("bernoulli" if is_between else "gaussian")

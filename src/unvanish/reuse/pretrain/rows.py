"""The rows that layers are pretrained on: gathered from what a user has, and brought to a common scale."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ...errors import OptionError

_LEAST = 2
_ROUNDING = 1e-5  # of a number: what float32 leaves of one, after sums over many rows


def gather(data: Any) -> Tensor:
    """Return all inputs as one tensor, one example a row.

    Args:
        data: A tensor; or batches, such as those of a `DataLoader`; or a `Dataset`. Of a tuple the first is meant.

    Raises:
        OptionError: if there are no floating-point rows in it, or one is not finite.
    """
    if isinstance(data, Tensor):
        rows = data.detach()
    else:
        batches = DataLoader(data, batch_size=256) if isinstance(data, Dataset) else data
        found = [_inputs(batch) for batch in batches] if isinstance(batches, Iterable) else []
        if not found or any(batch.shape[1:] != found[0].shape[1:] for batch in found):
            raise _unusable(f"{type(data).__name__} with {'inputs of several shapes' if found else 'no batch'}")
        rows = torch.cat(found)
    if not rows.is_floating_point() or rows.dim() < 2 or len(rows) < _LEAST:
        raise _unusable(f"{rows.dtype} of shape {tuple(rows.shape)}")
    if not bool(torch.isfinite(rows).all()):
        raise _unusable("nan or infinity")
    return rows


def _inputs(batch: Any) -> Tensor:
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(first, Tensor):
        raise _unusable(f"batches of {type(first).__name__}")
    return first.detach()


def _unusable(found: str) -> OptionError:
    return OptionError(
        f"pretrain(): data: found {found}, expected finite floating-point inputs as the model takes them, one a row, "
        f"at least {_LEAST}: a tensor, a Dataset or a DataLoader. Nothing was changed. "
        "Write pretrain(model, x_train)."
    )


@dataclass(frozen=True)
class Scale:
    """Brings Gaussian rows to mean 0 and spread 1, and takes that into the weights when they are learnt.

    A linear layer takes both: ``W (x - m) / s + c = (W / s) x + (c - W m / s)``, exactly. A convolution with padding
    takes one factor for all, and no shift; and a layer without a bias no shift.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, rows: Tensor, layer: nn.Module, visible: str) -> Scale:
        """Return the scale of rows that a layer reads; that of rows between 0 and 1 is theirs."""
        one = torch.ones((), dtype=rows.dtype, device=rows.device)
        if visible == "bernoulli":
            return cls(0 * one, one)
        if not isinstance(layer, nn.Linear):
            return cls(0 * one, _positive(rows.std(), rows.mean()))
        if layer._parameters.get("bias") is None:
            return cls(0 * one, _positive(rows.square().mean(0).sqrt(), 0 * rows[0]))
        return cls(rows.mean(0), _positive(rows.std(0), rows.mean(0)))

    def apply(self, rows: Tensor) -> Tensor:
        return (rows - self.mean) / self.std

    def undo(self, rows: Tensor) -> Tensor:
        return rows * self.std + self.mean

    def into(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights and biases that do to rows what the given ones do to scaled rows."""
        scaled = weight / self.std
        return scaled, bias - (scaled @ self.mean if self.mean.dim() else 0.0)


def _positive(std: Tensor, mean: Tensor) -> Tensor:
    """Return spreads, and 1 where there is none but rounding: what does not vary is not blown up."""
    return torch.where(std > _ROUNDING * mean.abs(), std, torch.ones_like(std))

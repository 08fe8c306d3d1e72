"""What a gradient scaler does to the losses of mixed precision."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class MixedPrecision:
    """The gradient scaler of a training, as far as it was seen.

    ``scaler``: None as long as none scaled a loss. ``waiting``: losses it has scaled and that no backward pass began
    from yet.
    """

    def __init__(self) -> None:
        self.scaler: Any = None
        self.waiting = 0
        self._scale: Tensor | None = None  # of the running backward pass

    def note_scaled(self, scaler: Any) -> None:
        """See a loss scaled."""
        if scaler.is_enabled():
            self.scaler, self.waiting = scaler, self.waiting + 1

    def begin_backward(self) -> None:
        """Look by how much the loss is scaled that a backward pass begins from."""
        self._scale = getattr(self.scaler, "_scale", None) if self.waiting else None
        self.waiting = max(self.waiting - 1, 0)

    def value_of(self, loss: Tensor) -> float | Tensor:
        """Return the loss without its scale: as a number where that is free, else as a copy on its device."""
        if self._scale is None and loss.is_cpu:
            return loss.item()
        value = loss.detach()
        if self._scale is not None:
            value = value / self._scale.to(value.device)
        return value.item() if value.device.type == "cpu" else value.reshape(()).float().clone()

    def copy_of_scale(self) -> Tensor | None:
        """Return the scale of the running backward pass as it is now; None if there is none."""
        return None if self._scale is None else self._scale.clone()

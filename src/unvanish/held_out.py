"""The loss on held-out data: what a criterion module computes while gradients are off.

`backward` is never called on it, so the criterion itself is watched. A loss computed by a function
(`F.cross_entropy` under `no_grad`) leaves no trace and is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

MAX_WAITING = 4096


class HeldOut:
    """Collects the losses of one evaluation at a time.

    Args:
        guard: Wraps a callback so that its failure switches watching off instead of the training.
    """

    def __init__(self, guard: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._guard = guard
        self._handles: list[Any] = []
        self._criteria: WeakSet[nn.Module] = WeakSet()
        self.waiting: list[Tensor] = []  # losses since the last `take`
        self._evaluations = 0

    def meet(self, criterion: nn.Module) -> None:
        """Watch a loss module from now on."""
        if criterion not in self._criteria:
            self._criteria.add(criterion)
            self._handles.append(criterion.register_forward_hook(self._guard(self._after_call)))

    def _after_call(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or len(self.waiting) >= MAX_WAITING:
            return
        if isinstance(output, Tensor) and output.numel() == 1 and output.is_floating_point():
            self.waiting.append(output.detach().reshape(()).clone())

    def take(self) -> float | None:
        """Return the mean loss of the evaluation that has just ended, if there was one worth a record.

        The record of evaluations is bounded: all of the first 64, then every second, every fourth, ...
        """
        if not self.waiting:
            return None
        values, self.waiting = self.waiting, []
        self._evaluations += 1
        stride = 1 << max((self._evaluations // 64).bit_length() - 1, 0)
        return float(torch.stack(values).mean()) if self._evaluations % stride == 0 else None

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

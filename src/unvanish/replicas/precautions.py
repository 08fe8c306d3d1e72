"""Mistakes of use that a coupling notices: what does not move, what was lost, starts that do not fit together."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..layers import is_normalisation, own_parameters

DEEP = 6  # layers of weights; the mean of n random starts is smaller by sqrt(n) in each
_CHECKED = 3  # the first steps, for which it is looked whether the weights move
_LOG = logging.getLogger("unvanish")


class MovementCheck:
    """Notices an optimiser that was built on other parameters than those of the replicas."""

    def __init__(self, stacked: nn.Module) -> None:
        self._stacked = stacked
        self._left = _CHECKED
        self._still = 0  # steps in a row without movement
        self.note()

    def note(self) -> None:
        """Remember where the weights are, until all steps were looked at."""
        if self._left:
            self._versions, self._sums = self._state()

    def look(self) -> None:
        """Look whether the weights moved since, although they have gradients.

        Raises:
            OptionError: if they did not in two steps in a row.
        """
        if not self._left:
            return
        self._left -= 1
        versions, sums = self._state()
        # a step of rate zero writes weights too; a step replayed by the device leaves versions
        is_still = versions == self._versions and sums == self._sums
        self._still = self._still + 1 if is_still and self._has_gradients() else 0
        if self._still > 1:
            raise OptionError(
                "Coupling.step(): replicas: found gradients, but weights that did not move in two steps, expected "
                "coupling.step() after optimizer.step(). The optimiser holds other parameters, maybe those of the "
                "model that was copied. Write optimizer = torch.optim.SGD(replicas.parameters(), lr=0.1)."
            )

    def _state(self) -> tuple[list[int], list[float]]:
        trained = [p for p in self._stacked.parameters() if p.requires_grad]
        floats = [p.detach() for p in trained if p.is_floating_point()]
        return [p._version for p in trained], [float(p.sum(dtype=torch.float64)) for p in floats]

    def _has_gradients(self) -> bool:
        """Say whether there is something to follow; mixed precision leaves out steps that are not finite."""
        grads = [p.grad for p in self._stacked.parameters() if p.requires_grad and p.grad is not None]
        total = sum(float(grad.abs().sum(dtype=torch.float64)) for grad in grads)
        return 0 < total < float("inf")


class Losses:
    """Which replicas were lost to nan or infinity, and since when; each is reported once."""

    def __init__(self) -> None:
        self.since: dict[int, int] = {}

    def note(self, alive: Sequence[int], n: int, step: int) -> None:
        """Take in which replicas are finite now."""
        if len(alive) == n and not self.since:
            return
        for i in range(n):
            if i in alive:
                self.since.pop(i, None)
            elif i not in self.since:
                self.since[i] = step
                _LOG.warning(
                    "Coupling: replica %d holds nan or infinity since step %d and is left out; %d of %d are coupled. "
                    "coupling.reset(%d, optimizer) starts it again from the centre.",
                    *(i, step, len(alive), n, i),
                )


def warn_of_nothing_to_do() -> None:
    """Say that one replica has no other to be pulled to."""
    _LOG.warning("Coupling: one replica is its own mean; the coupling changes nothing.")


def warn_of_deep_starts(stacked: nn.Module) -> None:
    """Warn of a deep net without normalisation whose replicas start apart."""
    layers = [module for module in stacked.modules() if any(_is_weight(p) for _, p in own_parameters(module))]
    if len(layers) > DEEP and not any(map(is_normalisation, stacked.modules())) and start_apart(stacked):
        _LOG.warning(
            "Coupling: replicas of %d layers without normalisation start apart. The mean of n random starts is smaller "
            "by the root of n in each layer, so that a strong pull can make gradients vanish. Write "
            "Replicas(model, n, init='shared'), or put norms between the layers.",
            len(layers),
        )


def warn_of_late_merging() -> None:
    """Warn of a pull that grows over replicas that started apart."""
    _LOG.warning(
        "Coupling: the strength rises, and the replicas started apart. Networks that have settled in separate basins "
        "merge badly: their mean is in general no good network. Write Replicas(model, n, init='shared')."
    )


@torch.no_grad()
def start_apart(stacked: nn.Module) -> bool:
    """Say whether the replicas differ in what they train."""
    return any(p.requires_grad and bool((p != p[:1]).any()) for p in stacked.parameters())


def _is_weight(stacked: Tensor) -> bool:
    """Say whether each replica of it has at least two axes."""
    return stacked.dim() > 2

"""Thaw a model from the top, phase by phase, each from the best weights so far."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .freeze import freeze_to, layers_of


class GradualThaw:
    """Freezes all but the top at first and lets one layer more learn in each phase.

    Call ``step(loss)`` after each evaluation. A phase ends after ``every`` of them, or after ``patience`` of them in a
    row that were no better. Then weights, buffers and momentum are set back to the best evaluation so far, the next
    layer is thawed with an empty momentum, and patience starts anew. After the last phase the best weights are in the
    model.

    Args:
        model: With pretrained layers.
        optimizer: Over all parameters of the model: its groups stay, so schedulers fit. `layer_rates` makes them.
        borders: For `freeze_to`, one a phase. By default one layer more each, from the topmost alone to all.
        every: Evaluations of each phase.
        patience: Evaluations without improvement that end a phase. Give this or ``every``.

    Raises:
        OptionError: if an argument cannot be used.

    Source: Howard & Ruder 2018, section 3.3 (one layer more each epoch).  Ours: the best weights at each border.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> thawing = GradualThaw(model, torch.optim.SGD(model.parameters(), 0.1), patience=1)
        >>> thawing
        GradualThaw(phase 1 of 2, freeze_to(model, 1), best inf)
        >>> [thawing.step(loss) for loss in (2.0, 2.5)], thawing
        ([False, False], GradualThaw(phase 2 of 2, freeze_to(model, 0), best 2))
        >>> [thawing.step(loss) for loss in (1.5, float("nan"))]
        [False, True]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        borders: Sequence[int | str] | None = None,
        *,
        every: int | None = None,
        patience: int | None = None,
    ) -> None:
        length = every if patience is None else patience
        if (every is None) == (patience is None) or not isinstance(length, int) or length < 1:
            raise OptionError(
                f"GradualThaw(): found every={every!r} and patience={patience!r}, expected one of them, a whole number "
                "from 1 on. Write GradualThaw(model, optimizer, patience=2)."
            )
        self.model, self.optimizer = model, optimizer
        self.borders = tuple(range(len(layers_of(model)) - 1, -1, -1)) if borders is None else tuple(borders)
        if not self.borders:
            raise OptionError(
                "GradualThaw(): borders: found none, expected one for each phase. Write borders=(-1, -2, 0)."
            )
        self.every, self.patience = every, patience
        self.phase, self.best = 0, math.inf
        self._noted, self._waited = 0, 0  # in this phase
        self._kept: dict[str, Tensor] = {}
        self._momentum: dict[Any, Any] = {}
        freeze_to(model, self.borders[0], optimizer=optimizer)

    def step(self, loss: float) -> bool:
        """Note an evaluation; True when the last phase is over. A loss that is not finite is never the best."""
        self._noted += 1
        self._waited += 1
        if loss < self.best:
            self.best, self._waited = float(loss), 0
            self._kept = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self._momentum = copy.deepcopy(self.optimizer.state_dict()["state"])
        if (self._noted if self.every else self._waited) < (self.every or self.patience or 1):
            return False
        self._restore()
        if self.phase + 1 == len(self.borders):
            return True
        self.phase += 1
        self._noted = self._waited = 0
        freeze_to(self.model, self.borders[self.phase], optimizer=self.optimizer)
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the states of model, optimiser and scheduler."""
        return {
            "phase": self.phase,
            "best": self.best,
            "noted": self._noted,
            "waited": self._waited,
            "kept": dict(self._kept),
            "momentum": self._momentum,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken; the optimiser keeps what was loaded into it."""
        self.phase, self.best = int(state["phase"]), float(state["best"])
        self._noted, self._waited = int(state["noted"]), int(state["waited"])
        self._kept, self._momentum = dict(state["kept"]), copy.deepcopy(state["momentum"])
        freeze_to(self.model, self.borders[self.phase])

    def __repr__(self) -> str:
        return (
            f"GradualThaw(phase {self.phase + 1} of {len(self.borders)}, "
            f"freeze_to(model, {self.borders[self.phase]!r}), best {self.best:g})"
        )

    @torch.no_grad()
    def _restore(self) -> None:
        if not self._kept:  # no loss was a number
            return
        for name, value in self.model.state_dict().items():
            value.copy_(self._kept[name])
        groups = self.optimizer.state_dict()["param_groups"]  # as they are: the rates belong to the schedule
        self.optimizer.load_state_dict({"state": copy.deepcopy(self._momentum), "param_groups": groups})

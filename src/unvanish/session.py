"""A watched training in the user's own script: watching and diagnosing in one handle."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .diagnose import DEFAULT_RULES, Rule, diagnose
from .errors import OptionError
from .launch import run_folder
from .records import Findings, Recording
from .watch import Watch

if TYPE_CHECKING:
    from .replicas import Coupling


class Run:
    """A training under watch; made by `watch`, used in a ``with``."""

    def __init__(self, watch: Watch, folder: Path | None, coupling: Coupling | None = None) -> None:
        self._watch = watch
        self._coupling = coupling
        self._measuring = ExitStack()
        self.folder = folder

    def __enter__(self) -> Run:
        self._watch.attach()
        if self._coupling is not None:
            from .replicas.speed import LearningSpeed

            watch = self._watch
            speed = LearningSpeed(self._coupling, watch.every, write=watch.note_speeds, guard=watch.guard)
            self._measuring.enter_context(speed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._measuring.close()
        self._watch.close()

    def recording(self) -> Recording:
        """Return what was recorded so far, also while the training goes on."""
        return self._watch.recording()

    def diagnose(self, *, rules: Iterable[Rule] = DEFAULT_RULES) -> Findings:
        """Return what is wrong with the training, from what was recorded so far."""
        return diagnose(self.recording(), rules=rules)


def watch(
    model: nn.Module | Iterable[nn.Module],
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    *,
    coupling: Coupling | None = None,
    every: int = 10,
    folder: str | Path | None = "runs",
) -> Run:
    """Watch a training layer by layer; nothing about the training changes.

    Args:
        model: The model, or several.
        optimizer: Its optimiser, or several; None finds every optimiser that holds its parameters.
        coupling: Of the model, if it is `Replicas`: then the record holds how fast they learn, and by what.
        every: Sample each so many steps; the first ten are all sampled. >= 1
        folder: The record is kept in a new folder of this one; None keeps it in memory only.

    Returns:
        A handle to use in a ``with``; its `diagnose` says what is wrong.

    Raises:
        OptionError: if an argument is no model, no optimiser, no coupling of the model, or no whole number >= 1.

    Cost: about 1 % of the step time of a small-batch MLP with ``every=10`` (bench/overhead.py).

    Example:
        >>> import torch, unvanish
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with unvanish.watch(model, optimizer, folder=None) as run:
        ...     for _ in range(20):
        ...         loss = model(torch.randn(8, 3)).square().mean()
        ...         optimizer.zero_grad(); loss.backward(); optimizer.step()
        >>> run.recording().steps
        20
    """
    models = [model] if isinstance(model, nn.Module) else list(model)
    for item in models:
        if not isinstance(item, nn.Module):
            raise OptionError(
                f"watch(): model: found {type(item).__name__}, expected a torch.nn.Module or several. "
                "Nothing was attached. Call watch(model, optimizer)."
            )
    optimizers: list[Any] = []
    if optimizer is not None:
        is_single = hasattr(optimizer, "param_groups") or not isinstance(optimizer, Iterable)
        optimizers = [optimizer] if is_single else list(optimizer)  # type: ignore[arg-type]
    for found in optimizers:
        if not hasattr(found, "param_groups"):
            raise OptionError(
                f"watch(): optimizer: found {type(found).__name__}, expected a torch.optim.Optimizer "
                "or several. Nothing was attached. Call watch(model, optimizer)."
            )
    if coupling is not None and all(item is not getattr(coupling, "replicas", None) for item in models):
        raise OptionError(
            f"watch(): coupling: found {type(coupling).__name__}, expected the Coupling of a watched model. Nothing "
            "was attached. Call watch(replicas, optimizer, coupling=coupling)."
        )
    place = None if folder is None else run_folder(Path(folder), type(models[0]).__name__ if models else "run")
    return Run(Watch(models, optimizers, every=every, folder=place), place, coupling)

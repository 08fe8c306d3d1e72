"""Apply remedies to a model, and undo them unless they are kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import nn

from .records import Change
from .treatments import Patient, Treatment, applied, parse_treatment


class Changes:
    """What was changed; made by `treat`. Leaving the ``with`` undoes it bit for bit, unless `keep` was called."""

    def __init__(self, patient: Patient, treatments: Iterable[Treatment]) -> None:
        self._patient = patient
        self._treatments = tuple(treatments)
        self._stack = ExitStack()
        self._changes: list[Change] = []
        self._is_kept = False

    def __enter__(self) -> Changes:
        with ExitStack() as stack:
            for treatment in self._treatments:
                self._changes.append(stack.enter_context(applied(treatment, self._patient)))
            self._stack = stack.pop_all()  # all went well: undone later, not now
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_kept:
            self._stack.close()

    def __iter__(self) -> Iterator[Change]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)

    def keep(self) -> None:
        """Make the changes last. Applies them first if that has not been done."""
        if not self._changes:
            self.__enter__()
        self._is_kept = True
        _KEPT.append(self._stack)

    def undo(self) -> None:
        """Undo the changes now, also after `keep`."""
        self._stack.close()
        if self._stack in _KEPT:
            _KEPT.remove(self._stack)


# An ExitStack of generators undoes itself when it is collected; kept changes must not be.
_KEPT: list[ExitStack] = []


def treat(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    *treatments: str | Treatment,
    inputs: tuple[Any, ...] = (),
    facts: dict[str, float] | None = None,
) -> Changes:
    """Return changes to a model that apply in a ``with``, or for good with ``keep()``.

    Args:
        model: The model, changed in place.
        optimizer: Its optimiser; needed by what acts at the step, and given the parameters that are added.
        *treatments: Ids such as ``"he-init"`` or ``"clip-norm=0.5"``, or treatments such as ``clip_norm(0.5)``.
        inputs: Arguments of one forward call, for treatments that look at data.
        facts: What is known of the data: ``target_mean``, ``target_std``.

    Raises:
        TreatmentError: if a treatment does not exist or does not fit; then nothing is changed.

    Example:
        >>> import torch, unvanish
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> before = model[0].weight.clone()
        >>> with unvanish.treat(model, None, "he-init") as changes:
        ...     print([change.treatment for change in changes], torch.equal(before, model[0].weight))
        ['he-init'] False
        >>> torch.equal(before, model[0].weight)
        True
    """
    if optimizer is None:
        optimizers: tuple[Any, ...] = ()
    else:
        is_single = hasattr(optimizer, "param_groups")
        optimizers = (optimizer,) if is_single else tuple(optimizer)  # type: ignore[arg-type]
    chosen = [parse_treatment(item) if isinstance(item, str) else item for item in treatments]
    return Changes(Patient(model, optimizers, inputs, dict(facts or {})), chosen)

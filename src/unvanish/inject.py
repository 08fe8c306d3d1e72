"""Apply treatments to a script that knows nothing of them.

Models are met when they are first called, optimisers when they are made. What acts on a model is applied to each model
that is called from outside; what acts on the step, to each optimiser once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from .errors import TreatmentError
from .treatments import Patient, Treatment, applied
from .treatments.loop import of_log_probabilities

AT_THE_STEP = frozenset(
    (
        "clip-norm clip-value adaptive-clip normalise-layers lower-lr raise-lr warm-up layerwise-rates zero-grad "
        "descend weight-decay"
    ).split()
)


class _Enough(SystemExit):
    """The steps that were asked for are done."""


class Injection:
    """Treats every model and optimiser of a script while it is attached.

    Args:
        treatments: What to apply.
        facts: What an untreated run found: ``target_mean``, ``target_std``.
        max_steps: End the script after so many optimiser steps; 0 never does.
        seed_offset: Added to every seed that the script sets, so that one script gives several runs.
    """

    def __init__(
        self,
        treatments: Sequence[Treatment],
        *,
        facts: dict[str, float] | None = None,
        max_steps: int = 0,
        seed_offset: int = 0,
    ) -> None:
        self.applied: list[str] = []
        self.refused: list[str] = []
        self._treatments = tuple(treatments)
        self._facts = dict(facts or {})
        self._max_steps, self._seed_offset = max_steps, seed_offset
        self._optimizers: WeakSet[torch.optim.Optimizer] = WeakSet()
        self._steps: dict[int, int] = {}
        self._treated: WeakSet[Any] = WeakSet()
        self._depth = 0
        self._stack = ExitStack()

    def attach(self) -> None:
        """Begin to wait for models and optimisers."""
        self._replace(torch.optim.Optimizer, "__init__", self._noting_optimizer)
        if self._seed_offset:
            for owner, name in ((torch, "manual_seed"), (torch.random, "manual_seed"), *_other_seeds()):
                self._replace(owner, name, self._shifted_seed)
            torch.manual_seed(torch.initial_seed())  # shifted: a script that sets no seed gets another one, too
        if any(treatment.id == "logits-loss" for treatment in self._treatments):
            # From the start: `nll_loss(model(x), y)` looks the function up before the model is met.
            self._replace(nn.functional, "nll_loss", of_log_probabilities)
        if self._treatments:
            handles = [
                register_module_forward_pre_hook(self._before_call),
                register_module_forward_hook(self._after_call, always_call=True),
            ]
            for handle in handles:
                self._stack.callback(handle.remove)
        if self._max_steps:
            self._stack.callback(register_optimizer_step_post_hook(self._count).remove)

    def detach(self) -> None:
        """Undo everything."""
        self._stack.close()

    def _replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, make(original))
        self._stack.callback(setattr, owner, name, original)

    def _noting_optimizer(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def init(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
            original(optimizer, *args, **kwargs)
            self._optimizers.add(optimizer)

        return init

    def _shifted_seed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def seed(value: Any = None, *args: Any, **kwargs: Any) -> Any:
            shifted = (int(value) + self._seed_offset) % 2**32 if isinstance(value, int) else value
            return original(shifted, *args, **kwargs)

        return seed

    def _before_call(self, module: nn.Module, args: Any) -> Any:
        self._depth += 1
        if self._depth > 1 or not torch.is_grad_enabled() or not self._optimizers or module in self._treated:
            return None
        if next(module.parameters(), None) is None:
            return None
        self._treated.add(module)
        self._depth = 0
        before = set(module._forward_pre_hooks)
        self._treat(module, args)
        self._depth = 1
        return _run_new_hooks(module, args, before)

    def _after_call(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth = max(self._depth - 1, 0)

    def _treat(self, model: nn.Module, args: Any) -> None:
        """Apply what fits this model, and to its optimisers what acts on the step."""
        ids = {id(p) for p in model.parameters()}
        known = list(self._optimizers)
        own = [o for o in known if any(id(p) in ids for group in o.param_groups for p in group["params"])]
        optimizers = tuple(own or known)
        fresh = tuple(o for o in optimizers if o not in self._treated)
        self._treated.update(fresh)
        for treatment in self._treatments:
            at_step = treatment.id in AT_THE_STEP
            if at_step and not fresh:
                continue
            patient = Patient(model, fresh if at_step else optimizers, tuple(args), self._facts)
            try:
                with torch.random.fork_rng(devices=[]):  # new weights must not change the order of the data
                    self._stack.enter_context(applied(treatment, patient))
                self.applied.append(str(treatment))
            except TreatmentError as error:
                self.refused.append(str(error))

    def _count(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._steps[id(optimizer)] = self._steps.get(id(optimizer), 0) + 1
        if self._steps[id(optimizer)] >= self._max_steps:
            raise _Enough(0)


def _run_new_hooks(module: nn.Module, args: Any, before: set[int]) -> Any:
    """Run the pre-hooks that were added during this very call: it has already listed the others."""
    changed = None
    for key, hook in list(module._forward_pre_hooks.items()):
        if key not in before:
            result = hook(module, args)
            if result is not None:
                args = changed = result if isinstance(result, tuple) else (result,)
    return changed


def _other_seeds() -> list[tuple[Any, str]]:
    import random

    import numpy as np

    return [(np.random, "seed"), (random, "seed")]

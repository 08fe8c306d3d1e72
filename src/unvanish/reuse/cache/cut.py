"""Where the frozen part of a model ends; run what is below and what is above on its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

Place = tuple[int, int]  # which frozen call (0: the inputs of the model), which of its outputs


@dataclass(frozen=True)
class Source:
    """One call of a frozen module, or the inputs of the model: what came out when the cut was found.

    Args:
        name: Of the module.
        module: None for the inputs.
        turn: Which call of this module it was.
        leaves: Outputs; tensors without their data.
        spec: How they were nested.
    """

    name: str
    module: nn.Module | None
    turn: int
    leaves: tuple[Any, ...]
    spec: TreeSpec


@dataclass(frozen=True)
class Cut:
    """Where the frozen part of a model hands over to the rest.

    Args:
        model: The whole model.
        sources: The inputs, then each outermost call of a frozen module in the order of execution.
        needed: Which of their outputs reach the rest.
        tensors: Names of the parameters and buffers that these outputs depend on.
        rows: Rows of the batch that it was found with.
    """

    model: nn.Module
    sources: tuple[Source, ...]
    needed: tuple[Place, ...]
    tensors: tuple[str, ...]
    rows: int

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of what is handed over."""
        return tuple(self.sources[number].name or ("(model)" if number else "(inputs)") for number, _ in self.needed)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Return the frozen modules that are left out above the cut, by name."""
        return {source.name: source.module for source in self.sources if source.module is not None}

    @torch.no_grad()
    def features(self, inputs: Any, *, as_is: bool = False) -> tuple[Tensor, ...]:
        """Compute what the frozen part hands over, and nothing above it; in evaluation mode, or in the modes as is."""
        mode = nullcontext() if as_is else in_evaluation(self.model)
        if self._chain is not None and isinstance(inputs, Tensor):
            with mode:
                return (_through(self._chain[0], inputs).clone(),)
        found: dict[Place, Tensor] = {}

        def collect(number: int, forward: Callable[[], Any]) -> Any:
            output = forward()
            leaves = tree_flatten(output)[0]
            # a later module may work in place on what is collected here
            found.update({place: leaves[place[1]].clone() for place in self.needed if place[0] == number})
            if number == self.needed[-1][0]:
                raise _Enough
            return output

        given = tree_flatten(inputs)[0]
        found.update({place: given[place[1]].clone() for place in self.needed if place[0] == 0})
        with mode, self.intercepted(collect), suppress(_Enough):
            call(self.model, inputs)
        return tuple(found[place] for place in self.needed)

    def rest(self, features: tuple[Tensor, ...], *, placeholder: str | None) -> Any:
        """Compute the output of the model from what the frozen part has handed over."""
        if self._chain is not None:
            return _through(self._chain[1], features[0])
        rows = features[0].shape[0]
        given = dict(zip(self.needed, features, strict=True))
        blanks = self._blank_outputs(rows, placeholder or str(_device(self.model)))
        handing_over = {number for number, _ in self.needed}

        def stand_in(number: int, forward: Callable[[], Any] | None = None) -> Any:
            if number not in handing_over:
                return blanks[number][1]
            leaves = [given.get((number, place), leaf) for place, leaf in enumerate(blanks[number][0])]
            return tree_unflatten(leaves, self.sources[number].spec)

        with self.intercepted(stand_in):
            return call(self.model, stand_in(0))

    @property
    def is_chain(self) -> bool:
        """Say whether the model calls its children one after the other, so that its two parts are those of a list."""
        return self._chain is not None

    @cached_property
    def _chain(self) -> tuple[list[nn.Module], list[nn.Module]] | None:
        """Return the modules below and above the cut if the model is a plain chain: no call has to be stood in for."""
        children = list(_children(self.model))
        below = [source.module for source in self.sources[1:]]
        is_chain = (
            self.needed == ((len(below), 0),) and 0 < len(below) == len({*below}) and below == children[: len(below)]
        )
        return (children[: len(below)], children[len(below) :]) if is_chain else None

    @cached_property
    def _planned(self) -> dict[tuple[nn.Module, int], int]:
        return {(s.module, s.turn): number for number, s in enumerate(self.sources) if s.module is not None}

    @cached_property
    def _blanks(self) -> dict[tuple[int, str], list[tuple[list[Any], Any]]]:
        return {}

    def _blank_outputs(self, rows: int, device: str) -> list[tuple[list[Any], Any]]:
        """Return outputs of the right kind that nobody looks into, flat and nested, for each source."""
        if (rows, device) not in self._blanks:
            self._blanks.clear()  # one size of batch at a time
            flat = [[self._blank(leaf, rows, device) for leaf in source.leaves] for source in self.sources]
            nested = [tree_unflatten(leaves, s.spec) for leaves, s in zip(flat, self.sources, strict=True)]
            self._blanks[rows, device] = list(zip(flat, nested, strict=True))
        return self._blanks[rows, device]

    def _blank(self, leaf: Any, rows: int, device: str) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        shape = list(leaf.shape)
        if shape and shape[0] == self.rows:
            shape[0] = rows
        return torch.zeros((), dtype=leaf.dtype, device=device).expand(shape)

    @contextmanager
    def intercepted(self, act: Callable[[int, Callable[[], Any]], Any]) -> Iterator[None]:
        """Let ``act`` decide what each outermost frozen call returns."""
        turns: Counter[nn.Module] = Counter()
        inside = False

        def around(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return forward(*args, **kwargs)
            number = self._planned.get((module, turns[module]))
            turns[module] += 1
            if number is None:
                return forward(*args, **kwargs)
            inside = True
            try:
                return act(number, partial(forward, *args, **kwargs))
            finally:
                inside = False

        with replaced_forward(self.modules.values(), around):
            yield


def _children(model: nn.Module) -> Iterable[nn.Module]:
    """Return what a plain sequence calls one after the other, a module also twice; nothing of other models."""
    hooks = (model._forward_hooks, model._forward_pre_hooks, model._backward_hooks, model._backward_pre_hooks)
    is_plain = "forward" not in vars(model) and not any(hooks)
    return model if isinstance(model, nn.Sequential) and type(model) is nn.Sequential and is_plain else ()


def _through(modules: list[nn.Module], values: Any) -> Any:
    for module in modules:
        values = module(values)
    return values


class _Enough(BaseException):
    """Ends a forward pass that has given what was wanted: there is no other way out of someone else's forward."""


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model on a tensor, or on a tuple or dict of arguments."""
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def replaced_forward(modules: Any, around: Callable[..., Any]) -> Iterator[None]:
    """Call ``around(module, forward, ...)`` in place of the forward of each module; the old ones come back."""
    missing = object()
    kept = [(module, module.__dict__.get("forward", missing)) for module in dict.fromkeys(modules)]
    try:
        for module, _ in kept:
            module.__dict__["forward"] = partial(around, module, module.forward)
        yield
    finally:
        for module, forward in kept:
            if forward is missing:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation mode, and back module by module."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.__dict__["training"] = False  # what assignment does, at a tenth of its cost
        yield
    finally:
        for module in training:
            module.__dict__["training"] = True

"""Find where the frozen part of a model ends, by following the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...errors import OptionError
from ...untouched import same_random_state, untouched
from .cut import Cut, Place, Source, call, replaced_forward
from .flow import RANDOM, Flow

_LEARNS = "(a parameter that learns)"


@dataclass
class _Called:
    """One call of a module, and the calls inside of it."""

    module: nn.Module
    name: str
    inner: list[_Called] = field(default_factory=list)
    output: Any = None
    marks: frozenset[Any] = frozenset()
    leaf_marks: tuple[frozenset[Any], ...] = ()


def find_cut(model: nn.Module, inputs: Any) -> Cut:
    """Find the outputs of frozen layers that the rest of a model needs.

    One forward pass is watched operation by operation. A call of a module is frozen if no parameter that learns and no
    random number reaches its output. Then, in a second pass, the outputs of the outermost frozen calls are followed to
    the output of the model: those that arrive are what the rest needs; with skips over the border there are several,
    and the inputs of the model can be among them.

    Args:
        model: Some layers are frozen.
        inputs: A batch of at least two rows, as the model takes it: a tensor, a tuple or dict of arguments.

    Raises:
        OptionError: if nothing is frozen, or what the rest needs does not have one row for each row of the inputs.

    Source: Ours. Frozen calls are found by following the data and not by the order of registration, so skips,
    branches, shared modules and code outside of modules count.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.ReLU(), nn.Linear(4, 2))
        >>> find_cut(model, torch.zeros(2, 3)).names
        ('1',)
    """
    rows = _rows(inputs)
    constant: set[tuple[nn.Module, int]] = set()
    with untouched(model), torch.no_grad():
        tree, state = _watch(model, inputs)
        while True:
            sources, depends = _sources(tree, inputs, constant)
            if not any(p is not None for s in sources if s.module for p in s.module.parameters()):
                _refuse_unfrozen(model, tree)
            cut = Cut(model, tuple(sources), (), (), rows)
            with same_random_state([model]):
                needed = _needed(cut, inputs)
            without_rows = [
                sources[number] for number, leaf in needed if sources[number].leaves[leaf].shape[:1] != (rows,)
            ]
            # such as the angles of rotary positions, which are computed anew above the cut
            again = {
                (s.module, s.turn) for s in without_rows if s.module and not any(True for _ in s.module.parameters())
            }
            if not again:
                break
            constant |= again
    if without_rows or not needed:
        found = f"output {without_rows[0].name!r} without them" if without_rows else "no output of a frozen layer used"
        raise OptionError(
            f"cache_features(): the frozen part of {type(model).__name__}: found {found}, expected outputs with one "
            "row for each row of the batch. Nothing was written. Cut at another layer with freeze_to(model, n)."
        )
    reached = {mark for place in needed for mark in depends.get(place, ())}
    tensors = sorted(mark for mark in reached if isinstance(mark, str) and mark in state)
    return Cut(model, tuple(sources), tuple(needed), tuple(tensors), rows)


def _watch(model: nn.Module, inputs: Any) -> tuple[_Called, set[str]]:
    """Run a forward pass, and return the tree of its calls with the marks of their outputs, and all names."""
    flow = Flow()
    names = {module: name for name, module in model.named_modules()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        flow.mark(tensor, {name, _LEARNS} if tensor.requires_grad else {name})
    top = _Called(model, "")
    stack = [top]

    def around(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        called = _Called(module, names[module])
        stack[-1].inner.append(called)
        stack.append(called)
        try:
            output = forward(*args, **kwargs)
        finally:
            stack.pop()
        called.output = output
        called.leaf_marks = tuple(flow.marks(leaf) for leaf in tree_flatten(output)[0])
        called.marks = frozenset().union(*called.leaf_marks)
        return output

    with replaced_forward(list(names), around), flow:
        call(model, inputs)
    return top, set(tensors)


def _sources(
    tree: _Called, inputs: Any, constant: set[tuple[nn.Module, int]]
) -> tuple[list[Source], dict[Place, frozenset[Any]]]:
    """Return the outermost frozen calls in order, and the marks of their outputs."""
    leaves, spec = tree_flatten(inputs)
    sources = [Source("", None, 0, _without_data(leaves), spec)]
    depends: dict[Place, frozenset[Any]] = {}
    turns: Counter[nn.Module] = Counter()

    def visit(called: _Called) -> None:
        turn = turns[called.module]
        turns[called.module] += 1
        outputs, spec = tree_flatten(called.output)
        holds_tensor = any(isinstance(leaf, Tensor) for leaf in outputs)
        if holds_tensor and not called.marks & {_LEARNS, RANDOM} and (called.module, turn) not in constant:
            for place, marks in enumerate(called.leaf_marks):
                depends[len(sources), place] = marks
            sources.append(Source(called.name, called.module, turn, _without_data(outputs), spec))
            return
        for inner in called.inner:
            visit(inner)

    for called in tree.inner:
        visit(called)
    # turns of modules that are called inside of frozen calls are never counted, here as in `intercepted`
    return sources, depends


def _needed(cut: Cut, inputs: Any) -> list[Place]:
    """Follow the outputs of frozen calls, and the inputs, to the output of the model."""
    flow = Flow()

    def marked(number: int, leaves: list[Any]) -> list[Any]:
        clones = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for place, clone in enumerate(clones):
            if isinstance(clone, Tensor):
                flow.mark(clone, {(number, place)})
        return clones

    def follow(number: int, forward: Callable[[], Any]) -> Any:
        leaves, spec = tree_flatten(forward())
        return tree_unflatten(marked(number, leaves), spec)

    leaves, spec = tree_flatten(inputs)
    with cut.intercepted(follow), flow:
        output = call(cut.model, tree_unflatten(marked(0, leaves), spec))
    return sorted(mark for mark in flow.marks(output) | flow.leaked if isinstance(mark, tuple))


def _refuse_unfrozen(model: nn.Module, tree: _Called) -> None:
    """Say why no layer counts as frozen.

    Raises:
        OptionError: always.
    """

    def walk(called: _Called) -> Iterator[_Called]:
        yield called
        for inner in called.inner:
            yield from walk(inner)

    random = [c.name for c in walk(tree) if RANDOM in c.marks and not c.inner]
    if random and any(not p.requires_grad for p in model.parameters()):
        raise OptionError(
            f"cache_features(): layer {random[0]!r}: found random numbers below every frozen layer, expected an output "
            "that can be computed once. Nothing was written. Move it behind the frozen part or out of the model."
        )
    raise OptionError(
        f"cache_features(): model: found no frozen layer at the input of {type(model).__name__}, expected one that "
        "training leaves as it is. Nothing was written. Call unvanish.freeze_to(model, -1) first."
    )


def _without_data(leaves: list[Any]) -> tuple[Any, ...]:
    return tuple(leaf.to("meta") if isinstance(leaf, Tensor) else leaf for leaf in leaves)


def _rows(inputs: Any) -> int:
    return next(int(leaf.shape[0]) for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor))

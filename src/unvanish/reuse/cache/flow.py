"""Follow what flows where: each tensor carries marks, and every operation hands them on."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RANDOM = "(random numbers)"

Marks = frozenset[Hashable]


class Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]  # as torch has it
    """While active, outputs of operations have the marks of all tensors that went in.

    It sees every operation below autograd, so views, changes in place, whole numbers and detached tensors count, and
    code outside of modules too. Marks belong to the memory of a tensor. What a random generator was asked for has the
    mark `RANDOM`; what leaves for Python (``item()``) is remembered in ``leaked``.

    Example:
        >>> a, b = torch.ones(2), torch.ones(2)
        >>> flow = Flow()
        >>> flow.mark(a, {"a"})
        >>> with flow:
        ...     c, d = (a.long() + b).detach(), b * torch.rand(2)
        >>> sorted(flow.marks(c)), sorted(flow.marks(d))
        (['a'], ['(random numbers)'])
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.leaked: Marks = frozenset()
        self._marks: dict[Hashable, Marks] = {}
        self._kept: list[Tensor] = []  # memory that is freed would be given out again, with its old marks

    def mark(self, tensor: Tensor, marks: Iterable[Hashable]) -> None:
        """Give a tensor these marks in place of what it has."""
        self._kept.append(tensor)
        self._marks[_memory(tensor)] = frozenset(marks)

    def marks(self, values: Any) -> Marks:
        """Return the marks of all tensors in a nest of lists, tuples and dicts."""
        return self._marks_of(value for value in tree_leaves(values) if isinstance(value, Tensor))

    def _marks_of(self, tensors: Iterable[Tensor]) -> Marks:
        return frozenset().union(*(self._marks.get(_memory(tensor), ()) for tensor in tensors))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        may_draw = torch.Tag.nondeterministic_seeded in func.tags  # also attention without dropout: so it is looked at
        tensors = list(_tensors((*args, *(kwargs or {}).values())))
        before = _random_state(tensors) if may_draw else []
        output = func(*args, **(kwargs or {}))
        marks = self._marks_of(tensors)
        if may_draw and not all(map(torch.equal, before, _random_state(tensors))):
            marks |= {RANDOM}
        if func is torch.ops.aten._local_scalar_dense.default:
            self.leaked |= marks
        for tensor in _tensors((output,)):
            self.mark(tensor, marks | self._marks_of((tensor,)))
        return output


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among the arguments or results of an operation; `tree_leaves` takes ten times as long."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _memory(tensor: Tensor) -> Hashable:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors have none
        return id(tensor)


def _random_state(tensors: list[Tensor]) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if any(tensor.is_cuda for tensor in tensors):
        states += torch.cuda.get_rng_state_all()
    return states

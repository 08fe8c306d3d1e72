"""What replicas can be made of and called with: refused at once if not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import OptionError
from .choice import Backend

Batches = Literal["shared", "separate"]


def check_arguments(n: object, init: object, backend: object, seeds: object) -> None:
    """Refuse what no replicas can be made of.

    Raises:
        OptionError: names the argument, what was found, and what is expected.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise OptionError(f"Replicas(): n: found {n!r}, expected a whole number from 1 on. Write n=3.")
    if not (init in ("shared", "separate") or callable(init)):
        raise OptionError(
            f"Replicas(): init: found {init!r}, expected 'shared', 'separate' or a function that returns the model "
            "of replica i. Write init='shared'."
        )
    if backend not in (*get_args(Backend), "auto"):
        raise OptionError(
            f"Replicas(): backend: found {backend!r}, expected 'loop', 'vmap', 'batched' or 'auto'. "
            "Write backend='auto'."
        )
    if seeds is None:
        return
    if not isinstance(seeds, Sequence) or len(seeds) != n or not all(isinstance(seed, int) for seed in seeds):
        raise OptionError(f"Replicas(): seeds: found {seeds!r}, expected {n} whole numbers. Write seeds=range({n}).")
    if backend == "vmap":
        raise OptionError(
            "Replicas(): seeds: found backend='vmap', expected another. It draws the numbers of all replicas together. "
            "Write backend='batched'."
        )


def check_batches(n: int, batches: object, x: Any, y: Any) -> bool:
    """Return whether each of n replicas has a batch of its own.

    Raises:
        OptionError: if ``batches`` is unknown, or a tensor has no batch for each replica.
    """
    if batches not in get_args(Batches):
        raise OptionError(
            f"Replicas.loss(): batches: found {batches!r}, expected 'shared' or 'separate'. "
            "Write batches='separate' where x and y have a leading axis of replicas."
        )
    if batches == "shared":
        return False
    both = isinstance(x, Tensor) and isinstance(y, Tensor)  # nearly always, and `tree_leaves` is slow
    for leaf in (x, y) if both else tree_leaves((_plain(x), _plain(y))):
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.shape[0] != n):
            raise OptionError(
                f"Replicas.loss(): batches='separate': found a tensor of shape {tuple(leaf.shape)}, expected "
                f"{n} batches along the first axis. Write torch.stack([x0, x1, ...])."
            )
    return True


def check_index(where: str, i: object, n: int) -> None:
    """Refuse what is no number of a replica.

    Raises:
        OptionError: if it is none.
    """
    if isinstance(i, bool) or not isinstance(i, int) or not -n <= i < n:
        raise OptionError(f"{where}(): i: found {i!r}, expected a replica from 0 to {n - 1}. Write {where}(0).")


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value

"""Prove that a model can be run in two parts: rows are independent, modes do not matter, the output is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ...errors import OptionError
from ...measures import largest
from ...untouched import same_random_state, untouched
from .cut import Cut, call
from .features import Head


def check_rows(cut: Cut, inputs: Any) -> tuple[Tensor, ...]:
    """Return features, of which it is made sure that they are the same in both modes and beside other rows.

    Raises:
        OptionError: if they are not.
    """
    features = cut.features(inputs)
    with untouched(cut.model):
        cut.model.train()
        training = [
            f"{top}.{name}".strip(".") for top, m in cut.modules.items() for name, m in m.named_modules() if m.training
        ]
        in_training = cut.features(inputs, as_is=True)
    if not all(map(_close, features, in_training)):
        raise OptionError(
            f"cache_features(): layer {training[-1]!r}: found other outputs in training mode than in evaluation mode "
            "(batch norm or dropout), expected the same: its weights are frozen, the layer is not. Nothing was "
            "written. Freeze it with unvanish.freeze_to(model, n)."
        )
    half = cut.features(tree_map(lambda leaf: leaf[: cut.rows // 2] if isinstance(leaf, Tensor) else leaf, inputs))
    for name, one, other in zip(cut.names, features, half, strict=True):
        if not _close(one[: cut.rows // 2], other):
            raise OptionError(
                f"cache_features(): layer {name!r}: found an output that depends on the other rows of the batch, "
                "expected one for each row alone (batch norm without running statistics?). Nothing was written. "
                "Freeze less with freeze_to(model, n)."
            )
    return features


def proven_head(cut: Cut, inputs: Any) -> Head:
    """Return the rest of the model, after it has given the output of the whole model; in a chain it does so anyhow.

    Raises:
        OptionError: if it gives another one.
    """
    if cut.is_chain:
        return Head(cut, "meta")
    features = tuple(feature.contiguous() for feature in cut.features(inputs))
    with torch.no_grad(), untouched(cut.model):
        whole = _run(cut, lambda: call(cut.model, inputs))
    for placeholder in ("meta", None):  # "meta" has no cost, but cannot be mixed with parameters of the model itself
        head = Head(cut, placeholder)
        try:
            with torch.no_grad(), untouched(cut.model):
                part = _run(cut, lambda head=head: head(features))  # type: ignore[misc]
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            continue
        if len(whole) == len(part) and all(map(_close, whole, part)):
            return head
    raise OptionError(
        f"cache_features(): head: found another output of {type(cut.model).__name__} when its frozen layers are left "
        "out, expected the same. Nothing was written. Cut at another layer with freeze_to(model, n), or cache the "
        "frozen part as a module of its own."
    )


def _run(cut: Cut, function: Callable[[], Any]) -> list[Tensor]:
    with same_random_state([cut.model]):
        return [leaf for leaf in tree_leaves(function()) if isinstance(leaf, Tensor)]


def _close(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors agree to what another order of summation may change."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    atol = min(100 * torch.finfo(one.dtype).eps, 0.05) * max(largest(other), 1e-30)
    return torch.allclose(one, other, rtol=0.0, atol=atol, equal_nan=True)

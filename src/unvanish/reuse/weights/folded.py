"""Batch norms that an export folded into the convolution in front of them.

An export for prediction multiplies the kernel by gamma / sqrt(variance + epsilon) and drops the batch norm, and may
keep the name of the kernel. Loaded by name into the net it came from, the batch norm would act twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .foreign import ForeignLayer
from .matching import Pair
from .targets import BATCH_NORM, CONV, CONV_TRANSPOSE


def unfolded(pairs: Sequence[Pair], *, is_identity: bool) -> tuple[list[Pair], list[str]]:
    """Return the pairs with each folded batch norm set to do nothing, or what is wrong with them.

    Args:
        pairs: All layers of the model.
        is_identity: Set them so; else they are faults.
    """
    found, faults = list(pairs), []
    for place, (pair, before) in enumerate(zip(pairs[1:], pairs, strict=False), start=1):
        is_batch_norm = isinstance(pair.target.module, BATCH_NORM)
        holder = before.source
        if not (is_batch_norm and pair.why == "unfilled" and holder) or not _can_hold(before):
            continue
        if not is_identity:
            faults.append(
                f"{pair.target.name!r}: found no batch norm behind {holder.name!r} in the file, expected one. It was "
                "folded into that layer, or never was; loaded by name it would act twice. Set it to do nothing with "
                "folded_batch_norm='identity'"
            )
            continue
        arrays = dict(holder.arrays)
        beta = {} if "bias" in before.target.tensors else {"bias": arrays.pop("bias")} if "bias" in arrays else {}
        found[place - 1] = replace(before, source=replace(holder, arrays=arrays))
        idle = ForeignLayer(holder.name, "FoldedNorm", beta)
        found[place] = Pair(pair.target, idle, f"folded into {holder.name!r}: set to do nothing")
    return found, faults


def _can_hold(pair: Pair) -> bool:
    """Say whether a batch norm may have been folded into a layer."""
    return isinstance(pair.target.module, (*CONV, *CONV_TRANSPOSE)) or pair.target.kind == "Linear"

"""What would make a run cheaper: no finding, because nothing is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..records import Advice, Trace
from .reading import scalar

LEAST_SHARE = 0.2  # of a step; less is not worth a change of the script
LEAST_FRONT_SAMPLES = 5
LEAST_EQUAL_ROWS = 3
LEAST_PASSES = 1.5  # how often each row came, as far as the sampled steps tell
SOURCE = "docs/reuse.md"


def advice(trace: Trace) -> Iterator[Advice]:
    """Point out frozen layers in front of a model that are computed again for the same rows, epoch after epoch.

    Said only if rows were seen to come again bit for bit: so not in a first epoch, and not behind random augmentation.
    The share is that of the forward pass through them in the time from step to step, both without the watch.

    Args:
        trace: With the fact ``frozen_front``, of steps that were sampled; other traces get no advice.

    Source: Ours. How often a row came is estimated as in counting by capture and recapture: of m rows and k known
    ones, m * k / h is the number of all rows if h were known.
    """
    front = _front(trace)
    if not front or front["share_of_step"] < LEAST_SHARE or front["samples"] < LEAST_FRONT_SAMPLES:
        return
    passes = _passes(front)
    if passes < LEAST_PASSES or front["is_changed"] or _was_never_learnt(trace, front["layers"]):
        return
    share, steps = front["share_of_step"], front["last_step"] - front["step"]
    is_held = not front["batch_norms"] and not front["is_random"]
    yield Advice(
        "recomputed-frozen-trunk" if is_held else "frozen-trunk-not-held",
        _why_held(front) if is_held else _why_moving(front),
        _code(front, scalar(trace, "batch")),
        SOURCE,
        layers=tuple(front["layers"]),
        share_of_step=share,
        step=front["step"],
        share_of_run=min(steps / max(trace.total_steps - 1, 1), 1.0),
        evidence={
            "trunk_seconds": front["seconds"],
            "step_seconds": front["step_seconds"],
            "equal_rows": front["equal_pairs"],
            "passes": passes,
        },
    )


def _front(trace: Trace) -> Mapping[str, Any]:
    """Return what the record says of a frozen front; nothing if a part of it is missing."""
    front = trace.facts.get("frozen_front")
    if not isinstance(front, Mapping) or not front.get("layers"):
        return {}
    numbers = ("share_of_step", "samples", "step", "last_step", "seconds", "step_seconds", "row_pairs", "equal_pairs")
    return front if all(isinstance(front.get(name), (int, float)) for name in numbers) else {}


def _passes(front: Mapping[str, Any]) -> float:
    """Return how often each row came, about; 0 if too few were seen again to tell.

    Example:
        >>> front = {"step": 0, "last_step": 99, "rows_a_step": 10, "row_pairs": 40_000, "equal_pairs": 400}
        >>> _passes(front)  # 1,000 rows came, out of 100
        10.0
    """
    if front["equal_pairs"] < LEAST_EQUAL_ROWS:
        return 0.0
    came = front["rows_a_step"] * (front["last_step"] - front["step"] + 1)
    return float(came * front["equal_pairs"] / front["row_pairs"])


def _was_never_learnt(trace: Trace, layers: list[str]) -> bool:
    """Say whether some of these layers look as initialisation left them: to keep those is a finding."""
    return any(layer.is_fresh for layer in trace.layers if layer.name in layers)


def _named(layers: list[str]) -> str:
    return f"Layer {layers[0]} is" if len(layers) == 1 else f"Layers {layers[0]} to {layers[-1]} are"


def _why_held(front: Mapping[str, Any]) -> str:
    share = front["share_of_step"]
    return (
        f"{_named(front['layers'])} frozen and computed again for every batch: {share:.0%} of a step. "
        f"unvanish.cache_features computes them once a row: an epoch would take about {1 - share:.2g} of its time."
    )


def _why_moving(front: Mapping[str, Any]) -> str:
    share, norms = front["share_of_step"], front["batch_norms"]
    moving = [f"the batch norm {norms[0]} uses each batch and goes on changing"] if norms else []
    moving += ["random numbers are drawn in them"] if front["is_random"] else []
    return (
        f"{_named(front['layers'])} frozen, but in training mode: {' and '.join(moving)}. unvanish.freeze_to holds "
        f"them; then unvanish.cache_features can compute them once a row, which are {share:.0%} of a step now."
    )


def _code(front: Mapping[str, Any], batch: float) -> str:
    """Return the lines to paste; `freeze_to` stands there also for what is held: it changes nothing about that."""
    size = int(batch) if math.isfinite(batch) else 64
    lines, border = ["# dataset: what you train on, read by number: (x, y) = dataset[i]"], str(front.get("border", ""))
    if front.get("is_apart"):
        lines.append("model = torch.nn.Sequential(trunk, head)  # the two models of your script")
        border = f"1.{border}".rstrip(".")
    return "\n".join(
        (
            *lines,
            f"trunk = unvanish.freeze_to(model, {border!r})"
            if border
            else "trunk = unvanish.freeze_to(model, n)  # n: how many layers are frozen",
            f'features = unvanish.cache_features(trunk, dataset, "cache/", batch_size={size})',
            f"for f, y in features.loader({size}, shuffle=True):",
            "    loss = loss_fn(features.head(f), y)  # the rest of your loop stays",
        )
    )

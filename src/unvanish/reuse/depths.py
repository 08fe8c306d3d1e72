"""How many layers to reuse, measured: train with the lowest n of a learnt model, for each n."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..errors import OptionError
from .freeze import freeze_to, layers_of, thaw
from .picture import blank, save

Way = Literal["frozen", "tuned"]


@dataclass(frozen=True)
class Depth:
    """What came of reusing the lowest layers.

    Args:
        layers: How many were reused; above them all starts anew.
        way: Whether they stayed frozen or learnt on.
        losses: Of each seed.
    """

    layers: int
    way: Way
    losses: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median loss."""
        return statistics.median(self.losses)


@dataclass(frozen=True)
class Depths:
    """The trials of `try_depths`; prints as a table with bars, and draws itself.

    Args:
        rows: One for each depth and way; the first is training from scratch.
    """

    rows: tuple[Depth, ...]

    @property
    def best(self) -> Depth:
        """Return the row with the smallest median loss; of equal ones the first."""
        return min(self.rows, key=lambda row: row.median)

    def __str__(self) -> str:
        most = max(row.median for row in self.rows)
        lines = [f"{'layers':>6}  {'way':<7}{'median':>10}{'least':>10}{'most':>10}"]
        for row in self.rows:
            bar = "█" * round(24 * row.median / most) if most > 0 else ""
            lines.append(
                f"{row.layers:>6}  {row.way:<7}{row.median:>10.4g}{min(row.losses):>10.4g}{max(row.losses):>10.4g}"
                f"  {bar}{' best' if row is self.best else ''}"
            )
        return "\n".join(lines)

    def draw(self, file: str | Path) -> Path:
        """Draw the loss against the number of reused layers: a line for each way, beside training from scratch.

        Lines join the medians, bars reach from the smallest to the largest loss, and each seed is a point.

        Args:
            file: Ends in .png, .svg or .pdf.

        Raises:
            OptionError: if matplotlib is not there or the file cannot be written.
        """
        figure = blank("Depths.draw()", 6, 4)
        axis = figure.subplots()
        scratch = self.rows[0]
        axis.axhspan(min(scratch.losses), max(scratch.losses), color="0.9", linewidth=0)
        axis.axhline(scratch.median, color="0.5", linestyle="--")
        _draw_rows(axis, "from scratch", [scratch], color="0.4", shift=0.0)
        ways = list(dict.fromkeys(row.way for row in self.rows[1:]))
        for number, way in enumerate(ways):
            own = [row for row in self.rows[1:] if row.way == way]
            _draw_rows(axis, way, own, color=f"C{number}", shift=0.06 * (2 * number - len(ways) + 1))
        axis.set_xticks(range(max(row.layers for row in self.rows) + 1))
        axis.set_xlabel("lowest layers reused")
        axis.set_ylabel("held-out loss")
        axis.legend(fontsize="small")
        return save("Depths.draw()", figure, file, "draw('depths.png')")


def _draw_rows(axis: Any, label: str, rows: list[Depth], color: str, shift: float) -> None:
    """Draw medians, ranges and points; a little aside, so that ways do not cover each other."""
    places = [row.layers + shift for row in rows]
    medians = [row.median for row in rows]
    ranges = [[row.median - min(row.losses) for row in rows], [max(row.losses) - row.median for row in rows]]
    axis.errorbar(places, medians, ranges, marker="o", capsize=3, color=color, label=label)
    for place, row in zip(places, rows, strict=True):
        axis.scatter([place] * len(row.losses), row.losses, s=9, color=color, alpha=0.5)


def try_depths(
    make_model: Callable[[], nn.Module],
    fit: Callable[[nn.Module], float],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    ways: Sequence[Way] = ("frozen", "tuned"),
) -> Depths:
    """Train on a small budget with the lowest 0, 1, ... layers of a learnt model, and compare.

    Layers above start anew, by their ``reset_parameters()``. No layers is the control, from scratch, with the same
    budget. The losses say which depth is worth a whole training; with few seeds and a small budget they say no more.

    Args:
        make_model: Returns a model with what was learnt, and a head that fits the new task.
        fit: Trains a model in place and returns its loss on held-out data; its budget is yours.
        seeds: Each starts torch's generator before layers are drawn anew and before ``fit``.
        ways: ``"frozen"``: the reused layers stay as they are. ``"tuned"``: they learn on.

    Raises:
        OptionError: if a layer above cannot be drawn anew.

    Cost: ``len(seeds) * (1 + layers * len(ways))`` calls of ``fit``; the topmost layer is never reused.

    Source: Yosinski et al. 2014, section 4 (transfer at each depth, frozen and tuned).

    Example:
        >>> learnt = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> _ = [nn.init.constant_(layer.weight, 5.0) for layer in learnt]
        >>> import copy
        >>> depths = try_depths(lambda: copy.deepcopy(learnt), lambda m: 5 - m[0].weight.item(), ways=["frozen"])
        >>> depths.best.layers, depths.best.losses
        (1, (0.0, 0.0, 0.0))
    """
    count = len(layers_of(make_model()))
    plan: list[tuple[int, Way]] = [(0, "tuned"), *((n, way) for n in range(1, count) for way in ways)]
    return Depths(
        tuple(Depth(n, way, tuple(_trial(make_model, fit, n, way, seed) for seed in seeds)) for n, way in plan)
    )


def _trial(
    make_model: Callable[[], nn.Module], fit: Callable[[nn.Module], float], n: int, way: Way, seed: int
) -> float:
    model = make_model()
    torch.manual_seed(seed)
    freeze_to(model, n)
    _draw_anew(model)
    if way == "tuned":
        thaw(model)
    return float(fit(model))


def _draw_anew(model: nn.Module) -> None:
    """Reset all modules with parameters that learn."""
    for module in reversed(list(model.modules())):  # children first: their owner may draw them in a way of its own
        if not any(p.requires_grad for p in module.parameters(recurse=False)):
            continue
        reset = getattr(module, "reset_parameters", None)
        if reset is None:
            name = next(name for name, found in model.named_modules() if found is module)
            raise OptionError(
                f"try_depths(): layer {name!r}: found no reset_parameters(), expected a way to draw it anew. Give "
                f"{type(module).__name__} one."
            )
        reset()

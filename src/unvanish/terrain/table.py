"""A landscape as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .record import Landscape, Path, Place

_MAX_ROWS = 40


def parts(found: Landscape) -> Iterator[RenderableType]:
    """Yield the report of a landscape, from how alike replicas are to what each costs."""
    cost = f"{found.forward} forward and {found.backward} backward passes of a batch in {found.seconds:.1f} s"
    yield Text.assemble(("landscape", "bold"), f"  {found.replicas} replicas on {found.examples} examples")
    yield Text(cost, style="dim")
    tables = (_heights(found), _noise(found), _flatness(found), _pairs(found), _layers(found))
    for table in (table for table in tables if table is not None):
        yield ""
        yield table
    if found.notes:
        yield ""
    for note in found.notes:
        yield Padding(Text(_plain(note)), (0, 0, 0, 2))


def _heights(found: Landscape) -> Table:
    table = _table("where", "loss", "mistakes", "norm of weights")
    for place in found.places:
        table.add_row(_plain(place.name), _number(place.loss), _per_cent(place.mistakes), _number(place.norm))
    return table


def _noise(found: Landscape) -> Table | None:
    """Return local energies, in mistakes where there are classes, else in the loss."""
    sigmas = [energy.sigma for energy in found.places[0].energies]
    if not sigmas:
        return None
    what = "mistakes" if found.is_classified else "loss"
    table = _table(f"rise of {what} under noise", *(f"sigma {sigma:g}" for sigma in sigmas))
    for place in found.places:
        table.add_row(_plain(place.name), *_rises(place, is_classified=found.is_classified))
    return table


def _rises(place: Place, *, is_classified: bool) -> Iterator[str]:
    for energy in place.energies:
        if is_classified:
            yield f"{_per_cent(energy.mistakes)} ± {100 * energy.mistakes_uncertainty:.2g}"
        else:
            yield _with_uncertainty(energy.loss, energy.loss_uncertainty)


def _flatness(found: Landscape) -> Table | None:
    if all(place.curvature is None and place.entropy is None for place in found.places):
        return None
    table = _table("curvature and volume", "top eigenvalue", "x norm squared", "local entropy")
    for place in found.places:
        top, entropy = place.curvature, place.entropy
        table.add_row(
            _plain(place.name),
            "-" if top is None else _with_uncertainty(top.top, top.residual),
            "-" if top is None else _number(top.scaled),
            "-" if entropy is None else _with_uncertainty(entropy.value, entropy.uncertainty),
        )
    return table


def _pairs(found: Landscape) -> Table:
    """Return overlaps and barriers over all pairs: as replicas are, and with their units aligned."""
    table = _table("between", "as they are", "units aligned")
    for_pairs = "overlap of two replicas"
    table.add_row(for_pairs, _range(_off_diagonal(found.overlaps)), _range(_off_diagonal(found.aligned_overlaps)))
    for to_centre, where in ((False, "between two replicas"), (True, "to the centre")):
        raw, aligned = (found.walks(is_aligned=one, to_centre=to_centre) for one in (False, True))
        if raw:
            table.add_row(f"barrier {where}, loss", _highest(raw), _highest(aligned))
        if raw and found.is_classified:
            table.add_row(f"barrier {where}, mistakes", _highest_mistakes(raw), _highest_mistakes(aligned))
    return table


def _highest(paths: Sequence[Path]) -> str:
    return _range([path.barrier for path in paths])


def _highest_mistakes(paths: Sequence[Path]) -> str:
    values = [path.barrier_mistakes for path in paths]
    return _range([100 * value for value in values], "%")


def _layers(found: Landscape) -> Table:
    table = _table("layer", "kind", "parameters", "overlap", "aligned", "spread", "spread / centre")
    rows = found.layers
    left_out = len(rows) - _MAX_ROWS
    for row in rows[:_MAX_ROWS]:
        numbers = (row.overlap, row.aligned_overlap, row.spread, row.relative_spread)
        table.add_row(_plain(row.name), _plain(row.kind), str(row.parameters), *map(_number, numbers))
    if left_out > 0:
        table.add_row(f"and {left_out} more", *("",) * 6)
    return table


def _table(*heads: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place == 0 or head == "kind" else "right", overflow="fold")
    return table


def _off_diagonal(matrix: Sequence[Sequence[float]]) -> list[float]:
    return [value for i, row in enumerate(matrix) for j, value in enumerate(row) if i < j]


def _range(values: Sequence[float], unit: str = "") -> str:
    """Write the mean of values, and in brackets their range if there are several."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "-"
    mean = _number(sum(known) / len(known)) + unit
    return mean if len(known) == 1 else f"{mean} ({_number(min(known))} to {_number(max(known))})"


def _with_uncertainty(value: float, uncertainty: float) -> str:
    return "-" if math.isnan(value) else f"{_number(value)} ± {uncertainty:.2g}"


def _number(value: float) -> str:
    """Write a number in three digits; what a rounding left of zero is zero.

    Example:
        >>> _number(0.123456), _number(-3e-17), _number(12345.6), _number(float("nan"))
        ('0.123', '0', '1.23e+04', '-')
    """
    if math.isnan(value):
        return "-"
    return "0" if abs(value) < 1e-12 else f"{value:.3g}"


def _per_cent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.2f}%"


def _plain(text: str) -> str:
    """Return text without any character that could command a terminal: names of layers are other people's."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

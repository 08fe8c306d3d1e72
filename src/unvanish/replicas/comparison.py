"""The table of a comparison: scores over seeds, and differences to matched controls seed by seed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """What one way to train came to.

    Args:
        name: The method, and what was read out of it if there is a choice.
        against: The name of the row of its matched control, if there is one.
        lr: The learning rate, chosen on held-out rows of the training data.
        at_edge: Whether that is the first or the last of those tried, so that a better one may lie outside.
        evaluations: Gradients of single examples in each training.
        scores: One a seed, higher is better; nan if a prediction was not finite.
        seconds: Mean time of a training.
    """

    name: str
    against: str | None
    lr: float
    at_edge: bool
    evaluations: int
    scores: tuple[float, ...]
    seconds: float

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.scores)

    @property
    def spread(self) -> float:
        """The standard deviation over seeds; nan for one seed."""
        return _deviation(self.scores)


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns: rows, and what was the same for all; prints as a table, and is JSON."""

    rows: tuple[Row, ...]
    settings: Mapping[str, Any]

    def __getitem__(self, name: str) -> Row:
        return {row.name: row for row in self.rows}[name]

    def paired(self, name: str, against: str) -> tuple[float, float]:
        """Return the mean difference of two rows, taken seed by seed, and its standard error (nan for one seed)."""
        differences = [a - b for a, b in zip(self[name].scores, self[against].scores, strict=True)]
        return statistics.fmean(differences), _deviation(differences) / math.sqrt(len(differences))

    def _against_control(self, row: Row) -> tuple[float, float] | None:
        """Return the paired difference to the matched control, if that is in the table."""
        is_here = any(other.name == row.against for other in self.rows)
        return self.paired(row.name, row.against) if row.against and is_here else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; what is not a finite number is None."""
        rows = []
        for row in self.rows:
            difference, error = self._against_control(row) or (math.nan, math.nan)
            computed = {"mean": row.mean, "spread": row.spread, "difference": difference, "error": error}
            rows.append(asdict(row) | computed)
        document: dict[str, Any] = _finite({"schema_version": 1, "settings": dict(self.settings), "rows": rows})
        return document

    def to_json(self) -> str:
        """Return one JSON document."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'':<{width}}  {'lr':>7}  {'mean':>7}  {'spread':>6}  difference to the matched control"]
        for row in self.rows:
            lr = f"{row.lr:g}" + "*" * row.at_edge
            line = f"{row.name:<{width}}  {lr:>7}  {row.mean:7.2f}  {row.spread:6.2f}"
            if paired := self._against_control(row):
                line += f"  {paired[0]:+6.2f} ± {paired[1]:.2f}  {row.against}"
            lines.append(line)
        same = self.settings
        lines.append(
            f"{same['score']}; n = {same['n']}; {same['seeds']} seeds; {same['steps']} gradients of {same['batch']} "
            "examples in each training"
        )
        lines.append("spread: standard deviation over seeds; ±: standard error of the differences, seed by seed")
        if any(row.at_edge for row in self.rows):
            lines.append("*: the first or last of the learning rates tried")
        return "\n".join(lines)


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

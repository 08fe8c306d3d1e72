"""The numbers of a landscape, frozen; nan where something was not measured."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console, RenderableType

from ..errors import OptionError, RecordError
from ..records import SCHEMA_VERSION, finite
from ..version import VERSION
from .table import parts

FILE_NAME = "landscape.json"
_WIDTH = 110
_KIND = "landscape"

_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True)
class Energy:
    """How much the loss rises under multiplicative noise of one strength: a mean over draws, and its uncertainty."""

    sigma: float
    loss: float
    loss_uncertainty: float
    mistakes: float = math.nan
    mistakes_uncertainty: float = math.nan


@dataclass(frozen=True, slots=True)
class Curvature:
    """The largest eigenvalue of the Hessian of the loss; some eigenvalue lies within ``residual`` of ``top``."""

    top: float
    residual: float
    scaled: float  # top, times the squared norm of the weights
    steps: int


@dataclass(frozen=True, slots=True)
class Entropy:
    """Logarithm of the mean likelihood of the data over a Gaussian neighbourhood, in nats."""

    value: float
    uncertainty: float
    width: float  # of the neighbourhood, in units of the rms of each layer's weights
    inverse_temperature: float


@dataclass(frozen=True, slots=True)
class Place:
    """One point in the space of weights: a replica, or the centre of all."""

    name: str
    loss: float
    mistakes: float  # share of examples that are classified wrongly; nan where there are no classes
    norm: float
    energies: tuple[Energy, ...] = ()
    curvature: Curvature | None = None
    entropy: Entropy | None = None


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer: how alike replicas are in it, and how far they are apart."""

    name: str
    kind: str
    parameters: int
    overlap: float  # mean cosine over pairs
    aligned_overlap: float
    spread: float  # mean over replicas of the squared distance to the centre, per parameter
    relative_spread: float  # the same, over the centre's mean square


@dataclass(frozen=True, slots=True)
class Path:
    """The straight way from one point to another."""

    start: str
    end: str
    is_aligned: bool
    t: tuple[float, ...]
    losses: tuple[float, ...]
    mistakes: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """The most by which the loss rises above the line between its ends.

        Example:
            >>> Path("0", "1", False, (0.0, 0.5, 1.0), (1.0, 4.0, 3.0), ()).barrier
            2.0
        """
        return barrier(self.t, self.losses)

    @property
    def barrier_mistakes(self) -> float:
        """The same for the share of mistakes; nan where there are no classes."""
        return barrier(self.t, self.mistakes)


@dataclass(frozen=True)
class Landscape:
    """How the minima of replicas lie to each other: prints, draws, and turns into JSON."""

    replicas: int
    examples: int
    batches: int
    places: tuple[Place, ...]
    layers: tuple[LayerRow, ...]
    overlaps: tuple[tuple[float, ...], ...]
    aligned_overlaps: tuple[tuple[float, ...], ...]  # empty if units were not aligned
    paths: tuple[Path, ...]
    notes: tuple[str, ...]
    forward: int  # passes of single batches
    backward: int
    seconds: float
    seed: int

    @property
    def is_classified(self) -> bool:
        """Whether mistakes were counted."""
        return any(math.isfinite(place.mistakes) for place in self.places)

    def place(self, name: str) -> Place:
        """Return the place of that name, such as ``"replica 0"`` or ``"centre"``; KeyError if there is none."""
        for place in self.places:
            if place.name == name:
                return place
        raise KeyError(name)

    def walks(self, *, is_aligned: bool, to_centre: bool) -> tuple[Path, ...]:
        """Return the paths between replicas, or those from replicas to the centre."""
        found = (path for path in self.paths if path.is_aligned == is_aligned)
        return tuple(path for path in found if path.end.endswith("centre") == to_centre)

    def __rich_console__(self, *_: Any) -> Iterator[RenderableType]:
        return parts(self)

    def __str__(self) -> str:
        buffer = io.StringIO()
        Console(file=buffer, width=_WIDTH, highlight=False, markup=False, emoji=False).print(self)
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def to_dict(self) -> dict[str, Any]:
        """Return the landscape as plain values; nan and inf become None."""
        head = {"schema_version": SCHEMA_VERSION, "unvanish": VERSION, "kind": _KIND}
        paths = [{"barrier": path.barrier, "barrier_mistakes": path.barrier_mistakes} for path in self.paths]
        document = dataclasses.asdict(self)
        document["paths"] = [{**path, **more} for path, more in zip(document["paths"], paths, strict=True)]
        plain: dict[str, Any] = finite({**head, **document})
        return plain

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return the landscape as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def save(self, path: str | pathlib.Path) -> pathlib.Path:
        """Write the landscape as JSON, into a folder as ``landscape.json``; `unvanish report` shows it with a run.

        Raises:
            OptionError: if the file cannot be written.
        """
        path = pathlib.Path(path)
        file = path / FILE_NAME if path.is_dir() else path
        try:
            file.write_text(self.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise OptionError(
                f"Landscape.save(): path: found {error.strerror!r} for {str(file)!r}, expected a folder or file that "
                "can be written. Write landscape.save(run.folder)."
            ) from error
        return file

    def draw(self, file: str | pathlib.Path) -> pathlib.Path:
        """Draw the landscape into an image file; its ending (.png, .svg, .pdf) says of which kind.

        Raises:
            OptionError: if matplotlib is missing, or the file cannot be written.
        """
        from .picture import draw

        return draw(self, pathlib.Path(file))


def barrier(t: Sequence[float], heights: Sequence[float]) -> float:
    """Return the largest rise of heights above the line between the first and the last; nan without heights.

    Source: Entezari et al. 2022.
    """
    if not heights:
        return math.nan
    rises = [h - (1 - x) * heights[0] - x * heights[-1] for x, h in zip(t, heights, strict=True)]
    return math.nan if any(math.isnan(rise) for rise in rises) else max(rises)


def read_landscape(folder: pathlib.Path) -> Landscape | None:
    """Return the landscape that was saved into the folder of a run; None if there is none.

    Raises:
        RecordError: if the file is damaged or of another kind.
    """
    file = folder / FILE_NAME
    if not file.is_file():
        return None
    try:
        return from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise RecordError(
            f"report: {str(file)!r}: found a damaged file or another format ({error}), expected what Landscape.save() "
            "writes. Save it again, or remove it."
        ) from error


def from_dict(document: Mapping[str, Any]) -> Landscape:
    """Return a landscape from its plain values; what is not as `Landscape.to_dict` writes it is a ValueError."""
    if document.get("kind") != _KIND or document.get("schema_version") != SCHEMA_VERSION:
        raise ValueError("written by something else, or by another version of unvanish")
    return Landscape(
        replicas=_whole(document["replicas"]),
        examples=_whole(document["examples"]),
        batches=_whole(document["batches"]),
        places=tuple(_place(place) for place in document["places"]),
        layers=tuple(_fill(LayerRow, row) for row in document["layers"]),
        overlaps=tuple(_numbers(row) for row in document["overlaps"]),
        aligned_overlaps=tuple(_numbers(row) for row in document["aligned_overlaps"]),
        paths=tuple(_fill(Path, path) for path in document["paths"]),
        notes=tuple(str(note) for note in document["notes"]),
        forward=_whole(document["forward"]),
        backward=_whole(document["backward"]),
        seconds=_number(document["seconds"]),
        seed=_whole(document["seed"]),
    )


def _place(value: Mapping[str, Any]) -> Place:
    energies = tuple(_fill(Energy, energy) for energy in value["energies"])
    curvature = None if value["curvature"] is None else _fill(Curvature, value["curvature"])
    entropy = None if value["entropy"] is None else _fill(Entropy, value["entropy"])
    loss, mistakes, norm = (_number(value[name]) for name in ("loss", "mistakes", "norm"))
    return Place(str(value["name"]), loss, mistakes, norm, energies, curvature, entropy)


def _fill(kind: type[_Row], value: Mapping[str, Any]) -> _Row:
    """Return a flat record from plain values, each checked against its declared type."""
    readers: dict[str, Callable[[Any], Any]] = {
        "float": _number,
        "int": _whole,
        "str": str,
        "bool": bool,
        "tuple[float, ...]": _numbers,
    }
    wanted = dataclasses.fields(kind)  # type: ignore[arg-type]  # only dataclasses come here
    return kind(**{item.name: readers[str(item.type)](value[item.name]) for item in wanted})


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(_number(value) for value in values)


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{type(value).__name__} where a number belongs")
    return float(value)


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{type(value).__name__} where a whole number belongs")
    return value

"""Everything that is measured of a landscape, one thing after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import torch

from ...errors import OptionError
from ...terrain import Landscape, Path, Place
from .align import align
from .barrier import walk
from .curvature import curvature
from .entropy import local_entropy
from .given import Settings
from .groups import Units
from .noise import local_energy
from .overlap import centre, layer_rows, norm, overlaps
from .surface import Height, Surface, Weights, is_near
from .units import Unreadable, hidden_units

_CENTRE = "centre"
_MAX_NAMED = 4  # layers in a note

_Spot = tuple[str, Weights, Height]


def measure(surface: Surface, weights: list[Weights], settings: Settings) -> Landscape:
    """Measure everything that was asked for.

    Raises:
        OptionError: if the loss of a replica is not finite, or scipy is missing.
    """
    names = list(surface.parameters)
    count = len(weights)
    labels = [f"replica {i}" for i in range(count)]
    heights = [surface.height(each) for each in weights]
    for label, height in zip(labels, heights, strict=True):
        if not math.isfinite(height.loss):
            raise OptionError(
                f"landscape(): {label}: found the loss {height.loss}, expected a finite number. A network that has "
                "diverged has no minimum: leave it out, or train it anew."
            )
    aligned, notes = _aligned(surface, weights) if settings.align else ([], [])
    middle = centre(weights)
    places = [*zip(labels, weights, heights, strict=True), (_CENTRE, middle, surface.height(middle))]
    described, more = _describe(surface, places, settings)
    paths: list[Path] = []
    if "barriers" in settings.parts:
        chosen = _spread(list(combinations(range(count), 2)), settings.pairs)
        if len(chosen) < math.comb(count, 2):
            notes.append(f"Barriers between replicas: {len(chosen)} of {math.comb(count, 2)} pairs.")
        paths = _walks(surface, places, chosen, settings.points, aligned)
    return Landscape(
        replicas=count,
        examples=surface.examples,
        batches=len(surface.batches),
        places=tuple(described),
        layers=tuple(layer_rows(surface.model, names, weights, aligned)),
        overlaps=overlaps(weights, names),
        aligned_overlaps=overlaps(aligned, names) if aligned else (),
        paths=tuple(paths),
        notes=(*notes, *more),
        forward=surface.forward,
        backward=surface.backward,
        seconds=0.0,
        seed=settings.seed,
    )


def _describe(surface: Surface, places: Sequence[_Spot], settings: Settings) -> tuple[list[Place], list[str]]:
    """Return what is measured at each place, and notes on what could not be."""
    notes: dict[str, None] = {}
    described = []
    for name, weights, height in places:
        place = Place(name, *height, norm(weights, list(surface.parameters)))
        if "local_energy" in settings.parts:
            energies = local_energy(surface, weights, height, settings.sigmas, settings.draws, settings.seed)
            place = replace(place, energies=energies)
        if "curvature" in settings.parts:
            try:
                place = replace(place, curvature=curvature(surface, weights, settings.seed))
            except (RuntimeError, NotImplementedError) as error:  # a kernel without a second derivative
                notes[f"No curvature: {str(error).splitlines()[0]}"] = None
        if "local_entropy" in settings.parts:
            entropy = local_entropy(surface, weights, height.loss, settings.width, settings.chains, settings.seed)
            place = replace(place, entropy=entropy)
        described.append(place)
    return described, list(notes)


def _walks(
    surface: Surface, places: Sequence[_Spot], chosen: Sequence[tuple[int, int]], points: int, aligned: list[Weights]
) -> list[Path]:
    """Return the paths between replicas and to the centre, as they are and aligned."""
    *spots, middle = places
    found = _walk_all(surface, spots, middle, chosen, points, is_aligned=False)
    if not aligned:
        return found
    if all(_is_same(one[1], other) for one, other in zip(spots, aligned, strict=True)):  # they were in order
        return found + [replace(path, is_aligned=True) for path in found]
    spots = [(name, weights, height) for (name, _, height), weights in zip(spots, aligned, strict=True)]
    mean = centre(aligned)
    middle = (f"aligned {_CENTRE}", mean, surface.height(mean))
    return found + _walk_all(surface, spots, middle, chosen, points, is_aligned=True)


def _walk_all(
    surface: Surface,
    spots: Sequence[_Spot],
    middle: _Spot,
    chosen: Sequence[tuple[int, int]],
    points: int,
    *,
    is_aligned: bool,
) -> list[Path]:
    ends = [(spots[i], spots[j]) for i, j in chosen] + [(spot, middle) for spot in spots]
    return [walk(surface, start, end, points, aligned=is_aligned) for start, end in ends]


def _aligned(surface: Surface, weights: list[Weights]) -> tuple[list[Weights], list[str]]:
    """Return the replicas with their units in a common order; none, and why, if that cannot be done rightly."""
    try:
        groups = hidden_units(surface.model, surface.batches[0][0])
    except Unreadable as error:
        return [], [f"Units were not aligned: {error}."]
    surface.forward += 1
    if not groups:
        return [], ["Units were not aligned: none are known to be free to change places."]
    aligned = align(weights, groups, surface.parameters)
    for one, other in zip(weights, aligned, strict=True):
        if not is_near(surface.output(one), surface.output(other)):
            return [], ["Units were not aligned: in another order the network computed something else."]
    return aligned, _held(surface, groups)


def _held(surface: Surface, groups: Sequence[Units]) -> list[str]:
    """Name the layers that no aligned unit touches."""
    touched = {axis.tensor.rpartition(".")[0] for group in groups for axis in group.axes}
    layers = dict.fromkeys(name.rpartition(".")[0] for name in surface.parameters)
    held = [repr(name) for name in layers if name not in touched]
    if not held:
        return []
    others = f" and {len(held) - _MAX_NAMED} more" if len(held) > _MAX_NAMED else ""
    return [f"Not aligned, because what may change places there is not known: {', '.join(held[:_MAX_NAMED])}{others}."]


def _spread(items: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Return at most ``count`` items, evenly spread."""
    if len(items) <= count:
        return items
    return [items[int((k + 0.5) * len(items) / count)] for k in range(count)]


def _is_same(one: Weights, other: Weights) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())

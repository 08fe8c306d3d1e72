"""Which layer of a file belongs to which layer of the model, and why."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...errors import WeightsError
from ...layers import clean_name
from .foreign import Foreign, ForeignLayer
from .layouts import fits
from .readers.guard import natural
from .targets import Target


@dataclass(frozen=True)
class Wanted:
    """What the user said of the match.

    Args:
        names: Layer of the model to layer of the file; also of whole parts, such as ``{"encoder": "backbone"}``.
        keep: Layers of the model that stay as they are; patterns are allowed.
        leave: Layers of the file that are not used; patterns are allowed.
        lowest: So many of the first layers of the model only.
    """

    names: Mapping[str, str]
    keep: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()
    lowest: int | None = None


@dataclass(frozen=True)
class Pair:
    """A layer of the model, what it is loaded from, and why; None: it stays as it is."""

    target: Target
    source: ForeignLayer | None
    why: str
    doubt: str = ""


Chosen = dict[int, tuple[ForeignLayer, str, str]]  # by place: the layer, why, and a doubt


def match(targets: Sequence[Target], foreign: Foreign, wanted: Wanted) -> list[Pair]:
    """Pair all layers of the model, in their order.

    Words of the user come first, equal names second, the common order last.

    Raises:
        WeightsError: if a layer that must be filled has no partner, or the user named what is not there.
    """
    _check_words(targets, foreign, wanted)
    kept = [_is_kept(target, place, wanted) for place, target in enumerate(targets)]
    sources = [layer for layer in foreign.layers if not _matches(layer.name, wanted.leave)]
    chosen: Chosen = {}
    _by_word(targets, sources, wanted.names, chosen)
    _by_name(targets, sources, kept, foreign, chosen)
    if foreign.family != "torch":
        _by_order(targets, sources, kept, foreign, chosen)
    pairs = []
    for place, target in enumerate(targets):
        if kept[place]:
            pairs.append(Pair(target, None, "kept"))
        elif place in chosen:
            pairs.append(Pair(target, *chosen[place]))
        else:
            pairs.append(Pair(target, None, "unfilled"))
    return pairs


def _is_kept(target: Target, place: int, wanted: Wanted) -> bool:
    return _matches(target.name, wanted.keep) or (wanted.lowest is not None and place >= wanted.lowest)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Say whether a layer, or a part that holds it, is named."""
    parts = re.split(r"([./])", name)
    holders = ["".join(parts[: 2 * count + 1]) for count in range(len(parts) // 2 + 1)]
    return any(fnmatch.fnmatchcase(holder, pattern) for holder in holders for pattern in patterns)


def _check_words(targets: Sequence[Target], foreign: Foreign, wanted: Wanted) -> None:
    ours, theirs = [target.name for target in targets], [layer.name for layer in foreign.layers]
    for option, patterns, names, place in (
        ("keep", wanted.keep, ours, "model"),
        ("leave", wanted.leave, theirs, "file"),
        ("names", tuple(wanted.names), ours, "model"),
    ):
        for pattern in patterns:
            if not any(_matches(name, (pattern,)) for name in names):
                near = difflib.get_close_matches(pattern, names, 1)
                raise WeightsError(
                    f"load_weights(): {option}: found {pattern!r}, expected a layer of the {place}. "
                    + (f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(map(repr, names[:8]))}.")
                )


def _by_word(
    targets: Sequence[Target],
    sources: list[ForeignLayer],
    names: Mapping[str, str],
    chosen: Chosen,
) -> None:
    """Take what the user said; the longest name that holds a layer decides."""
    by_name: dict[str, list[ForeignLayer]] = {}
    for layer in sources if names else ():
        by_name.setdefault(_plain(layer.name), []).append(layer)
    for place, target in enumerate(targets):
        holders = [name for name in names if target.name == name or target.name.startswith(f"{name}.")]
        if not holders:
            continue
        holder = max(holders, key=len)
        rest = target.name[len(holder) :]
        found = by_name.get(_plain(names[holder] + rest), [])
        if len(found) > 1 and target.level < len(found):
            found = [found[target.level]]
        if found:
            chosen[place] = (found[0], "named by you", "")
        elif not rest:
            near = difflib.get_close_matches(names[holder], [layer.name for layer in sources], 1)
            raise WeightsError(
                f"load_weights(): names[{holder!r}]: found {names[holder]!r}, expected a layer of the file. "
                + (f"Did you mean {near[0]!r}?" if near else "List them with: unvanish weights FILE")
            )


def _by_name(
    targets: Sequence[Target],
    sources: Sequence[ForeignLayer],
    kept: Sequence[bool],
    foreign: Foreign,
    chosen: Chosen,
) -> None:
    """Take equal names, whatever stands in front of all of them and however their parts are separated."""
    used = {id(source) for source, *_ in chosen.values()}
    free = [source for source in sources if id(source) not in used]
    prefix, theirs = _best_prefix(targets, free)
    for place, target in enumerate(targets):
        source = theirs.get(_plain(target.name))
        if place in chosen or kept[place] or source is None or (target.level and foreign.family != "torch"):
            continue
        is_number = _plain(target.name).replace("_", "").isdigit()
        if foreign.family == "torch" or (fits(source, target) and not is_number):
            chosen[place] = (source, f"same name{f' behind {prefix!r}' if prefix else ''}", "")


def _best_prefix(targets: Sequence[Target], sources: Sequence[ForeignLayer]) -> tuple[str, dict[str, ForeignLayer]]:
    """Return what to take off the names of the file so that most are those of the model."""
    ours = {_plain(target.name) for target in targets}
    cleaned = {clean_name(source.name.replace("/", ".")): source for source in sources}
    counts: Counter[str] = Counter()
    for name in cleaned:
        parts = name.split(".")
        for number in range(min(3, len(parts))):
            prefix = "".join(f"{part}." for part in parts[:number])
            counts[prefix] += _plain(name.removeprefix(prefix)) in ours
    best = max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default="")
    return best, {_plain(n.removeprefix(best)): source for n, source in cleaned.items() if n.startswith(best)}


def _plain(name: str) -> str:
    """Return a name without the differences in how parts are separated."""
    return re.sub(r"[^0-9a-z]+", "_", name.lower()).strip("_")


def _by_order(
    targets: Sequence[Target],
    sources: Sequence[ForeignLayer],
    kept: Sequence[bool],
    foreign: Foreign,
    chosen: Chosen,
) -> None:
    """Pair what is left in the common order, if kinds agree all along; else the n-th of each kind."""
    used = {id(source) for source, *_ in chosen.values()}
    free = [source for source in sources if id(source) not in used]
    open_places = [place for place in range(len(targets)) if place not in chosen]
    for is_tied_taken in (True, False):  # a tied layer has arrays of its own in some formats only
        places = [place for place in open_places if is_tied_taken or not targets[place].is_tied]
        if foreign.is_ordered:
            pairs = list(zip(places, free, strict=False))
            if len(pairs) >= len([p for p in places if not kept[p]]) and all(
                kept[place] or fits(source, targets[place]) for place, source in pairs
            ):
                for number, (place, source) in enumerate(pairs, start=1):
                    if not kept[place]:
                        chosen[place] = (source, f"same order: layer {number} of both", "")
                return
    _by_kind(targets, free, kept, open_places, foreign, chosen)


def _by_kind(
    targets: Sequence[Target],
    free: Sequence[ForeignLayer],
    kept: Sequence[bool],
    places: Sequence[int],
    foreign: Foreign,
    chosen: Chosen,
) -> None:
    """Pair the n-th layer of each kind; only where names or the file itself give the kinds an order."""
    groups: dict[tuple[int, ...], list[int]] = {}
    known: dict[tuple[object, ...], tuple[int, ...]] = {}  # a net has many layers, and few that take different ones
    for place in places:
        module = targets[place].module
        key = (type(module), getattr(module, "groups", 1), getattr(module, "in_channels", 0), *targets[place].tensors)
        if key not in known:
            known[key] = tuple(n for n, source in enumerate(free) if fits(source, targets[place]))
        groups.setdefault(known[key], []).append(place)
    for partners, members in groups.items():
        if not partners or any(set(partners) & set(others) for others in groups if others != partners):
            continue
        if len(members) > len(partners):
            members = [place for place in members if not targets[place].is_tied]
        order = _ordered([free[n] for n in partners], foreign)
        if order is None:
            continue
        doubt = _doubt(order) if foreign.is_ordered else ""
        for number, (place, partner) in enumerate(zip(members, order, strict=False), start=1):
            if not kept[place]:
                why = f"{partner.kind} {number} of the file, {targets[place].kind} {number} of the model"
                chosen[place] = (partner, why, doubt)


def _ordered(sources: list[ForeignLayer], foreign: Foreign) -> list[ForeignLayer] | None:
    """Return layers of one kind in their order; None if neither the file nor their names tell it."""
    holders = {source.name.rpartition("/")[0] for source in sources}
    if foreign.is_ordered or len(sources) < 2 or (foreign.is_kind_ordered and len(holders) == 1):
        return sources
    ordered = sorted(sources, key=lambda source: natural(source.name))
    return ordered if _are_numbered([source.name for source in ordered]) else None


def _doubt(sources: Sequence[ForeignLayer]) -> str:
    """Return what is uncertain if layers of one shape were paired although the orders of all layers differ."""
    seen: dict[tuple[object, ...], str] = {}
    for source in sources:
        shapes = tuple(tuple(array.shape) for array in source.arrays.values())
        if shapes in seen:
            return (
                f"the layers stand in another order than in the model, and {seen[shapes]!r} and {source.name!r} have "
                "the same shapes. Name them: names={'layer of the model': 'layer of the file'}"
            )
        seen[shapes] = source.name
    return ""


def _are_numbered(names: Sequence[str]) -> bool:
    """Say whether names differ by a number only, as a framework counts them: ``conv2d``, ``conv2d_1``.

    Example:
        >>> _are_numbered(["conv2d", "conv2d_1"]), _are_numbered(["shortcut", "main"])
        (True, False)
    """
    stems = {re.sub(r"_?\d+", "", name) for name in names}
    return len(stems) == 1

"""A plan in words: one line for each tensor, then what stays over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .foreign import Foreign, ForeignLayer

if TYPE_CHECKING:
    from .plan import Plan

MOST_LINES = 400


def plan_text(plan: Plan) -> str:
    """Return a plan as text."""
    rows = []
    for step in plan.steps:
        for number, (name, value) in enumerate(zip(step.names, step.values, strict=True)):
            shapes = zip(step.sources, step.before, strict=True)
            origin = ", ".join(f"{source} {_shape(shape)}" for source, shape in shapes) or "constant"
            operations = ", ".join(step.operations) or "as it is"
            rows.append(
                (
                    name,
                    _shape(tuple(value.shape)),
                    "" if number else origin,
                    operations if not number else '"',
                    step.why,
                )
            )
    state = "loaded" if plan.is_loaded else "a plan; nothing is changed yet"
    lines = [f"{plan.foreign.form}: {plan.foreign.file} → {type(plan.model).__name__} ({state})"]
    lines += _table(("tensor", "shape", "from", "operations", "why"), rows)
    for title, names in (
        ("settings taken over", [str(change) for change in plan.changes]),
        ("kept as they are", plan.kept),
        ("unfilled", plan.unfilled),
        ("unused", plan.unused),
        ("in doubt", plan.doubts),
        ("wrong", plan.faults),
    ):
        lines += [f"{title}:", *(f"  {name}" for name in names[:MOST_LINES])] if names else []
    lines.append(f"verified: {plan.verification}" if plan.verification else "unverified: give verify=(inputs, outputs)")
    return _printable("\n".join(lines))


def foreign_document(foreign: Foreign) -> dict[str, Any]:
    """Return the content of a file as plain data, for JSON."""
    return {
        "schema_version": 1,
        "file": foreign.file,
        "format": foreign.form,
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "arrays": [
                    {"name": role, "shape": list(array.shape), "dtype": str(array.dtype).removeprefix("torch.")}
                    for role, array in layer.arrays.items()
                ],
                "settings": _told(layer),
            }
            for layer in foreign.layers
        ],
    }


def _told(layer: ForeignLayer) -> dict[str, str]:
    return {key: str(value) for key, value in layer.settings.items() if key in _TOLD}


def foreign_text(foreign: Foreign, *, is_short: bool = False) -> str:
    """Return the content of a file as text; its first line alone if that is enough."""
    rows = []
    for layer in foreign.layers:
        for number, (role, array) in enumerate(layer.arrays.items()):
            told = ", ".join(f"{key}={value}" for key, value in _told(layer).items())
            first = (layer.name, layer.kind) if number == 0 else ("", "")
            rows.append(
                (
                    *first,
                    role,
                    _shape(tuple(array.shape)),
                    str(array.dtype).removeprefix("torch."),
                    "" if number else told,
                )
            )
    count = sum(array.numel() for layer in foreign.layers for array in layer.arrays.values())
    lines = [f"{foreign.form}: {foreign.file}: {len(foreign.layers)} layers, {len(rows)} arrays, {count:,} numbers"]
    if is_short:
        return _printable(lines[0])
    lines += _table(("layer", "kind", "array", "shape", "dtype", "settings"), rows)
    return _printable("\n".join((*lines, *foreign.notes)))


_TOLD = ("epsilon", "momentum", "strides", "padding", "groups", "activation", "heads", "reset_after", "dilation")


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    shown = [titles, *rows[:MOST_LINES]]
    widths = [max(len(row[column]) for row in shown) for column in range(len(titles))]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown
    ]
    return lines if len(rows) <= MOST_LINES else [*lines, f"  and {len(rows) - MOST_LINES} more"]


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _printable(text: str) -> str:
    """Return text without characters that could command a terminal: names come from other people's files."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)

"""A patched copy of a script: one line that applies the winner, where it is certain where that line belongs."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import OptionError

NEED_DATA = ("lsuv-init", "precise-bn", "limit-units", "augment")  # they look at a batch
NEED_THE_CALL = ("match-target-shape", "logits-loss")  # they act on how the script calls model and loss


@dataclass(frozen=True)
class _Place:
    """Where the line goes: after the statement that makes the optimiser."""

    model: str
    optimizer: str
    line: int  # the last one of that statement, counted from 1
    indent: str


def check_place(file: Path, target: str, *, is_module: bool) -> None:
    """Refuse to write where something would be lost.

    Raises:
        OptionError: if the file exists or cannot be made, or the target is a module.
    """
    if is_module:
        raise OptionError("cure: --apply: found a module (-m), expected a script: a copy of it could not be imported.")
    if file.exists():
        raise OptionError(f"cure: --apply: found that {str(file)!r} exists, expected a new file. Nothing was run.")
    if not file.absolute().parent.is_dir():
        raise OptionError(f"cure: --apply: found no folder {str(file.parent)!r}, expected one that exists.")


def patched_copy(script: Path, file: Path, treatments: Sequence[str]) -> str:
    """Write a copy of a script with the treatments applied; return what was done, or why it was not.

    The copy differs by an import and one line after the optimiser is made. It is written only where that place is
    certain: one statement ``name = ...Optimizer(model.parameters(), ...)`` in the script, outside of any loop.
    """
    source = script.read_text()
    reason = _reason_against(treatments)
    place = _find_place(source)
    if reason or place is None:
        why = (
            reason
            or "it is not certain where the optimizer is made (expected one `name = Optimizer(model.parameters()...)`)"
        )
        return f"--apply: {file} was not written: {why}. Paste the lines above instead."
    file.write_text(_with_lines(source, place, treatments))
    return f"patched copy: {file} (one import and line {place.line + 2} are new)"


def _reason_against(treatments: Sequence[str]) -> str:
    for treatment in treatments:
        identifier = treatment.partition("=")[0]
        if identifier.startswith(NEED_DATA):
            return f"{identifier!r} needs a batch of the data"
        if identifier in NEED_THE_CALL:
            return f"{identifier!r} changes how the script itself calls its model or loss"
    return ""


def _find_place(source: str) -> _Place | None:
    lines = source.splitlines()
    tree = ast.parse(source)
    found = [place for body in _bodies(tree) for statement in body if (place := _place_of(statement, lines))]
    return found[0] if len(found) == 1 and not _in_loop(tree, found[0].line) else None


def _bodies(tree: ast.Module) -> list[list[ast.stmt]]:
    return [body for node in ast.walk(tree) if isinstance(body := getattr(node, "body", None), list)]


def _in_loop(tree: ast.Module, line: int) -> bool:
    loops = [node for node in ast.walk(tree) if isinstance(node, (ast.For, ast.While))]
    return any(loop.lineno <= line <= (loop.end_lineno or loop.lineno) for loop in loops)


def _place_of(statement: ast.stmt, lines: Sequence[str]) -> _Place | None:
    """Recognise ``optimizer = something(model.parameters(), ...)``."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    target, value = statement.targets[0], statement.value
    if not isinstance(target, ast.Name) or not isinstance(value, ast.Call) or not value.args:
        return None
    first = value.args[0]
    if not (isinstance(first, ast.Call) and isinstance(first.func, ast.Attribute) and first.func.attr == "parameters"):
        return None
    indent = lines[statement.lineno - 1][: statement.col_offset]
    if indent.strip():  # something stands before it in its line
        return None
    return _Place(ast.unparse(first.func.value), target.id, statement.end_lineno or statement.lineno, indent)


def _with_lines(source: str, place: _Place, treatments: Sequence[str]) -> str:
    lines = source.splitlines(keepends=True)
    end = "\r\n" if lines[0].endswith("\r\n") else "\n"
    named = ", ".join(repr(treatment) for treatment in treatments)
    call = f"unvanish.treat({place.model}, {place.optimizer}, {named}).keep()  # found by unvanish cure"
    lines.insert(place.line, place.indent + call + end)
    lines.insert(_first_import(source), f"import unvanish{end}")
    return "".join(lines)


def _first_import(source: str) -> int:
    """Return how many lines stand before the first import that may follow ours."""
    for statement in ast.parse(source).body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
                continue
            return statement.lineno - 1
    return 0

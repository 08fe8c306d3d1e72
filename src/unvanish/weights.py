"""The command `weights`: what a foreign weights file holds, and the plan to load it into a model."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from .errors import TargetError, UnvanishError, WeightsError
from .factory import build, load_factory
from .output import CLEAN, FINDINGS, TARGET, Output
from .reuse.weights import Plan, load_weights, read_weights
from .reuse.weights.foreign import Family
from .reuse.weights.load import problems_of
from .reuse.weights.show import foreign_document, foreign_text, plan_text

_FAMILIES: dict[str, Family] = {"keras": "keras", "flax": "flax", "torch": "torch"}


@dataclass(frozen=True)
class Wanted:
    """What the user asked for."""

    file: Path
    onto: str
    keep: tuple[str, ...]
    leave: tuple[str, ...]
    lowest: int | None
    part: str
    layout: str

    def family(self) -> Family | None:
        """Return whose layouts the user says the arrays have."""
        return _FAMILIES.get(self.layout)


def show(wanted: Wanted, output: Output) -> int:
    """List the layers of a file or, for a model, write the plan to load them; return the exit code.

    Raises:
        TargetError: if the file or the factory cannot be loaded.
    """
    try:
        if not wanted.onto:
            foreign = read_weights(wanted.file, part=wanted.part, layout=wanted.family())
            output.write(foreign_text(foreign, is_short=output.quiet) + "\n", foreign_document(foreign))
            return CLEAN
        with output.of_script():
            model = _model(wanted.onto)
        plan = _plan(model, wanted)
    except WeightsError as error:
        raise TargetError(f"weights: {str(error).removeprefix('load_weights(): ')}") from error
    problems = problems_of(plan, is_partial=bool(wanted.keep or wanted.leave or wanted.lowest), is_proven=False)
    verdict = f"it would be refused, for {len(problems)} reasons" if problems else "it would be loaded"
    text = verdict if output.quiet else f"{plan_text(plan)}\n{verdict}"
    output.write(f"{text}\n", {**plan.to_dict(), "problems": problems})
    return FINDINGS if problems else CLEAN


def _plan(model: Any, wanted: Wanted) -> Plan:
    return load_weights(
        model,
        wanted.file,
        keep=wanted.keep,
        leave=wanted.leave,
        lowest=wanted.lowest,
        part=wanted.part,
        layout=wanted.family(),
        apply=False,
    )


def _model(target: str) -> Any:
    """Build the model of a factory; what the user's code raises is shown whole."""
    try:
        return build(load_factory(target, command="weights"), command="weights").model
    except (UnvanishError, KeyboardInterrupt):
        raise
    except BaseException:  # a SystemExit, too: then there is no model to load into
        traceback.print_exc()
        raise typer.Exit(TARGET) from None

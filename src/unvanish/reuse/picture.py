"""Pictures in files: without a screen, and with errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import OptionError


def blank(call: str, width: float, height: float) -> Any:
    """Return a figure of matplotlib, sizes in inches.

    Raises:
        OptionError: if matplotlib is not there.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError(
            f"{call}: found no matplotlib, expected it for pictures. Run: pip install 'unvanish[plot]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: it would keep the figure, and choose a screen
    return figure


def save(call: str, figure: Any, file: str | Path, example: str) -> Path:
    """Write a figure, and return where.

    Raises:
        OptionError: if the file cannot be written.
    """
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise OptionError(
            f"{call}: file: found {str(file)!r} ({error}), expected a file that can be written, ending in .png, .svg "
            f"or .pdf. Write {example}."
        ) from error
    return Path(file)

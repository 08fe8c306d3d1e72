"""Where results go: the report or the JSON document on standard output, the rest on standard error."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

from .errors import OptionError
from .records import SEVERITIES, Findings, Recording
from .report import Ink, report_text, verdict_line
from .terrain import Landscape

CLEAN, FINDINGS, USAGE, TARGET, INCONCLUSIVE = range(5)  # exit codes


class FailOn(StrEnum):
    """From which severity on findings make the exit code 1."""

    critical = "critical"
    warning = "warning"
    info = "info"
    never = "never"


class Output:
    """Where the result of a command goes, and in which form.

    Args:
        json_file: ``-`` is standard output, which then carries nothing else; empty: no document.
        quiet: The verdict alone.
        no_color: No styles, even on a terminal.

    Raises:
        OptionError: if ``json_file`` cannot be written; found out before the work is done.
    """

    def __init__(self, json_file: str = "", *, quiet: bool = False, no_color: bool = False) -> None:
        self.stream: IO[str] = sys.stdout
        self.is_document_only = json_file == "-"
        self.file = Path(json_file).absolute() if json_file not in ("", "-") else None
        self.quiet, self.no_color = quiet, no_color
        if self.file is not None:
            _write(self.file, "", mode="a")

    def ink(self) -> Ink:
        """Return what the stream can show now."""
        return Ink.of(self.stream, is_colour_wanted=not self.no_color)

    def show(self, findings: Findings, recording: Recording | None = None, landscape: Landscape | None = None) -> None:
        """Write the report, the document, or both."""
        ink = self.ink()
        text = verdict_line(findings, ink) if self.quiet else report_text(findings, ink, recording, landscape)
        self.write(text, findings.to_dict() | ({} if landscape is None else {"landscape": landscape.to_dict()}))

    def write(self, text: str, document: Mapping[str, Any]) -> None:
        """Write a result in the form that was asked for."""
        written = json.dumps(document, indent=2, allow_nan=False) + "\n"
        if self.file is not None:
            _write(self.file, written)
        self.stream.write(written if self.is_document_only else text)
        self.stream.flush()

    def say(self, text: str) -> None:
        """Tell on standard error what is not the result."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def of_script(self) -> Iterator[None]:
        """Keep standard output for the document: what a script prints meanwhile goes to standard error."""
        if not self.is_document_only:
            yield
            return
        flush()
        kept = os.dup(1)
        os.dup2(2, 1)
        try:
            yield
        finally:
            flush()
            os.dup2(kept, 1)
            os.close(kept)


def _write(path: Path, text: str, *, mode: str = "w") -> None:
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OptionError(
            f"--json: file {str(path)!r}: found {error.strerror!r}, expected a file that can be written. "
            "Name another one, or write --json - for standard output."
        ) from error


def flush() -> None:
    """Bring what a script wrote before what we write."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def exit_code(findings: Findings, fail_on: FailOn) -> int:
    """Return the exit code that findings stand for."""
    if fail_on is FailOn.never:
        return CLEAN
    if any(findings.at_least(severity) for severity in SEVERITIES if severity == fail_on.value):
        return FINDINGS
    return INCONCLUSIVE if findings.verdict == "inconclusive" else CLEAN


def nearby(path: Path) -> str:
    """Return a path as short as it can be written from the working directory."""
    with contextlib.suppress(ValueError, OSError):
        return str(path.relative_to(Path.cwd()))
    return str(path)

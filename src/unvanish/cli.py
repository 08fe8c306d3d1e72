"""The command line. Standard output carries the result; progress and logs go to standard error."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import IO, Annotated, NoReturn

import typer
from typer.main import get_command

from .diagnose import diagnose
from .errors import OptionError, TargetError, UnvanishError
from .launch import check_target
from .records import SEVERITIES, Findings, Recording
from .report import Ink, report_text, verdict_line
from .trace import read_recording
from .version import VERSION

USAGE, TARGET, INCONCLUSIVE = 2, 3, 4
_FINDINGS = 1

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Watch a PyTorch training layer by layer, and learn what is wrong with it.",
    epilog="Exit codes: 0 clean, 1 findings at or above --fail-on, 2 usage, 3 the target could not be "
    "loaded or raised, 4 inconclusive, 130/143 interrupted or terminated.",
)


class FailOn(StrEnum):
    """From which severity on findings make the exit code 1."""

    critical = "critical"
    warning = "warning"
    info = "info"
    never = "never"


Json = Annotated[str, typer.Option("--json", metavar="FILE", help="Write the findings as JSON; - is standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the verdict only.")]
NoColor = Annotated[bool, typer.Option("--no-color", help="No colours; NO_COLOR is honoured as well.")]
Fail = Annotated[
    FailOn,
    typer.Option("--fail-on", help="Exit with 1 from this severity on; never: also 0 if inconclusive."),
]


def _version(is_asked: bool) -> None:
    if is_asked:
        print(f"unvanish {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command(
    context_settings={"allow_interspersed_args": False},
    epilog="All arguments after the script are the script's own.",
)
def run(
    target: Annotated[str, typer.Argument(metavar="SCRIPT", help="A script, or with -m a module.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[ARGS]...")] = None,
    is_module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module, as with python -m.")] = False,
    every: Annotated[int, typer.Option(min=1, help="Sample each so many steps.")] = 10,
    json: Json = "",
    fail_on: Fail = FailOn.critical,
    folder: Annotated[Path, typer.Option(help="Keep the record in a new folder of this one.")] = Path("runs"),
    no_record: Annotated[bool, typer.Option("--no-record", help="Keep no record on disk.")] = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Run a training script unmodified, watch it, and say what is wrong with it."""
    from .attend import attend, without_training

    check_target(target, is_module=is_module)
    json_file = Path(json).absolute() if json not in ("", "-") else None
    is_leader = os.environ.get("RANK", "0") == "0"  # of several processes one keeps the record
    with _script_output_aside(json == "-") as result:
        attended = attend(
            target,
            arguments or [],
            is_module=is_module,
            every=every,
            parent=None if no_record or not is_leader else folder,
        )
        _flush()
        if not is_leader:
            raise typer.Exit(attended.outcome.status)
        recording = attended.recording
        findings = without_training(diagnose(recording), recording, is_torch_seen=attended.is_torch_seen)
        out = _Output(result, json if json_file is None else str(json_file), quiet=quiet, no_color=no_color)
        out.show(findings, recording)
        if attended.folder is not None:
            out.say(f"record: {_nearby(attended.folder)}")
    raise typer.Exit(attended.outcome.status or _exit_code(findings, fail_on))


@app.command()
def report(
    record: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    json: Json = "",
    fail_on: Fail = FailOn.critical,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Say what is wrong with a recorded run; also while it goes on."""
    recording = read_recording(record)
    findings = diagnose(recording)
    _Output(sys.stdout, json, quiet=quiet, no_color=no_color).show(findings, recording)
    raise typer.Exit(_exit_code(findings, fail_on))


class _Output:
    """Where the result goes, and in which form."""

    def __init__(self, stream: IO[str], json: str, *, quiet: bool, no_color: bool) -> None:
        self.stream, self.json, self.quiet, self.no_color = stream, json, quiet, no_color

    def show(self, findings: Findings, recording: Recording | None) -> None:
        """Write the JSON document, the report, or both."""
        if self.json == "-":
            self.write(findings.to_json() + "\n")
            return
        if self.json:
            _write_file(Path(self.json), findings.to_json() + "\n")
        ink = Ink.of(self.stream, is_colour_wanted=not self.no_color)
        self.write(verdict_line(findings, ink) if self.quiet else report_text(findings, ink, recording))

    def write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()

    def say(self, text: str) -> None:
        """Tell something that is not the result."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


def _write_file(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OptionError(
            f"--json: {str(path)!r}: found {error.strerror}, expected a file that can be written."
        ) from error


@contextlib.contextmanager
def _script_output_aside(is_wanted: bool) -> Iterator[IO[str]]:
    """Send what the script writes to standard output to standard error, and hand out the real one."""
    if not is_wanted:
        yield sys.stdout
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with open(os.dup(kept), "w", encoding="utf-8") as result:
            yield result
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)


def _flush() -> None:
    """Bring what the script wrote before what we write."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _exit_code(findings: Findings, fail_on: FailOn) -> int:
    if fail_on is FailOn.never:
        return 0
    if any(findings.at_least(severity) for severity in SEVERITIES if severity == fail_on.value):
        return _FINDINGS
    return INCONCLUSIVE if findings.verdict == "inconclusive" else 0


def _nearby(path: Path) -> str:
    """Return a path as short as it can be written from here."""
    with contextlib.suppress(ValueError, OSError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def _log_to_stderr() -> None:
    """Show our own warnings; the root logger is the script's to configure."""
    logger = logging.getLogger("unvanish")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("unvanish: %(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code."""
    _log_to_stderr()
    try:
        get_command(app).main(arguments, prog_name="unvanish")
    except UnvanishError as error:
        print(f"unvanish: {error}", file=sys.stderr)
        sys.exit(TARGET if isinstance(error, TargetError) else USAGE)
    sys.exit(0)

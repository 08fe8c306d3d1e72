"""The command line. Standard output carries the result; progress and logs go to standard error."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from typer.main import get_command

from .diagnose import diagnose
from .errors import OptionError, TargetError, UnvanishError
from .launch import check_target
from .output import TARGET, USAGE, FailOn, Output, exit_code, flush, nearby
from .records import Findings
from .report import RunView, compare_document, compare_text
from .terrain import read_landscape
from .trace import read_recording
from .version import VERSION

if TYPE_CHECKING:
    from .inject import Injection

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Watch a PyTorch training layer by layer, and learn what is wrong with it.",
    epilog="Exit codes: 0 clean, 1 findings at or above --fail-on, 2 usage, 3 the target could not be "
    "loaded or raised, 4 inconclusive, 130/143 interrupted or terminated.",
)

Json = Annotated[str, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - is standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the verdict only.")]
NoColor = Annotated[bool, typer.Option("--no-color", help="No colours; NO_COLOR is honoured as well.")]


class Layout(StrEnum):
    """Whose layouts arrays have."""

    keras = "keras"
    flax = "flax"
    torch = "torch"


Fail = Annotated[
    FailOn, typer.Option("--fail-on", help="Exit with 1 from this severity on; never: also 0 if inconclusive.")
]


def _version(is_asked: bool) -> None:
    if is_asked:
        print(f"unvanish {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command(
    context_settings={"allow_interspersed_args": False},
    epilog="All arguments after the script are the script's own.",
)
def run(
    target: Annotated[str, typer.Argument(metavar="SCRIPT", help="A script, or with -m a module.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGS", help="The script's arguments.")] = None,
    is_module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module, as with python -m.")] = False,
    every: Annotated[int, typer.Option(min=1, help="Sample each so many steps.")] = 10,
    json: Json = "",
    fail_on: Fail = FailOn.critical,
    folder: Annotated[Path, typer.Option(help="Keep the record in a new folder of this one.")] = Path("runs"),
    no_record: Annotated[bool, typer.Option("--no-record", help="Keep no record on disk.")] = False,
    treat: Annotated[
        list[str] | None,
        typer.Option("--treat", metavar="ID[=VALUE]", help="Apply a treatment while the script runs; repeatable."),
    ] = None,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Run a training script unmodified, watch it, and say what is wrong with it."""
    from .attend import attend, without_training

    check_target(target, is_module=is_module)
    output = Output(json, quiet=quiet, no_color=no_color)
    is_leader = os.environ.get("RANK", "0") == "0"  # of several processes one keeps the record and reports
    parent = None if no_record or not is_leader else folder
    injection = _injection(treat or [])
    also = None if injection is None else injection.attach
    with output.of_script():
        attended = attend(target, arguments or [], is_module=is_module, every=every, parent=parent, also=also)
    flush()
    status = attended.outcome.status
    if not is_leader:
        raise typer.Exit(status)
    recording = attended.recording
    findings = without_training(diagnose(recording), recording, is_torch_seen=attended.is_torch_seen)
    output.show(findings, recording)
    if injection is not None:
        output.say(f"applied: {', '.join(dict.fromkeys(injection.applied)) or 'no treatment'}")
        for reason in dict.fromkeys(injection.refused):
            output.say(reason)
    if attended.folder is not None:
        output.say(f"record: {nearby(attended.folder)}")
    raise typer.Exit(status or exit_code(findings, fail_on))


def _injection(treatments: Sequence[str]) -> Injection | None:
    """Return what applies treatments to the script; None if there are none."""
    if not treatments:
        return None
    from .inject import Injection
    from .treatments import parse_treatment

    return Injection([parse_treatment(text) for text in treatments])


@app.command()
def check(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="FILE.py:FACTORY or PKG.MOD:FACTORY.")],
    json: Json = "",
    fail_on: Fail = FailOn.critical,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Look at a model before it trains: one forward and one backward pass on one batch.

    The factory takes no arguments and returns a model, (model, loss_fn, batch), or
    (model, loss_fn, batch, optimizer).
    """
    output = Output(json, quiet=quiet, no_color=no_color)
    with output.of_script():
        findings = _checked(target)
    output.show(findings)
    raise typer.Exit(exit_code(findings, fail_on))


def _checked(target: str) -> Findings:
    """Build and check a model; what the user's code raises is shown whole."""
    from .factory import build, load_factory

    try:
        factory = load_factory(target)
        from .check import check

        found = check(*build(factory))
    except OptionError as error:
        raise TargetError(f"check: target {target!r}: {error}") from error
    except (UnvanishError, KeyboardInterrupt):
        raise
    except BaseException:  # a SystemExit, too: then there is no model to look at
        traceback.print_exc()
        raise typer.Exit(TARGET) from None
    return replace(found, run={**found.run, "script": target})


@app.command(
    context_settings={"allow_interspersed_args": False},
    epilog="All arguments after the script are the script's own. Trials run in copies of the working folder and of the "
    "script's folder; what a script writes elsewhere by an absolute path is written. Exit codes: 0 a cure was found or "
    "none is needed, 1 nothing helped for certain, 3 the script failed, 4 nothing trained, 130/143 interrupted.",
)
def cure(
    target: Annotated[str, typer.Argument(metavar="SCRIPT", help="A script, or with -m a module.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGS", help="The script's arguments.")] = None,
    is_module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module, as with python -m.")] = False,
    budget: Annotated[float, typer.Option(min=2, help="Spend at most so many times the steps of one run.")] = 6.0,
    metric: Annotated[
        str, typer.Option(metavar="REGEX", help="Judge by the last match of its group in what the script prints.")
    ] = "",
    maximise: Annotated[
        bool | None,
        typer.Option("--maximise/--minimise", help="Whether a greater metric is better.", show_default=False),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="So many trials at once.")] = 1,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds for one trial; 0 = no limit.")] = 0.0,
    apply: Annotated[
        Path | None, typer.Option("--apply", metavar="FILE", help="Write a patched copy of the script with the winner.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Keep the trials in a folder of this one; they are resumed.")] = Path(
        "runs"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the trials of an earlier search.")] = False,
    json: Json = "",
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Find a treatment that verifiably helps a training script, by short trials of it."""
    from .remedy import Wanted, seek

    check_target(target, is_module=is_module, command="cure")
    output = Output(json, quiet=quiet, no_color=no_color)
    wanted = Wanted(
        target, tuple(arguments or ()), is_module, budget, metric, maximise, jobs, timeout, apply, folder, fresh
    )
    raise typer.Exit(seek(wanted, output))


@app.command()
def report(
    record: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    json: Json = "",
    fail_on: Fail = FailOn.critical,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Say what is wrong with a recorded run; also while it goes on."""
    from .attend import without_training

    recording = read_recording(record)
    findings = without_training(diagnose(recording), recording, is_torch_seen=True)
    landscape = read_landscape(record if record.is_dir() else record.parent)
    Output(json, quiet=quiet, no_color=no_color).show(findings, recording, landscape)
    raise typer.Exit(exit_code(findings, fail_on))


@app.command()
def compare(
    records: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="The folders of two or more runs.")],
    json: Json = "",
    no_color: NoColor = False,
) -> None:
    """Put recorded runs side by side: verdicts, losses, and the layers of equal name."""
    if len(records) < 2:
        raise OptionError(
            f"compare: found one run, {str(records[0])!r}, expected two or more. "
            f"For one run write: unvanish report {records[0]}"
        )
    recordings = [read_recording(record) for record in records]
    runs = [
        RunView(record.resolve().name, recording, diagnose(recording))
        for record, recording in zip(records, recordings, strict=True)
    ]
    output = Output(json, no_color=no_color)
    output.write(compare_text(runs, output.ink()), compare_document(runs))


@app.command(
    epilog="Exit codes: 0 listed, or the plan is complete; 1 the load would be refused; 2 usage; 3 the file or the "
    "factory could not be loaded."
)
def weights(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help=".keras .h5 .weights.h5 .onnx .msgpack .npz .safetensors .pt, orbax")
    ],
    onto: Annotated[
        str, typer.Option(metavar="TARGET", help="FILE.py:FACTORY or PKG.MOD:FACTORY of the model to load into.")
    ] = "",
    keep: Annotated[
        list[str] | None, typer.Option(metavar="LAYER", help="A layer of the model that stays as it is; repeatable.")
    ] = None,
    leave: Annotated[
        list[str] | None, typer.Option(metavar="LAYER", help="A layer of the file that is not used; repeatable.")
    ] = None,
    lowest: Annotated[int | None, typer.Option(min=1, help="Only so many of the first layers.")] = None,
    part: Annotated[str, typer.Option(help="Of a file with several sets of weights, the one to read.")] = "",
    layout: Annotated[
        Layout | None, typer.Option(help="Whose layouts the arrays have, where names leave it open.")
    ] = None,
    json: Json = "",
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """List what a weights file of another framework holds, or the plan to load it into a model."""
    output = Output(json, quiet=quiet, no_color=no_color)
    from .weights import Wanted, show

    family = layout.value if layout else ""
    raise typer.Exit(show(Wanted(file, onto, tuple(keep or ()), tuple(leave or ()), lowest, part, family), output))


@app.command()
def demo(
    folder: Annotated[
        Path | None, typer.Option(help="Keep the records in new folders of this one; default: keep none.")
    ] = None,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Watch a network that does not learn, remedy it, and watch it again."""
    from .demo import demonstrate

    demonstrate(Output(quiet=quiet, no_color=no_color), folder)


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

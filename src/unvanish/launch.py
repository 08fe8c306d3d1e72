"""Run an unmodified script under watch, as `python` would run it."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import importlib.util
import os
import runpy
import signal
import sys
import time
import traceback
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .errors import TargetError


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a script ended: ``status`` as the shell sees it, and whether it raised."""

    status: int
    has_raised: bool = False
    message: str = ""


def check_target(target: str, *, is_module: bool, command: str = "run") -> None:
    """Raise `TargetError` unless the target is there to be run by a command; nothing is imported or run.

    Raises:
        TargetError: if the script or module cannot be found, or is no Python.
    """
    if is_module:
        try:
            found = _find_module(target)
        except (ImportError, ValueError) as error:
            raise TargetError(f"{command}: module {target!r}: found {error}, expected an importable module.") from error
        except Exception:  # the package fails when it is imported: running it shows the whole traceback
            return
        if found is None:
            raise TargetError(
                f"{command}: module {target!r}: found nothing of that name, expected an importable module. "
                f"For a file write: unvanish {command} path/to/train.py"
            )
        return
    path = Path(target)
    if not path.exists():
        raise TargetError(
            f"{command}: script {target!r}: found no such file, expected a Python script. "
            f"The working directory is {os.getcwd()!r}."
        )
    if path.is_dir():
        raise TargetError(f"{command}: script {target!r}: found a folder, expected a Python script.")


def _find_module(target: str) -> Any:
    """Look for a module where `python -m` would: in the working directory first."""
    path = list(sys.path)
    sys.path[0:1] = [os.getcwd()]
    try:
        return importlib.util.find_spec(target)
    finally:
        sys.path[:] = path


def run_target(target: str, arguments: list[str], *, is_module: bool) -> Outcome:
    """Run a script or module as ``__main__`` and say how it ended; its traceback goes to standard error."""
    main = sys.modules["__main__"]
    argv, path = sys.argv, list(sys.path)
    pid = os.getpid()
    previous = _on_termination(pid)
    try:
        outcome = _run(target, arguments, is_module=is_module)
    finally:
        sys.modules["__main__"], sys.argv, sys.path[:] = main, argv, path
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
    if os.getpid() != pid:
        _end_child(outcome)
    return outcome


def _run(target: str, arguments: list[str], *, is_module: bool) -> Outcome:
    try:
        if is_module:
            sys.argv = [target, *arguments]
            sys.path[0:1] = [os.getcwd()]
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            _run_file(target, arguments)
    except SystemExit as stop:
        return _exit_status(stop)
    except KeyboardInterrupt:
        return Outcome(130, message="interrupted")
    except BaseException as error:
        _print_traceback(error)
        return Outcome(3, has_raised=True, message=f"{type(error).__name__}: {error}")
    return Outcome(0)


def _end_child(outcome: Outcome) -> NoReturn:
    """End a process that the script forked as `python` would: it must not write our report."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(1 if outcome.has_raised else outcome.status)


def _run_file(target: str, arguments: list[str]) -> None:
    """Execute a file in a fresh ``__main__``, so that pickling and spawned workers find it."""
    path = os.path.join(os.getcwd(), target)  # as python writes it: absolute, and not tidied up
    sys.argv = [target, *arguments]
    sys.path[0:1] = [os.path.dirname(os.path.realpath(path))]
    with open(path, "rb") as file:
        source = file.read()
    code = compile(source, path, "exec", dont_inherit=True)
    module = types.ModuleType("__main__")
    module.__file__ = path
    module.__builtins__ = builtins  # type: ignore[attr-defined]
    module.__dict__["__annotations__"] = {}
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


class _Terminated(SystemExit):
    """SIGTERM arrived."""


def _on_termination(pid: int) -> Any:
    """Turn SIGTERM into an exit that unwinds, so that the record is finished; None if not possible."""

    def terminate(number: int, frame: Any) -> None:
        if os.getpid() != pid:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        raise _Terminated(143)

    try:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return None
        return signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread
        return None


def _exit_status(stop: SystemExit) -> Outcome:
    """Return what the shell would see: None is 0, a number itself, anything else is printed and 1."""
    if stop.code is None:
        return Outcome(0)
    if isinstance(stop.code, int):
        return Outcome(stop.code & 0xFF, message="terminated" if isinstance(stop, _Terminated) else "")
    print(stop.code, file=sys.stderr)
    return Outcome(1, message=str(stop.code))


def _print_traceback(error: BaseException) -> None:
    """Print the traceback as Python would, without the frames of this file."""
    sys.stdout.flush()
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    traceback.print_exception(type(error), error, frames, file=sys.stderr)


def run_folder(parent: Path, target: str) -> Path:
    """Return a new folder name for a run: time, script, and a number if that is taken."""
    stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(target).stem)[:40] or "run"
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{stem}"
    folder, number = parent / name, 1
    while folder.exists():
        number += 1
        folder = parent / f"{name}-{number}"
    return folder

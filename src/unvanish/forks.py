"""A process that has imported torch already and becomes a trial by forking: most of a short trial is its imports.

    python -m unvanish.forks FILE_DESCRIPTOR MODULE...

Each message on the socket is a trial: what to run, with a socket that closes when the trial ends.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

MESSAGE = 1 << 20  # bytes of one request; environments are the largest part of it
PRELOADED = ("torch", "numpy", "scipy", "sklearn")  # importing them has no effect that a script could miss
# A script that sets variables may want them set before torch is imported.
_SETS_ENVIRONMENT = re.compile(r"environ\s*\[|environ\.(update|setdefault|pop)|putenv|ctypes|LD_PRELOAD")


class Nursery:
    """Starts trials by forking; made by `nursery_for`.

    Args:
        modules: Imported before the first trial.
        environment: Of the trials.
    """

    def __init__(self, modules: list[str], environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "unvanish.forks", str(theirs.fileno()), *modules]
        self._socket = ours
        self._process = subprocess.Popen(
            command, env=dict(environment), pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        theirs.close()

    def start(self, specification: Path, folder: Path, output: Path) -> ForkedTrial:
        """Start the trial of a specification in a working folder.

        Raises:
            OSError: if the process is gone.
        """
        ours, theirs = socket.socketpair()
        message = json.dumps([str(specification), str(folder), str(output)]).encode()
        with theirs:
            socket.send_fds(self._socket, [message], [theirs.fileno()])
        return ForkedTrial(ours)

    def close(self) -> None:
        """End the process; trials that run go on."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


class ForkedTrial:
    """A running trial, with the part of `subprocess.Popen` that is needed."""

    returncode = None

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        pid = end.recv(32)
        if not pid:
            raise OSError("the process that starts trials is gone")
        self.pid = int(pid)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the trial has ended: its end of the socket is closed then.

        Raises:
            subprocess.TimeoutExpired: if it takes longer.
        """
        if self._socket.fileno() < 0:
            return
        self._socket.settimeout(timeout)
        try:
            self._socket.recv(1)
        except TimeoutError as error:
            raise subprocess.TimeoutExpired("trial", timeout or 0.0) from error
        self._socket.close()


def nursery_for(script: Path | None, environment: Mapping[str, str]) -> Nursery | None:
    """Return a nursery for the trials of a script; None where only processes of their own are safe.

    Those are other systems than Linux, and scripts that change the environment, which may have to come before the
    import of torch.
    """
    if sys.platform != "linux" or script is None:
        return None
    try:
        source = script.read_text()
        tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError):
        return None
    modules = sorted({name for name in _imported(tree) if name.partition(".")[0] in PRELOADED})
    if _SETS_ENVIRONMENT.search(source) or not modules:
        return None
    return Nursery(modules, environment)


def _imported(tree: ast.Module) -> list[str]:
    """Return the modules that a script imports at its top level."""
    names = []
    for statement in tree.body:
        if isinstance(statement, ast.Import):
            names += [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            names.append(statement.module)
    return names


def serve(descriptor: int, modules: list[str]) -> None:
    """Import the modules, and fork for each request until the other end closes."""
    # The first optimiser of a process imports torch._dynamo, which takes as long as torch itself.
    for name in (*modules, "torch._dynamo", "unvanish.trial", "unvanish.inject", "unvanish.watch"):
        with contextlib.suppress(Exception):  # the script will meet the same error, and tell it
            importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended trials leave nothing behind
    with socket.socket(fileno=descriptor) as requests:
        while True:
            message, descriptors, _, _ = socket.recv_fds(requests, MESSAGE, 1)
            if not message:
                return
            if os.fork() == 0:
                requests.close()
                _become_trial(json.loads(message), descriptors[0])
            os.close(descriptors[0])


def _become_trial(request: list[str], descriptor: int) -> NoReturn:
    """Run one trial in this forked process, and end it."""
    specification, folder, output = request
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        os.set_inheritable(descriptor, False)
        os.write(descriptor, str(os.getpid()).encode())
        os.chdir(folder)
        os.environ["PWD"] = folder
        printed = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for standard in (1, 2):
            os.dup2(printed, standard)
        _as_if_new()
        from .trial import main

        status = main([specification])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)


def _as_if_new() -> None:
    """Give this process what a new one would have: random numbers of its own, unbuffered output."""
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2:])

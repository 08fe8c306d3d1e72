"""A script under watch runs as `python` would run it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unvanish.errors import TargetError
from unvanish.launch import check_target, run_folder, run_target

RUNNER = (
    "import sys; from unvanish.launch import run_target\n"
    "sys.exit(run_target(sys.argv[1], sys.argv[2:], is_module=False).status)"
)


def launched(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script through `run_target` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", RUNNER, str(script), *arguments], capture_output=True, text=True, timeout=60
    )


def plain(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=60)


SCRIPTS = {
    "arguments": "import sys; print(sys.argv[1:], __name__, __file__ == sys.argv[0], __package__, __doc__)",
    "folder": "import sys, os; print(sys.path[0], os.getcwd()); import beside; print(beside.value)",
    "exit": "import sys; print('before'); sys.exit(7)",
    "exit with words": "raise SystemExit('words')",
    "exit with nothing": "raise SystemExit",
    "exit at last": "import atexit; atexit.register(print, 'bye')",
    "annotations": "x: int = 3\nprint(__annotations__)",
    "pickle": "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))) is A)",
    "main": "import __main__; print(__main__.__file__, __main__.__dict__ is globals())",
    "fork": (
        "import os, sys\nchild = os.fork()\nif not child:\n    print('child')\n    sys.exit(5)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    ),
    "fork to the end": (
        "import os\nchild = os.fork()\nif child:\n    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "else:\n    print('child')"
    ),
    "spawn": (
        "import multiprocessing as m\ndef f(x): return x + 1\nif __name__ == '__main__':\n"
        "    with m.get_context('spawn').Pool(1) as p: print(p.map(f, [1, 2]))"
    ),
    "fork pool": (
        "import multiprocessing as m\ndef f(x): return x + 1\n"
        "with m.get_context('fork').Pool(2) as p: print(p.map(f, [1, 2]))"
    ),
}


@pytest.mark.parametrize("what", SCRIPTS)
def test_a_script_runs_as_python_runs_it(what: str, tmp_path: Path) -> None:
    """Output, exit status, arguments, `__main__` and child processes are those of `python script.py`."""
    (tmp_path / "beside.py").write_text("value = 3")
    script = tmp_path / "train.py"
    script.write_text('"""Trains."""\n' + SCRIPTS[what])
    bare, ours = plain(script, "--a", "b"), launched(script, "--a", "b")
    assert (ours.stdout, ours.returncode) == (bare.stdout, bare.returncode)
    assert ours.stderr == bare.stderr


@pytest.mark.parametrize("fault", ["1/0", "def f(:", "raise KeyError('a')", "import nothing_of_that_name"])
def test_the_traceback_is_pythons_own(fault: str, tmp_path: Path) -> None:
    """A script that raises gives status 3 and, on standard error, exactly what `python` shows."""
    script = tmp_path / "train.py"
    script.write_text(f"print('begin')\ndef train():\n    return None\n{fault}\n")
    bare, ours = plain(script), launched(script)
    assert ours.returncode == 3
    assert ours.stdout == bare.stdout
    assert ours.stderr == bare.stderr


def test_the_process_is_left_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`sys.argv`, `sys.path`, `__main__` and the signal handler are put back, whatever the script did to them."""
    script = tmp_path / "train.py"
    script.write_text("import sys, signal; sys.path.insert(0, 'x'); sys.argv = []; raise KeyboardInterrupt")
    before = (sys.argv, list(sys.path), sys.modules["__main__"], signal.getsignal(signal.SIGTERM))
    outcome = run_target(str(script), [], is_module=False)
    assert outcome.status == 130
    assert (sys.argv, list(sys.path), sys.modules["__main__"], signal.getsignal(signal.SIGTERM)) == before


def test_termination_unwinds_the_script(tmp_path: Path) -> None:
    """SIGTERM lets `finally` run and ends with 143, so that the record is finished."""
    script = tmp_path / "train.py"
    script.write_text(
        "import time\ntry:\n    print('ready', flush=True)\n    time.sleep(30)\n"
        "finally:\n    print('unwound', flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", RUNNER, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.stdout.read() == "unwound\n"
    process.stdout.close()
    assert process.wait(timeout=30) == 143


def test_a_wrong_target_is_refused_with_words(tmp_path: Path) -> None:
    """What cannot be run is told before anything runs, with what to do."""
    with pytest.raises(TargetError, match=r"found no such file, expected a Python script. The working directory is"):
        check_target(str(tmp_path / "nothing.py"), is_module=False)
    with pytest.raises(TargetError, match="found a folder, expected a Python script"):
        check_target(str(tmp_path), is_module=False)
    with pytest.raises(TargetError, match=r"For a file write: unvanish run path/to/train.py"):
        check_target("nothing_of_that_name", is_module=True)
    with pytest.raises(TargetError, match="expected an importable module"):
        check_target("nothing_of_that_name.deeper", is_module=True)


def test_folders_of_runs_are_new(tmp_path: Path) -> None:
    """Two runs in one second get two folders, and odd names become plain ones."""
    first = run_folder(tmp_path, "a/b c:d.py")
    first.mkdir()
    second = run_folder(tmp_path, "a/b c:d.py")
    assert first != second
    assert first.name.endswith("-b-c-d")
    assert second.parent == tmp_path

"""The record on disk: whole, bounded, readable at any moment, and never the end of a training."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unvanish.errors import RecordError
from unvanish.records import MEASURES, SCALARS, Event, Layer, Op, Recording
from unvanish.trace import FILE_NAME, MAX_CELLS, MAX_EVENTS, MAX_LOSSES, MAX_SAMPLES, Recorder, Stream, read_recording

LAYERS = tuple(Layer(name=f"слой <{i}> \"'", kind="Linear", parameters=7 * i, position=i) for i in range(3))


def put(recorder: Recorder, stream: Stream, step: int, layers: int = 3) -> None:
    """Write one sampled step whose numbers are known from the step."""
    scalars = np.arange(len(SCALARS), dtype=np.float64) + step
    measures = np.full((layers, len(MEASURES)), step, dtype=np.float32)
    scalars[3], measures[0, 2] = np.nan, np.inf
    stream.total_steps = step + 1
    recorder.write([(stream, step, scalars, measures)], [(stream, step, 1 / (step + 1))])


def filled(folder: Path | None, steps: int = 12) -> Recorder:
    """Return a recorder that holds two traces with something of everything."""
    recorder = Recorder(folder)
    recorder.run.update(torch="2.13", seconds=1.5, share=float("nan"), nested={"a": [1, (2, 3)]})
    for name in ("Adam", "SGD"):
        stream = recorder.stream(name)
        stream.layers = LAYERS
        stream.facts = {"lr": 0.1, "momentum": np.float64(0.9), "bad": float("inf")}
        stream.loss_paths = ((Op("MseLoss", (2, 3), "0", {"dim": 1}), Op("Addmm")), ())
        for step in range(steps):
            put(recorder, stream, step)
        recorder.write(
            [], [(stream, steps, float("nan"))], [(stream, Event(3, "non-finite-loss", {"loss": float("nan")}))]
        )
    recorder.describe()
    return recorder


def assert_same(left: Recording, right: Recording) -> None:
    """Raise unless two recordings say the same."""
    assert dict(left.run) == dict(right.run)
    assert len(left.traces) == len(right.traces)
    for one, other in zip(left.traces, right.traces, strict=True):
        for name in ("name", "layers", "loss_paths", "events", "total_steps", "facts"):
            assert getattr(one, name) == getattr(other, name), name
        for name in ("steps", "loss_steps", "losses"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        for name in MEASURES:
            np.testing.assert_array_equal(one.measures[name], other.measures[name])
        for name in SCALARS:
            np.testing.assert_array_equal(one.scalars[name], other.scalars[name])


# Round trip ---------------------------------------------------------------------------------------------


def test_the_file_says_what_memory_says(tmp_path: Path) -> None:
    """A record read back equals the recording in memory, before and after closing; nan comes through."""
    recorder = filled(tmp_path / "run")
    assert_same(read_recording(tmp_path / "run"), recorder.recording())
    recorder.close()
    recording = read_recording(str(tmp_path / "run" / FILE_NAME))
    assert_same(recording, recorder.recording())
    assert_same(recording, filled(None).recording())
    trace = recording.traces[1]
    assert list(trace.steps) == list(range(12))
    np.testing.assert_array_equal(trace.measures["alignment"][:, 1], np.arange(12))
    assert np.isinf(trace.measures["weight_rms"][:, 0]).all()
    assert np.isnan(trace.losses[-1])
    json.dumps(recording.run, allow_nan=False)


def test_layers_met_later_have_no_earlier_numbers(tmp_path: Path) -> None:
    """A layer that appears in mid-run has nan before; the earlier columns stay where they were."""
    recorder = Recorder(tmp_path)
    stream = recorder.stream("SGD")
    stream.layers = LAYERS[:1]
    put(recorder, stream, 0, layers=1)
    stream.layers = LAYERS
    put(recorder, stream, 1)
    recorder.close()
    measured = read_recording(tmp_path).traces[0].measures["alignment"]
    np.testing.assert_array_equal(measured, [[0, np.nan, np.nan], [1, 1, 1]])


def test_layers_stand_from_input_to_output() -> None:
    """The layers of a trace come in the order of their calls, those never called last, with their own numbers."""
    recorder = Recorder(None)
    stream = recorder.stream("SGD")
    stream.layers = tuple(
        Layer(name=name, kind="Linear", parameters=1, position=position)
        for name, position in (("head", 2), ("unused", -1), ("first", 0), ("second", 1))
    )
    block = np.repeat(np.arange(4, dtype=np.float32)[:, None], len(MEASURES), axis=1)
    recorder.write([(stream, 0, np.zeros(len(SCALARS)), block)], [])
    (trace,) = recorder.recording().traces
    assert [layer.name for layer in trace.layers] == ["first", "second", "head", "unused"]
    np.testing.assert_array_equal(trace.measures["grad_rms"], [[2, 3, 0, 1]])


def test_a_record_is_readable_while_it_is_written(tmp_path: Path) -> None:
    """A second connection sees every committed sample, and does not disturb the writer."""
    recorder = Recorder(tmp_path)
    stream = recorder.stream("SGD")
    stream.layers = LAYERS
    recorder.describe()
    for step in range(20):
        put(recorder, stream, step)
        assert list(read_recording(tmp_path).traces[0].steps) == list(range(step + 1))
    assert recorder.failure == ""
    recorder.close()


def test_a_closed_record_is_one_file(tmp_path: Path) -> None:
    """After closing there is one file, which can be read from a folder where nothing may be written."""
    filled(tmp_path).close()
    assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]
    header = (tmp_path / FILE_NAME).read_bytes()[18:20]
    assert header == b"\x01\x01", "still in write-ahead mode: a reader would have to write beside it"


def test_names_of_folders_may_hold_any_characters(tmp_path: Path) -> None:
    """A folder with blanks, signs of addresses and other scripts is read like any."""
    for name in ("a b", "50% done?", "run#1", "слой", "x&mode=rwc", "%41"):
        recorder = filled(tmp_path / name)
        recorder.close()
        assert_same(read_recording(tmp_path / name), recorder.recording())


CHILD = """
import sys, pathlib
sys.path.insert(0, {tests!r})
from test_trace import LAYERS, put
from unvanish.trace import Recorder
recorder = Recorder(pathlib.Path(sys.argv[1]))
stream = recorder.stream("SGD")
stream.layers = LAYERS
recorder.describe()
for step in range(10**6):
    put(recorder, stream, step)
    if step % 10 == 0:
        print(step, flush=True)
"""


def test_nothing_is_lost_when_the_process_is_killed(tmp_path: Path) -> None:
    """After `kill -9` at a random moment the record opens and holds all steps that were committed."""
    chance = random.Random(0)
    code = CHILD.format(tests=str(Path(__file__).parent))
    children = []
    for number in range(4):
        folder = tmp_path / str(number)
        children.append(
            (folder, subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True))
        )
    for folder, child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "0\n"
        time.sleep(chance.uniform(0.0, 0.4))
        os.kill(child.pid, signal.SIGKILL)
        told = [int(line) for line in child.stdout.read().split("\n")[:-1]]
        child.stdout.close()
        assert child.wait() == -signal.SIGKILL
        (trace,) = read_recording(folder).traces
        last = trace.steps[-1]
        assert last >= max(told, default=0)
        assert trace.loss_steps[-1] == last
        np.testing.assert_array_equal(trace.measures["alignment"][:, 1], trace.steps)
        assert [layer.name for layer in trace.layers] == [layer.name for layer in LAYERS]


def test_a_forked_child_does_not_write(tmp_path: Path) -> None:
    """A process that the script forks has its own memory and leaves the record of its parent alone."""
    recorder = Recorder(tmp_path)
    stream = recorder.stream("SGD")
    stream.layers = LAYERS
    put(recorder, stream, 0)
    child = os.fork()
    if child == 0:
        for step in range(100, 120):
            put(recorder, stream, step)
        recorder.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    put(recorder, stream, 1)
    recorder.close()
    assert recorder.failure == ""
    assert list(read_recording(tmp_path).traces[0].steps) == [0, 1]


# Bounds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "layers"), [(1, 3), (10, 3), (1, 200)])
def test_a_long_run_stays_within_its_bounds(every: int, layers: int, tmp_path: Path) -> None:
    """Of 100,000 steps samples and losses are thinned to strides that double, and cover the run evenly."""
    steps, recorder = 100_000, Recorder(tmp_path)
    stream = recorder.stream("SGD")
    stream.layers = tuple(Layer(name=str(i), kind="Linear", parameters=1) for i in range(layers))
    scalars, block = np.zeros(len(SCALARS)), np.zeros((layers, len(MEASURES)), dtype=np.float32)
    samples: list[Any] = []
    losses: list[Any] = []
    for step in range(steps):
        losses.append((stream, step, float(step)))
        if step % (every * stream.sample_stride) == 0 or (step < 10 and stream.sample_stride == 1):
            samples.append((stream, step, scalars + step, block))
        if len(samples) == 8 or step == steps - 1:
            recorder.write(samples, losses, [(stream, Event(step, "validation-loss"))] if step % 50 == 0 else [])
            samples, losses = [], []
    recorder.close()
    limit = min(MAX_SAMPLES, MAX_CELLS // layers)
    (trace,) = read_recording(tmp_path).traces
    assert_same(read_recording(tmp_path), recorder.recording())
    assert limit // 3 <= len(trace.steps) <= limit
    assert len(trace.loss_steps) <= MAX_LOSSES
    assert len(trace.events) <= MAX_EVENTS
    np.testing.assert_array_equal(trace.scalars["loss"], trace.steps + SCALARS.index("loss") * 0)
    np.testing.assert_array_equal(trace.losses, trace.loss_steps)
    for kept in (trace.steps, trace.loss_steps):
        gaps = np.diff(kept[kept >= 10 * every])
        assert gaps.max() <= 2 * gaps.min(), np.unique(gaps)
        assert kept[0] == 0
        assert steps - kept[-1] <= 2 * gaps.max()
    assert stream.sample_stride & (stream.sample_stride - 1) == 0
    size = (tmp_path / FILE_NAME).stat().st_size
    assert size < 2 * (limit + 8) * layers * len(MEASURES) * 4 + 3_000_000


def test_first_occurrences_stay(tmp_path: Path) -> None:
    """When there are too many events, the first ones are kept."""
    recorder = Recorder(tmp_path)
    stream = recorder.stream("SGD")
    for step in range(3 * MAX_EVENTS):
        recorder.write([], [], [(stream, Event(step, "kind"))])
    recorder.close()
    (trace,) = read_recording(tmp_path).traces
    assert [event.step for event in trace.events] == list(range(MAX_EVENTS))


# Disks that fail ------------------------------------------------------------------------------------------


def keeps_on(recorder: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    """Write on, and raise unless memory has everything and the log one line."""
    with caplog.at_level(logging.WARNING, "unvanish"):
        stream = recorder.stream("SGD")
        stream.layers = LAYERS
        for step in range(300):
            put(recorder, stream, step)
        recorder.describe()
        recorder.close()
    (trace,) = recorder.recording().traces
    assert list(trace.steps) == list(range(300))
    assert recorder.failure
    assert len([record for record in caplog.records if "recording to" in record.message]) == 1


def test_a_full_disk_does_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On a full disk the run goes on in memory, the failure is told once, and what was written can be read."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no right to mount a small disk: {done.stderr.decode().strip()}")
    try:
        keeps_on(recorder := Recorder(tmp_path), caplog)
        assert "full" in recorder.failure
        (tmp_path / FILE_NAME).stat()
        assert read_recording(tmp_path).traces == ()
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.parametrize("fails_at", [1, 2, 5, 30])
def test_any_failing_write_switches_to_memory(fails_at: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whichever statement fails first, the run goes on in memory and says what happened."""

    class Failing:
        def __init__(self, connection: sqlite3.Connection) -> None:
            self.connection, self.calls = connection, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.connection, name)

        def __enter__(self) -> Any:
            return self.connection.__enter__()

        def __exit__(self, *error: Any) -> Any:
            return self.connection.__exit__(*error)

        def executemany(self, *arguments: Any) -> Any:
            self.calls += 1
            if self.calls >= fails_at:
                raise sqlite3.OperationalError("disk I/O error")
            return self.connection.executemany(*arguments)

    recorder = Recorder(tmp_path)
    assert recorder._connection is not None
    recorder._connection = Failing(recorder._connection)  # type: ignore[assignment]
    keeps_on(recorder, caplog)
    assert recorder.failure == "OperationalError: disk I/O error"


def test_a_folder_that_cannot_be_made_leaves_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where a file stands in the way, or a record already, recording goes on in memory."""
    (tmp_path / "taken").write_text("a file")
    keeps_on(Recorder(tmp_path / "taken"), caplog)
    caplog.clear()
    filled(tmp_path / "run").close()
    before = (tmp_path / "run" / FILE_NAME).read_bytes()
    keeps_on(Recorder(tmp_path / "run"), caplog)
    assert (tmp_path / "run" / FILE_NAME).read_bytes() == before


def test_a_read_only_folder_leaves_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In a folder that may not be written to, recording goes on in memory; a record there can still be read."""
    recorder = filled(tmp_path)
    recorder.close()
    bind = ["mount", "--bind", str(tmp_path), str(tmp_path)]
    if subprocess.run(bind, capture_output=True).returncode:
        pytest.skip("no right to mount a folder read-only")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(tmp_path)], check=True)
        keeps_on(Recorder(tmp_path / "new"), caplog)
        assert_same(read_recording(tmp_path), recorder.recording())
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


# Files that are no records ------------------------------------------------------------------------------


def test_a_missing_record_says_what_to_do(tmp_path: Path) -> None:
    """A folder without a record is an error that says how to list and make them."""
    with pytest.raises(RecordError, match=r"found no run.sqlite, expected the folder of a run. List the runs"):
        read_recording(tmp_path)
    with pytest.raises(RecordError, match=r"found no run.sqlite"):
        read_recording(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"not a database", b"SQLite format 3\x00", bytes(5000)])
def test_a_foreign_file_is_refused(content: bytes, tmp_path: Path) -> None:
    """Whatever is no record is an error of its own kind, with words for it."""
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(RecordError, match=r"found a damaged file or another format \(.*Nothing was changed"):
        read_recording(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == content


def test_a_foreign_database_is_refused(tmp_path: Path) -> None:
    """A database of another program is told from a record by its mark, and left as it was."""
    connection = sqlite3.connect(tmp_path / "other.db")
    connection.execute("CREATE TABLE run (key, value)")
    connection.close()
    with pytest.raises(RecordError, match="no mark of unvanish in the file"):
        read_recording(tmp_path / "other.db")


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    """A record with other measures than ours is not misread."""
    filled(tmp_path).close()
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    with connection:
        connection.execute("UPDATE trace SET value = replace(value, 'grad_rms', 'grad_norm')")
    connection.close()
    with pytest.raises(RecordError, match="written by another version of unvanish"):
        read_recording(tmp_path)


HOSTILE = {
    "a list for a mapping": "UPDATE trace SET value = '[]'",
    "a number": "UPDATE trace SET value = 5",
    "nothing": "UPDATE run SET value = 'x'",
    "deep": "UPDATE run SET value = '" + "[" * 100_000 + "'",
    "huge number": "UPDATE run SET value = '" + "9" * 5000 + "'",
    "text for a step": "UPDATE OR IGNORE sample SET step = 'one' WHERE step = 1",
    "text for a loss": "UPDATE loss SET value = 'one' WHERE step = 1",
    "short block": "UPDATE sample SET measures = x'00' WHERE step = 1",
    "long block": "UPDATE sample SET scalars = zeroblob(80000) WHERE step = 1",
    "wide block": "UPDATE sample SET measures = zeroblob(64000) WHERE step = 1",
    "no block": "UPDATE sample SET measures = NULL WHERE step = 1",
    "bad event": "UPDATE event SET details = '7'",
    "text event": "UPDATE event SET step = 'soon'",
    "no events": "DROP TABLE event",
    "layers of text": "UPDATE trace SET value = json_replace(value, '$.layers', json('[\"a\"]'))",
    "layer without name": "UPDATE trace SET value = json_replace(value, '$.layers', json('[{}]'))",
    "odd name": "UPDATE trace SET value = json_replace(value, '$.name', 7)",
    "odd steps": "UPDATE trace SET value = json_replace(value, '$.total_steps', 'many')",
    "odd facts": "UPDATE trace SET value = json_replace(value, '$.facts', json('[1]'))",
    "odd paths": "UPDATE trace SET value = json_replace(value, '$.loss_paths', json('[[1]]'))",
    "odd position": "UPDATE trace SET value = json_replace(value, '$.layers[0].position', 'left')",
    "two layers of one name": "UPDATE trace SET value = json_replace(value, '$.layers[0].name', json('null'))",
}


def is_valid(recording: Recording) -> bool:
    """Say whether a recording has the shapes and kinds that diagnosing relies on."""
    for trace in recording.traces:
        steps, layers = len(trace.steps), len(trace.layers)
        assert isinstance(trace.name, str)
        assert isinstance(trace.total_steps, int)
        assert isinstance(trace.facts, dict)
        assert all(values.shape == (steps, layers) for values in trace.measures.values())
        assert all(values.shape == (steps,) for values in trace.scalars.values())
        assert trace.losses.dtype == np.float64
        assert trace.losses.shape == trace.loss_steps.shape
        assert all(isinstance(layer.name, str) and isinstance(layer.position, int) for layer in trace.layers)
        assert all(isinstance(event.step, int) and isinstance(event.details, dict) for event in trace.events)
    return True


@pytest.mark.parametrize("what", HOSTILE)
def test_a_record_with_odd_contents_is_refused(what: str, tmp_path: Path) -> None:
    """Contents of the wrong kind are a `RecordError`, never another exception."""
    filled(tmp_path).close()
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    with connection:
        connection.execute(HOSTILE[what])
    connection.close()
    if what == "wide block":  # more layers than described: they were met after the last description
        assert is_valid(read_recording(tmp_path))
        return
    with pytest.raises(RecordError, match="Nothing was changed"):
        read_recording(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a good record."""
    folder = tmp_path_factory.mktemp("whole")
    filled(folder).close()
    return (folder / FILE_NAME).read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_are_an_error_or_harmless(data: st.DataObject, whole: bytes, tmp_path: Path) -> None:
    """Whatever bytes are flipped, cut off or overwritten: a valid recording comes out, or a `RecordError`."""
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        match data.draw(st.sampled_from(["flip", "set", "zeros", "cut"])):
            case "flip":
                damaged[place] ^= 1 << data.draw(st.integers(0, 7))
            case "set":
                damaged[place] = data.draw(st.integers(0, 255))
            case "zeros":
                damaged[place : place + 64] = bytes(len(damaged[place : place + 64]))
            case _:
                damaged = damaged[: max(place, 1)]
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE_NAME).write_bytes(damaged)
    try:
        recording = read_recording(tmp_path / "run")
    except RecordError:
        return
    assert is_valid(recording)

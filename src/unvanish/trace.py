"""The record of a run on disk: one SQLite file in WAL mode, bounded whatever the run's length.

Readable while it is written and after ``kill -9``. When a trace is full, every second sample goes and the
stride doubles, so that the whole run stays covered evenly. If the disk fails, recording goes on in
memory and the report says so: a training run is never killed by being watched.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from .errors import RecordError
from .records import MEASURES, SCALARS, SPEEDS, Event, Layer, Op, Recording, Speeds, Trace, finite

MAX_SAMPLES = 2_000  # of one trace
MAX_CELLS = 120_000  # layers x samples of one trace: 16 measures of 4 bytes each make 8 MB
MAX_LOSSES = 20_000
MAX_EVENTS = 2_000
FILE_NAME = "run.sqlite"
_APPLICATION_ID = 0x756E7661  # "unva"
_SCHEMA = """
CREATE TABLE run (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE trace (id INTEGER PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE sample (trace INTEGER, step INTEGER, scalars BLOB, measures BLOB, PRIMARY KEY (trace, step));
CREATE TABLE loss (trace INTEGER, step INTEGER, value REAL, PRIMARY KEY (trace, step)) WITHOUT ROWID;
CREATE TABLE speed (trace INTEGER, step INTEGER, measures BLOB, PRIMARY KEY (trace, step));
CREATE TABLE event (trace INTEGER, step INTEGER, kind TEXT, details TEXT);
"""
log = logging.getLogger("unvanish")


@dataclass
class Stream:
    """The growing trace of one optimiser; bounded."""

    number: int
    name: str
    samples: dict[int, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    layers: tuple[Layer, ...] = ()
    loss_paths: tuple[tuple[Op, ...], ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    speed_layers: tuple[str, ...] = ()
    speeds: dict[int, np.ndarray[Any, Any]] = field(default_factory=dict)
    total_steps: int = 0
    sample_stride: int = 1  # in sampled steps: doubles when the trace is full
    loss_stride: int = 1
    is_done: bool = False  # nothing will be added
    is_written: bool = False  # and that is on disk

    def to_trace(self) -> Trace:
        """Return the trace as the diagnosis reads it: layers from input to output, those never called last."""
        order = sorted(range(len(self.layers)), key=lambda i: (self.layers[i].position < 0, self.layers[i].position))
        steps = np.array(sorted(self.samples), dtype=np.int64)
        measures = np.full((len(steps), len(self.layers), len(MEASURES)), np.nan, dtype=np.float32)
        scalars = np.full((len(steps), len(SCALARS)), np.nan)
        for row, step in enumerate(steps):
            scalars[row], block = self.samples[int(step)]
            measures[row, : block.shape[0]] = block[: len(self.layers)]
        measures = measures[:, order]
        loss_steps = np.array(sorted(self.losses), dtype=np.int64)
        return Trace(
            name=self.name,
            layers=tuple(self.layers[i] for i in order),
            steps=steps,
            measures={name: measures[:, :, i] for i, name in enumerate(MEASURES)},
            scalars={name: scalars[:, i] for i, name in enumerate(SCALARS)},
            loss_steps=loss_steps,
            losses=np.array([self.losses[int(step)] for step in loss_steps], dtype=np.float64),
            loss_paths=tuple(tuple(replace(op, details=_plain(op.details)) for op in path) for path in self.loss_paths),
            events=tuple(
                replace(event, details=_plain(event.details)) for event in sorted(self.events, key=lambda e: e.step)
            ),
            total_steps=self.total_steps,
            facts=_plain(self.facts),
            speeds=self._to_speeds() if self.speed_layers else None,
        )

    def _to_speeds(self) -> Speeds:
        steps = sorted(self.speeds)
        rows = np.array([self.speeds[step] for step in steps], dtype=np.float32)
        rows = rows.reshape(len(steps), len(self.speed_layers), len(SPEEDS))
        return Speeds(
            self.speed_layers, np.array(steps, dtype=np.int64), {name: rows[:, :, i] for i, name in enumerate(SPEEDS)}
        )


class Recorder:
    """Writes the streams of one run, to a folder if it has one and always to memory.

    Args:
        folder: Made if missing; None keeps everything in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.run: dict[str, Any] = {}
        self.streams: list[Stream] = []
        self.failure = ""
        self._process = os.getpid()
        self._connection: sqlite3.Connection | None = None
        if folder is not None:
            self._try(self._open, folder)

    def stream(self, name: str) -> Stream:
        """Begin the trace of one more optimiser."""
        self.streams.append(Stream(len(self.streams), name))
        return self.streams[-1]

    def write(
        self,
        samples: Sequence[tuple[Stream, int, np.ndarray[Any, Any], np.ndarray[Any, Any]]],
        losses: Sequence[tuple[Stream, int, float]],
        events: Sequence[tuple[Stream, Event]] = (),
        speeds: Sequence[tuple[Stream, int, np.ndarray[Any, Any]]] = (),
    ) -> None:
        """Add sampled steps, losses, first occurrences and speeds of replicas, and commit them together."""
        for stream, step, scalars, measures in samples:
            stream.samples[step] = (scalars, measures)
        losses = [item for item in losses if item[1] % item[0].loss_stride == 0]
        for stream, step, value in losses:
            stream.losses[step] = value
        events = [item for item in events if len(item[0].events) < MAX_EVENTS]
        for stream, event in events:
            stream.events.append(event)
        for stream, step, rows in speeds:
            stream.speeds[step] = rows
        self._try(self._insert, samples, losses, events, speeds)
        for stream in self.streams:
            self._bound(stream)

    def describe(self) -> None:
        """Write what is known of run and traces now: layers, totals, facts."""
        self._try(self._describe)

    def close(self) -> None:
        """Write the description and close the file, leaving one file without its log."""
        self.describe()
        if self._connection is not None:
            self._try(self._leave_one_file)
            self._connection = None

    def _leave_one_file(self) -> None:
        """Fold the log into the file, so that the record can be copied and read where nothing may be written."""
        connection = self._connection
        if connection is None:
            return
        with contextlib.suppress(sqlite3.OperationalError):  # someone is reading: the log stays beside it
            connection.execute("PRAGMA busy_timeout=200")
            connection.execute("PRAGMA journal_mode=DELETE")
        connection.close()

    def recording(self) -> Recording:
        """Return the run as it stands."""
        return Recording(_plain(self.run), tuple(stream.to_trace() for stream in self.streams))

    def _open(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / FILE_NAME).exists():
            raise FileExistsError(f"{FILE_NAME} is there already")
        connection = sqlite3.connect(folder / FILE_NAME, check_same_thread=False, timeout=5.0)
        self._connection = connection
        if connection.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
            log.warning("the folder %s cannot hold a write-ahead log; the record is slower there", folder)
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute(f"PRAGMA application_id={_APPLICATION_ID}")
        connection.executescript(_SCHEMA)

    def _insert(self, samples: Any, losses: Any, events: Any, speeds: Any) -> None:
        connection = self._connection
        if connection is None:
            return
        with connection:
            connection.executemany(
                "INSERT OR REPLACE INTO sample VALUES (?, ?, ?, ?)",
                [(s.number, step, scalars.tobytes(), block.tobytes()) for s, step, scalars, block in samples],
            )
            connection.executemany(
                "INSERT OR REPLACE INTO loss VALUES (?, ?, ?)",
                # SQLite stores nan as NULL, which is what it means here
                [(s.number, step, value) for s, step, value in losses],
            )
            connection.executemany(
                "INSERT INTO event VALUES (?, ?, ?, ?)",
                [(s.number, e.step, e.kind, json.dumps(finite(e.details))) for s, e in events],
            )
            connection.executemany(
                "INSERT OR REPLACE INTO speed VALUES (?, ?, ?)",
                [(s.number, step, rows.tobytes()) for s, step, rows in speeds],
            )

    def _describe(self) -> None:
        connection = self._connection
        if connection is None:
            return
        with connection:
            connection.executemany(
                "INSERT OR REPLACE INTO run VALUES (?, ?)",
                [(key, json.dumps(finite(value))) for key, value in self.run.items()],
            )
            connection.executemany(
                "INSERT OR REPLACE INTO trace VALUES (?, ?)",
                [(s.number, json.dumps(_describe_stream(s))) for s in self.streams if not s.is_written],
            )
        for stream in self.streams:
            stream.is_written = stream.is_done

    def _bound(self, stream: Stream) -> None:
        """Drop every second sample, speed or loss when there are too many."""
        limit = max(16, min(MAX_SAMPLES, MAX_CELLS // max(len(stream.layers), 1)))
        if len(stream.speeds) > limit:
            gone = sorted(stream.speeds)[1::2]
            stream.speeds = {step: stream.speeds[step] for step in sorted(stream.speeds)[::2]}
            self._try(self._delete, "speed", stream, gone)
        if len(stream.samples) > limit:
            gone = sorted(stream.samples)[1::2]
            stream.samples = {step: stream.samples[step] for step in sorted(stream.samples)[::2]}
            stream.sample_stride *= 2
            self._try(self._delete, "sample", stream, gone)
        if len(stream.losses) > MAX_LOSSES:
            stream.loss_stride *= 2
            gone = [step for step in stream.losses if step % stream.loss_stride]
            stream.losses = {k: v for k, v in stream.losses.items() if k % stream.loss_stride == 0}
            self._try(self._delete, "loss", stream, gone)

    def _delete(self, table: str, stream: Stream, steps: Sequence[int]) -> None:
        if self._connection is not None:
            with self._connection:
                self._connection.executemany(
                    f"DELETE FROM {table} WHERE trace = ? AND step = ?",
                    [(stream.number, step) for step in steps],
                )

    def _try(self, action: Any, *arguments: Any) -> None:
        """Do it; when the disk fails, say so once and go on in memory."""
        if os.getpid() != self._process:  # a process that the script forked: the file is its parent's
            return
        try:
            action(*arguments)
        except (sqlite3.Error, OSError) as error:
            if not self.failure:
                self.failure = f"{type(error).__name__}: {error}"
                log.warning("recording to %s stopped (%s); watching goes on in memory", self.folder, self.failure)
            connection, self._connection = self._connection, None
            if connection is not None:
                try:
                    connection.close()
                except sqlite3.Error:
                    log.debug("closing the broken record failed", exc_info=True)


def _describe_stream(stream: Stream) -> dict[str, Any]:
    return {
        "name": stream.name,
        "total_steps": stream.total_steps,
        "facts": finite(stream.facts),
        "layers": [asdict(layer) for layer in stream.layers],
        "loss_paths": [[finite(asdict(op)) for op in path] for path in stream.loss_paths],
        "measures": MEASURES,
        "scalars": SCALARS,
        "speed_layers": stream.speed_layers,
        "speeds": SPEEDS,
    }


def read_recording(path: str | Path) -> Recording:
    """Read a run from its folder or file, also while it is being written.

    Raises:
        RecordError: if it is missing, no record, or damaged.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise RecordError(
            f"report: {str(path)!r}: found no {FILE_NAME}, expected the folder of a run. "
            "List the runs with `ls runs/`, or record one with `unvanish run train.py`."
        )
    address = file.absolute().as_uri()
    try:
        try:
            return _read(f"{address}?mode=ro")
        except sqlite3.OperationalError as error:
            if "unable to open" not in str(error):
                raise
            return _read(f"{address}?immutable=1")  # a log that was left in a folder where nothing may be written
    except (sqlite3.Error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise RecordError(
            f"report: {str(file)!r}: found a damaged file or another format ({error}), "
            "expected the record of a run. Nothing was changed."
        ) from error


def _read(address: str) -> Recording:
    with contextlib.closing(sqlite3.connect(address, uri=True, timeout=5.0)) as connection:
        return _read_all(connection)


def _read_all(connection: sqlite3.Connection) -> Recording:
    if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
        raise ValueError("no mark of unvanish in the file")
    run = {key: json.loads(value) for key, value in connection.execute("SELECT key, value FROM run")}
    streams = []
    for number, text in connection.execute("SELECT id, value FROM trace ORDER BY id"):
        described = json.loads(text)
        if tuple(described["measures"]) != MEASURES or tuple(described["scalars"]) != SCALARS:
            raise ValueError("written by another version of unvanish")
        stream = Stream(number, _kind(described["name"], str))
        stream.total_steps, stream.facts = _kind(described["total_steps"], int), _kind(described["facts"], dict)
        stream.layers = tuple(_layer(layer) for layer in described["layers"])
        stream.loss_paths = tuple(tuple(_op(op) for op in path) for path in described["loss_paths"])
        _read_rows(connection, stream)
        if described.get("speed_layers"):  # records from before there were any have no table of them
            _read_speeds(connection, stream, described)
        streams.append(stream)
    return Recording(run, tuple(stream.to_trace() for stream in streams))


def _kind(value: Any, *kinds: type) -> Any:
    """Return the value if it is of one of these types, else raise."""
    if type(value) not in kinds:
        raise ValueError(f"{type(value).__name__} where {kinds[0].__name__} belongs")
    return value


def _layer(value: Mapping[str, Any]) -> Layer:
    kinds: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,), "float": (float, int)}
    layer = Layer(**value)
    for item in fields(Layer):
        _kind(getattr(layer, item.name), *kinds[str(item.type)])
    return layer


def _op(value: Mapping[str, Any]) -> Op:
    shape = tuple(_kind(size, int) for size in value["shape"])
    return Op(_kind(value["name"], str), shape, _kind(value["layer"], str), _kind(value["details"], dict))


def _plain(value: Any) -> Any:
    """Return the value as it will be read back from the file."""
    return json.loads(json.dumps(finite(value)))


def _read_rows(connection: sqlite3.Connection, stream: Stream) -> None:
    rows = connection.execute(
        "SELECT step, scalars, measures FROM sample WHERE trace = ? LIMIT ?", (stream.number, 4 * MAX_SAMPLES)
    )
    for step, scalars, measures in rows:
        if len(scalars) != 8 * len(SCALARS):
            raise ValueError("a sample of another size")
        stream.samples[_kind(step, int)] = (
            np.frombuffer(scalars, dtype=np.float64),
            np.frombuffer(measures, dtype=np.float32).reshape(-1, len(MEASURES)),
        )
    rows = connection.execute("SELECT step, value FROM loss WHERE trace = ? LIMIT ?", (stream.number, 4 * MAX_LOSSES))
    stream.losses = {
        _kind(step, int): float("nan") if value is None else float(_kind(value, float, int)) for step, value in rows
    }
    rows = connection.execute(
        "SELECT step, kind, details FROM event WHERE trace = ? LIMIT ?", (stream.number, 2 * MAX_EVENTS)
    )
    stream.events = [
        Event(_kind(step, int), _kind(kind, str), _kind(json.loads(details), dict)) for step, kind, details in rows
    ]


def _read_speeds(connection: sqlite3.Connection, stream: Stream, described: Mapping[str, Any]) -> None:
    if tuple(described["speeds"]) != SPEEDS:
        raise ValueError("written by another version of unvanish")
    stream.speed_layers = tuple(_kind(name, str) for name in described["speed_layers"])
    rows = connection.execute(
        "SELECT step, measures FROM speed WHERE trace = ? LIMIT ?", (stream.number, 4 * MAX_SAMPLES)
    )
    shape = (len(stream.speed_layers), len(SPEEDS))
    stream.speeds = {
        _kind(step, int): np.frombuffer(measures, dtype=np.float32).reshape(shape) for step, measures in rows
    }

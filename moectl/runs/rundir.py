"""The run folder: the truth about one run, in files that need no database to be read.

::

    run.json       what it was and what came of it (rewritten whole, atomically)
    config.yaml    the resolved configuration
    metrics.jsonl  one line per log call: step, tokens, time (Unix seconds), values; the run's marks, if it has any
    events.jsonl   one line per thing that happened
    routing/       step-XXXXXXXX.json, routing statistics of one step
    env.json       versions, host, environment (allow-listed); diff.patch, source.patch
    checkpoints/   step-XXXXXXXX/
    .lock          held by the one process that writes; heartbeat.json, its last sign of life

What goes into run.json and events.jsonl passes the secret masks first (``runs.secrets``). config.yaml is
never masked, for a changed one could not be resumed: a configuration that holds a secret is refused.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

from moectl import paths
from moectl.errors import ConfigError, MoectlError, NotFoundError
from moectl.runs.files import (
    Line,
    LineWriter,
    decode_number,
    dumps,
    encode_number,
    explained,
    line_number,
    read_json,
    read_lines,
    write_atomic,
)
from moectl.runs.heartbeat import LOST_AFTER_S, alive_elsewhere
from moectl.runs.lock import FileLock
from moectl.runs.secrets import mask_value, secret_in
from moectl.runs.settings import parse_config

STATUSES = ("running", "finished", "interrupted", "collapsed", "failed", "lost")


class MetricRow(NamedTuple):
    """One log call. ``time`` in Unix seconds; NaN and infinities as logged."""

    step: int
    tokens: int
    time: float
    values: dict[str, float]


def now() -> str:
    """The present in UTC, ISO 8601 with milliseconds: ``2026-01-31T12:00:00.000Z``."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seconds_since_epoch(moment: str) -> float:
    """The inverse of :func:`now`, in Unix seconds."""
    return datetime.fromisoformat(moment).timestamp()


class RunDir:
    """One run folder, opened for reading, and for writing between ``acquire`` and ``release``.

    Usable as a context manager, which releases at the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / ".lock")
        self._metrics: LineWriter | None = None
        self._events: LineWriter | None = None
        self.record: dict[str, Any] = {}

    @classmethod
    def create(cls, id: str, *, config_yaml: str, record: Mapping[str, Any], runs_dir: Path | None = None) -> RunDir:
        """A new run folder, its lock held: ``status`` running, ``created`` now, then ``record``.

        Raises:
            ConfigError: the id is not usable, the configuration holds a secret, the run exists, or another
                process writes it (exit 2).
            MoectlError: the place cannot be written (exit 1).
        """
        try:
            paths.check_name(id)
        except ValueError:
            rule = f"{paths.NAME_RULE[0].upper()}{paths.NAME_RULE[1:]}."
            raise ConfigError(f"'{id}' is not a usable run name", rule) from None
        folder = (paths.runs_dir() if runs_dir is None else runs_dir) / id
        key = secret_in(parse_config(config_yaml, folder / "config.yaml"))
        if key is not None:
            raise ConfigError(
                f"the configuration holds a secret at '{key}', and a run's configuration is written down",
                "A secret does not belong in a config; pass it through the environment.",
            )
        paths.ensure(folder)
        run = cls(folder).acquire()
        try:
            if (folder / "run.json").exists():
                raise ConfigError(
                    f"the run '{id}' exists already",
                    f"Choose another --name, continue it with --resume {id}, or remove it: moectl runs rm {id} --yes",
                )
            with explained(f"create the run folder {id}"):
                run.checkpoints.mkdir(exist_ok=True)
                (folder / "routing").mkdir(exist_ok=True)
            write_atomic(folder / "config.yaml", config_yaml)
            # run.json comes last: a folder that has one is complete.
            base = {"id": id, "name": id, "status": "running", "created": now(), "generation": 0}
            run.update(**{**base, **record, "id": id})
        except BaseException:
            run.release()
            raise
        return run

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """An existing run folder, for reading. Raises ``NotFoundError`` when there is no run.json."""
        if not (path / "run.json").is_file():
            raise NotFoundError(f"{path} is not a run folder: it has no run.json", "See `moectl runs ls`.")
        run = cls(path)
        run.reload()
        return run

    def reload(self) -> None:
        """Read run.json anew."""
        self.record = read_json(self.path / "run.json")

    @property
    def id(self) -> str:
        """The folder's name: the id that everything else goes by."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def live(self) -> bool:
        """True while a process writes this run: here by its lock, on a network file system by its sign of life too."""
        return self._lock.busy() or alive_elsewhere(self.path) is not None

    @property
    def status(self) -> str:
        """The recorded status; ``lost`` when it says running and nobody holds the lock any more."""
        status = str(self.record.get("status", "lost"))
        return "lost" if status == "running" and not self.live else status

    def acquire(self) -> Self:
        """Become the one writer. Raises ``ConfigError`` (exit 2) naming the PID of another one."""
        if self._lock.held:
            return self
        if not self._lock.acquire():
            raise ConfigError(
                f"the run '{self.id}' is being written by {self._lock.holder()}",
                "Wait until it ends, or choose another --name.",
            )
        # The lock's note was written a moment ago.
        if (beat := alive_elsewhere(self.path, now=(self.path / ".lock").stat().st_mtime)) is not None:
            self._lock.release()
            raise ConfigError(
                f"the run '{self.id}' is being written by PID {beat.pid} on {beat.host}, {beat.age:.0f} s ago",
                f"If that process is gone, wait {LOST_AFTER_S:.0f} s from its last sign of life and try again.",
            )
        if (self.path / "run.json").exists():
            self.reload()
        return self

    def release(self) -> None:
        """Close the files and let the lock go. Harmless when not held."""
        for writer in (self._metrics, self._events):
            if writer is not None:
                writer.close()
        self._metrics = self._events = None
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Append one line of numbers. Needs the lock."""
        if self._metrics is None:
            assert self._lock.held, "log() needs acquire() first"
            self._metrics = LineWriter(self.path / "metrics.jsonl")
        numbers = {name: encode_number(value) for name, value in values.items()}
        row = {"step": int(step), "tokens": int(tokens), "time": round(time.time(), 3), **self._marks()}
        self._metrics.write({**row, "values": numbers})

    def event(self, kind: str, message: str, **details: Any) -> None:
        """Append one thing that happened. Needs the lock.

        What is of a step gets ``step=``, and goes when a resumed run does that step again. What has happened for
        good gets ``at=``, the step that the run was at, and stays.
        """
        if self._events is None:
            assert self._lock.held, "event() needs acquire() first"
            self._events = LineWriter(self.path / "events.jsonl")
        self._events.write(mask_value({"time": round(time.time(), 3), "kind": kind, "message": message, **details}))

    def routing(self, step: int, payload: Mapping[str, Any]) -> None:
        """Write the routing statistics of one step, over an earlier version of the same step."""
        assert self._lock.held, "routing() needs acquire() first"
        write_atomic(self.path / "routing" / f"step-{step:08d}.json", dumps({**payload, **self._marks()}) + "\n")

    def _marks(self) -> dict[str, Any]:
        """What goes beside every number of a marked run."""
        return {"marks": self.record["marks"]} if self.record.get("marks") else {}

    def update(self, **fields: Any) -> None:
        """Merge ``fields`` into run.json, atomically. Takes the lock for the moment when not held."""
        held = self._lock.held
        self.acquire()
        try:
            record = {**self.record, **mask_value(fields)}
            write_atomic(self.path / "run.json", dumps(record, indent=1) + "\n")
            self.record = read_json(self.path / "run.json")
        finally:
            if not held:
                self.release()

    def position(self) -> dict[str, int]:
        """Bytes of metrics.jsonl and events.jsonl so far, on the disk when this returns. Needs the lock."""
        assert self._lock.held, "position() needs acquire() first"
        sizes = {"metrics": 0, "events": 0}
        for name, writer in (("metrics", self._metrics), ("events", self._events)):
            path = self.path / f"{name}.jsonl"
            if writer is not None:
                writer.sync()
            if path.exists():
                sizes[name] = path.stat().st_size
        return sizes

    def truncate_after(self, step: int, position: Mapping[str, int] | None = None) -> None:
        """Forget what a resumed run does again: all rows, events and routing files after ``step``.

        Args:
            step: that training goes on from.
            position: where the record stood then; what is of ``step`` but was written later goes, too, such as
                the final evaluation. None: by step alone.
        """
        assert self._lock.held, "truncate_after() needs acquire() first"
        for writer in (self._metrics, self._events):
            if writer is not None:
                writer.close()
        self._metrics = self._events = None
        for name in ("metrics", "events"):
            path = self.path / f"{name}.jsonl"
            if path.exists():
                end = None if position is None else position[name]
                text = path.read_bytes()
                kept = [text[line.begin : line.end] for line in read_lines(path) if _stays(line, step, end)]
                write_atomic(path, b"".join(kept).decode())  # as they were: earlier positions stay true
        for file in (self.path / "routing").glob("step-*.json"):
            if int(file.stem.removeprefix("step-")) > step:
                file.unlink()
        # An index that read the old rows sees by the generation that it must read again. Last, for one that looks
        # while the files change would else count old rows as new ones.
        self.update(generation=int(self.record.get("generation", 0)) + 1)

    def metrics(self, *, problems: list[str] | None = None) -> Iterator[MetricRow]:
        """All rows in the order written. A broken line raises, or goes to ``problems``."""
        path = self.path / "metrics.jsonl"
        for line in read_lines(path, problems=problems):
            try:
                yield metric_row(line, path)
            except MoectlError as error:
                if problems is None:
                    raise
                problems.append(error.message)

    def events(self, *, problems: list[str] | None = None) -> list[dict[str, Any]]:
        """All events in the order written. A broken line raises, or goes to ``problems``."""
        return [line.value for line in read_lines(self.path / "events.jsonl", problems=problems)]

    def latest(self, *, problems: list[str] | None = None) -> dict[str, float]:
        """The newest value of every metric, run.json's final ones over the logged ones."""
        values: dict[str, float] = {}
        for row in self.metrics(problems=problems):
            values.update(row.values)
        return {**values, **self.final}

    @property
    def final(self) -> dict[str, float]:
        """The summary in run.json's ``metrics``; a missing value (null) is left out."""
        try:
            summary = dict(self.record.get("metrics") or {})
            return {name: decode_number(value) for name, value in summary.items() if value is not None}
        except (TypeError, ValueError) as error:
            message = f"{self.path / 'run.json'}: 'metrics' is not a table of numbers ({error})"
            raise MoectlError(message, "Restore the file from a copy.") from None


def metric_row(line: Line, path: Path) -> MetricRow:
    """One line of ``path`` (a metrics.jsonl) as a ``MetricRow``; a ``MoectlError`` names the line."""
    value = line.value
    try:
        values = {str(name): decode_number(number) for name, number in value["values"].items()}
        return MetricRow(int(value["step"]), int(value["tokens"]), float(value["time"]), values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"{path}: line {line_number(path, line.begin)} is no metric row ({error!r})"
        raise MoectlError(message, "Remove the line, or restore the file from a copy.") from None


def _stays(line: Line, step: int, end: int | None) -> bool:
    """Whether a line is of before ``step`` was saved; an event without a step stays."""
    of = line.value.get("step")
    if not isinstance(of, int):
        return True
    # Both: bytes say nothing any more where somebody has removed a line before.
    return of <= step and (end is None or line.end <= end)


def folder_size(folder: Path) -> int:
    """Bytes of all files below ``folder``; links are not followed."""
    total = 0
    for root, _, files in os.walk(folder):
        total += sum(os.lstat(os.path.join(root, name)).st_size for name in files)
    return total

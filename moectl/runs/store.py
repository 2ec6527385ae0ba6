"""The registry: an index over the run folders, rebuilt from them whenever it is missing.

Indexing is catching up: the registry remembers how many bytes of a run's metrics.jsonl it has read,
and reads on from there inside ``BEGIN IMMEDIATE``. So the trainer, ``runs ls`` and ``runs reindex``
may all index the same run at once, and no row is lost or counted twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.orm import Session

from moectl.errors import MoectlError, NotFoundError
from moectl.runs import database
from moectl.runs.entry import Entry, Reached, fits
from moectl.runs.files import dumps, read_lines
from moectl.runs.find import find_run, run_folders
from moectl.runs.models import Metric, Run, from_columns, to_columns
from moectl.runs.rundir import MetricRow, RunDir, metric_row

BATCH_ROWS = 100


class Point(NamedTuple):
    """One value of one metric."""

    step: int
    tokens: int
    time: float
    value: float


class Indexed(NamedTuple):
    """What a ``reindex`` found."""

    runs: int
    values: int
    removed: int


class Registry:
    """The index at ``path``, created or migrated on opening.

    Attributes:
        warnings: sentences for the user, gathered while opening and indexing.

    Raises (every method): ``RegistryError`` when it is locked, read-only or damaged.
    """

    def __init__(self, path: Path, *, network: bool | None = None) -> None:
        self.path = path
        self.warnings: list[str] = []
        self._engine = database.open_engine(path, network=network, warnings=self.warnings)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _session(self, *, write: bool = False) -> Iterator[Session]:
        """One transaction: BEGIN IMMEDIATE when it writes, so that it waits its turn at the start."""
        engine = self._engine.execution_options(write=write)
        with database.explained(self.path), Session(engine) as session, session.begin():
            session.connection()  # begin now, not at the first statement
            yield session

    def index(self, run: RunDir) -> int:
        """Bring the index up to one run folder; returns how many metric values were added."""
        self._index_record(run)
        added = 0
        while (batch := self._index_batch(run)) is not None:
            added += batch
        return added

    def _index_record(self, run: RunDir) -> None:
        signature = signature_of(run.path)
        generation = _generation(run)
        with self._session() as session:
            known = session.execute(select(Run.signature, Run.generation).where(Run.id == run.id)).one_or_none()
        if known is not None and tuple(known) == (signature, generation):
            return
        run.reload()
        generation = _generation(run)
        with self._session(write=True) as session:
            row = session.get(Run, run.id)
            if row is not None and row.generation != generation:
                session.execute(delete(Metric).where(Metric.run_id == run.id))
                row.metrics_end = 0
            if row is None:
                row = Run(id=run.id, metrics_end=0)
                session.add(row)
            record = run.record
            data = record.get("data") or {}
            row.name = str(record.get("name", run.id))
            row.status = str(record.get("status", "lost"))
            row.preset, row.router, row.seed = record.get("preset"), record.get("router"), record.get("seed")
            row.commit, row.config_hash = record.get("commit"), record.get("config_hash")
            row.data_id = data.get("id")
            row.created = str(record.get("created", ""))
            row.record, row.signature, row.generation = dumps(record), signature, generation

    def _index_batch(self, run: RunDir) -> int | None:
        """Index the next lines, up to ``BATCH_ROWS`` values; None when there is nothing more."""
        path = run.path / "metrics.jsonl"
        with self._session() as session:  # reading first: a run with nothing new takes no write lock
            end = session.scalar(select(Run.metrics_end).where(Run.id == run.id))
        if end is None or _size(path) == end:
            return None
        with self._session(write=True) as session:
            end = session.scalar(select(Run.metrics_end).where(Run.id == run.id)) or 0
            if _size(path) < end:  # cut by hand: read it all again
                session.execute(delete(Metric).where(Metric.run_id == run.id))
                end = 0
            rows, new_end = self._next_rows(run, path, end)
            if new_end == end:
                return None
            for first in range(0, len(rows), BATCH_ROWS):
                session.execute(insert(Metric), rows[first : first + BATCH_ROWS])
            session.execute(update(Run).where(Run.id == run.id).values(metrics_end=new_end))
        return len(rows)

    def _next_rows(self, run: RunDir, path: Path, end: int) -> tuple[list[dict[str, Any]], int]:
        """The columns of the lines from byte ``end`` on, a batch at most (but a whole line at least)."""
        rows: list[dict[str, Any]] = []
        problems: list[str] = []
        for line in read_lines(path, start=end, problems=problems):
            try:
                columns = list(_columns(run.id, metric_row(line, path)))
            except MoectlError as error:
                problems.append(error.message)
                columns = []
            if rows and len(rows) + len(columns) > BATCH_ROWS:
                break
            rows.extend(columns)
            end = line.end
        self.warnings.extend(problem for problem in problems if problem not in self.warnings)
        return rows, end

    def sync(self, runs_dir: Path) -> None:
        """Index what is new or changed in ``runs_dir``, forget what is gone or unreadable; cheap when nothing is."""
        with self._session() as session:
            known = {
                id: (signature, end)
                for id, signature, end in session.execute(select(Run.id, Run.signature, Run.metrics_end))
            }
        present = {folder.name: folder for folder in run_folders(runs_dir)}
        for id, folder in present.items():
            if known.get(id) != (signature_of(folder), _size(folder / "metrics.jsonl")):
                self._index_folder(folder)
        for id in known.keys() - present.keys():
            self.remove(id)

    def reindex(self, runs_dir: Path) -> Indexed:
        """Forget everything and read every run folder anew; unreadable ones end in ``warnings``."""
        folders = run_folders(runs_dir)
        with self._session() as session:
            known = set(session.scalars(select(Run.id)))
        for id in known:
            self.remove(id)
        counts = [self._index_folder(folder) for folder in folders]
        done = [count for count in counts if count is not None]
        return Indexed(len(done), sum(done), len(known - {folder.name for folder in folders}))

    def _index_folder(self, folder: Path) -> int | None:
        try:
            return self.index(RunDir.open(folder))
        except database.RegistryError:
            raise
        except MoectlError as error:
            self.warnings.append(error.message)
            with self._session() as session:
                known = session.scalar(select(Run.id).where(Run.id == folder.name)) is not None
            if known:  # what the folder no longer says, the index does not say either
                self.remove(folder.name)
            return None

    def remove(self, id: str) -> bool:
        """Forget one run (its folder stays). False when it was not known."""
        with self._session(write=True) as session:
            session.execute(delete(Metric).where(Metric.run_id == id))
            return bool(session.execute(delete(Run).where(Run.id == id)).rowcount)  # type: ignore[attr-defined]

    def list_runs(
        self,
        runs_dir: Path,
        *,
        status: str | None = None,
        router: str | None = None,
        group: str | None = None,
        limit: int | None = None,
    ) -> list[Entry]:
        """All indexed runs, the newest first; filters by status (``lost`` too), router, group or number."""
        with self._session() as session:
            rows = session.execute(select(Run.id, Run.record).order_by(Run.created.desc(), Run.id.desc())).all()
            entries: list[Entry] = []
            for id, text in rows:
                run = RunDir(runs_dir / id)
                run.record = json.loads(text)
                if not fits(run, status=status, router=router, group=group):
                    continue
                try:
                    entries.append(Entry.of(run, self._reached(session, id)))
                except MoectlError as error:  # one broken run does not hide the others
                    self.warnings.append(error.message)
                if limit is not None and len(entries) >= limit:
                    break
        return entries

    def _reached(self, session: Session, id: str) -> Reached:
        step, tokens = session.execute(
            select(func.max(Metric.step), func.max(Metric.tokens)).where(Metric.run_id == id)
        ).one()
        loss = session.execute(
            select(Metric.value, Metric.kind)
            .where(Metric.run_id == id, Metric.name == "eval/lm_loss")
            .order_by(Metric.id.desc())
            .limit(1)
        ).one_or_none()
        return Reached(step, tokens, None if loss is None else from_columns(*loss))

    def get(self, name_or_prefix: str, runs_dir: Path) -> Entry:
        """One run by id, name or unique prefix. Raises ``NotFoundError`` (4) or ``ConfigError`` (2)."""
        id = find_run(name_or_prefix, runs_dir=runs_dir).name
        for entry in self.list_runs(runs_dir):
            if entry.id == id:
                return entry
        raise NotFoundError(f"the run '{id}' is not in the registry", "Index it: `moectl runs reindex`.")

    def metrics(self, run_id: str, name: str) -> list[Point]:
        """All values of one metric of one run, in the order logged."""
        with self._session() as session:
            rows = session.execute(
                select(Metric.step, Metric.tokens, Metric.time, Metric.value, Metric.kind)
                .where(Metric.run_id == run_id, Metric.name == name)
                .order_by(Metric.id)
            ).all()
        return [Point(step, tokens, time, from_columns(value, kind)) for step, tokens, time, value, kind in rows]

    def metric_names(self, run_id: str) -> Sequence[str]:
        """The names of all metrics of one run, sorted."""
        with self._session() as session:
            return session.scalars(
                select(Metric.name).where(Metric.run_id == run_id).distinct().order_by(Metric.name)
            ).all()

    def backup(self, target: Path) -> None:
        """A consistent copy of the registry while others write."""
        database.backup(self.path, target)


def rebuild(path: Path, runs_dir: Path) -> tuple[Registry, Indexed]:
    """``runs reindex``: the registry rebuilt; one that cannot be used is set aside, which is a warning."""
    aside: Path | None = None
    try:
        registry = Registry(path)
        if not database.healthy(registry._engine):
            registry.close()
            raise database.RegistryDamagedError(f"the registry {path} is damaged")
        return registry, registry.reindex(runs_dir)
    except database.RegistryDamagedError:
        aside = database.set_aside(path)
    registry = Registry(path)
    registry.warnings.append(f"the old registry could not be used and was set aside: {aside}")
    return registry, registry.reindex(runs_dir)


def signature_of(folder: Path) -> str:
    """Changes whenever run.json is rewritten."""
    try:
        stat = (folder / "run.json").stat()
    except OSError:
        return ""
    return f"{stat.st_mtime_ns}:{stat.st_size}"


def _generation(run: RunDir) -> str:
    # A resumed run drops rows, and a removed name may be used again: both must be read from the start.
    return f"{run.record.get('created', '')}#{run.record.get('generation', 0)}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _columns(run_id: str, row: MetricRow) -> Iterator[dict[str, Any]]:
    for name, number in row.values.items():
        value, kind = to_columns(number)
        yield {
            "run_id": run_id, "name": name, "step": row.step, "tokens": row.tokens,
            "time": row.time, "value": value, "kind": kind,
        }  # fmt: skip

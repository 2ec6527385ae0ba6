"""The registry is an index: concurrent, rebuilt from the folders, and never the only copy."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.exc import IntegrityError

from moectl import paths
from moectl.runs import RunDir, database
from moectl.runs.entry import Entry
from moectl.runs.logger import RunRecorder
from moectl.runs.models import Base, Metric, Run
from moectl.runs.store import BATCH_ROWS, Registry, rebuild

MakeRun = Callable[..., RunDir]
LINES = 300


@pytest.fixture
def registry(home: Path) -> Registry:
    return Registry(paths.registry_path())


def _write_run(home: str, number: int, start: float) -> None:
    os.environ["MOECTL_HOME"] = home
    time.sleep(max(0.0, start - time.time()))
    run = RunDir.create(f"run-{number}", config_yaml="", record={"seed": number})
    with RunRecorder(run, paths.registry_path()) as recorder:
        for step in range(1, LINES + 1):
            recorder.log(step, step * 10, {"train/loss": number + step / 1000, "train/lr": math.nan})
        recorder.update(status="finished", step=LINES)


def test_four_processes_log_at_once_and_no_row_is_lost(home: Path) -> None:
    # They also race to create and migrate the registry, and a reader lists and syncs all the while.
    context = multiprocessing.get_context("spawn")
    start = time.time() + 1.0
    processes = [context.Process(target=_write_run, args=(str(home), number, start)) for number in range(4)]
    for process in processes:
        process.start()
    time.sleep(max(0.0, start - time.time()))
    registry = Registry(paths.registry_path())
    while any(process.is_alive() for process in processes):
        registry.sync(paths.runs_dir())
        registry.list_runs(paths.runs_dir())
        time.sleep(0.02)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert registry.warnings == []
    entries = {entry.id: entry for entry in registry.list_runs(paths.runs_dir())}
    assert {entry.status for entry in entries.values()} == {"finished"}
    for number in range(4):
        points = registry.metrics(f"run-{number}", "train/loss")
        assert [(point.step, point.value) for point in points] == [
            (step, number + step / 1000) for step in range(1, LINES + 1)
        ]
        assert len(registry.metrics(f"run-{number}", "train/lr")) == LINES
        events = RunDir.open(home / f"runs/run-{number}").events()
        assert events == []  # a warning would mean that the index was given up


def test_settings_of_every_connection(registry: Registry) -> None:
    with registry._engine.connect() as connection:
        pragma = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in
                  ("journal_mode", "synchronous", "busy_timeout", "foreign_keys", "user_version")}  # fmt: skip
    assert pragma == {"journal_mode": "wal", "synchronous": 1, "busy_timeout": 30_000, "foreign_keys": 1,
                      "user_version": database.SCHEMA_VERSION}  # fmt: skip


def test_writes_begin_immediate_and_reads_do_not_block(registry: Registry, make_run: MakeRun) -> None:
    registry.index(make_run("a"))
    with registry._session(write=True):
        other = sqlite3.connect(registry.path, timeout=0)
        assert other.execute("SELECT count(*) FROM runs").fetchone() == (1,)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        other.close()
    with registry._session():  # a reader takes no write lock
        other = sqlite3.connect(registry.path, timeout=0)
        other.execute("BEGIN IMMEDIATE")
        other.close()


def test_a_failed_write_is_rolled_back_whole(registry: Registry, make_run: MakeRun) -> None:
    registry.index(make_run("a"))
    before = len(registry.metrics("a", "eval/lm_loss"))
    with pytest.raises(database.RegistryError) as caught, registry._session(write=True) as session:
        session.add(Metric(run_id="a", name="eval/lm_loss", step=1, tokens=1, time=0.0, value=1.0, kind="finite"))
        session.flush()
        session.add(Metric(run_id="a", name="eval/lm_loss", step=1, tokens=1, time=0.0, value=None, kind="finite"))
        session.flush()
    assert isinstance(caught.value.__cause__, IntegrityError)
    assert len(registry.metrics("a", "eval/lm_loss")) == before


def test_a_writer_waits_for_another(registry: Registry, make_run: MakeRun) -> None:
    run = make_run("a")
    other = sqlite3.connect(registry.path, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.4, other.commit)
    timer.start()
    began = time.monotonic()
    registry.index(run)
    assert time.monotonic() - began > 0.3
    timer.join()
    other.close()


def test_non_finite_values_are_kept(registry: Registry, make_run: MakeRun) -> None:
    registry.index(make_run("a", losses=[math.nan, math.inf, -math.inf, 0.1]))
    values = [point.value for point in registry.metrics("a", "eval/lm_loss")]
    assert math.isnan(values[0]) and values[1:] == [math.inf, -math.inf, 0.1]
    with sqlite3.connect(registry.path) as raw:
        rows = raw.execute("SELECT value, kind FROM metrics WHERE name = 'eval/lm_loss' ORDER BY id").fetchall()
    assert rows == [(None, "nan"), (None, "+inf"), (None, "-inf"), (0.1, "finite")]


def test_a_line_wider_than_a_batch_and_many_batches(registry: Registry, make_run: MakeRun) -> None:
    run = make_run("a", losses=[], close=False)
    for step in range(5):
        run.log(step, step, {f"m{number}": float(number) for number in range(BATCH_ROWS * 2 + 7)})
        run.log(step, step, {f"n{number}": 1.0 for number in range(60)})
    run.release()
    assert registry.index(run) == 5 * (BATCH_ROWS * 2 + 7 + 60)
    assert registry.index(run) == 0
    assert len(registry.metrics("a", "m206")) == len(registry.metrics("a", "n59")) == 5


def test_resume_drops_the_rows_that_come_again(registry: Registry, make_run: MakeRun) -> None:
    run = make_run("a")
    registry.index(run)
    run.acquire()
    run.truncate_after(200)
    for step in range(201, 400):  # longer than before: the size alone would not tell
        run.log(step, step * 1000, {"eval/lm_loss": 1.0})
    run.release()
    registry.sync(paths.runs_dir())
    assert [point.step for point in registry.metrics("a", "eval/lm_loss")] == [100, 200, *range(201, 400)]


def test_a_reader_beside_a_run_that_is_wound_back_counts_nothing_twice(home: Path, make_run: MakeRun) -> None:
    """Forty times back to step 5 and on to 50, while another connection indexes as fast as it can."""
    run = make_run("r", losses=[], status="running", close=False)
    stop = threading.Event()

    def read() -> int:
        reader, looked = Registry(paths.registry_path()), 0
        while not stop.is_set():
            reader.index(RunDir.open(run.path))
            looked += 1
        reader.close()
        return looked

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        try:
            for sitting in range(40):
                for step in range(6 if sitting else 1, 51 if sitting % 2 else 40):
                    run.log(step, step * 10, {"train/lm_loss": sitting + step / 100})
                run.truncate_after(5)
        finally:
            stop.set()
        assert reading.result() > 0
    run.log(6, 60, {"train/lm_loss": 7.0})
    registry = Registry(paths.registry_path())
    registry.index(run)
    points = registry.metrics("r", "train/lm_loss")
    assert [(point.step, point.value) for point in points] == [(s, s / 100) for s in range(1, 6)] + [(6, 7.0)]
    registry.close()
    run.release()


def test_reindex_gives_the_same_answers(registry: Registry, make_run: MakeRun) -> None:
    make_run("a", losses=[3.0, math.nan])
    make_run("b", router=None, preset="dense", marks=["noncausal"], created="2026-01-01T00:00:00.000Z")
    make_run("c", status="running")
    make_run("d", losses=[], status="failed")
    registry.sync(paths.runs_dir())
    answers = [entry.to_dict() for entry in registry.list_runs(paths.runs_dir())]
    registry.close()
    for suffix in ("", "-wal", "-shm"):
        registry.path.with_name(registry.path.name + suffix).unlink(missing_ok=True)
    again, indexed = rebuild(registry.path, paths.runs_dir())
    assert [entry.to_dict() for entry in again.list_runs(paths.runs_dir())] == answers
    assert (indexed.runs, indexed.values) == (4, 3 * (2 + 3 + 3))
    folders = {entry["id"]: Entry.read(RunDir.open(paths.runs_dir() / entry["id"])).to_dict() for entry in answers}
    assert [folders[entry["id"]] for entry in answers] == answers
    assert {entry["id"]: entry["status"] for entry in answers} == {
        "a": "finished", "b": "finished", "c": "lost", "d": "failed",
    }  # fmt: skip
    assert answers[-1]["id"] == "b"


def test_sync_follows_the_folders(registry: Registry, make_run: MakeRun) -> None:
    make_run("a")
    make_run("b")
    registry.sync(paths.runs_dir())
    shutil.rmtree(paths.runs_dir() / "a")
    RunDir.open(paths.runs_dir() / "b").update(marks=["seen"])
    (paths.runs_dir() / "half").mkdir()  # no run.json: not a run
    registry.sync(paths.runs_dir())
    (entry,) = registry.list_runs(paths.runs_dir())
    assert (entry.id, entry.marks) == ("b", ["seen"])
    assert registry.metrics("a", "eval/lm_loss") == []


def test_a_broken_line_costs_itself_only(registry: Registry, make_run: MakeRun) -> None:
    run = make_run("a")
    lines = (run.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run.path / "metrics.jsonl").write_text("".join([*lines[:2], "nonsense\n", '{"step": 1}\n', *lines[2:]]))
    registry.reindex(paths.runs_dir())
    assert len(registry.metrics("a", "eval/lm_loss")) == 3
    assert ["line 3 is broken" in registry.warnings[0], "line 4 is no metric row" in registry.warnings[1]] == [True] * 2


def test_a_broken_run_does_not_hide_the_others(registry: Registry, make_run: MakeRun) -> None:
    make_run("a")
    (make_run("b").path / "run.json").write_text("{")
    make_run("c", metrics={"eval/lm_loss": "much"})
    assert registry.reindex(paths.runs_dir()).runs == 2
    assert [entry.id for entry in registry.list_runs(paths.runs_dir())] == ["a"]
    for name in ("b/run.json", "c/run.json"):
        assert any(name in warning for warning in registry.warnings)


def test_sync_and_reindex_agree_about_a_run_that_has_broken(registry: Registry, make_run: MakeRun) -> None:
    make_run("a")
    broken = make_run("b")
    registry.sync(paths.runs_dir())
    whole = (broken.path / "run.json").read_text()
    (broken.path / "run.json").write_text("{")
    for bring_up in (registry.sync, registry.reindex):
        registry.warnings.clear()
        bring_up(paths.runs_dir())
        assert [entry.id for entry in registry.list_runs(paths.runs_dir())] == ["a"]
        assert registry.metrics("b", "eval/lm_loss") == []
        assert any("b/run.json" in warning for warning in registry.warnings)
    (broken.path / "run.json").write_text(whole)
    registry.sync(paths.runs_dir())
    assert {entry.id for entry in registry.list_runs(paths.runs_dir())} == {"a", "b"}
    assert len(registry.metrics("b", "eval/lm_loss")) == 3


def test_get_and_filters(registry: Registry, make_run: MakeRun) -> None:
    make_run("moe-1")
    make_run("dense-1", router=None, status="failed")
    registry.sync(paths.runs_dir())
    assert registry.get("moe", paths.runs_dir()).id == "moe-1"
    assert [entry.id for entry in registry.list_runs(paths.runs_dir(), status="failed")] == ["dense-1"]
    assert [entry.id for entry in registry.list_runs(paths.runs_dir(), router="top1")] == ["moe-1"]
    assert len(registry.list_runs(paths.runs_dir(), limit=1)) == 1
    assert "eval/lm_loss" in registry.metric_names("moe-1")


def test_damaged_registry_is_named_and_rebuilt(registry: Registry, make_run: MakeRun) -> None:
    registry.index(make_run("a"))
    registry.close()
    data = bytearray(registry.path.read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    registry.path.write_bytes(data)
    with pytest.raises(database.RegistryDamagedError, match="is damaged") as caught:
        Registry(registry.path).list_runs(paths.runs_dir())
    assert "moectl runs reindex" in (caught.value.hint or "")
    again, indexed = rebuild(registry.path, paths.runs_dir())
    assert indexed.runs == 1 and [entry.id for entry in again.list_runs(paths.runs_dir())] == ["a"]
    assert (paths.home() / "registry.db.bad-1").exists() and "set aside" in again.warnings[0]


def test_newer_schema_is_refused_with_what_to_do(registry: Registry, make_run: MakeRun) -> None:
    make_run("a")
    registry.close()
    with sqlite3.connect(registry.path) as raw:
        raw.execute(f"PRAGMA user_version={database.SCHEMA_VERSION + 1}")
    with pytest.raises(database.RegistryDamagedError, match="schema version 2; this moectl knows 1") as caught:
        Registry(registry.path)
    assert "Upgrade moectl" in (caught.value.hint or "")
    assert rebuild(registry.path, paths.runs_dir())[1].runs == 1


def test_migrations_make_the_models(registry: Registry) -> None:
    with registry._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
        assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() == "0001"
    assert {Run.__tablename__, Metric.__tablename__} == {"runs", "metrics"}


def test_alembic_is_imported_only_to_migrate(home: Path) -> None:
    code = (
        "import sys; from moectl import paths; from moectl.runs.store import Registry; Registry(paths.registry_path());"
        "print('alembic' in sys.modules)"
    )
    answers = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "12"
    ]
    assert answers == ["True\n", "False\n"]


def test_backup_while_a_writer_writes(registry: Registry, make_run: MakeRun, tmp_path: Path) -> None:
    registry.index(make_run("a"))
    with registry._session(write=True) as session:
        session.add(Metric(run_id="a", name="x", step=1, tokens=1, time=0.0, value=1.0, kind="finite"))
        session.flush()
        registry.backup(tmp_path / "copy.db")
    copy = Registry(tmp_path / "copy.db")
    assert len(copy.metrics("a", "eval/lm_loss")) == 3 and copy.metrics("a", "x") == []
    assert len(registry.metrics("a", "x")) == 1
    assert not list(tmp_path.glob(".copy*"))


def test_network_file_system(home: Path, make_run: MakeRun) -> None:
    run = make_run("a")
    registry = Registry(paths.registry_path(), network=True)
    assert "network file system" in registry.warnings[0]
    registry.index(run)
    with registry._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "delete"
    registry.close()
    local = Registry(paths.registry_path())  # moved to a local disk: WAL again
    assert local.warnings == [] and len(local.metrics("a", "eval/lm_loss")) == 3
    with local._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_which_mount_a_folder_is_on(tmp_path: Path) -> None:
    mounts = f"rootfs / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n/dev/sdb {tmp_path}/local xfs rw 0 0\nodd\n"
    (tmp_path / "local").mkdir()
    assert database.on_network_filesystem(tmp_path / "runs", mounts)
    assert not database.on_network_filesystem(tmp_path / "local" / "runs", mounts)
    assert not database.on_network_filesystem(tmp_path.parent, mounts)

"""The registry's SQLite file: opened, migrated and judged here; what is in it is ``store``'s.

WAL, ``synchronous=NORMAL``, ``busy_timeout`` 30 s, ``BEGIN IMMEDIATE`` for every write. SQLite's
shared-memory WAL index does not work over a network, so there the journal is DELETE (sqlite.org/wal.html).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError

from moectl import paths
from moectl.errors import MoectlError
from moectl.runs.lock import FileLock

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 30.0
_NETWORK = frozenset({
    "nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "ncpfs", "afs", "ceph", "lustre", "gpfs", "beegfs",
    "glusterfs", "pvfs2", "orangefs", "9p", "fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.gcsfuse",
    "fuse.rclone", "fuse.juicefs",
})  # fmt: skip
_DAMAGED = ("malformed", "not a database", "disk image", "no such table", "no such column", "encrypted")


class RegistryError(MoectlError):
    """The registry cannot be used now: locked, read-only. The run folders are not affected."""


class RegistryDamagedError(RegistryError):
    """The registry must be rebuilt: damaged, or written by a newer moectl."""


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into a ``RegistryError`` that says what to do."""
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        raise _explain(path, str(error.orig if isinstance(error, DBAPIError) else error)) from error


def _explain(path: Path, reason: str) -> RegistryError:
    if "locked" in reason or "busy" in reason:
        return RegistryError(
            f"the registry {path} stayed locked for {BUSY_TIMEOUT_S:.0f} s",
            "Another process is writing it; try again. The run folders are complete in any case.",
        )
    if any(sign in reason for sign in _DAMAGED):
        return RegistryDamagedError(
            f"the registry {path} is damaged ({reason})",
            "Nothing is lost: `moectl runs reindex` sets it aside and rebuilds it from the run folders.",
        )
    if "full" in reason:
        return RegistryError(f"the disk of the registry {path} is full", "Free some space, then `moectl runs reindex`.")
    return RegistryError(
        f"cannot use the registry {path}: {reason}",
        "Set MOECTL_HOME to a folder that you can write to.",
    )


def open_engine(path: Path, *, network: bool | None = None, warnings: list[str] | None = None) -> Engine:
    """An engine on an up-to-date registry, created or migrated first where needed.

    Args:
        network: whether ``path`` lies on a network file system; None looks it up.

    Raises:
        RegistryError: it cannot be opened or written.
        RegistryDamagedError: it is damaged, or of a newer schema.
    """
    paths.ensure(path.parent)
    if on_network_filesystem(path.parent) if network is None else network:
        journal = "delete"
        if warnings is not None:
            warnings.append(
                f"{path.parent} is on a network file system: the registry works there, slowly, and only for one "
                "machine at a time. Set MOECTL_HOME to a local disk."
            )
    else:
        journal = "wal"
    engine = _engine(path)
    with explained(path):
        if _state(path) != (SCHEMA_VERSION, journal):
            _prepare(engine, path, journal)
    return engine


def _engine(path: Path) -> Engine:
    engine = create_engine(URL.create("sqlite", database=str(path)), connect_args={"timeout": BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        # The driver's own BEGIN comes late and is deferred: two readers that turn writers then
        # fail at once, whatever the busy timeout. Ours is explicit, below.
        connection.isolation_level = None
        for pragma in ("synchronous=NORMAL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        write = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _state(path: Path) -> tuple[int, str]:
    """(schema version, journal mode); (0, "") without a file. A newer schema raises."""
    if not path.exists():
        return 0, ""
    with contextlib.closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)) as connection:
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA_VERSION:
            raise RegistryDamagedError(
                f"the registry {path} has schema version {version}; this moectl knows {SCHEMA_VERSION}",
                "Upgrade moectl; or `moectl runs reindex`, which sets it aside and builds one of this version.",
            )
        return version, str(connection.execute("PRAGMA journal_mode").fetchone()[0])


def _prepare(engine: Engine, path: Path, journal: str) -> None:
    """Journal mode and migrations, by one process at a time."""
    lock = FileLock(path.with_name(path.name + ".lock"))
    if not lock.acquire(timeout=BUSY_TIMEOUT_S):
        raise RegistryError(f"the registry {path} is being migrated by {lock.holder()}", "Try again in a moment.")
    try:
        version, mode = _state(path)
        if mode != journal:
            with contextlib.closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)) as connection:
                connection.execute(f"PRAGMA journal_mode={journal}")
        if version < SCHEMA_VERSION:
            _migrate(engine)
    finally:
        lock.release()


def _migrate(engine: Engine) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    with engine.execution_options(write=True).begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        connection.exec_driver_sql(f"PRAGMA user_version={SCHEMA_VERSION}")


def set_aside(path: Path) -> Path:
    """Move a registry that cannot be used, with its journals, to ``registry.db.bad-N``."""
    number = 1
    while (target := path.with_name(f"{path.name}.bad-{number}")).exists():
        number += 1
    for suffix in ("-wal", "-shm", "-journal", ""):
        source = path.with_name(path.name + suffix)
        if source.exists():
            os.replace(source, target.with_name(target.name + suffix))
    return target


def healthy(engine: Engine) -> bool:
    """SQLite's own quick check of every page."""
    try:
        with engine.connect() as connection:
            return connection.exec_driver_sql("PRAGMA quick_check(1)").scalar() == "ok"
    except DBAPIError:
        return False


def backup(path: Path, target: Path) -> None:
    """A consistent copy while others write, through SQLite's backup API; ``target`` appears whole."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with (
            explained(path),
            contextlib.closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)) as source,
            contextlib.closing(sqlite3.connect(temporary)) as copy,
        ):
            source.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, no -wal beside it
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def on_network_filesystem(folder: Path, mounts: str | None = None) -> bool:
    """Whether ``folder`` lies on a network file system, by the longest mount point that holds it.

    Args:
        mounts: text in the form of ``/proc/self/mounts``, which is read by default (Linux; elsewhere
            the answer is no).
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
    resolved = folder.resolve()
    best, kind = -1, ""
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = Path(fields[1].replace("\\040", " "))
        if (resolved == point or point in resolved.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), fields[2]
    return kind in _NETWORK

"""What lies around a project: plug-ins, the registry and the runs, the disk, git, the terminal."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from moectl import paths
from moectl.doctor.lines import Line, line
from moectl.doctor.report import listed
from moectl.errors import MoectlError
from moectl.plugins import router_entries
from moectl.runs import git
from moectl.runs.database import SCHEMA_VERSION, on_network_filesystem
from moectl.runs.entry import Entry
from moectl.runs.find import readable_runs, run_folders
from moectl.runs.rundir import RunDir
from moectl.runs.store import Registry
from moectl.testing.trial import router_problems

GIB = 2**30
LITTLE, TOO_LITTLE = 5 * GIB, GIB // 4
_TRIAL_BYTES = 4096
_REINDEX = "`moectl runs reindex` rebuilds it from the run folders, which are the truth."


def where() -> Path:
    """The project's home folder."""
    return paths.home()


def plugins() -> Iterator[Line]:
    """Every router that can be named, loaded in a process of its own."""
    entries = router_entries()
    problems = {name: why for name, why in router_problems(list(entries.values())).items() if why}
    for name, why in problems.items():
        package = entries[name].distribution
        yield line(f"router '{name}'", f"of '{package}': {why}", "problem", f"Update or uninstall '{package}'.")
    others = sorted({entry.distribution for entry in entries.values()} - {"moectl"})
    brought = f", plug-ins: {', '.join(others)}" if others else ", no plug-ins"
    yield line("routers", f"{len(entries) - len(problems)} of {len(entries)} load{brought}")


def registry() -> Iterator[Line]:
    """Whether the registry opens, and says what the run folders say; which runs ended without a word."""
    runs: list[RunDir] = []
    unreadable: list[str] = []
    runs.extend(readable_runs(problems=unreadable))
    yield _index(paths.registry_path())
    for problem in unreadable:
        yield line("runs", problem, "warning", "Restore its run.json from a copy, or remove the folder.")
    lost = [run.id for run in runs if run.status == "lost"]
    if lost:
        said = f"{listed(lost)} say 'running', and no process holds their lock any more"
        yield line("stale runs", said, "warning", f"Continue each: moectl train --resume {lost[0]}")
    live = [run.id for run in runs if run.live]
    yield line("locks", f"{listed(live)} being written" if live else f"none of {len(runs)} runs is being written")


def _index(path: Path) -> Line:
    folders = {folder.name for folder in run_folders()}
    if not path.exists():
        if folders:
            return line("registry", f"there is none yet for {len(folders)} runs", "warning", _REINDEX)
        return line("registry", "none yet: the first run makes one")
    try:
        version, sound = _inspect(path)
    except sqlite3.Error as error:
        return line("registry", f"{path} cannot be read: {error}", "problem", _REINDEX)
    if not sound:
        return line("registry", f"{path} is damaged: SQLite's quick check fails", "problem", _REINDEX)
    if version > SCHEMA_VERSION:
        said = f"{path} has schema version {version}; this moectl knows {SCHEMA_VERSION}"
        return line("registry", said, "problem", f"Upgrade moectl; or {_REINDEX}")
    if version < SCHEMA_VERSION:
        said = f"{path} has schema version {version} of {SCHEMA_VERSION}: the next command migrates it"
        return line("registry", said, "warning", "`moectl runs ls` does so at once.")
    return _agreement(path, folders, version)


def _inspect(path: Path) -> tuple[int, bool]:
    """(schema version, whether SQLite finds it sound), read only."""
    with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        return version, connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"


def _agreement(path: Path, folders: set[str], version: int) -> Line:
    """Whether the index says of each run what its folder says."""
    opened = Registry(path)
    try:
        indexed = {entry.id: entry for entry in opened.list_runs(paths.runs_dir())}
    finally:
        opened.close()
    differing = [
        id
        for id in sorted(folders & indexed.keys())
        if (entry := _read(paths.runs_dir() / id)) is not None and entry != indexed[id]
    ]
    gone, missing = sorted(indexed.keys() - folders), sorted(folders - indexed.keys())
    parts = [
        f"{what}: {listed(ids)}"
        for what, ids in (("not in it", missing), ("folder gone", gone), ("out of date", differing))
        if ids
    ]
    if parts:
        todo = f"`moectl runs ls` brings it up to date; {_REINDEX}"
        return line("registry", f"it differs from the run folders ({'; '.join(parts)})", "warning", todo)
    return line("registry", f"schema version {version}, and says what the {len(folders)} run folders say")


def _read(folder: Path) -> Entry | None:
    try:
        return Entry.read(RunDir.open(folder))
    except MoectlError:
        return None  # said of the run itself


def disk() -> Iterator[Line]:
    """Room and rights at the home folder, or where it would be made."""
    folder = paths.home()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    said = f"{free / GIB:.1f} GiB free at {folder}"
    if free < TOO_LITTLE:
        yield line("disk", said, "problem", "Free some space (`moectl runs ls` shows old runs), or set MOECTL_HOME.")
    elif free < LITTLE:
        yield line("disk", said, "warning", "A checkpoint of a small model takes 0.2 GiB: free some space in time.")
    else:
        yield line("disk", said)
    refused = _refused(there)
    if refused is not None:
        yield line("writable", f"{there}: {refused}", "problem", "Set MOECTL_HOME to a folder that you can write to.")
    else:
        yield line("writable", str(there))
    if on_network_filesystem(there):
        said = f"{there} is on a network file system: the registry is slow there, and for one machine at a time"
        yield line("file system", said, "warning", "Set MOECTL_HOME to a local disk.")


def _refused(folder: Path) -> str | None:
    """Why nothing can be written into ``folder``, found by writing a file without a name; None where it can."""
    if not folder.is_dir():
        return "it is no folder"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TRIAL_BYTES))
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return None


def surroundings() -> Iterator[Line]:
    """Git, and the terminal's encoding."""
    if shutil.which("git") is None:
        todo = "Install git, or set MOECTL_GIT_COMMIT: runs record the commit they were made from."
        yield line("git", "not found: the commit of a run will be unknown", "warning", todo)
    else:
        repository = git.read_repository(Path.cwd())
        state = {True: ", with changes", False: ", clean", None: ""}[repository.dirty]
        yield line(
            "git", f"commit {repository.commit[:12]}{state}" if repository.root else "this folder is no repository"
        )
    encoding = (getattr(sys.stdout, "encoding", None) or "unknown").lower().replace("_", "-")
    if encoding.replace("-", "") not in ("utf8", "utf16", "utf32"):
        todo = "Set PYTHONUTF8=1, or a UTF-8 locale such as LANG=C.UTF-8."
        yield line("terminal", f"encoding {encoding}: what it cannot show is escaped", "warning", todo)
    else:
        colour = "no colour (NO_COLOR)" if os.environ.get("NO_COLOR") else "colour on a terminal"
        yield line("terminal", f"encoding {encoding}, {colour}")

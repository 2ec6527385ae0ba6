"""What the ``runs`` commands do: list (by the registry, or without it), describe, remove."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from moectl import paths
from moectl.errors import ConfigError, MoectlError
from moectl.runs.entry import Entry, fits
from moectl.runs.files import explained
from moectl.runs.find import newest_first, readable_runs
from moectl.runs.heartbeat import last_beat
from moectl.runs.rundir import RunDir, folder_size


def list_runs(
    *, status: str | None = None, router: str | None = None, group: str | None = None, limit: int | None = None
) -> tuple[list[Entry], list[str]]:
    """All runs, the newest first, and warnings.

    The registry is brought up to date on the way. When it cannot be used, the folders answer, which
    is slower and the same.
    """
    runs_dir = paths.runs_dir()
    if not runs_dir.is_dir():
        return [], []
    try:
        from moectl.runs.store import Registry

        registry = Registry(paths.registry_path())
        try:
            registry.sync(runs_dir)
            return registry.list_runs(
                runs_dir, status=status, router=router, group=group, limit=limit
            ), registry.warnings
        finally:
            registry.close()
    except MoectlError as error:
        warnings = [f"{error.message}; read from the run folders instead. {error.hint or ''}".rstrip()]
    entries: list[Entry] = []
    for run in newest_first(readable_runs(runs_dir, problems=warnings)):
        if not fits(run, status=status, router=router, group=group):
            continue
        try:
            entries.append(Entry.read(run))
        except MoectlError as broken:
            warnings.append(broken.message)
    return entries[:limit], warnings


def describe(folder: Path) -> dict[str, Any]:
    """Everything about one run: its entry, run.json, newest metrics, events, checkpoints, files."""
    run = RunDir.open(folder)
    problems: list[str] = []
    checkpoints = sorted(item.name for item in run.checkpoints.glob("step-*") if item.is_dir())
    return {
        **Entry.read(run).to_dict(),
        "record": run.record,
        "metrics": dict(sorted(run.latest(problems=problems).items())),
        "events": run.events(problems=problems),
        "checkpoints": [name for name in checkpoints if ".bad" not in name and not name.endswith(".tmp")],
        "size_bytes": folder_size(folder),
        "last_seen": None if (beat := last_beat(folder)) is None else beat._asdict(),
        "patches": [name for name in ("diff.patch", "source.patch") if (folder / name).exists()],
        "problems": sorted(set(problems)),
    }


def remove(folder: Path, *, confirmed: bool) -> dict[str, Any]:
    """Delete a run: its folder, then its rows.

    Raises:
        ConfigError: not confirmed (says what would go), being written now, or not in the runs folder.
    """
    run = RunDir.open(folder)
    if folder.resolve().parent != paths.runs_dir().resolve():
        raise ConfigError(
            f"{folder} is not in {paths.runs_dir()}", "Only runs of this home are removed; delete the folder yourself."
        )
    size = folder_size(folder)
    files = sum(len(names) for _, _, names in os.walk(folder))
    if not confirmed:
        raise ConfigError(
            f"this would delete the run '{run.id}' ({run.status}): {files} files, {size / 1e6:.1f} MB in {folder}",
            f"Nothing was deleted. To do it: moectl runs rm {run.id} --yes",
        )
    with explained(f"remove the run {run.id}"):
        # The lock keeps a trainer out. The rename makes the run vanish whole, before its files do.
        run.acquire()
        try:
            doomed = folder.with_name(f".removed-{run.id}.{os.getpid()}")
            os.replace(folder, doomed)
        finally:
            run.release()
        shutil.rmtree(doomed)
    warnings: list[str] = []
    if paths.registry_path().exists():
        try:
            from moectl.runs.store import Registry

            with contextlib.closing(Registry(paths.registry_path())) as registry:
                registry.remove(run.id)
        except MoectlError as error:
            warnings.append(
                f"the folder is gone; the registry still names it: {error.message}. {error.hint or ''}".rstrip()
            )
    return {"removed": run.id, "files": files, "size_bytes": size, "warnings": warnings}

"""Which run does the user mean: by id, unique prefix, name or folder; the newest one by default.

Reads the folders alone, so that it works without a registry.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moectl import paths
from moectl.errors import ConfigError, MoectlError, NotFoundError, did_you_mean
from moectl.runs.rundir import RunDir


def run_folders(runs_dir: Path | None = None) -> list[Path]:
    """All complete run folders (those with a run.json), by name. None yet is an empty list."""
    root = paths.runs_dir() if runs_dir is None else runs_dir
    try:
        entries = sorted(root.iterdir())
    except OSError:
        return []
    return [entry for entry in entries if not entry.name.startswith(".") and (entry / "run.json").is_file()]


def readable_runs(runs_dir: Path | None = None, *, problems: list[str] | None = None) -> Iterator[RunDir]:
    """All runs that can be read; what is wrong with the others is appended to ``problems``."""
    for folder in run_folders(runs_dir):
        try:
            yield RunDir.open(folder)
        except MoectlError as error:
            if problems is not None:
                problems.append(error.message)


def newest_first(runs: Iterator[RunDir] | list[RunDir]) -> list[RunDir]:
    """Sorted by creation, the newest first; by id where two are equally old."""
    return sorted(runs, key=lambda run: (str(run.record.get("created", "")), run.id), reverse=True)


def find_run(name_or_path: str | Path | None = None, *, runs_dir: Path | None = None) -> Path:
    """The folder of one run: by id, folder, name or unique prefix; None is the newest finished run.

    Raises:
        NotFoundError: no such run (exit 4), naming the nearest.
        ConfigError: the name or prefix fits several runs (exit 2), listing them.
    """
    if name_or_path is None:
        return _newest_finished(runs_dir)
    name = str(name_or_path)
    folders = {folder.name: folder for folder in run_folders(runs_dir)}
    if name in folders:
        return folders[name]
    given = Path(name).expanduser()
    if name and (given / "run.json").is_file():
        return given.resolve()
    named = [run.id for run in readable_runs(runs_dir) if run.record.get("name") == name]
    for matches in (named, [id for id in folders if name and id.startswith(name)]):
        if len(matches) == 1:
            return folders[matches[0]]
        if matches:
            shown = ", ".join(sorted(matches)[:8]) + (", ..." if len(matches) > 8 else "")
            raise ConfigError(f"'{name}' fits {len(matches)} runs: {shown}", "Give more of the name, or the whole id.")
    hint = did_you_mean(name, folders) or "See `moectl runs ls`."
    if not folders:
        hint = "There is no run yet: `moectl train` makes one."
    raise NotFoundError(f"no run '{name}'", hint)


def _newest_finished(runs_dir: Path | None) -> Path:
    runs = newest_first(readable_runs(runs_dir))
    for run in runs:
        if run.status == "finished":
            return run.path
    if runs:
        raise NotFoundError(
            f"no run has finished yet; the newest, '{runs[0].id}', is {runs[0].status}",
            f"Name the run that you mean, or continue it: moectl train --resume {runs[0].id}",
        )
    raise NotFoundError("there is no run yet", "`moectl train` makes one; `moectl quickstart` the whole walk.")

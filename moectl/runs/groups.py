"""Named groups of runs: which belong to it, and as what. An ablation is one.

::

    groups/NAME/group.json   what was asked for: data, members (run, variant, seed), price and budget
                configs/     the config that each member is started with
                logs/        what each member's process wrote to stderr
                .lock        held by the one process that works on the group

A run says in its own run.json which group it belongs to. So the runs of a group are found without this folder, too,
and those that are planned and have not begun are found in it alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from moectl import paths
from moectl.errors import ConfigError, MoectlError, NotFoundError, did_you_mean
from moectl.runs.files import dumps, read_json, write_atomic
from moectl.runs.find import readable_runs
from moectl.runs.lock import FileLock
from moectl.runs.rundir import RunDir, now
from moectl.runs.subject import Subject


class Member(NamedTuple):
    """One run of a group: its id, and what it is there."""

    run: str
    variant: str
    seed: int

    @property
    def folder(self) -> Path:
        return paths.runs_dir() / self.run

    def opened(self) -> RunDir | None:
        """The run; None before it has begun (or after it was removed)."""
        return RunDir.open(self.folder) if (self.folder / "run.json").is_file() else None


class Group:
    """A group's folder; usable as a context manager, which lets its lock go.

    Attributes:
        record: group.json.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = paths.groups_dir() / name
        self.record: dict[str, Any] = {}
        self._lock = FileLock(self.folder / ".lock")

    @classmethod
    def begin(cls, name: str) -> Self:
        """The group of this name, made if there is none, its lock held.

        Raises:
            ConfigError: not a usable name, or another process works on the group (exit 2).
        """
        try:
            paths.check_name(name)
        except ValueError:
            rule = f"{paths.NAME_RULE[0].upper()}{paths.NAME_RULE[1:]}."
            raise ConfigError(f"'{name}' is not a usable group name", rule) from None
        group = cls(name)
        paths.ensure(group.folder)
        if not group._lock.acquire():
            raise ConfigError(
                f"the group '{name}' is being worked on by {group._lock.holder()}",
                "Wait until it ends, or choose another --name.",
            )
        try:
            if group._file.exists():
                group.record = read_json(group._file)
            else:
                group.update(id=name, created=now(), members=[])
        except BaseException:
            group.release()
            raise
        return group

    @classmethod
    def open(cls, name: str) -> Self:
        """A group, for reading. Raises ``NotFoundError`` (exit 4), naming the nearest."""
        group = cls(name)
        if name in group_names() and group._file.exists():
            group.record = read_json(group._file)
        elif not _runs_that_name(name):
            hint = did_you_mean(name, group_names()) or "`moectl ablate` makes one; `moectl runs ls` shows all runs."
            raise NotFoundError(f"no group '{name}'", hint)
        return group

    def release(self) -> None:
        """Let the lock go. Harmless when not held."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    @property
    def _file(self) -> Path:
        return self.folder / "group.json"

    @property
    def members(self) -> tuple[Member, ...]:
        """All members: in the order that they were asked for, then runs that name the group and are not in its file."""
        try:
            listed = [Member(item["run"], item["variant"], item["seed"]) for item in self.record.get("members", [])]
        except (KeyError, TypeError) as error:
            raise MoectlError(
                f"{self._file} is broken: {error!r}", "Restore it, or remove it: the runs stay."
            ) from None
        known = {member.run for member in listed}
        return (*listed, *(member for member in _runs_that_name(self.name) if member.run not in known))

    def add(self, members: Iterable[Member]) -> None:
        """Put those in that are not there yet. Needs the lock."""
        known = {member.run: member for member in self.members}
        known |= {member.run: member for member in members if member.run not in known}
        self.update(members=[member._asdict() for member in known.values()])

    def update(self, **fields: Any) -> None:
        """Merge ``fields`` into group.json, atomically. Needs the lock."""
        assert self._lock.held, "update() needs begin() first"
        self.record = {**self.record, **fields}
        write_atomic(self._file, dumps(self.record, indent=1) + "\n")


def group_names() -> list[str]:
    """The names of all groups that have a folder, sorted."""
    try:
        return sorted(entry.name for entry in paths.groups_dir().iterdir() if (entry / "group.json").is_file())
    except OSError:
        return []


def evaluated(name: str) -> tuple[list[Path], list[str]]:
    """The folders of a group's runs, those of its first variant first, and the ids of those with no LM loss yet.

    Raises:
        NotFoundError: no such group (exit 4).
    """
    members = Group.open(name).members
    order = list(dict.fromkeys(member.variant for member in members))
    folders, without = [], []
    for member in sorted(members, key=lambda m: (order.index(m.variant), m.seed)):
        run = member.opened()
        if run is not None and Subject.read(run).losses:
            folders.append(run.path)
        elif run is not None:
            without.append(run.id)
    return folders, without


def _runs_that_name(name: str) -> list[Member]:
    found = []
    for run in readable_runs():
        group: Mapping[str, Any] = run.record.get("group") or {}
        if group.get("name") == name:
            found.append((str(run.record.get("created")), Member(run.id, str(group["variant"]), run.record["seed"])))
    return [member for _, member in sorted(found)]

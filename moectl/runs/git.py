"""What git knows about a folder, through the ``git`` program, which may be missing.

Nothing here fails a run: what cannot be known is "unknown", with a sentence saying why.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

UNKNOWN = "unknown"
PATCH_BYTES = 1_000_000
_READ_BYTES = 16 * PATCH_BYTES
_TIMEOUT_S = 20


@dataclass(frozen=True)
class Repository:
    """The state of one repository.

    Attributes:
        root: its top folder, or None.
        commit: 40 hex digits, or "unknown".
        dirty: whether tracked files differ from the commit; None when that is not known.
        untracked: files and folders that git neither tracks nor ignores.
        patch: the difference of tracked files to the commit, whole files only, at most 1 MB; unmasked.
        problem: why something of this is unknown.
    """

    root: Path | None = None
    commit: str = UNKNOWN
    dirty: bool | None = None
    untracked: int | None = None
    patch: str = ""
    problem: str | None = None


class _GitError(Exception):
    pass


def read_repository(folder: Path) -> Repository:
    """The repository that ``folder`` lies in, as it is now."""
    try:
        root = Path(_git(folder, "rev-parse", "--show-toplevel"))
    except _GitError as error:
        return Repository(problem=str(error))
    try:
        commit = _git(folder, "rev-parse", "--verify", "--quiet", "HEAD")
        base, problem = commit, None
    except _GitError:
        commit, problem = UNKNOWN, f"the repository {root} has no commit yet"
        base = ""
    try:
        base = base or _git(folder, "hash-object", "-t", "tree", os.devnull)  # the empty tree
        status = _git(root, "status", "--porcelain", "--untracked-files=normal").splitlines()
        untracked = sum(line.startswith("??") for line in status)
        dirty = len(status) > untracked
        patch = _within_limit(_diff(root, base)) if dirty else ""
    except _GitError as error:
        return Repository(root, commit, None, None, "", problem or str(error))
    return Repository(root, commit, dirty, untracked, patch, problem)


def tracked(file: Path) -> bool:
    """Whether git tracks ``file``: a package installed inside somebody's repository is not of it."""
    try:
        _git(file.parent, "ls-files", "--error-unmatch", "--", file.name)
    except _GitError:
        return False
    return True


def _command(folder: Path, *arguments: str) -> list[str]:
    # fsmonitor and external diff programs are other people's code: not run from here.
    return ["git", "-C", str(folder), "-c", "core.fsmonitor=false", "-c", "core.quotePath=false", *arguments]


def _environment() -> dict[str, str]:
    return {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"}


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            _command(folder, *arguments), capture_output=True, env=_environment(), timeout=_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise _GitError("there is no git program") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _GitError(f"git could not be asked: {error}") from None
    if done.returncode:
        reason = done.stderr.decode("utf-8", "replace").strip()
        if "not a git repository" in reason:
            raise _GitError(f"{folder} is not in a git repository")
        raise _GitError(f"git said: {reason.splitlines()[0] if reason else f'exit code {done.returncode}'}")
    return done.stdout.decode("utf-8", "surrogateescape").strip("\n")


def _diff(root: Path, base: str) -> str:
    """The working tree against ``base``; of a huge one, the first 16 MB."""
    command = _command(root, "diff", "--no-ext-diff", "--no-textconv", "--no-color", base, "--")
    try:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_environment()
        ) as process:
            assert process.stdout is not None
            data = process.stdout.read(_READ_BYTES + 1)
            if len(data) > _READ_BYTES:
                process.kill()
    except OSError as error:
        raise _GitError(f"git could not be asked: {error}") from None
    return data.decode("utf-8", "surrogateescape")


def _within_limit(patch: str, limit: int = PATCH_BYTES) -> str:
    """The patch with whole files left out, and named at the top, until it fits ``limit`` bytes."""
    if _bytes(patch) <= limit:
        return patch
    files = ["diff --git " + part for part in patch.split("\ndiff --git ")]
    files[0] = files[0].removeprefix("diff --git ")
    kept: list[str] = []
    omitted: list[str] = []
    room = limit - 200 * len(files)
    for text in files:
        size = _bytes(text) + 1
        if size <= room:
            kept.append(text)
            room -= size
        else:
            omitted.append(f"# left out: {text.splitlines()[0].removeprefix('diff --git ')[:150]} ({size} bytes)")
    return "\n".join([*omitted, *kept]).rstrip("\n")[:limit] + "\n"


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))

"""Import each router in a process of its own, one per package, and say which cannot be used.

A module that ends, hangs or kills its interpreter then does so to nobody but itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence

from moectl.errors import MoectlError
from moectl.plugins import RouterEntry, reading

TIMEOUT_S = 120.0
#: The child reads ``{"path": [...], "names": [...]}`` from stdin. The last line of its stdout is the answer.
_CHILD = "from moectl.testing.trial import answer; answer()"


def try_entries(
    entries: Sequence[RouterEntry], *, tried: Callable[[str], None] | None = None, timeout_s: float = TIMEOUT_S
) -> dict[str, str | None]:
    """Load each router of ``entries``, the routers of one package in one child process.

    Args:
        entries: routers that no second package claims.
        tried: called with each package's name before its turn.
        timeout_s: how long a package may take.

    Returns:
        name -> None where it loads and is a router, otherwise why not.
    """
    packages: dict[str, list[str]] = {}
    for entry in entries:
        packages.setdefault(entry.distribution, []).append(entry.name)
    outcome: dict[str, str | None] = {}
    for package, names in packages.items():
        if tried is not None:
            tried(package)
        outcome |= _in_child(names, timeout_s)
    return outcome


def router_problems(
    entries: Sequence[RouterEntry], *, tried: Callable[[str], None] | None = None
) -> dict[str, str | None]:
    """Name -> why that router cannot be used, or None: its name is claimed twice, or it cannot be loaded."""
    alone = [entry for entry in entries if not entry.rivals]
    loaded = try_entries(alone, tried=tried)
    return {entry.name: entry.clash or loaded.get(entry.name) or reading(entry).problem for entry in entries}


def _in_child(names: list[str], timeout_s: float) -> dict[str, str | None]:
    question = json.dumps({"path": sys.path, "names": names})
    try:
        child = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=question,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return dict.fromkeys(names, f"importing it took more than {timeout_s:.0f} s")
    try:
        answered = json.loads(child.stdout.splitlines()[-1])
        return {name: answered[name] for name in names}
    except (LookupError, TypeError, ValueError):
        how = f"killed by signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
        last = next((line.strip() for line in reversed(child.stderr.splitlines()) if line.strip()), "")
        why = f"importing it ended the interpreter ({how})"
        return dict.fromkeys(names, f"{why}: {last}" if last else why)


def answer() -> None:
    """The child's part."""
    question = json.load(sys.stdin)
    sys.path[:] = question["path"]
    stdout, sys.stdout = sys.stdout, sys.stderr  # what a plug-in prints is not the answer
    from moectl.routers import router_class

    answers: dict[str, str | None] = {}
    for name in question["names"]:
        try:
            router_class(name)
            answers[name] = None
        except MoectlError as error:
            answers[name] = error.message
    stdout.write("\n" + json.dumps(answers) + "\n")

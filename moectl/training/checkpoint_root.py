"""The folder that holds the checkpoints: names, lock, rename into place, prune, clean up, set aside.

Every step here is one rename, so a process killed anywhere leaves whole checkpoints under their names, and
leftovers under names of their own that the next save removes.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moectl.disk import fsync
from moectl.training.checkpoint_files import remove

STEP = re.compile(r"step-(\d{8,})")
TEMPORARY, REPLACED = ".tmp-", ".replaced-"
SAID_AFTER_S, PATIENCE_S = 10.0, 180.0


def checkpoint_steps(root: Path) -> list[int]:
    """Steps that have a checkpoint folder, ascending; whether each is intact shows in loading it."""
    if not root.is_dir():
        return []
    found = (STEP.fullmatch(entry.name) for entry in root.iterdir() if entry.is_dir())
    return sorted(step for match in found if match and step_name(step := int(match[1])) == match[0])


def restored_steps(root: Path) -> list[int]:
    """As :func:`checkpoint_steps`, once what was killed while it replaced a checkpoint has its name back."""
    with suppress(OSError):
        if any(root.glob(f"{REPLACED}*")):
            with locked(root):
                restore_replaced(root)
    return checkpoint_steps(root)


def step_name(step: int) -> str:
    """``step-00000200`` for 200."""
    return f"step-{step:08d}"


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the folder against other savers and loaders; the kernel lets go when the process dies.

    So every temporary folder seen under the lock is a leftover. File systems without such locks are used
    without: a run has one writer anyway. So it is after some minutes: a reader that was stopped (Ctrl-Z) does not
    stop the run that it reads.
    """
    handle = os.open(root, os.O_RDONLY)
    try:
        with suppress(OSError):
            _lock(handle, root)
        yield
    finally:
        # Closing is not enough where a forked child holds a copy of the handle.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _lock(handle: int, root: Path) -> None:
    """Wait for the lock as long as PATIENCE_S; after SAID_AFTER_S, warn once."""
    began, said = time.monotonic(), False
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = time.monotonic() - began
            if waited >= PATIENCE_S:
                return None
            if waited >= SAID_AFTER_S and not said:
                said = True
                text = f"another process has held {root} for {waited:.0f} s: waiting {PATIENCE_S - waited:.0f} s more"
                warnings.warn(text, stacklevel=2)
            time.sleep(0.002)


def make_root(root: Path) -> None:
    if not root.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        fsync(root.parent)


def clean(root: Path) -> None:
    """Undo what killed processes left half done."""
    restore_replaced(root)
    for leftover in root.glob(f"{TEMPORARY}*"):
        remove(leftover)


def restore_replaced(root: Path) -> None:
    """Put back a checkpoint whose replacement never came; drop one whose replacement did."""
    for replaced in root.glob(f"{REPLACED}*"):
        final = root / replaced.name.removeprefix(REPLACED)
        if final.exists():
            remove(replaced)
        else:
            replaced.rename(final)


def publish(temporary: Path, final: Path) -> None:
    """Rename the complete checkpoint into place; an old one of that step steps back first."""
    root = final.parent
    replaced = root / f"{REPLACED}{final.name}"
    if final.exists():
        final.rename(replaced)
    try:
        temporary.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    fsync(root)
    remove(replaced)


def prune(root: Path, kept: Collection[int]) -> None:
    for step in checkpoint_steps(root):
        if step not in kept:
            doomed = root / f"{TEMPORARY}pruned-{step_name(step)}-{secrets.token_hex(4)}"
            # The new checkpoint is safe; one that cannot be removed now is tried again at the next save.
            with suppress(OSError):
                (root / step_name(step)).rename(doomed)  # at once: never half a checkpoint under its name
                remove(doomed)


def set_aside(folder: Path) -> str:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.bad-{number}")).exists():
        number += 1
    try:
        folder.rename(aside)
    except OSError as error:
        return f"checkpoint {folder.name} is bad and skipped (it cannot be renamed: {error.strerror})"
    return f"checkpoint {folder.name} is bad and set aside as {aside.name}"

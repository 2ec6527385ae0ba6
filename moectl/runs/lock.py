"""One writer per run: an advisory file lock that dies with its process.

``flock`` belongs to the open file, so that a probe of the same file by the same process cannot
drop it (POSIX record locks would be), and the kernel frees it at ``kill -9``: no stale lock
can stay. The file itself is never deleted; its text only names the holder.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from pathlib import Path

from moectl.runs.files import explained

_PATIENCE_S = 0.5  # a probe holds the lock for microseconds; a real writer for minutes


class FileLock:
    """An exclusive lock on ``path``; ``holder`` tells who has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1

    @property
    def held(self) -> bool:
        """True while this object has the lock."""
        return self._descriptor >= 0

    def acquire(self, timeout: float = _PATIENCE_S) -> bool:
        """Take the lock within ``timeout`` seconds; False when another holder keeps it."""
        if self.held:
            return True
        with explained(f"lock {self.path.name}"):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                deadline = time.monotonic() + timeout
                while not _try(descriptor, fcntl.LOCK_EX):
                    if time.monotonic() >= deadline:
                        os.close(descriptor)
                        return False
                    time.sleep(0.02)
                text = json.dumps({"pid": os.getpid(), "host": platform.node(), "since": round(time.time(), 3)})
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, text.encode() + b"\n", 0)
            except OSError:
                os.close(descriptor)
                raise
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        if self.held:
            os.close(self._descriptor)  # closing the open file frees its lock
            self._descriptor = -1

    def busy(self) -> bool:
        """True when some process, this one included, holds the lock now. Needs read access only."""
        if self.held:
            return True
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return not _try(descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)

    def holder(self) -> str:
        """``"PID 123 on host-a"`` as the holder wrote it, or ``"another process"``."""
        try:
            note = json.loads(self.path.read_text(encoding="utf-8"))
            return f"PID {int(note['pid'])} on {note['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

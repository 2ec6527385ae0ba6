"""A sign of life in the run folder, for those whom the lock does not reach.

On one machine the lock tells it all: it dies with its process. A network file system may not carry locks from host
to host, so that a run that is alive elsewhere looks lost here, or gets a second writer; there the last sign of
life decides. For a lost run, it says when it was last seen.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

NAME = "heartbeat.json"
EVERY_S = 10.0
LOST_AFTER_S = 120.0
"""Without a sign for so long, a run on another host is lost: twelve beats, and clocks that differ by a little."""


class Beat(NamedTuple):
    """The last sign of life: whose, and when (Unix seconds, by the writer's clock)."""

    pid: int
    host: str
    time: float
    boot: str | None = None
    """Of the writer's machine: names of hosts come twice, in images and containers."""

    @property
    def age(self) -> float:
        return time.time() - self.time


def last_beat(folder: Path) -> Beat | None:
    """The last sign of life in a run folder; None where there is none that can be read."""
    try:
        note: dict[str, Any] = json.loads((folder / NAME).read_text(encoding="utf-8"))
        boot = note.get("boot")
        return Beat(int(note["pid"]), str(note["host"]), float(note["time"]), None if boot is None else str(boot))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def alive_elsewhere(folder: Path, *, network: bool | None = None, now: float | None = None) -> Beat | None:
    """The fresh sign of life of a process on another host, where locks may not reach; else None.

    It is fresh by the writer's clock or by that of the file system: either one may be wrong.

    Args:
        network: whether the folder is on a network file system; None looks it up.
        now: by the file system's clock, where something has just been written; else by this machine's.
    """
    beat = last_beat(folder)
    if beat is None or _written_here(beat):
        return None
    with contextlib.suppress(OSError):
        beaten = (folder / NAME).stat().st_mtime
        if min(abs(beat.age), abs((time.time() if now is None else now) - beaten)) > LOST_AFTER_S:
            return None
    if network is None:
        from moectl.runs.database import on_network_filesystem  # a database library, that few who look here need

        network = on_network_filesystem(folder)
    return beat if network else None


def _boot() -> str | None:
    """The kernel's name for this boot of this machine; None where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip() or None
    except OSError:
        return None


def _written_here(beat: Beat) -> bool:
    boot = _boot()
    return beat.host == platform.node() if beat.boot is None or boot is None else beat.boot == boot


class Heartbeat:
    """Writes a sign of life now and every ten seconds, from a thread of its own, until ``stop``."""

    def __init__(self, folder: Path, *, every: float = EVERY_S) -> None:
        self.path, self.every = folder / NAME, every
        self._stopped = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="moectl-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more signs; the file goes, for the record now says how the run ended."""
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # a file that cannot be removed keeps no run from its end
            self.path.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._stopped.wait(self.every):
            self._beat()

    def _beat(self) -> None:
        temporary = self.path.with_name(f".{NAME}.tmp")
        note = Beat(os.getpid(), platform.node(), round(time.time(), 3), _boot())
        text = json.dumps(note._asdict())
        try:
            temporary.write_text(text + "\n", encoding="ascii")
            os.replace(temporary, self.path)  # not fsynced: after a power cut nobody is alive
        except OSError:
            return  # a full disk does not stop a run over its sign of life

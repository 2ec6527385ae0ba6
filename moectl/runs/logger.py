"""What a training loop logs to: the run folder first, the registry when it can.

The folder is the truth. A registry that is locked, read-only, damaged or newer than this moectl
never stops a run: it is said once, and ``moectl runs ls`` or ``moectl runs reindex`` catches up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from moectl.errors import MoectlError
from moectl.runs.heartbeat import Heartbeat
from moectl.runs.rundir import RunDir

if TYPE_CHECKING:
    from moectl.runs.store import Registry

FLUSH_LINES = 100
FLUSH_SECONDS = 5.0
SAID = (
    "collapse", "router_logits", "loss_spike", "out_of_memory", "bad_checkpoint", "precision",
    "compile_failed", "recompiled", "overflow",
)  # fmt: skip
"""Events that the user is told of while the run goes on: each once per layer, or step where it is of no layer."""


class RunRecorder:
    """Writes one run: ``log``, ``event``, ``routing``, ``update``; then ``close``.

    Args:
        rundir: the folder, its lock held.
        registry: the index: its path (opened here, so that a broken one cannot stop the run), an
            open ``Registry``, or None for no index.
        warn: called with one sentence when the index fails (an event of the run too), and for events that are SAID.
    """

    def __init__(
        self, rundir: RunDir, registry: Registry | Path | None = None, *, warn: Callable[[str], None] | None = None
    ) -> None:
        self.rundir = rundir
        self._warn = warn
        self._registry: Registry | None = None
        self._said: set[tuple[str, Any]] = set()
        self._lines = 0
        self._flushed = time.monotonic()
        if isinstance(registry, Path):
            from moectl.runs.store import Registry as Opened

            try:
                self._registry = Opened(registry)
            except MoectlError as error:
                self._give_up(error)
            else:
                for warning in self._registry.warnings:
                    self._say(warning)
        else:
            self._registry = registry
        self._heartbeat = Heartbeat(rundir.path)
        self.flush()

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """One line of numbers: on disk when this returns, in the index within seconds."""
        self.rundir.log(step, tokens, values)
        self._lines += 1
        if self._lines >= FLUSH_LINES or time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def event(self, kind: str, message: str, **details: Any) -> None:
        """One thing that happened, with ``step=`` where it is of one, and is forgotten with it; ``at=`` otherwise."""
        self.rundir.event(kind, message, **details)
        step = details.get("step", details.get("at"))
        about = (kind, details.get("layer", ("step", details.get("spiked", step))))
        if kind in SAID and about not in self._said and self._warn is not None:
            self._said.add(about)
            self._warn(f"warning: at step {step}: {message}")

    def routing(self, step: int, payload: Mapping[str, Any]) -> None:
        """Routing statistics of one step."""
        self.rundir.routing(step, payload)

    def position(self) -> dict[str, int]:
        """How far the record goes, in bytes; all of it is on the disk."""
        return self.rundir.position()

    def rewind(self, step: int, position: Mapping[str, int]) -> None:
        """Forget what was recorded after a checkpoint of ``step`` was written at ``position``."""
        self.rundir.truncate_after(step, position)
        self.flush()

    def update(self, **fields: Any) -> None:
        """Merge fields into run.json, and into the index."""
        self.rundir.update(**fields)
        self.flush()

    def flush(self) -> None:
        """Bring the index up to the folder. After one failure the index is left alone."""
        self._lines, self._flushed = 0, time.monotonic()
        if self._registry is None:
            return
        try:
            self._registry.index(self.rundir)
        except MoectlError as error:
            self._registry = None
            self._give_up(error)

    def close(self) -> None:
        """Last flush, then the sign of life and the lock go."""
        try:
            self.flush()
        finally:
            self._heartbeat.stop()
            self.rundir.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _give_up(self, error: MoectlError) -> None:
        self._say(f"this run is not being indexed: {error.message}. Its folder is complete; see `moectl runs reindex`.")

    def _say(self, message: str) -> None:
        self.rundir.event("warning", message)
        if self._warn is not None:
            self._warn(message)

"""One run of a group in a process of its own: what to train comes in on stdin, what happens goes out on stdout.

A line of JSON comes first; every further line is a reason to stop, between two steps and with a checkpoint. The end
of stdin is one, too: when the process of the group dies, its runs end in order. Out go lines of JSON, each with a
``kind``: ``say`` (text), ``begun`` (run, steps), ``step`` (step, values), ``ended`` (status, reason, ...), ``error``
(message, hint, exit_code). Whatever else is printed goes to stderr, which the group keeps in a file.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moectl.errors import MoectlError
from moectl.training.protocol import Progress

EVERY_S = 0.25
ORPHANED = "the process of the group is gone"
_BEGAN = time.monotonic()  # a rented machine's price does not wait for imports


class Channel:
    """Both directions; made once, before anything is printed."""

    def __init__(self) -> None:
        self._out = os.dup(1)
        os.dup2(2, 1)  # stray output does not get in between
        self._buffer = b""
        self._reason: str | None = None
        self._told = 0.0

    def spec(self) -> dict[str, Any]:
        """The first line; a thread watches for the others."""
        line = self._line()
        spec: dict[str, Any] = json.loads(line or "null")
        threading.Thread(target=self._watch, name="moectl-group", daemon=True).start()
        return spec

    def reason(self) -> str | None:
        """Why the run must stop, if it must."""
        return self._reason

    def tell(self, kind: str, **fields: Any) -> None:
        """One line out. With nobody to read it, the run must stop."""
        line = (json.dumps({"kind": kind, **fields}, default=str) + "\n").encode()
        try:
            while line:
                line = line[os.write(self._out, line) :]
        except OSError:
            self._reason = self._reason or ORPHANED

    def progress(self, run: str, steps: int) -> Progress:
        """What is called after every step: it tells of some."""

        def progress(step: int, values: Mapping[str, float]) -> None:
            if step == steps or time.monotonic() - self._told >= EVERY_S:
                self._told = time.monotonic()
                self.tell("step", step=step, values={name: float(value) for name, value in values.items()})

        self.tell("begun", run=run, steps=steps)
        return progress

    def _watch(self) -> None:
        self._reason = self._line() or self._reason or ORPHANED

    def _line(self) -> str:
        """Up to the next newline; "" at the end. Not by sys.stdin, whose lock a dying interpreter would wait for."""
        while b"\n" not in self._buffer:
            part = os.read(0, 65536)
            if not part:
                return ""
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()


def main() -> int:
    """Train the run that stdin names; its exit code is that of ``moectl train``."""
    channel = Channel()
    spec = channel.spec()
    try:
        outcome = _train(spec, channel)
    except MoectlError as error:
        channel.tell("error", message=error.message, hint=error.hint, exit_code=error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        channel.tell("error", message="stopped in the middle of a step", hint=None, exit_code=130)
        return 130
    ended = {"status": outcome.status, "reason": outcome.reason, "step": outcome.step, "tokens": outcome.tokens}
    channel.tell("ended", run=outcome.id, **ended)
    return outcome.exit_code


def _train(spec: Mapping[str, Any], channel: Channel) -> Any:
    from moectl.config.loading import load_config
    from moectl.walk.budget import Terms
    from moectl.walk.train import RunRequest, start_run

    request = RunRequest(
        data=spec["data"],
        command=spec["command"],
        commit=spec["commit"],
        go_on=True,
        say=lambda text: channel.tell("say", text=text),
        progress=channel.progress,
        terms=Terms(**spec["terms"], since=_BEGAN),
        group=spec["group"],
        halt=channel.reason,
    )
    if channel.reason() is not None:
        raise MoectlError(f"not begun: {channel.reason()}", exit_code=130)
    return start_run(load_config(Path(spec["config"])), request)

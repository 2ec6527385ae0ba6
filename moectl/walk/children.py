"""The processes of a group: started, listened to, asked to stop, and missed when they die."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# As this process finds moectl and all else, and never in the working folder, where a user's file may bear any name.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from moectl.walk.member import main; sys.exit(main())"
)
_PATIENCE_S = 10.0


class Child:
    """One run's process.

    Args:
        spec: for :mod:`moectl.walk.member`.
        environment: over this process's own.
        log: its stderr is appended to this file.

    Attributes:
        ending: its last words, ``ended`` or ``error``; None while it runs, and for ever if it died.
        began: when it was started, by the monotonic clock.
    """

    def __init__(self, spec: Mapping[str, Any], *, environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self.ending: dict[str, Any] | None = None
        self.began = time.monotonic()
        self.asked = False
        self._buffer = b""
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C is ours to hand on, once
            )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._write(json.dumps(spec))

    @property
    def output(self) -> int:
        """The file descriptor that its messages come from."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def messages(self) -> Iterator[dict[str, Any]]:
        """Those that have come in the meantime."""
        while True:
            try:
                part = os.read(self.output, 65536)
            except BlockingIOError:
                break
            if not part:
                break
            self._buffer += part
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message["kind"] in ("ended", "error"):
                self.ending = message
            yield message

    def stop(self, reason: str) -> None:
        """Ask it to end between two steps, with a checkpoint. Asked again, it is told by a signal: at once."""
        if self.asked:
            self._process.send_signal(signal.SIGTERM)
            return
        self.asked = True
        self._write(reason)

    @property
    def over(self) -> bool:
        return self._process.poll() is not None

    @property
    def death(self) -> str:
        """How it died, with its last words on stderr."""
        code = self._process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        try:
            words = [line for line in self.log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        except OSError:
            words = []
        return f"its process was {how}" if code < 0 else f"its process {how}" + (f": {words[-1]}" if words else "")

    def close(self) -> None:
        """Let its pipes go; a process that is still there gets time to end in order, then none."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return  # dead: it will be missed


def wait(children: list[Child], seconds: float) -> None:
    """Until one of them has something to say, or for so long."""
    with selectors.DefaultSelector() as selector:
        for child in children:
            selector.register(child.output, selectors.EVENT_READ)
        selector.select(seconds) if children else time.sleep(seconds)

"""Checkpoints written by a thread while training goes on, from a copy of what they hold.

One at a time: the next waits for the one before, so that at most one copy is in memory and the newest on the disk
is never older than two. What a write fails with is raised where the next one is asked for, or where the run ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from torch import Tensor

Parts = Mapping[str, Mapping[str, Tensor]]


class BackgroundWriter:
    """At most one write at a time. A process that ends in order finishes the one that it has begun."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._written: Future[object] | None = None

    def start(self, write: Callable[[], object]) -> None:
        """Call ``write`` in a thread, after the one before.

        Raises:
            Whatever the one before failed with.
        """
        self.wait()
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="moectl-checkpoint")
        self._written = self._thread.submit(write)

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            Whatever it failed with; once.
        """
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        """Wait; where something else has failed already, that is what is told."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        if kind is None:
            self.wait()


def copied(parts: Parts) -> dict[str, dict[str, Tensor]]:
    """All tensors copied to the CPU; names of one tensor (a tied head) keep sharing one copy."""
    copies: dict[object, Tensor] = {}
    kept = []  # the originals, so that no id is used twice meanwhile

    def copy(tensor: Tensor) -> Tensor:
        key: object = id(tensor) if not tensor.numel() else (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if key not in copies:
            kept.append(tensor)
            copies[key] = tensor.detach().to("cpu", copy=True)
        return copies[key]

    return {part: {name: copy(tensor) for name, tensor in tensors.items()} for part, tensors in parts.items()}

"""Where a run's time goes, and what share of the device's peak the training steps reach.

On CUDA a part's time is between two events on the stream, read when the step's numbers are (no wait of its own);
elsewhere it is wall-clock time. ``time/...`` metrics are seconds per step since the last log line; evaluation and
checkpoints are given as they came.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from moectl.training.compiled import Compiled
from moectl.training.protocol import Speed

STEP_PARTS = ("data", "forward", "backward", "optimizer")
PARTS = (*STEP_PARTS, "checkpoint", "evaluation")


@dataclass(frozen=True)
class Yardstick:
    """What a run's speed is measured against.

    Attributes:
        flops_per_token: of forward and backward, with the parameters that a token uses.
        peak: FLOP/s of the device at most, in the run's precision; None where it is not known.
        about: where the peak comes from, in a phrase.
    """

    flops_per_token: float
    peak: float | None
    about: str

    def utilisation(self, tokens: int, seconds: float) -> float | None:
        """Model FLOPs utilisation (Chowdhery et al. 2022, arXiv:2204.02311): a share of the peak."""
        return None if self.peak is None or seconds <= 0 else tokens * self.flops_per_token / seconds / self.peak


class Clock:
    """Adds up seconds by part.

    Args:
        device: of the run.
        yardstick: what its speed is measured against, or None.

    Attributes:
        steps, seconds, tokens: of the steps that were done in this process: their number, the time from their first
            batch to their moved weights, and what they were trained on.
    """

    def __init__(self, device: torch.device, yardstick: Yardstick | None = None) -> None:
        self.device, self.yardstick = device, yardstick
        self.steps, self.seconds, self.tokens = 0, 0.0, 0
        self._totals = dict.fromkeys(PARTS, 0.0)
        self._lapped = 0
        self._lap = dict.fromkeys(PARTS, 0.0)
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs within is part ``name``. A part within another counts in both: do not."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._on_stream(name) else None
        started = time.perf_counter()
        if events is not None:
            events[0].record()
        try:
            yield
        finally:
            if events is not None:
                events[1].record()
                self._pending.append((name, events[0], events[1]))
            else:
                self._add(name, time.perf_counter() - started)

    def stepped(self, tokens: int, seconds: float) -> dict[str, float]:
        """Take in a step; how fast it was, and which share of the device's peak that is where it is known."""
        self.steps += 1
        self.tokens += tokens
        self.seconds += seconds
        mfu = None if self.yardstick is None else self.yardstick.utilisation(tokens, seconds)
        rate = {"train/tokens_per_second": tokens / seconds}
        return rate if mfu is None else rate | {"train/mfu": mfu}

    def speed(self, precision: str, compiled: Compiled | None) -> Speed:
        """Of all steps in this process, for the record."""
        speed = Speed(precision, self.settled())
        if compiled is not None:
            speed = replace(speed, graphs=compiled.graphs, late_graphs=compiled.late)
        if self.yardstick is None:
            return speed
        return replace(speed, mfu=self.yardstick.utilisation(self.tokens, self.seconds), **vars(self.yardstick))

    def lap(self) -> dict[str, float]:
        """``time/...`` of the steps since the last lap: seconds per step, and of what else there was, in all."""
        self._settle()
        lap, self._lap = self._lap, dict.fromkeys(PARTS, 0.0)
        steps, self._lapped = self.steps - self._lapped, self.steps
        values = {f"time/{name}": lap[name] / max(steps, 1) for name in STEP_PARTS}
        return values | {f"time/{name}": lap[name] for name in PARTS if name not in STEP_PARTS}

    def settled(self) -> dict[str, float]:
        """Seconds of each of :data:`PARTS` in this process."""
        self._settle()
        return dict(self._totals)

    def _settle(self) -> None:
        """Read the events; waits for those that are not over."""
        for name, begun, over in self._pending:
            over.synchronize()
            self._add(name, begun.elapsed_time(over) / 1e3)
        self._pending.clear()

    def _on_stream(self, name: str) -> bool:
        return self.device.type == "cuda" and name in ("forward", "backward", "optimizer")

    def _add(self, name: str, seconds: float) -> None:
        self._totals[name] += seconds
        self._lap[name] += seconds

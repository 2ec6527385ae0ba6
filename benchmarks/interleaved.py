"""Timing by turns: every variant once per round, so that a noisy machine is equally unkind to all of them.

A ratio is taken between two times of the same round, and its median over the rounds is reported, with
the interquartile range. Absolute times drift with the machine's load; these ratios do not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Timed(NamedTuple):
    """What is timed, and what must happen before each time without being timed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def measure(
    variants: Mapping[str, Timed],
    *,
    rounds: int,
    clock: str = "wall",
    warmup: int = 2,
    max_seconds: float = 60.0,
    min_rounds: int = 3,
) -> dict[str, list[float]]:
    """Seconds of each variant by round, after ``warmup`` rounds that are not kept.

    A variant leaves the later rounds once it has used up ``max_seconds``, but has at least
    ``min_rounds``; its list is then shorter, and ratios use the rounds that it took part in.
    """
    now = CLOCKS[clock]
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    spent = dict.fromkeys(variants, 0.0)
    for turn in range(warmup + rounds):
        for name, variant in variants.items():
            if spent[name] > max_seconds and (turn < warmup - 1 or len(seconds[name]) >= min_rounds):
                continue
            variant.prepare()
            started, started_wall = now(), time.perf_counter()
            variant.run()
            elapsed = now() - started
            spent[name] += time.perf_counter() - started_wall
            if turn >= warmup:
                seconds[name].append(elapsed)
    return seconds


def spread(values: list[float]) -> Spread:
    """Median and quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratio(numerator: list[float], denominator: list[float]) -> Spread:
    """Spread of the per-round ratios, over the rounds that both took part in."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=False)])

"""Means with 95 % intervals by Student's t, for the handful of seeds that anybody can afford."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev, variance
from typing import NamedTuple

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T95 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
_Z95 = 1.959963985


class MeanInterval(NamedTuple):
    """A mean of ``n`` values; ``low`` and ``high`` are None for fewer than two."""

    n: int
    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def t95(degrees: float) -> float:
    """The two-sided 95 % quantile of Student's t; fractional degrees are rounded down (wider).

    Above 30 degrees by the Cornish-Fisher expansion (Abramowitz & Stegun 26.7.5), good to 1e-5.
    """
    if degrees < 1:
        raise ValueError("at least one degree of freedom is needed")
    whole = math.floor(degrees)
    if whole <= len(_T95):
        return _T95[whole - 1]
    z = _Z95
    first, second = z**3 + z, 5 * z**5 + 16 * z**3 + 3 * z
    third = 3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z
    return z + first / (4 * whole) + second / (96 * whole**2) + third / (384 * whole**3)


def mean_interval(values: Sequence[float]) -> MeanInterval:
    """The mean and its 95 % interval. Raises ``ValueError`` for no values."""
    if not values:
        raise ValueError("a mean needs at least one value")
    mean, n = fmean(values), len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        return MeanInterval(n, mean, None, None)
    half = t95(n - 1) * stdev(values) / math.sqrt(n)
    return MeanInterval(n, mean, mean - half, mean + half)


def welch_interval(one: Sequence[float], other: Sequence[float]) -> MeanInterval:
    """Mean of ``other`` minus mean of ``one``, unpaired, with unequal variances (Welch 1947).

    ``n`` is the smaller number of values; both need two.
    """
    difference = fmean(other) - fmean(one)
    n = min(len(one), len(other))
    if n < 2 or not all(map(math.isfinite, (*one, *other))):
        return MeanInterval(n, difference, None, None)
    a, b = variance(one) / len(one), variance(other) / len(other)
    if a + b == 0:
        return MeanInterval(n, difference, difference, difference)
    degrees = (a + b) ** 2 / (a**2 / (len(one) - 1) + b**2 / (len(other) - 1))
    half = t95(max(1.0, degrees)) * math.sqrt(a + b)
    return MeanInterval(n, difference, difference - half, difference + half)

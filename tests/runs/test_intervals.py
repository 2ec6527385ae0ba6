"""Student's t against published tables and simulation."""

from __future__ import annotations

import random
from statistics import fmean

import pytest

from moectl.runs.intervals import mean_interval, t95, welch_interval


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.706205), (2, 4.302653), (4, 2.776445), (10, 2.228139), (30, 2.042272), (31, 2.039513), (40, 2.021075),
     (60, 2.000298), (120, 1.979930), (1000, 1.962339)],
)  # fmt: skip
def test_quantiles(degrees: int, quantile: float) -> None:
    # Tables give six decimals; ours carry four up to 30 degrees, and 1e-5 beyond.
    assert t95(degrees) == pytest.approx(quantile, abs=6e-5)


def test_known_interval() -> None:
    # Mean 2, s = 1, n = 3: half width 4.302653 / sqrt(3).
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.high == pytest.approx(2 + 2.484138, abs=1e-4)


def test_one_value_has_no_interval() -> None:
    assert mean_interval([1.5]) == (1, 1.5, None, None)
    assert mean_interval([1.5, float("nan")]).low is None
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([])


def test_coverage_is_95_percent() -> None:
    draw = random.Random(0)
    rounds = 4000
    paired = unpaired = 0
    for _ in range(rounds):
        one, other = [draw.gauss(0, 1) for _ in range(4)], [draw.gauss(0.5, 2) for _ in range(5)]
        interval = mean_interval(one)
        paired += interval.low <= 0 <= interval.high  # type: ignore[operator]
        interval = welch_interval(one, other)
        unpaired += interval.low <= 0.5 <= interval.high  # type: ignore[operator]
    # Four standard errors of a proportion; Welch with floored degrees of freedom is a little wide.
    assert abs(paired / rounds - 0.95) < 0.014
    assert 0.936 < unpaired / rounds < 0.98


def test_welch_direction_and_constant_values() -> None:
    assert welch_interval([1.0, 2.0], [3.0, 4.0]).mean == 2.0
    found = welch_interval([1.0, 1.0], [2.0, 2.0])
    assert found.excludes_zero and found.mean == fmean([1.0])

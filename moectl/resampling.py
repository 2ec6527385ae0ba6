"""Bootstrap intervals by group. numpy only, and the t quantiles of the registry.

Texts of one group (a play, a file, a template) are alike, so tokens are no independent sample:
whole groups are drawn again, within their domain, and every interval here rests on that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moectl.runs.intervals import t95

_Z95 = 1.959963985


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def group_weights(strata: NDArray[np.int64], draws: int, seed: int) -> NDArray[np.float64]:
    """How often each group is drawn in each bootstrap sample, drawn anew within its stratum.

    Args:
        strata: ``[G]`` the domain of each group; every domain keeps its number of groups.
        draws: number of bootstrap samples ``B``.
        seed: of the generator.

    Returns:
        ``[B, G]`` multiplicities.
    """
    generator = np.random.default_rng(seed)
    weights = np.zeros((draws, strata.shape[0]), dtype=np.float64)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        weights[:, members] = generator.multinomial(len(members), np.full(len(members), 1 / len(members)), draws)
    return weights


def smallest_stratum(strata: NDArray[np.int64]) -> int:
    """Groups of the domain that has the fewest of those that have any; 0 for no groups at all.

    With one group a domain's resamples are all alike: there is no scatter, and no interval.
    """
    sizes = np.bincount(strata)
    return int(sizes[sizes > 0].min()) if len(strata) else 0


def centred_interval(value: float, samples: NDArray[np.float64], groups: int) -> Interval:
    """The 95 % bootstrap interval around ``value``: the samples' quantiles, moved by their bias and widened.

    A plug-in estimate of information is biased upwards, and a bootstrap sample carries the bias
    twice: its plain quantiles can lie above the value itself. Moved so that their mean is the
    value, they say how far the value would scatter, on the scale of the nulls, which carry the
    same bias once.

    Resampling g groups scatters too little: its variance is (g-1)/g of the unbiased one, and its
    quantiles are a normal's where Student's t is due. Both are made good, by
    ``t(g-1) / 1.96 · sqrt(g / (g-1))``: 1.29 for 8 groups, 1.04 for 30. For a mean this gives the t
    interval. With several strata the smallest sets the factor, which errs to the wide side.

    Args:
        value: the estimate from all groups.
        samples: ``[B]`` the estimate from each resample.
        groups: of the smallest stratum, 2 or more (:func:`smallest_stratum`).

    Raises:
        ValueError: fewer than two groups.
    """
    if groups < 2:
        raise ValueError(f"an interval needs at least two groups, not {groups}")
    widening = t95(groups - 1) / _Z95 * math.sqrt(groups / (groups - 1))
    low, high = widening * (np.quantile(samples, (0.025, 0.975)) - samples.mean())
    return Interval(float(value + low), float(value + high))

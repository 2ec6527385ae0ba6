"""Bootstrap intervals by group. numpy only, knows nobody.

Texts of one group (a play, a file, a template) are alike, so tokens are no independent sample:
whole groups are drawn again, within their domain, and every interval here rests on that.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


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


def centred_interval(value: float, samples: NDArray[np.float64]) -> Interval:
    """The 95 % bootstrap interval around ``value``: the samples' quantiles, moved by their bias.

    A plug-in estimate of information is biased upwards, and a bootstrap sample carries the bias
    twice: its plain quantiles can lie above the value itself. Moved so that their mean is the
    value, they say how far the value would scatter, on the scale of the nulls, which carry the
    same bias once.
    """
    low, high = np.quantile(samples, (0.025, 0.975)) - samples.mean()
    return Interval(float(value + low), float(value + high))

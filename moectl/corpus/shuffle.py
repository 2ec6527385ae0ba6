"""Shuffling that gives the same order on every machine and NumPy version."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def permutation(size: int, *entropy: int) -> npt.NDArray[np.int64]:
    """A permutation of ``range(size)`` that depends on ``entropy`` (integers >= 0) only.

    NumPy promises the streams of its bit generators, not those of ``Generator.permutation``
    (NEP 19); so this sorts raw 64-bit draws, with a stable sort.
    """
    draws = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(size)
    return np.argsort(draws, kind="stable").astype(np.int64)

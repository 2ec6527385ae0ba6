"""How near is near enough, by dtype.

A tensor holds when its largest absolute error is at most ``TOLERANCE · max(1, largest reference value)``.
bfloat16 has no fixed number: what the reference itself loses against float64 is the measure, see
:mod:`moectl.parity.precision`.
"""

from __future__ import annotations

import math

import torch

from moectl.errors import unknown

#: float64: a few hundred roundings of 1e-16 through three layers and back, and room. float32: 1e-7, likewise.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
#: Scores nearer than this, relatively, are a tie: which one is chosen is rounding.
TIE = {torch.float64: 1e-9, torch.float32: 1e-5}
#: bfloat16: how often the reference's own error a candidate may have; and at least so many units in the last place.
#: Two right computations have errors of one size but not one number, and a run compares some hundred tensors:
#: with 2, three of 600 runs of our own code were outside, by up to an eighth; with 3 none came above 0.75.
BFLOAT16_FACTOR = 3.0
BFLOAT16_FLOOR_ULPS = 2.0

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def allowed(dtype: torch.dtype, scale: float) -> float:
    """The largest absolute error of a tensor whose largest reference value is ``scale``."""
    return TOLERANCE[dtype] * max(1.0, scale)


def bfloat16_bound(error: float, scale: float) -> float:
    """What a bfloat16 candidate may be off, where the reference is off by ``error`` in values up to ``scale``."""
    return max(BFLOAT16_FACTOR * error, BFLOAT16_FLOOR_ULPS * bfloat16_ulp(scale))


def bfloat16_ulp(scale: float) -> float:
    """The spacing of bfloat16 numbers (8 significant bits) at ``scale``: 2⁻⁷ from 1 to 2."""
    if not 0.0 < scale < math.inf:
        return 0.0
    return 2.0 ** (math.floor(math.log2(scale)) - 7)


def dtype_name(dtype: torch.dtype) -> str:
    """``"float64"``."""
    return str(dtype).removeprefix("torch.")


def dtypes_named(names: tuple[str, ...]) -> tuple[torch.dtype, ...]:
    """The dtypes of ``--dtype``, widest first; ``all`` stands for the three.

    Raises:
        ConfigError: an unknown name.
    """
    for name in names:
        if name not in (*DTYPES, "all"):
            raise unknown("dtype", name, (*DTYPES, "all"))
    return tuple(dtype for name, dtype in DTYPES.items() if name in names or "all" in names)

"""The numbers that decide."""

from __future__ import annotations

import pytest
import torch

from moectl.errors import ConfigError
from moectl.parity.tolerance import allowed, bfloat16_bound, bfloat16_ulp, dtypes_named


def test_allowed_grows_with_the_reference_from_one_on() -> None:
    assert allowed(torch.float64, 0.0) == allowed(torch.float64, 1.0) == 1e-10
    assert allowed(torch.float64, 50.0) == pytest.approx(5e-9)
    assert allowed(torch.float32, 4.0) == pytest.approx(4e-5)


@pytest.mark.parametrize(("scale", "ulp"), [(1.0, 2**-7), (1.99, 2**-7), (2.0, 2**-6), (0.75, 2**-8), (0.0, 0.0)])
def test_bfloat16_spacing(scale: float, ulp: float) -> None:
    assert bfloat16_ulp(scale) == ulp
    if ulp:
        just_above = torch.nextafter(torch.tensor(scale).bfloat16(), torch.tensor(4.0).bfloat16())
        if scale in (1.0, 2.0, 0.75):
            assert float(just_above) - scale == ulp


def test_bfloat16_bound_has_a_floor() -> None:
    assert bfloat16_bound(0.5, 1.0) == 1.5
    assert bfloat16_bound(0.0, 1.0) == 2 * 2**-7


def test_dtypes_by_name() -> None:
    assert dtypes_named(("all",)) == (torch.float64, torch.float32, torch.bfloat16)
    assert dtypes_named(("bfloat16", "float64")) == (torch.float64, torch.bfloat16)
    with pytest.raises(ConfigError, match="unknown dtype 'float16'"):
        dtypes_named(("float16",))

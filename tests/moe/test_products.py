"""Products of few rows and of many, against float64."""

from __future__ import annotations

import warnings

import pytest
import torch

from moectl.moe import products
from moectl.moe.products import FEW_ROWS, outer_product, product_dtype, times, times_transposed

ROWS = [0, 1, FEW_ROWS.start, 64, FEW_ROWS.stop - 1, FEW_ROWS.stop]
#: Features: fewer than a piece, whole pieces with page-long rows, a piece and a rest.
FEATURES = [(5, 7), (256, 1024), (300, 1024), (600, 500)]


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def close(mine: torch.Tensor, exact: torch.Tensor, terms: int) -> None:
    """Sums of ``terms`` products of unit normals: rounding grows like √terms units in the last place of √terms."""
    bits = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-8}[mine.dtype]
    torch.testing.assert_close(mine.double(), exact, rtol=0, atol=8 * bits * max(terms, 1))


def test_the_sizes_below_are_on_both_sides_of_the_rule() -> None:
    x, sizes = torch.empty(64, 1), [torch.empty(*shape) for shape in FEATURES]
    assert [products._bound_by_weights(x, weight) for weight in sizes] == [False, True, True, True]
    assert [products._bound_by_weights(torch.empty(rows, 1), sizes[1]) for rows in ROWS] == [
        False, False, True, True, True, False
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("outputs", "inputs"), FEATURES)
def test_products(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = drawn(rows, inputs, dtype=dtype), drawn(outputs, inputs, dtype=dtype)
    bias, grad = drawn(outputs, dtype=dtype), drawn(rows, outputs, dtype=dtype)
    exact = [tensor.double() for tensor in (x, weight, bias, grad)]
    close(times_transposed(x, weight), exact[0] @ exact[1].t(), inputs)
    close(times_transposed(x, weight, bias), exact[0] @ exact[1].t() + exact[2], inputs)
    close(times(grad, weight), exact[3] @ exact[1], outputs)
    before = drawn(outputs, inputs, dtype=dtype)
    written, added = torch.full_like(weight, torch.nan), before.clone()
    outer_product(grad, x, out=written, add=False)
    outer_product(grad, x, out=added, add=True)
    close(written, exact[3].t() @ exact[0], rows)
    close(added, before.double() + exact[3].t() @ exact[0], rows + 1)


@pytest.mark.parametrize("supported", [True, False])
def test_low_precision_is_multiplied_in_float32_only_where_it_must_be(
    supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "cpu_has_bfloat16", lambda: supported)
    low = torch.bfloat16 if supported else torch.float32
    assert product_dtype(torch.empty(1, dtype=torch.bfloat16), training=True) == low
    assert product_dtype(torch.empty(1, dtype=torch.float16), training=True) == torch.float32
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert product_dtype(torch.empty(1, dtype=dtype), training=False) == dtype
    assert product_dtype(torch.empty(products.MANY_TOKENS, dtype=torch.bfloat16), training=False) == low
    for dtype in (torch.float32, torch.float64):
        assert product_dtype(torch.empty(1, dtype=dtype), training=True) == dtype
    with torch.backends.mkldnn.flags(enabled=False):  # who turns oneDNN off turns those instructions off
        assert product_dtype(torch.empty(1, dtype=torch.bfloat16), training=True) == torch.float32


@pytest.mark.parametrize("supported", [True, False])
def test_autocast_warns_once_on_a_cpu_without_bfloat16(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "cpu_has_bfloat16", lambda: supported)
    products._warn_slow_autocast.cache_clear()
    x = torch.randn(2, 3)
    with warnings.catch_warnings(record=True) as caught, torch.autocast("cpu", dtype=torch.bfloat16):
        warnings.simplefilter("always")
        assert [products.cast_for_autocast(x).dtype for _ in range(2)] == [torch.bfloat16] * 2
    assert len(caught) == (0 if supported else 1)
    assert supported or "Train in float32" in str(caught[0].message)
    products._warn_slow_autocast.cache_clear()


def test_without_autocast_nothing_is_cast() -> None:
    x = torch.randn(2, 3)
    assert products.cast_for_autocast(x) is x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert products.cast_for_autocast(x.double()).dtype == torch.float64
        nowhere = torch.empty(2, 3, device="meta")  # a device that has no autocast
        assert products.cast_for_autocast(nowhere) is nowhere


@pytest.mark.parametrize(
    ("machine", "avx512", "amx", "arm", "mkldnn", "expected"),
    [
        ("x86_64", True, False, True, True, True),
        ("AMD64", False, True, True, True, True),
        ("x86_64", False, False, True, True, False),  # AVX512 without bfloat16: oneDNN emulates it
        ("aarch64", False, False, True, True, True),
        ("aarch64", False, False, False, True, False),
        ("arm64", False, False, True, False, False),  # torch without oneDNN
    ],
)
def test_which_cpus_have_bfloat16(
    machine: str, avx512: bool, amx: bool, arm: bool, mkldnn: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: arm)
    assert products.cpu_has_bfloat16.__wrapped__() is expected

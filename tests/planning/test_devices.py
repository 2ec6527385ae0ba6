"""The table of devices, this machine, and names that are none."""

from __future__ import annotations

import math

import pytest
import torch

from moectl.errors import ConfigError, MissingDependencyError
from moectl.moe.products import cpu_has_bfloat16
from moectl.planning.devices import (
    THIS,
    USUAL,
    UTILISATION,
    device_of,
    find_device,
    known_devices,
    prices_of,
    this_gpu,
    this_machine,
)


@pytest.mark.parametrize("name", known_devices())
def test_every_device_is_complete_and_makes_sense(name: str) -> None:
    device = known_devices()[name]
    assert device.kind == "cuda" and device.utilisation == UTILISATION["cuda"]
    assert 1e12 < device.fp32 <= device.bf16 < 2e15  # dense: no device of the table has more
    assert 0.2e12 < device.fp64 <= device.fp32
    assert 8e9 < device.memory < 300e9
    assert device.usd_per_hour is not None and 0.1 < device.usd_per_hour < 10
    assert (device.rate("bfloat16"), device.rate("float32")) == (device.bf16, device.fp32)
    assert device.rate("bfloat16-pure") == device.bf16
    assert device.rate("float64") == device.fp64 and device.rate("float16") >= device.bf16


def test_a_device_without_bfloat16_says_so() -> None:
    slow = known_devices()["T4"]
    assert slow.rate("bfloat16") == slow.fp32 < slow.rate("float16")
    assert slow.computed_as("bfloat16") == slow.computed_as("bfloat16-pure") == slow.bf16_is is not None
    assert slow.computed_as("float16") is None
    assert known_devices()["H100"].computed_as("bfloat16") is None


@pytest.mark.parametrize(
    ("name", "share"), [("L4", 64), ("T4", 32), ("RTX-3090", 64), ("RTX-4090", 64), ("RTX-5090", 64)]
)
def test_float64_is_a_small_share_where_it_is(name: str, share: int) -> None:
    """What the makers' papers say: 1/64 of float32 in Ada, GA102 and Blackwell RTX, 1/32 in Turing."""
    device = known_devices()[name]
    assert device.rate("float64") == pytest.approx(device.fp32 / share, rel=0.02)


@pytest.mark.parametrize("spelt", ["H100", "h100", "RTX 4090", "rtx_4090", "A100-8"])
def test_names_are_found_however_they_are_spelt(spelt: str) -> None:
    assert find_device(spelt).name in ("H100", "RTX-4090", "A100-80GB")


@pytest.mark.parametrize(("name", "nearest"), [("H1000", "H100"), ("RTX-4009", "RTX-4090")])
def test_an_unknown_device_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_device(name)
    assert f"unknown device '{name}'" in caught.value.message
    assert caught.value.hint is not None and f"Did you mean '{nearest}" in caught.value.hint
    assert "here" in caught.value.hint


def test_a_name_that_fits_several_lists_them() -> None:
    with pytest.raises(ConfigError) as caught:
        find_device("A100")
    assert caught.value.hint == "Name one of: A100-80GB, A100-40GB."


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("cpu", THIS),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", None),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("AMD Instinct MI300X OAM", "MI300X"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_what_a_machine_calls_its_device(reported: str, name: str | None) -> None:
    assert device_of(reported) == name


def test_a_gpu_of_this_machine_has_the_tables_rates_and_its_own_memory() -> None:
    found = this_gpu("NVIDIA H100 80GB HBM3", 79e9)
    assert (found.name, found.memory, found.usd_per_hour) == (f"{THIS}: H100", 79e9, None)
    assert found.fp32 == known_devices()["H100"].fp32


def test_an_unknown_gpu_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="this machine's GPU 'NVIDIA GeForce GTX 1080' is not in the table") as caught:
        this_gpu("NVIDIA GeForce GTX 1080", 8e9)
    assert "--device cpu" in str(caught.value.hint)


def test_the_cpu_is_the_cpu_whatever_else_is_there() -> None:
    assert find_device("cpu").kind == this_machine(torch.device("cpu")).kind == "cpu"
    here = find_device("cpu")
    assert here.fp64 > 0 and here.fp64 != here.fp32  # measured apart
    assert (here.computed_as("bfloat16") is None) is cpu_has_bfloat16()
    assert cpu_has_bfloat16() or here.bf16 == here.fp32
    assert here.rate("float16") == here.fp32


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there(name: str) -> None:
    with pytest.raises(MissingDependencyError, match=f"there is no device '{name}' on this machine") as caught:
        find_device(name)
    assert caught.value.exit_code == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_this_machine_is_measured() -> None:
    here = this_machine()
    assert here.kind == "cpu" and here.name.startswith(THIS) and str(torch.get_num_threads()) in here.name
    assert math.isfinite(here.fp32) and 1e8 < here.fp32 < 1e14
    assert 1e9 < here.memory < 1e14
    assert find_device("here").memory == here.memory


def test_the_usual_ones_are_in_the_table() -> None:
    assert set(USUAL) <= set(known_devices())
    assert len(prices_of()) == len("2026-05")

"""The table of devices, this machine, and names that are none."""

from __future__ import annotations

import math

import pytest
import torch

from moectl.errors import ConfigError
from moectl.planning.devices import (
    THIS,
    USUAL,
    UTILISATION,
    device_of,
    find_device,
    known_devices,
    prices_of,
    this_machine,
)


@pytest.mark.parametrize("name", known_devices())
def test_every_device_is_complete_and_makes_sense(name: str) -> None:
    device = known_devices()[name]
    assert device.kind == "cuda" and device.utilisation == UTILISATION["cuda"]
    assert 1e12 < device.fp32 <= device.tf32 <= device.bf16 < 2e15  # dense: no device of the table has more
    assert 8e9 < device.memory < 300e9
    assert device.usd_per_hour is not None and 0.1 < device.usd_per_hour < 10
    assert (device.rate("bfloat16"), device.rate("float32")) == (device.bf16, device.fp32)
    assert device.rate("float64") < device.rate("float32") and device.rate("float16") >= device.bf16


def test_a_device_without_bfloat16_says_so() -> None:
    slow = known_devices()["T4"]
    assert slow.rate("bfloat16") == slow.fp32 < slow.rate("float16")
    assert slow.bf16_is is not None
    assert known_devices()["H100"].bf16_is is None


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
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_what_a_machine_calls_its_device(reported: str, name: str | None) -> None:
    assert device_of(reported) == name


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

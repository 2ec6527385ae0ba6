"""Energy counters, in files as the kernel writes them; no GPU is needed, and none is pretended."""

from __future__ import annotations

from pathlib import Path

import pytest

from moectl.walk.energy import EnergyMeter

RANGE = 262_143_328_850


def package(powercap: Path, number: str, name: str, microjoules: int) -> Path:
    zone = powercap / f"intel-rapl:{number}"
    zone.mkdir(parents=True)
    (zone / "name").write_text(f"{name}\n")
    (zone / "energy_uj").write_text(f"{microjoules}\n")
    (zone / "max_energy_range_uj").write_text(f"{RANGE}\n")
    return zone / "energy_uj"


def test_packages_are_added_up_and_their_parts_are_not(tmp_path: Path) -> None:
    one, two = package(tmp_path, "0", "package-0", 1_000_000), package(tmp_path, "1", "package-1", 5_000_000)
    core, psys = package(tmp_path, "0:0", "core", 0), package(tmp_path, "2", "psys", 0)
    meter = EnergyMeter.on("cpu", tmp_path)
    assert meter is not None and meter.joules() == 0.0
    for file, value in ((one, 3_000_000), (two, 5_500_000), (core, 10**9), (psys, 10**9)):
        file.write_text(str(value))
    assert meter.joules() == pytest.approx(2.5)
    one.write_text("4000000")
    assert meter.joules() == pytest.approx(3.5)  # since it was made


def test_a_counter_that_wraps_around(tmp_path: Path) -> None:
    file = package(tmp_path, "0", "package-0", RANGE - 1_000_000)
    meter = EnergyMeter.on("cpu", tmp_path)
    assert meter is not None
    file.write_text("2000000")
    assert meter.joules() == pytest.approx(3.0)


def test_a_counter_that_cannot_be_read_any_more_adds_nothing(tmp_path: Path) -> None:
    file = package(tmp_path, "0", "package-0", 0)
    meter = EnergyMeter.on("cpu", tmp_path)
    assert meter is not None
    file.write_text("7000000")
    assert meter.joules() == pytest.approx(7.0)
    file.unlink()
    assert meter.joules() == pytest.approx(7.0)


def test_a_machine_that_does_not_tell(tmp_path: Path) -> None:
    assert EnergyMeter.on("cpu", tmp_path / "nothing") is None
    package(tmp_path, "0", "package-0", 0).unlink()  # as unreadable as for anybody who is not root
    assert EnergyMeter.on("cpu", tmp_path) is None

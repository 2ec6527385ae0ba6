"""How much energy a device has taken, where it tells: NVIDIA's counter of a GPU, RAPL's of a CPU.

NVML counts a whole GPU since its driver was loaded (Volta and newer); it needs the package ``nvidia-ml-py``. RAPL
counts whole CPU packages, all that runs on them, and only root may read it on most machines. Nothing is estimated.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

POWERCAP = Path("/sys/class/powercap")
_EVERY_S = 10.0

Reading = Callable[[], float]


class EnergyMeter:
    """Joules since it was made, from counters that may wrap around.

    Args:
        counters: each a function that reads joules, and where the counter starts again from 0 (infinity: nowhere).
    """

    def __init__(self, counters: list[tuple[Reading, float]]) -> None:
        self._counters = counters
        self._last = [read() for read, _ in counters]
        self._total = 0.0
        self._looked = time.monotonic()

    @classmethod
    def on(cls, device: str, powercap: Path = POWERCAP) -> Self | None:
        """Of ``device`` as torch names it (``cpu``, ``cuda:0``); None where it does not tell."""
        try:
            counters = _nvml(device) if device.startswith("cuda") else _rapl(powercap)
            return cls(counters) if counters else None
        except OSError:
            return None

    def tick(self) -> None:
        """To be called more often than a counter wraps around (RAPL: some ten minutes under full load)."""
        if time.monotonic() - self._looked >= _EVERY_S:
            self.joules()

    def joules(self) -> float:
        """So far. A counter that cannot be read any more adds nothing."""
        self._looked = time.monotonic()
        for index, (read, wraps) in enumerate(self._counters):
            try:
                now = read()
            except OSError:
                continue
            moved = now - self._last[index]
            self._total += moved if moved >= 0 else moved + wraps if wraps < float("inf") else 0.0
            self._last[index] = now
        return self._total


def _rapl(powercap: Path) -> list[tuple[Reading, float]]:
    """One counter per CPU package (``intel-rapl:0``; what lies below is part of it), AMD's too."""

    def microjoules(file: Path) -> float:
        return int(file.read_text()) / 1e6

    zones = sorted(zone for zone in powercap.glob("intel-rapl:*") if zone.name.count(":") == 1)
    packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
    return [
        (lambda file=zone / "energy_uj": microjoules(file), microjoules(zone / "max_energy_range_uj"))  # type: ignore[misc]
        for zone in packages
    ]


def _nvml(device: str) -> list[tuple[Reading, float]]:
    """The counter of one GPU, found by its UUID: NVML does not count as CUDA_VISIBLE_DEVICES does."""
    try:
        import pynvml
    except ImportError:
        return []
    import torch

    uuid = str(torch.cuda.get_device_properties(torch.device(device)).uuid)
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return []

    def joules() -> float:
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
        except pynvml.NVMLError as error:
            raise OSError(str(error)) from error

    return [(joules, float("inf"))]

"""Devices that a run may be trained on: what they can do at most, what they hold, what they cost."""

from __future__ import annotations

import functools
import os
import re
import time
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch
import yaml

from moectl.errors import ConfigError, unknown

#: Of a device's peak, what training reaches: assumed where nothing was measured. Published large runs have
#: 0.2-0.46 (Chowdhery et al. 2022, arXiv:2204.02311, table 3); an eager loop on small models has less.
UTILISATION = {"cuda": 0.30, "cpu": 0.50}
THIS = "this machine"
USUAL = ("RTX-4090", "A100-80GB", "H100")
_SIDE, _SECONDS = 1024, 0.2  # of the product that this machine's rate is taken from


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        kind: ``cuda`` or ``cpu``.
        fp32, tf32, bf16, fp16: peak FLOP/s of dense products; of a CPU, as measured just now.
        memory: bytes.
        usd_per_hour: a typical rent, or None.
        bf16_is: what bfloat16 is computed as, where not as itself.
        about: where the rate comes from.
    """

    name: str
    kind: str
    fp32: float
    tf32: float
    bf16: float
    memory: float
    usd_per_hour: float | None
    bf16_is: str | None = None
    fp16: float | None = None
    about: str = "peak"

    def rate(self, precision: str) -> float:
        """Peak FLOP/s of products in a run of this precision; float32 is exact float32, as torch has it by default."""
        if precision == "float16":
            return self.fp16 or self.bf16
        return {"bfloat16": self.bf16, "float32": self.fp32, "float64": self.fp32 / 2}[precision]

    @property
    def utilisation(self) -> float:
        return UTILISATION[self.kind]


def find_device(name: str) -> Device:
    """A device of the table, or :data:`THIS`, also as ``here``, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: unknown (exit 2), naming the nearest.
    """
    if name in (THIS, "here", "cpu", "cuda", "auto"):
        return this_machine()
    table = {key.lower(): key for key in known_devices()}
    spelt = name.lower().replace(" ", "-").replace("_", "-")
    fitting = [spelt] if spelt in table else [key for key in table if spelt and key.startswith(spelt)]
    if len(fitting) == 1:
        return known_devices()[table[fitting[0]]]
    if fitting:
        raise ConfigError(f"'{name}' fits several devices", f"Name one of: {', '.join(table[key] for key in fitting)}.")
    raise unknown("device", name, [*known_devices(), "here"])


@functools.cache
def known_devices() -> dict[str, Device]:
    """The table that ships, by name."""
    return {name: _device(name, entry) for name, entry in _table()["devices"].items()}


def prices_of() -> str:
    """The month that the table's prices are of."""
    return str(_table()["prices_of"])


def device_of(reported: str) -> str | None:
    """The table's name for what a machine calls its device; :data:`THIS` for a CPU; None where it is not in it."""
    if reported == "cpu":
        return THIS
    entries = _table()["devices"].items()
    return next((name for name, entry in entries if any(_names(text, reported) for text in entry["matches"])), None)


def _names(text: str, reported: str) -> bool:
    """Whether ``reported`` holds ``text`` as whole words, and is no lesser variant (an L40S is no L4, a D no 4090)."""
    return re.search(rf"(?<!\w){re.escape(text)}(?!\w)(?! D\b)", reported) is not None


def this_machine() -> Device:
    """Its GPU where there is one, known by name if it can be; else its CPU, its rate measured in a moment."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        name = device_of(properties.name)
        if name is not None:
            found = known_devices()[name]
            return replace(found, name=f"{THIS}: {name}", memory=float(properties.total_memory), usd_per_hour=None)
    rate, threads = measured_rate(), torch.get_num_threads()
    return Device(
        name=f"{THIS}: CPU, {threads} thread{'s' * (threads > 1)}",
        kind="cpu",
        fp32=rate,
        tf32=rate,
        bf16=rate,
        memory=_installed_memory(),
        usd_per_hour=None,
        about="measured on one product",
    )


def measured_rate() -> float:
    """FLOP/s of one large float32 product on this CPU, the best of some."""
    left, right = torch.randn(_SIDE, _SIDE), torch.randn(_SIDE, _SIDE)
    best, until = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < until:
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return 2 * _SIDE**3 / best


def _installed_memory() -> float:
    """Bytes of this machine, or as many as its control group allows."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="utf-8") as file:
            limits.append(int(file.read()))
    except (OSError, ValueError):  # no control group, or no limit
        pass
    return float(min(limits))


@functools.cache
def _table() -> dict[str, Any]:
    text = (resources.files("moectl.planning") / "devices.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.safe_load(text)
    return table


def _device(name: str, entry: dict[str, Any]) -> Device:
    values = {key: value for key, value in entry.items() if key != "matches"}
    return Device(name=name, kind="cuda", **values)

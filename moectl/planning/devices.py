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

from moectl.errors import ConfigError, MissingDependencyError, unknown
from moectl.moe.products import cpu_has_bfloat16

#: Of a device's peak, what training reaches: assumed where nothing was measured. Published large runs have
#: 0.2-0.46 (Chowdhery et al. 2022, arXiv:2204.02311, table 3); an eager loop on small models has less.
UTILISATION = {"cuda": 0.30, "cpu": 0.50}
THIS = "this machine"
USUAL = ("RTX-4090", "A100-80GB", "H100")
_OWN = re.compile(r"cpu|cuda(:\d+)?")
_VARIANT = re.compile(r"\b(D|Ti|SUPER|Laptop|Mobile|Max-Q|PCIe|NVL|CNX|MIG)\b", re.IGNORECASE)
_SIDE, _SECONDS = 1024, 0.2  # of the product that this machine's rate is taken from


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        kind: ``cuda`` or ``cpu``.
        fp64, fp32, bf16, fp16: peak FLOP/s of dense products; of a CPU, as measured just now. No fp16: that of bf16.
        memory: bytes.
        usd_per_hour: a typical rent, or None.
        bf16_is: what bfloat16 is computed as, where not as itself.
        about: where the rate comes from.
    """

    name: str
    kind: str
    fp64: float
    fp32: float
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
        if precision.startswith("bfloat16"):
            return self.bf16
        return {"float32": self.fp32, "float64": self.fp64}[precision]

    def computed_as(self, precision: str) -> str | None:
        """What a run of this precision computes in here, and why, where it is another one."""
        return self.bf16_is if precision.startswith("bfloat16") else None

    @property
    def utilisation(self) -> float:
        return UTILISATION[self.kind]


def find_device(name: str) -> Device:
    """A device of the table, or one of this machine: ``here``, ``auto`` (its GPU if it has one), ``cpu``, ``cuda``.

    Raises:
        ConfigError: unknown (exit 2), naming the nearest; a GPU of this machine that is not in the table.
        MissingDependencyError: a GPU that this machine has not (exit 5).
    """
    if name in (THIS, "here", "auto"):
        return this_machine()
    if _OWN.fullmatch(name):
        return this_machine(torch.device(name))
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
    """Whether ``reported`` holds ``text`` as whole words, and is no other variant (an L40S is no L4, a D no 4090)."""
    found = re.search(rf"(?<!\w){re.escape(text)}(?!\w)", reported)
    return found is not None and _VARIANT.search(reported[: found.start()] + reported[found.end() :]) is None


def this_machine(device: torch.device | None = None) -> Device:
    """A device of this machine: its CPU with rates measured in a moment, or a GPU with those of the table.

    Args:
        device: which; None for its GPU where there is one, else its CPU.

    Raises:
        ConfigError: a GPU that is not in the table. MissingDependencyError: a GPU that is not there (exit 5).
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        return _this_cpu()
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise MissingDependencyError(
            f"there is no device '{device}' on this machine",
            f"Plan for a GPU by its name ({', '.join(USUAL)}, ...), or for this machine's CPU: --device cpu.",
        )
    properties = torch.cuda.get_device_properties(device)
    return this_gpu(properties.name, float(properties.total_memory))


def this_gpu(reported: str, memory: float) -> Device:
    """This machine's GPU, by what its driver calls it.

    Raises:
        ConfigError: it is not in the table.
    """
    name = device_of(reported)
    if name is None:
        raise ConfigError(
            f"this machine's GPU '{reported}' is not in the table of devices: its rates are not known",
            f"Plan for one that is ({', '.join(known_devices())}), or for this machine's CPU: --device cpu.",
        )
    return replace(known_devices()[name], name=f"{THIS}: {name}", memory=memory, usd_per_hour=None)


def _this_cpu() -> Device:
    threads = torch.get_num_threads()
    rates = {dtype: _rate_of(dtype, threads) for dtype in (torch.float64, torch.float32)}
    native = cpu_has_bfloat16()
    return Device(
        name=f"{THIS}: CPU, {threads} thread{'s' * (threads > 1)}",
        kind="cpu",
        fp64=rates[torch.float64],
        fp32=rates[torch.float32],
        bf16=_rate_of(torch.bfloat16, threads) if native else rates[torch.float32],
        fp16=rates[torch.float32],
        bf16_is=None if native else "float32, for this CPU has no bfloat16 instructions",
        memory=_installed_memory(),
        usd_per_hour=None,
        about="measured on one product",
    )


def peak_rate(device: torch.device, precision: str) -> tuple[float | None, str]:
    """Peak FLOP/s of products in a run of this precision on ``device``, and where that comes from.

    None for a GPU that the table does not know.
    """
    if device.type == "cuda":
        name = device_of(torch.cuda.get_device_name(device))
        return (None, "unknown device") if name is None else (known_devices()[name].rate(precision), f"{name}, peak")
    dtype = {"float64": torch.float64, "float32": torch.float32}.get(precision, torch.bfloat16)
    threads = torch.get_num_threads()
    about = f"CPU, {threads} thread{'s' * (threads > 1)}, measured on one {str(dtype).removeprefix('torch.')} product"
    return _rate_of(dtype, threads), about


@functools.cache
def _rate_of(dtype: torch.dtype, threads: int) -> float:
    """Once per process and number of threads."""
    return measured_rate(dtype)


def measured_rate(dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of one large product on this CPU, the best of some. The global generator is not drawn from."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(_SIDE, _SIDE, generator=generator).to(dtype) for _ in range(2))
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

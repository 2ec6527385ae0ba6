"""Device, threads, seeds and memory: what surrounds the arithmetic."""

from __future__ import annotations

import os
import random
import resource
import sys
from collections.abc import Iterable

import numpy as np
import torch

from moectl.config.schema import TrainConfig
from moectl.errors import ConfigError, MissingDependencyError
from moectl.moe.layer import MoELayer


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU.

    Raises:
        MissingDependencyError: a device that this machine has not (exit code 5).
        ConfigError: not a device name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"'{name}' is not a device", "Use auto, cpu or cuda.") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise MissingDependencyError(f"there is no device '{name}' on this machine", "Use --device cpu or auto.")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device '{name}' is not supported", "Use auto, cpu or cuda.")
    return device


def configure(train: TrainConfig) -> torch.device:
    """Apply threads, determinism and device of a run; seeds are set apart by :func:`seed_all`."""
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
    torch.use_deterministic_algorithms(train.deterministic)
    device = resolve_device(train.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return device


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory: allocated on the device in this run for CUDA, resident in the whole process otherwise."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reuse_gradient_buffers(layers: Iterable[MoELayer]) -> None:
    """Let experts add weight gradients straight into buffers that outlive the step, where that is safe.

    A fresh buffer costs its page faults every time. Not with several processes, whose wrappers want
    to see each gradient pass through autograd.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return
    for layer in layers:
        layer.experts.accumulate_gradients_in_place(True)

"""What a run's record says: its key and name, where it started from, how it ended."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch

from moectl.config.presets import kind_of
from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import PackedDataset
from moectl.errors import MoectlError
from moectl.marks import marks_of
from moectl.models import accounting
from moectl.models.language_model import LanguageModel
from moectl.runs.logger import RunRecorder
from moectl.runs.provenance import Provenance
from moectl.runs.rundir import RunDir, now
from moectl.training import runtime
from moectl.training.protocol import TrainResult
from moectl.walk.router_code import RouterCode


def run_key(config: ExperimentConfig, data: PackedDataset, base: Mapping[str, Any], code: Mapping[str, Any]) -> str:
    """SHA-256 over all that determines a run's numbers: config (without its name), data, base, and code."""
    anonymous = config.model_copy(update={"name": None}).content_hash()
    parts = [anonymous, data.manifest.content_sha256, base, code]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def run_label(config: ExperimentConfig) -> str:
    """The run's kind, made safe for a folder."""
    return "".join(character if character.isalnum() else "-" for character in _kind(config)).strip("-") or "moe"


def _kind(config: ExperimentConfig) -> str:
    return kind_of(config.preset, None if config.moe is None else config.moe.router_name)


def opening(
    config: ExperimentConfig,
    *,
    key: str,
    provenance: Provenance,
    data: PackedDataset,
    model: LanguageModel,
    base: Mapping[str, Any],
    code: RouterCode | None,
) -> dict[str, Any]:
    """The record before the first step."""
    parameters = accounting.count(model)
    return {
        **provenance.record(),
        "kind": _kind(config),
        "preset": config.preset,
        "router": None if config.moe is None else config.moe.router_name,
        "router_code": None if code is None else code.record(),
        "moe": config.moe is not None,
        "seed": config.train.seed,
        "steps": config.train.steps,
        "step": 0,
        "tokens": 0,
        "config_hash": config.content_hash(),
        "run_key": key,
        "data": {"id": data.manifest.id, "sha256": data.manifest.content_sha256, "folder": str(data.folder)},
        "base": dict(base),
        "parameters": {"total": parameters.total, "active": parameters.active, "inactive": parameters.inactive},
        "threads": torch.get_num_threads(),
        "marks": list(marks_of(model)),
    }


def sitting(device: torch.device) -> dict[str, Any]:
    """What changes when a process starts to write the run: nothing of an earlier ending stays."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    began = {"status": "running", "started": now(), "devices": [name]}
    return {**began, "finished": None, "exit_reason": None, "fails_again": None}


def ending(run: RunDir, result: TrainResult, device: torch.device, started: float) -> dict[str, Any]:
    """What came of it. Training time and its tokens are kept as a pair, over all sittings that ended in order."""
    duration = _duration(run, started)
    return {
        "status": result.status,
        "exit_reason": result.reason,
        # Its own numbers failed it: resumed, it would go the same way.
        "fails_again": True if result.status == "failed" else None,
        "finished": now(),
        "duration_s": duration,
        "gpu_seconds": duration if device.type == "cuda" else 0.0,
        "step": result.step,
        "tokens": result.tokens,
        "peak_memory_bytes": runtime.peak_memory_bytes(device),
        "train_seconds": round(float(run.record.get("train_seconds") or 0.0) + result.train_seconds, 3),
        "train_tokens": int(run.record.get("train_tokens") or 0) + result.train_tokens,
        "metrics": result.metrics,
        "best": None if result.best is None else result.best._asdict(),
    }


@contextmanager
def failures_recorded(recorder: RunRecorder, started: float) -> Iterator[None]:
    """Whatever ends the run early is in its record before it reaches the user."""
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        # The disk that failed the run may fail its record too: the first error is the one to tell.
        with suppress(MoectlError, OSError):
            recorder.update(
                status="interrupted" if stopped else "failed",
                exit_reason="stopped in the middle of a step" if stopped else _sentence(error),
                finished=now(),
                duration_s=_duration(recorder.rundir, started),
            )
        raise


def _sentence(error: BaseException) -> str:
    return error.message if isinstance(error, MoectlError) else f"{type(error).__name__}: {error}".splitlines()[0]


def _duration(run: RunDir, started: float) -> float:
    """Seconds over all sittings of this run."""
    return round(float(run.record.get("duration_s") or 0.0) + time.monotonic() - started, 3)

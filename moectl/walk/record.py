"""What a run's record says: its key and name, where it started from, how it ended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
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
from moectl.runs.provenance import Provenance, collect
from moectl.runs.rundir import RunDir, now
from moectl.training import runtime
from moectl.training.finetune import count_found
from moectl.training.protocol import Speed, TrainResult
from moectl.walk.budget import Meter
from moectl.walk.models import Origin
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
    kind = kind_of(config.preset, None if config.moe is None else config.moe.router_name)
    return kind if config.distill is None else "distilled" if kind == "dense" else f"{kind}-distilled"


def opening(
    config: ExperimentConfig,
    *,
    key: str,
    provenance: Provenance,
    data: PackedDataset,
    model: LanguageModel,
    origin: Origin,
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
        **origin.fields(),
        "parameters": {**parameters.to_json(), "trainable": count_found(model, config.finetune)},
        "threads": torch.get_num_threads(),
        "marks": list(marks_of(model)),
    }


def sitting(device: torch.device, meter: Meter) -> dict[str, Any]:
    """What changes when a process starts to write the run: nothing of an earlier ending stays."""
    began = {"status": "running", "started": now(), "devices": [_name(device)], "threads": torch.get_num_threads()}
    return {**began, "finished": None, "exit_reason": None, "fails_again": None, **meter.fields()}


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def changes(run: RunDir, device: torch.device, short: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What keeps a resumed run from being the run that was never stopped: a sentence, and details for the record.

    Args:
        short: files of the record that are shorter than they were when the checkpoint was written.
    """
    for name in short:
        yield f"{name}.jsonl has lost lines since the checkpoint was written: they stay lost", {"file": f"{name}.jsonl"}
    now_sha256, written = collect([]).source_sha256, run.record
    if written.get("source_sha256", now_sha256) != now_sha256:
        changed = "moectl's own source has changed since this run began: the rest of it runs other code"
        yield changed, {"source_sha256": now_sha256}
    for what, before, after in (
        ("torch", (written.get("versions") or {}).get("torch"), version("torch")),
        ("device", (written.get("devices") or [None])[0], _name(device)),
        ("threads", written.get("threads"), torch.get_num_threads()),
    ):
        if before is not None and before != after:
            said = f"{what} was {before}, and is {after} now: from here on numbers may differ in their last bits"
            yield said, {"what": what, "before": before, "after": after}


def ending(run: RunDir, result: TrainResult, device: torch.device, meter: Meter) -> dict[str, Any]:
    """What came of it. Training time and its tokens are kept as a pair, over all sittings that ended in order."""
    spent = meter.fields()
    return {
        "status": result.status,
        "exit_reason": result.reason,
        # Its own numbers failed it: resumed, it would go the same way.
        "fails_again": True if result.status == "failed" else None,
        "finished": now(),
        **spent,
        "gpu_seconds": spent["duration_s"] if device.type == "cuda" else 0.0,
        "step": result.step,
        "tokens": result.tokens,
        "peak_memory_bytes": runtime.peak_memory_bytes(device),
        "train_seconds": round(float(run.record.get("train_seconds") or 0.0) + result.train_seconds, 3),
        "train_tokens": int(run.record.get("train_tokens") or 0) + result.train_tokens,
        "speed": None if result.speed is None else _speed(run, result.speed),
        "metrics": result.metrics,
        "best": None if result.best is None else result.best._asdict(),
    }


def _speed(run: RunDir, speed: Speed) -> dict[str, Any]:
    """That of the last sitting, but for the seconds by part, which are over all that ended in order."""
    before = (run.record.get("speed") or {}).get("seconds") or {}
    seconds = {part: round(before.get(part, 0.0) + spent, 3) for part, spent in speed.seconds.items()}
    return {**asdict(speed), "seconds": seconds}


@contextmanager
def failures_recorded(recorder: RunRecorder, meter: Meter) -> Iterator[None]:
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
                **meter.fields(),
            )
        raise


def _sentence(error: BaseException) -> str:
    return error.message if isinstance(error, MoectlError) else f"{type(error).__name__}: {error}".splitlines()[0]

"""One training run from config to record: data, model, run folder, loop, result."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moectl import paths
from moectl.config.loading import resolved_yaml
from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import PackedDataset
from moectl.errors import ConfigError, MoectlError
from moectl.evaluation.losses import evaluate
from moectl.models.decoder import Decoder
from moectl.routers import resolve_router
from moectl.runs.find import find_run
from moectl.runs.logger import RunRecorder
from moectl.runs.provenance import Provenance, collect
from moectl.runs.rundir import RunDir, now
from moectl.training import runtime
from moectl.training.protocol import Progress, TrainResult
from moectl.training.state import newest_checkpoint
from moectl.training.trainer import Trainer
from moectl.walk.data import dataset_for, dataset_of
from moectl.walk.loading import run_config
from moectl.walk.models import build_model, count_parameters

Say = Callable[[str], None]
EXIT_CODES = {"finished": 0, "failed": 1, "collapsed": 3, "interrupted": 130}


@dataclass(frozen=True)
class RunRequest:
    """How a run was asked for, beside its config.

    Attributes:
        data: dataset id, prefix or path; None by :func:`dataset_for`'s rule.
        command: the command line, for the record (secrets are masked there).
        commit: overrides the commit that git reports.
        say: takes a sentence for the user.
        progress: given the run's id and number of steps, returns what is called after every step.
    """

    data: str | None = None
    command: Sequence[str] = ()
    commit: str | None = None
    say: Say = lambda text: None
    progress: Callable[[str, int], Progress | None] = lambda run, steps: None


@dataclass(frozen=True)
class RunOutcome:
    """A run that has ended, or that had ended before (``already_done``)."""

    id: str
    folder: Path
    status: str
    reason: str
    step: int
    tokens: int
    metrics: dict[str, float] = field(default_factory=dict)
    already_done: bool = False

    @property
    def exit_code(self) -> int:
        return EXIT_CODES.get(self.status, 1)


def start_run(config: ExperimentConfig, request: RunRequest) -> RunOutcome:
    """Train from step 0, or return the run of the same config, data and source that has finished.

    Raises:
        ConfigError: the name is taken by another run, or by a process that is writing it.
        MoectlError: anything that data, model or loop refuse; the run is then recorded as failed.
    """
    config = resolve_router(config)  # a misspelt option is answered before anything is prepared
    folder, config = dataset_for(config, request.data, request.say)
    data = PackedDataset.open(folder)
    provenance = collect(list(request.command), commit=request.commit)
    key = run_key(config, data.manifest.content_sha256, provenance)
    name = config.name or f"{run_label(config)}-s{config.train.seed}-{key[:8]}"
    done = _finished_before(name, key)
    if done is not None:
        return done
    runtime.configure(config.train)
    model, base = build_model(config, data.manifest)
    record = _record(config, key, provenance, data, model, base)
    run = RunDir.create(name, config_yaml=resolved_yaml(config), record=record)
    provenance.write(run.path)
    return _run(run, config, data, model, request, resume=False)


def resume_run(name: str | None, request: RunRequest, config: ExperimentConfig | None = None) -> RunOutcome:
    """Continue a run from its newest intact checkpoint, exactly.

    Args:
        name: a run's id, name, prefix or folder; None is not resolved here.
        config: what the user gave along, to be compared; None takes the run's own.

    Raises:
        ConfigError: the run has finished, is being written, or ``config`` is another one.
    """
    run = RunDir.open(find_run(name))
    if run.status == "finished":
        raise ConfigError(f"the run '{run.id}' has finished", "Start a new one, with another --seed or --steps.")
    own = run_config(run.path)
    if config is not None:
        _refuse_changes(own, config.model_copy(update={"data": own.data}))
    data = PackedDataset.open(dataset_of(run.record))
    run.acquire()
    runtime.configure(own.train)
    model, _ = build_model(own, data.manifest)
    return _run(run, own, data, model, request, resume=True)


def run_key(config: ExperimentConfig, data_sha256: str, provenance: Provenance) -> str:
    """What determines a run's numbers: config (without its name), data, and moectl's own source."""
    anonymous = config.model_copy(update={"name": None})
    parts = (anonymous.content_hash(), data_sha256, provenance.source_sha256)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def run_label(config: ExperimentConfig) -> str:
    """``dense``, the preset, or the router's name, made safe for a folder."""
    if config.preset is not None:
        return config.preset
    if config.moe is None:
        return "dense"
    plain = config.moe.router_name.rsplit(":", 1)[-1]
    return "".join(character if character.isalnum() else "-" for character in plain).strip("-") or "moe"


def _run(
    run: RunDir,
    config: ExperimentConfig,
    data: PackedDataset,
    model: Decoder,
    request: RunRequest,
    *,
    resume: bool,
) -> RunOutcome:
    started = time.monotonic()
    with (
        RunRecorder(run, paths.registry_path(), warn=request.say) as recorder,
        _failures_recorded(recorder, started),
    ):
        trainer = Trainer(
            model,
            data,
            config,
            logger=recorder,
            checkpoints=run.checkpoints,
            evaluate=lambda decoder, final: _held_out(decoder, data, config, final),
            progress=request.progress(run.id, config.train.steps),
        )
        if resume:
            _restore(trainer, run, recorder, request.say)
        recorder.update(status="running", started=now(), devices=[_device_name(trainer.device)])
        result = trainer.train()
        recorder.update(**_ending(run, result, trainer.device, started))
    return RunOutcome(run.id, run.path, result.status, result.reason, result.step, result.tokens, result.metrics)


def _held_out(model: Decoder, data: PackedDataset, config: ExperimentConfig, final: bool) -> dict[str, float]:
    """Pure language-model losses: over the whole held-out split at the end, whatever bounds the periodic ones.

    What was read from a part of the split only is named ``eval_part/...``: it is another number.
    """
    bound = None if final else config.eval.max_blocks
    report = evaluate(model, data, batch_size=config.eval.batch_size, max_blocks=bound, bootstrap=0)
    if report.complete:
        return report.metrics()
    return {name.replace("eval/", "eval_part/", 1): value for name, value in report.metrics().items()}


def _restore(trainer: Trainer, run: RunDir, recorder: RunRecorder, say: Say) -> None:
    """Load the newest intact checkpoint and forget what was logged after it, so that nothing counts twice."""
    checkpoint, messages = newest_checkpoint(run.checkpoints)
    trainer.restore(checkpoint)
    run.truncate_after(checkpoint.step)
    for message in messages:
        say(message)
        recorder.event("bad_checkpoint", message, step=checkpoint.step)
    recorder.event("resumed", f"resumed from step {checkpoint.step}", step=checkpoint.step)
    say(f"resuming {run.id} from step {checkpoint.step}")


@contextmanager
def _failures_recorded(recorder: RunRecorder, started: float) -> Iterator[None]:
    """Whatever ends the run early is in its record before it reaches the user."""
    try:
        yield
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        reason = "interrupted twice: no checkpoint of the last step" if interrupted else _sentence(error)
        recorder.update(
            status="interrupted" if interrupted else "failed",
            exit_reason=reason,
            finished=now(),
            duration_s=_duration(recorder.rundir, started),
        )
        raise


def _sentence(error: BaseException) -> str:
    return error.message if isinstance(error, MoectlError) else f"{type(error).__name__}: {error}".splitlines()[0]


def _ending(run: RunDir, result: TrainResult, device: torch.device, started: float) -> dict[str, Any]:
    duration = _duration(run, started)
    return {
        "status": result.status,
        "exit_reason": result.reason,
        "finished": now(),
        "duration_s": duration,
        "gpu_seconds": duration if device.type == "cuda" else 0.0,
        "step": result.step,
        "tokens": result.tokens,
        "peak_memory_bytes": runtime.peak_memory_bytes(device),
        "train_seconds": round(float(run.record.get("train_seconds") or 0.0) + result.train_seconds, 3),
        "metrics": result.metrics,
    }


def _duration(run: RunDir, started: float) -> float:
    """Seconds over all sittings of this run."""
    return round(float(run.record.get("duration_s") or 0.0) + time.monotonic() - started, 3)


def _finished_before(name: str, key: str) -> RunOutcome | None:
    """The run of this name and key that has come to its end, None when the name is free; else an error."""
    folder = paths.runs_dir() / name
    if not (folder / "run.json").is_file():
        return None
    run = RunDir.open(folder)
    if run.live:
        run.acquire()  # raises, and names the process
    if run.record.get("run_key") != key:
        raise ConfigError(
            f"the name '{name}' is taken by a run of another config, data or source",
            f"Choose another --name, or remove it: moectl runs rm {name} --yes",
        )
    if run.status in ("finished", "collapsed"):
        record = run.record
        ended = (record["status"], record["exit_reason"], record["step"], record["tokens"])
        return RunOutcome(name, folder, *ended, run.latest(), already_done=True)
    raise ConfigError(
        f"the run '{name}' is there already, {run.status} at step {run.record.get('step')}",
        f"Continue it: moectl train --resume {name} · or remove it: moectl runs rm {name} --yes",
    )


def _refuse_changes(own: ExperimentConfig, given: ExperimentConfig) -> None:
    """A resumed run keeps its config; the first key that differs is named."""
    changed = _differences(own.model_dump(mode="json"), given.model_dump(mode="json"))
    changed = [key for key in changed if key != "name"]
    if changed:
        raise ConfigError(
            f"a resumed run keeps its config, but {', '.join(changed)} differ{'s' if len(changed) == 1 else ''}",
            "Resume without options, or start a new run.",
        )


def _differences(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return [] if ours == theirs else [prefix]
    keys = sorted(set(ours) | set(theirs))
    dot = f"{prefix}." if prefix else ""
    return [found for key in keys for found in _differences(ours.get(key), theirs.get(key), f"{dot}{key}")]


def _record(
    config: ExperimentConfig,
    key: str,
    provenance: Provenance,
    data: PackedDataset,
    model: Decoder,
    base: dict[str, Any],
) -> dict[str, Any]:
    return {
        **provenance.record(),
        "preset": config.preset,
        "router": None if config.moe is None else config.moe.router_name,
        "moe": config.moe is not None,
        "seed": config.train.seed,
        "steps": config.train.steps,
        "step": 0,
        "tokens": 0,
        "config_hash": config.content_hash(),
        "run_key": key,
        "data": {"id": data.manifest.id, "sha256": data.manifest.content_sha256, "folder": str(data.folder)},
        "base": base,
        "parameters": count_parameters(model),
        "threads": torch.get_num_threads(),
        "marks": [],
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

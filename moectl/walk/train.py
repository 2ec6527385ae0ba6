"""One training run from config to record: data, model, run folder, loop, result."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moectl import paths
from moectl.config.loading import resolved_yaml
from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import PackedDataset
from moectl.errors import ConfigError, NotFoundError
from moectl.evaluation.losses import evaluate
from moectl.marks import marked
from moectl.models.decoder import Decoder
from moectl.routers import resolve_router
from moectl.runs.find import find_run
from moectl.runs.logger import RunRecorder
from moectl.runs.provenance import collect
from moectl.runs.rundir import RunDir
from moectl.training import runtime
from moectl.training.protocol import Progress
from moectl.training.state import Checkpoint, checkpoint_steps, newest_checkpoint
from moectl.training.trainer import Trainer
from moectl.walk import record
from moectl.walk.data import dataset_for, dataset_of
from moectl.walk.loading import decoder_from, run_config
from moectl.walk.models import build_model
from moectl.walk.router_code import keep, router_code, with_absolute_router

Say = Callable[[str], None]
EXIT_CODES = {"finished": 0, "failed": 1, "collapsed": 3, "interrupted": 130}
ENDED = ("finished", "collapsed")


@dataclass(frozen=True)
class RunRequest:
    """How a run was asked for, beside its config.

    Attributes:
        data: dataset id, prefix or path; None by :func:`dataset_for`'s rule.
        command: the command line, for the record (secrets are masked there).
        commit: overrides the commit that git reports.
        go_on: continue a run of the same key that was interrupted, instead of saying how to.
        say: takes a sentence for the user.
        progress: given the run's id and number of steps, returns what is called after every step.
    """

    data: str | None = None
    command: Sequence[str] = ()
    commit: str | None = None
    go_on: bool = False
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
    marks: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        return EXIT_CODES.get(self.status, 1)


def start_run(config: ExperimentConfig, request: RunRequest) -> RunOutcome:
    """Train from step 0, or return the run of the same config, data, base and code that has ended.

    Raises:
        ConfigError: the name is taken by another run, or by a process that is writing it; a router
            that cannot be trained.
        MoectlError: anything that data, model or loop refuse; what the loop refuses is recorded as failed.
    """
    config = resolve_router(with_absolute_router(config))  # a misspelt option is answered before anything is prepared
    folder, config = dataset_for(config, request.data, request.say)
    data = PackedDataset.open(folder)
    runtime.configure(config.train)
    model, base = build_model(config, data.manifest)
    provenance = collect(list(request.command), commit=request.commit)
    code = router_code(config)
    sources = {"moectl": provenance.source_sha256, "router": None if code is None else code.sha256}
    key = record.run_key(config, data, base, sources)
    name = config.name or f"{record.run_label(config)}-s{config.train.seed}-{key[:8]}"
    there = _already_there(name, key, request)
    if there is not None:
        return there
    for warning in provenance.warnings:
        request.say(f"warning: {warning}")
    opening = record.opening(config, key=key, provenance=provenance, data=data, model=model, base=base, code=code)
    for mark in opening["marks"]:
        request.say(f"warning: later tokens change earlier outputs: every number of this run is marked [{mark}]")
    run = RunDir.create(name, config_yaml=resolved_yaml(config), record=opening)
    provenance.write(run.path)
    keep(code, run.path)
    return _run(run, config, data, model, request)


def resume_run(name: str, request: RunRequest, reread: Callable[[Path], ExperimentConfig] | None = None) -> RunOutcome:
    """Continue a run from its newest intact checkpoint, exactly.

    Args:
        name: a run's id, name, prefix or folder.
        reread: given the run's config file, the config that the user asks for now, to be compared;
            None where nothing was asked for.

    Raises:
        ConfigError: the run has ended, is being written, or another config was asked for.
        NotFoundError: no such run, or no checkpoint of it.
    """
    run = RunDir.open(find_run(name))
    if run.status in ENDED:
        raise ConfigError(f"the run '{run.id}' has {run.status}", "Start a new one, with another --seed or --steps.")
    own = run_config(run.path)
    if reread is not None:
        asked = resolve_router(with_absolute_router(reread(run.path / "config.yaml")))
        _refuse_changes(own, asked if "data" in asked.model_fields_set else asked.model_copy(update={"data": own.data}))
    data = PackedDataset.open(dataset_of(run.record))
    run.acquire()
    try:
        runtime.configure(own.train)
        try:
            checkpoint, messages = newest_checkpoint(run.checkpoints)
        except NotFoundError as error:
            hint = f"Remove it and start anew: moectl runs rm {run.id} --yes"
            raise NotFoundError(f"the run '{run.id}' stopped before its first checkpoint", hint) from error
        for message in messages:
            request.say(message)
        model = decoder_from(checkpoint, run.path)
    except BaseException:
        run.release()
        raise
    return _run(run, own, data, model, request, checkpoint=checkpoint, messages=messages)


def _run(
    run: RunDir,
    config: ExperimentConfig,
    data: PackedDataset,
    model: Decoder,
    request: RunRequest,
    *,
    checkpoint: Checkpoint | None = None,
    messages: Sequence[str] = (),
) -> RunOutcome:
    started = time.monotonic()
    recorder = RunRecorder(run, paths.registry_path(), warn=request.say)
    with recorder, record.failures_recorded(recorder, started):
        trainer = Trainer(
            model,
            data,
            config,
            logger=recorder,
            checkpoints=run.checkpoints,
            evaluate=lambda decoder, final: _held_out(decoder, data, config, final),
            progress=request.progress(marked(run.id, run.record["marks"]), config.train.steps),
        )
        if checkpoint is not None:
            _restore(trainer, checkpoint, messages, recorder, request.say)
        recorder.update(**record.sitting(trainer.device))
        result = trainer.train()
        recorder.update(**record.ending(run, result, trainer.device, started))
    ended = (result.status, result.reason, result.step, result.tokens)
    return RunOutcome(run.id, run.path, *ended, result.metrics, marks=tuple(run.record["marks"]))


def _held_out(model: Decoder, data: PackedDataset, config: ExperimentConfig, final: bool) -> dict[str, float]:
    """Pure language-model losses: over the whole held-out split at the end, whatever bounds the periodic ones.

    What was read from a part of the split only is named ``eval_part/...``: it is another number.
    """
    bound = None if final else config.eval.max_blocks
    report = evaluate(model, data, batch_size=config.eval.batch_size, max_blocks=bound, bootstrap=0)
    if report.complete:
        return report.metrics()
    return {name.replace("eval/", "eval_part/", 1): value for name, value in report.metrics().items()}


def _restore(
    trainer: Trainer, checkpoint: Checkpoint, messages: Sequence[str], recorder: RunRecorder, say: Say
) -> None:
    """Take up the checkpoint and forget what was logged after it, so that nothing counts twice."""
    run = recorder.rundir
    trainer.restore(checkpoint)
    run.truncate_after(checkpoint.step)
    for message in messages:
        recorder.event("bad_checkpoint", message, step=checkpoint.step)
    now_sha256 = collect([]).source_sha256
    if run.record.get("source_sha256", now_sha256) != now_sha256:
        changed = "moectl's own source has changed since this run began: the rest of it runs other code"
        say(f"warning: {changed}")
        recorder.event("warning", changed, step=checkpoint.step, source_sha256=now_sha256)
    recorder.event("resumed", f"resumed from step {checkpoint.step}", step=checkpoint.step)
    say(f"resuming {run.id} from step {checkpoint.step}")


def _already_there(name: str, key: str, request: RunRequest) -> RunOutcome | None:
    """The run of this name and key, where it has ended or is to go on; None when the name is free; else an error."""
    folder = paths.runs_dir() / name
    if not (folder / "run.json").is_file():
        return None
    run = RunDir.open(folder)
    if run.live:
        run.acquire()  # raises, and names the process
    remove = f"moectl runs rm {name} --yes"
    if run.record.get("run_key") != key:
        raise ConfigError(
            f"the name '{name}' is taken by a run of another config, data, base or code",
            f"Choose another --name, or remove it: {remove}",
        )
    if run.status in ENDED:
        ended = (run.status, run.record["exit_reason"], run.record["step"], run.record["tokens"])
        return RunOutcome(name, folder, *ended, run.latest(), already_done=True, marks=tuple(run.record["marks"]))
    steps = checkpoint_steps(run.checkpoints)
    if steps and request.go_on:
        return resume_run(name, request)
    raise ConfigError(
        f"the run '{name}' is there already, {run.status}"
        + (f" with a checkpoint of step {steps[-1]}" if steps else ", without a checkpoint"),
        (f"Continue it: moectl train --resume {name} · or remove it: {remove}" if steps else f"Remove it: {remove}"),
    )


def _refuse_changes(own: ExperimentConfig, given: ExperimentConfig) -> None:
    """A resumed run keeps its config; every key that differs is named."""
    changed = [key for key in _differences(own.model_dump(mode="json"), given.model_dump(mode="json")) if key != "name"]
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

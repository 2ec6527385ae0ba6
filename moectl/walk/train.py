"""One training run from config to record: data, model, run folder, loop, result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from moectl.models.language_model import LanguageModel
from moectl.routers import resolve_router
from moectl.runs.find import find_run, newest_first, readable_runs
from moectl.runs.logger import RunRecorder
from moectl.runs.provenance import collect
from moectl.runs.rundir import RunDir
from moectl.training import runtime
from moectl.training.finetune import trained_share
from moectl.training.protocol import Progress
from moectl.training.state import Checkpoint, newest_usable, restored_steps
from moectl.training.trainer import Trainer
from moectl.walk import record
from moectl.walk.budget import Meter, Terms
from moectl.walk.data import dataset_for, dataset_of
from moectl.walk.loading import model_from, run_config
from moectl.walk.models import as_resumed, build_model, on_base
from moectl.walk.router_code import keep, router_code, with_absolute_router
from moectl.walk.speed import yardstick
from moectl.walk.teacher import objective_of, teacher_record, with_found_teacher

Say = Callable[[str], None]
EXIT_CODES = {"finished": 0, "failed": 1, "collapsed": 3, "interrupted": 130}
ENDED = ("finished", "collapsed")
AUTO = "auto"


@dataclass(frozen=True)
class RunRequest:
    """How a run was asked for, beside its config.

    Attributes:
        data: dataset id, prefix or path; None by :func:`dataset_for`'s rule.
        command: the command line, for the record (secrets are masked there).
        commit: overrides the commit that git reports.
        go_on: continue a run of the same key that was interrupted or lost, instead of saying how to.
        say: takes a sentence for the user.
        progress: given the run's id and number of steps, returns what is called after every step.
        terms: what it may cost.
        group: of a group's run, the group's name and what the run is called in it.
        halt: asked after every step: why the run must end as interrupted now, or None.
    """

    data: str | None = None
    command: Sequence[str] = ()
    commit: str | None = None
    go_on: bool = False
    say: Say = lambda text: None
    progress: Callable[[str, int], Progress | None] = lambda run, steps: None
    terms: Terms = field(default_factory=Terms)
    group: Mapping[str, str] | None = None
    halt: Callable[[], str | None] = lambda: None


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
    request.terms.check(remembered=request.go_on)
    config = on_base(config, request.say)  # a misspelt option is answered before anything is prepared
    config = with_found_teacher(config)
    folder, config = dataset_for(config, request.data, request.say)
    data = PackedDataset.open(folder)
    runtime.configure(config.train)
    model, origin = build_model(config, data.manifest)
    teacher = teacher_record(config, data, model)
    provenance = collect(list(request.command), commit=request.commit)
    code = router_code(config)
    sources = {"moectl": provenance.source_sha256, "router": None if code is None else code.sha256}
    key = record.run_key(config, data, origin.record, sources if teacher is None else {**sources, "teacher": teacher})
    name = config.name or f"{record.run_label(config)}-s{config.train.seed}-{key[:8]}"
    there = _already_there(name, key, request)
    if isinstance(there, RunOutcome):
        return there
    for warning in provenance.warnings:
        request.say(f"warning: {warning}")
    opening = record.opening(config, key=key, provenance=provenance, data=data, model=model, origin=origin, code=code)
    opening["teacher"] = teacher
    if config.finetune.active:
        request.say(trained_share(opening["parameters"]))
    if request.group is not None:
        opening["group"] = dict(request.group)
    for mark in opening["marks"]:
        request.say(f"warning: later tokens change earlier outputs: every number of this run is marked [{mark}]")
    if there is None:
        request.terms.check()
        run = RunDir.create(name, config_yaml=resolved_yaml(config), record=opening)
    else:
        run = there.acquire()
        if run.record["status"] in ENDED or restored_steps(run.checkpoints):
            run.release()
            raise ConfigError(f"the run '{name}' was trained on by another process meanwhile", "Ask again.")
        run.truncate_after(-1)
        run.update(**opening)
    provenance.write(run.path)
    keep(code, run.path)
    origin.write(run.path)
    if origin.receipt is not None:
        request.say(origin.receipt.to_text())
    return _run(run, config, data, model, request)


def resume_run(name: str, request: RunRequest, reread: Callable[[Path], ExperimentConfig] | None = None) -> RunOutcome:
    """Continue a run from its newest checkpoint that is intact and fits, exactly.

    Args:
        name: a run's id, name, prefix or folder; ``auto`` for the newest one that can go on.
        reread: given the run's config file, the config that the user asks for now, to be compared;
            None where nothing was asked for.

    Raises:
        ConfigError: the run has ended, is being written, or another config was asked for.
        NotFoundError: no such run, no checkpoint of it, or none that can go on.
        CheckError: all its checkpoints are damaged.
    """
    request.terms.check(remembered=True)
    run = _newest_to_go_on(request.say) if name == AUTO else RunDir.open(find_run(name))
    _refuse_ended(run)
    own = run_config(run.path)
    if reread is not None:
        asked = resolve_router(with_absolute_router(as_resumed(reread(run.path / "config.yaml"), own)))
        asked = with_found_teacher(asked)
        _refuse_changes(own, asked if "data" in asked.model_fields_set else asked.model_copy(update={"data": own.data}))
    data = PackedDataset.open(dataset_of(run.record))
    if not restored_steps(run.checkpoints) and not any(run.checkpoints.glob("*.bad-*")):
        hint = f"Remove it and start anew: moectl runs rm {run.id} --yes"
        raise NotFoundError(f"the run '{run.id}' stopped before its first checkpoint", hint)
    run.acquire()
    try:
        _refuse_ended(run)  # another process may have ended it since
        runtime.configure(own.train)
    except BaseException:
        run.release()
        raise
    return _run(run, own, data, None, request)


def _run(
    run: RunDir, config: ExperimentConfig, data: PackedDataset, model: LanguageModel | None, request: RunRequest
) -> RunOutcome:
    """Train ``model`` from step 0, or without one from the newest checkpoint that fits."""
    try:
        meter = Meter(run, request.terms)
        meter.settle()
    except BaseException:
        run.release()
        raise
    recorder = RunRecorder(run, paths.registry_path(), warn=request.say)
    shown = request.progress(marked(run.id, run.record["marks"]), config.train.steps)

    def trainer_of(model: LanguageModel) -> Trainer:
        def progress(step: int, values: Mapping[str, float]) -> None:
            if shown is not None:
                shown(step, values)
            reason = request.halt() or meter.tick()
            trainer.stop.reason = trainer.stop.reason or reason

        trainer = Trainer(
            model,
            data,
            config,
            logger=recorder,
            checkpoints=run.checkpoints,
            evaluate=lambda decoder, final: _held_out(decoder, data, config, final),
            progress=progress,
            objective=objective_of(config, run.record.get("teacher")),
            yardstick=yardstick(model, config.train, length=data.manifest.block_size - 1),
        )
        return trainer

    with recorder:
        # Where nothing can be taken up, the record stays as it is.
        resumed = _take_up(trainer_of, recorder, request.say) if model is None else None
        with record.failures_recorded(recorder, meter):
            trainer = trainer_of(model) if model is not None else resumed
            assert trainer is not None
            meter.watch_energy(str(trainer.device))
            recorder.update(**record.sitting(trainer.device, meter))
            result = trainer.train()
            recorder.update(**record.ending(run, result, trainer.device, meter))
    ended = (result.status, result.reason, result.step, result.tokens)
    return RunOutcome(run.id, run.path, *ended, result.metrics, marks=tuple(run.record["marks"]))


def _held_out(model: LanguageModel, data: PackedDataset, config: ExperimentConfig, final: bool) -> dict[str, float]:
    """Pure language-model losses: over the whole held-out split at the end, whatever bounds the periodic ones.

    What was read from a part of the split only is named ``eval_part/...``: it is another number.
    """
    bound = None if final else config.eval.max_blocks
    report = evaluate(model, data, batch_size=config.eval.batch_size, max_blocks=bound, bootstrap=0)
    if report.complete:
        return report.metrics()
    return {name.replace("eval/", "eval_part/", 1): value for name, value in report.metrics().items()}


def _take_up(trainer_of: Callable[[LanguageModel], Trainer], recorder: RunRecorder, say: Say) -> Trainer:
    """A trainer where the newest usable checkpoint was written, and the record cut back to there: nothing counts twice.

    A checkpoint is usable if model, optimizer, generators and all else of this run come out of it.
    """
    run = recorder.rundir

    def use(checkpoint: Checkpoint) -> Trainer:
        trainer = trainer_of(model_from(checkpoint, run.path))
        trainer.restore(checkpoint)
        return trainer

    checkpoint, trainer, messages = newest_usable(run.checkpoints, use)
    position = checkpoint.state["record"]
    short = [name for name, size in recorder.position().items() if size < position[name]]
    recorder.rewind(checkpoint.step, position)
    for message in messages:
        say(message)
        # Without a step: it is set aside for good, also where this process dies before its first checkpoint.
        run.event("bad_checkpoint", message, at=checkpoint.step)
    for message, details in record.changes(run, trainer.device, short):
        say(f"warning: {message}")
        recorder.event("warning", message, step=checkpoint.step, **details)
    recorder.event("resumed", f"resumed from step {checkpoint.step}", step=checkpoint.step)
    say(f"resuming {run.id} from step {checkpoint.step}")
    return trainer


def _newest_to_go_on(say: Say) -> RunDir:
    """The newest run that has not ended, is not being written, and has a checkpoint.

    One that failed by its own numbers is passed over: it would fail again in the same way.
    """
    passed: list[str] = []
    for run in newest_first(readable_runs()):
        status = run.status
        if status in ("interrupted", "lost", "failed") and not run.record.get("fails_again"):
            if restored_steps(run.checkpoints):
                skipped = f" (newer, but cannot go on: {', '.join(passed[:4])})" if passed else ""
                say(f"going on with {run.id}, which is {status}{skipped}")
                return run
            status += " without a checkpoint"
        passed.append(f"{run.id} {status}")
    seen = f": {', '.join(passed[:4])}{', ...' if len(passed) > 4 else ''}" if passed else ""
    raise NotFoundError(f"no run can go on{seen}", "Start one: moectl train; or name the run: --resume RUN.")


def _already_there(name: str, key: str, request: RunRequest) -> RunOutcome | RunDir | None:
    """What came of the run of this name and key, where it has ended or is to go on; the run itself where it has no
    checkpoint to go on from; None when the name is free; else an error."""
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
            f"Choose another --name, or remove it: {remove}"
            + ("" if run.status in ENDED else f" · or continue it as it is: moectl train --resume {name}"),
        )
    if run.status in ENDED:
        ended = (run.status, run.record["exit_reason"], run.record["step"], run.record["tokens"])
        return RunOutcome(name, folder, *ended, run.latest(), already_done=True, marks=tuple(run.record["marks"]))
    steps = restored_steps(run.checkpoints)
    if request.go_on:
        return resume_run(name, request) if steps or any(run.checkpoints.glob("*.bad-*")) else run
    raise ConfigError(
        f"the run '{name}' is there already, {run.status}"
        + (f" with a checkpoint of step {steps[-1]}" if steps else ", without a checkpoint"),
        (f"Continue it: moectl train --resume {name} · or remove it: {remove}" if steps else f"Remove it: {remove}"),
    )


def _refuse_ended(run: RunDir) -> None:
    status = run.record.get("status")
    if status in ENDED:
        raise ConfigError(
            f"the run '{run.id}' has {status}: there is nothing to resume",
            f"Start a new one, with another --seed or --steps, or train on from its weights: --base {run.id}",
        )


def _refuse_changes(own: ExperimentConfig, given: ExperimentConfig) -> None:
    """A resumed run keeps its config; every key that differs is named."""
    changed = [key for key in differences(own.model_dump(mode="json"), given.model_dump(mode="json")) if key != "name"]
    if changed:
        raise ConfigError(
            f"a resumed run keeps its config, but {', '.join(changed)} differ{'s' if len(changed) == 1 else ''}",
            "Resume without options, or start a new run.",
        )


def differences(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    """The dotted keys in which two configs, as plain containers, differ."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return [] if ours == theirs else [prefix]
    keys = sorted(set(ours) | set(theirs))
    dot = f"{prefix}." if prefix else ""
    return [found for key in keys for found in differences(ours.get(key), theirs.get(key), f"{dot}{key}")]

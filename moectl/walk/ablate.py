"""An ablation: variants of one config, several seeds of each, as one named group that can be resumed and compared."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moectl.config.loading import load_config, resolved_yaml
from moectl.config.schema import ExperimentConfig
from moectl.corpus.store import find_dataset
from moectl.errors import ConfigError, MoectlError
from moectl.runs.compare import Comparison, compare
from moectl.runs.files import write_atomic
from moectl.runs.groups import Group, Member, evaluated
from moectl.runs.rundir import RunDir, now
from moectl.training.runtime import resolve_device
from moectl.walk.budget import PRICE, check_dollars, dollars, spent_before
from moectl.walk.data import dataset_for
from moectl.walk.group_runs import ENDED, GroupRuns, GroupTerms, Job, Report, Slot
from moectl.walk.loading import run_config
from moectl.walk.models import on_base
from moectl.walk.plan import PlanRequest, plan_run
from moectl.walk.teacher import with_found_teacher
from moectl.walk.train import differences

Say = Callable[[str], None]


@dataclass(frozen=True)
class AblationRequest:
    """What an ablation is asked for.

    Attributes:
        name: of the group; an earlier one of this name goes on.
        configs: the config of each variant by its name; the first is what the others are compared with.
        seeds: each variant is trained with each of them.
        data: dataset id, prefix or path; None: the group's own, else by :func:`dataset_for`'s rule.
        parallel: runs at a time.
        terms: price and budgets; None in them is as the group has it.
        command, commit: for the record, as in a training run.
        say: takes a sentence for the user.
        progress: told where the group is.
    """

    name: str
    configs: Mapping[str, ExperimentConfig]
    seeds: Sequence[int]
    data: str | None = None
    parallel: int = 1
    terms: GroupTerms = field(default_factory=GroupTerms)
    command: Sequence[str] = ()
    commit: str | None = None
    say: Say = lambda text: None
    progress: Callable[[Report], None] = lambda report: None


@dataclass(frozen=True)
class Result:
    """What came of one member. ``status`` is that of its run, or "not begun"; ``trouble`` is what this sitting's
    process failed with; ``trained`` says whether this sitting worked on it."""

    run: str
    variant: str
    seed: int
    status: str
    reason: str | None
    step: int
    steps: int
    tokens: int
    duration_s: float | None
    cost: float | None
    trained: bool
    trouble: str | None


@dataclass(frozen=True)
class Projection:
    """What the runs to come will take by the plan: seconds of device time and dollars (None: no price). ``measured``
    are the variants whose rate was measured here; the others' is assumed, those of ``unknown`` have no plan."""

    seconds: float
    cost: float | None
    measured: tuple[str, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class Ablation:
    """The group after this sitting.

    Attributes:
        stopped: why this sitting ended before all was done: Ctrl-C, or the budget.
        cost: US dollars of all runs of the group; None without a price.
        comparison: None where fewer than two runs have been evaluated.
    """

    group: str
    results: tuple[Result, ...]
    stopped: str | None
    cost: float | None
    projection: Projection | None
    comparison: Comparison | None

    @property
    def exit_code(self) -> int:
        """0 all ended (collapsed is a result), 1 a run failed or its process died, 130 stopped with checkpoints."""
        if self.stopped is not None:
            return 130
        if any(result.trouble or result.status in ("failed", "lost", "not begun") for result in self.results):
            return 1
        return 0 if all(result.status in ENDED for result in self.results) else 130


def ablate(request: AblationRequest) -> Ablation:
    """Train what is not done yet, and compare.

    Runs that have ended are not trained again; interrupted and lost ones go on where they were; those that
    failed by their own numbers are reported, and not tried again.

    Raises:
        ConfigError: another config or dataset than the group's, a price, budget or number of runs at a time
            that cannot be, or another process at this group.
        MoectlError: whatever preparing the data raises. What a single run raises is in its result.
    """
    terms = request.terms
    for key, value in ((PRICE, terms.price_per_hour), ("--max-cost", terms.max_cost)):
        check_dollars(key, value)
    check_dollars("--max-cost-per-run", terms.max_cost_per_run)
    configs = {name: with_found_teacher(on_base(config)) for name, config in request.configs.items()}
    slots = _slots(list(configs.values()), request.parallel)
    with Group.begin(request.name) as group:
        terms = _terms(group, terms)
        data = _data(group, configs, request)
        jobs = _jobs(group, {name: dataset_for(config, data)[1] for name, config in configs.items()}, request.seeds)
        _enter(group, jobs, data, terms, request)
        done, to_do, passed = _sorted(jobs, terms, request.say)
        runs = GroupRuns(
            group,
            group.members,
            slots=slots,
            terms=terms,
            spec={"data": data, "command": list(request.command), "commit": request.commit},
            say=request.say,
            progress=request.progress,
        )
        projection = _projected(to_do, terms, data)
        _announce(jobs, to_do, projection, terms, runs.cost, request)
        runs.run(to_do, done_before=[*done, *passed])
        group.update(ended=now(), stopped=runs.stopped, cost=runs.cost)
    tried = {job.member.run for job in to_do}
    results = tuple(_result(job, job.member.run in tried, runs.troubles.get(job.member.run)) for job in jobs)
    folders, _ = evaluated(request.name)
    comparison = compare(folders) if len(folders) > 1 else None
    return Ablation(request.name, results, runs.stopped, runs.cost, projection, comparison)


def _terms(group: Group, given: GroupTerms) -> GroupTerms:
    def first(name: str) -> float | None:
        value = getattr(given, name)
        return group.record.get(name) if value is None else value

    terms = GroupTerms(first("price_per_hour"), first("max_cost"), first("max_cost_per_run"))
    if terms.price_per_hour is None and (terms.max_cost is not None or terms.max_cost_per_run is not None):
        raise ConfigError(f"a budget needs {PRICE}", f"What does an hour on this device cost? Example: {PRICE} 2.50")
    return terms


def _data(group: Group, configs: Mapping[str, ExperimentConfig], request: AblationRequest) -> str:
    """The id of the dataset of all runs, prepared now if need be: the group's own from its first sitting on."""
    own = group.record.get("data")
    asked = None if request.data is None else find_dataset(request.data)
    if own is None:
        folder, _ = dataset_for(next(iter(configs.values())), request.data, request.say)
        return str(folder) if asked is not None else folder.name
    if asked is not None and find_dataset(own).resolve() != asked.resolve():
        raise ConfigError(
            f"the group '{group.name}' was begun with the dataset {own}, not with {request.data}",
            "Its runs could not be compared: leave --data out, or choose another --name.",
        )
    return str(own)


def _jobs(group: Group, configs: Mapping[str, ExperimentConfig], seeds: Sequence[int]) -> list[Job]:
    """Every variant with every seed, seed by seed: what is there when a budget ends can be compared.

    Raises:
        ConfigError: a run of the group has another config.
    """
    folder = group.folder / "configs"
    folder.mkdir(exist_ok=True)
    jobs = []
    for seed in seeds:
        for variant, shared in configs.items():
            member = Member(f"{group.name}-{variant}-s{seed}", variant, seed)
            train = shared.train.model_copy(update={"seed": seed})
            config = ExperimentConfig.model_validate(
                {**shared.model_dump(), "name": member.run, "train": train.model_dump()}
            )
            run = member.opened()
            if run is not None:
                _refuse_another(group, run, config)
            file = folder / f"{member.run}.yaml"
            write_atomic(file, resolved_yaml(config))
            assert load_config(file) == config
            jobs.append(Job(member, file, config.train.steps))
    return jobs


def _refuse_another(group: Group, run: RunDir, config: ExperimentConfig) -> None:
    changed = differences(run_config(run.path).model_dump(mode="json"), config.model_dump(mode="json"))
    if changed:
        raise ConfigError(
            f"the group '{group.name}' was begun with another config: in {run.id}, {', '.join(changed)}"
            f" differ{'s' if len(changed) == 1 else ''}",
            "Choose another --name for these runs, or ask for what the group was begun with.",
        )
    if (run.record.get("group") or {}).get("name") != group.name:
        raise ConfigError(
            f"the name '{run.id}' is taken by a run that is not of the group '{group.name}'", "Choose another --name."
        )


def _enter(group: Group, jobs: Sequence[Job], data: str, terms: GroupTerms, request: AblationRequest) -> None:
    group.add(job.member for job in jobs)
    group.update(
        data=data,
        price_per_hour=terms.price_per_hour,
        max_cost=terms.max_cost,
        max_cost_per_run=terms.max_cost_per_run,
        command=list(request.command),
        began=now(),
        ended=None,
        stopped=None,
    )


def _sorted(jobs: Sequence[Job], terms: GroupTerms, say: Say) -> tuple[list[Job], list[Job], list[Job]]:
    """Those that have ended, those to train, and those that are passed over, saying why."""
    done: list[Job] = []
    to_do: list[Job] = []
    passed: list[Job] = []
    for job in jobs:
        run = job.member.opened()
        if run is None:
            to_do.append(job)
        elif run.status in ENDED:
            done.append(job)
        elif run.record.get("fails_again"):
            say(f"{run.id} failed, and would again: {run.record.get('exit_reason')}")
            passed.append(job)
        elif _over_budget(run, terms):
            say(f"{run.id} has used up its own budget of {terms.max_cost_per_run:.2f} dollars")
            passed.append(job)
        else:
            to_do.append(job)
    return done, to_do, passed


def _over_budget(run: RunDir, terms: GroupTerms) -> bool:
    cost = spent_before(run, terms.price_per_hour).cost
    return terms.max_cost_per_run is not None and cost is not None and cost >= terms.max_cost_per_run


def _slots(configs: Sequence[ExperimentConfig], parallel: int) -> list[Slot]:
    """A place for each run at a time: a GPU each, or an equal part of the CPU's cores."""
    if parallel < 1:
        raise ConfigError(f"--parallel {parallel} cannot be", "Give 1 or more.")
    devices = [resolve_device(config.train.device) for config in configs]
    if any(device.type == "cuda" for device in devices):
        return _gpus(devices, parallel)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if parallel > cores:
        raise ConfigError(f"--parallel {parallel}: this machine has {cores} cores", f"Give at most {cores}.")
    if parallel == 1:
        return [Slot()]
    threads = max(1, min(torch.get_num_threads(), cores // parallel))
    return [Slot(share=1 / parallel, threads=threads)] * parallel


def _gpus(devices: Sequence[torch.device], parallel: int) -> list[Slot]:
    if parallel == 1:
        return [Slot()]
    count = torch.cuda.device_count()
    if parallel > count:
        raise ConfigError(f"--parallel {parallel}: there are {count} GPUs", f"Give at most {count}.")
    if any(device.type != "cuda" or device.index is not None for device in devices):
        raise ConfigError("--parallel needs train.device auto or cuda: each run gets a GPU of its own", "Change one.")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    return [Slot({"CUDA_VISIBLE_DEVICES": name.strip()}) for name in names[:parallel]]


def _projected(jobs: Sequence[Job], terms: GroupTerms, data: str) -> Projection | None:
    """By ``moectl plan``: once per variant, for the steps that are left."""
    if not jobs:
        return None
    seconds, per_step = 0.0, dict[str, float | None]()
    measured: list[str] = []
    for job in jobs:
        variant = job.member.variant
        if variant not in per_step:
            try:
                (cost,) = plan_run(load_config(job.config), PlanRequest(data=data, devices=("here",))).costs
            except MoectlError:
                per_step[variant] = None
            else:
                per_step[variant] = cost.seconds / job.steps
                measured += [variant] if cost.source == "measured" else []
        run = job.member.opened()
        left = job.steps - (0 if run is None else int(run.record.get("step") or 0))
        seconds += (per_step[variant] or 0.0) * left
    price = terms.price_per_hour
    unknown = tuple(variant for variant, value in per_step.items() if value is None)
    return Projection(seconds, None if price is None else dollars(seconds, price), tuple(measured), unknown)


def _announce(
    jobs: Sequence[Job],
    to_do: Sequence[Job],
    projection: Projection | None,
    terms: GroupTerms,
    spent: float | None,
    request: AblationRequest,
) -> None:
    """How much there is to do, and what it will cost, before anything is trained."""
    said = f"group {request.name}: {len(to_do)} of {len(jobs)} runs to train"
    if projection is None:
        request.say(said + ", the others have ended before" * (len(jobs) > 0))
        return
    known = f"about {_duration(projection.seconds)} of device time"
    assumed = [name for name in request.configs if name not in (*projection.measured, *projection.unknown)]
    sources = [f"measured: {', '.join(projection.measured)}"] if projection.measured else []
    sources += [f"assumed: {', '.join(assumed)}"] if assumed else []
    sources += [f"not planned: {', '.join(projection.unknown)}"] if projection.unknown else []
    if projection.cost is not None:
        known += f", {projection.cost:.2f} dollars at {terms.price_per_hour:.2f} an hour"
    request.say(f"{said}, {known} without evaluations (rate {'; '.join(sources)})")
    if terms.max_cost is None or projection.cost is None:
        return
    left = terms.max_cost - (spent or 0.0)
    if projection.cost > left:
        request.say(f"warning: that is more than is left of the budget: {left:.2f} of {terms.max_cost:.2f} dollars")


def _duration(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 3600
        else f"{seconds / 60:.1f} min"
        if seconds >= 60
        else f"{seconds:.0f} s"
    )


def _result(job: Job, trained: bool, trouble: str | None) -> Result:
    run = job.member.opened()
    record: Mapping[str, Any] = {} if run is None else run.record
    return Result(
        *job.member,
        status="not begun" if run is None else run.status,
        reason=record.get("exit_reason"),
        step=int(record.get("step") or 0),
        steps=job.steps,
        tokens=int(record.get("tokens") or 0),
        duration_s=record.get("duration_s"),
        cost=record.get("cost"),
        trained=trained and run is not None,
        trouble=trouble,
    )

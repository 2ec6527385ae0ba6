"""A plan from what is at hand: the config, the prepared data, and how fast earlier runs of this shape were."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moectl import paths
from moectl.config.schema import DataConfig, ExperimentConfig
from moectl.corpus.manifest import Manifest
from moectl.corpus.store import dataset_ids, find_dataset
from moectl.errors import ConfigError, MoectlError, NotFoundError, did_you_mean
from moectl.models.config import SIZES, DecoderConfig, decoder_config
from moectl.models.decoder import Decoder
from moectl.planning.budget import check_price
from moectl.planning.devices import THIS, USUAL, Device, device_of, find_device
from moectl.planning.plan import Data, Plan, make_plan
from moectl.routers import resolve_router
from moectl.runs.find import newest_first, readable_runs
from moectl.training.runtime import resolve_device
from moectl.walk.loading import load_run, run_config
from moectl.walk.router_code import with_absolute_router

_VOCABULARY = re.compile(r"bpe:(\d+)")


@dataclass(frozen=True)
class PlanRequest:
    """What a plan was asked for, beside its config.

    Attributes:
        data: dataset id, prefix or path; None: that of the config, else the newest.
        devices: names; none: this machine and some usual ones.
        price: dollars per hour, in place of the devices' own.
        match: look for ways to equal the dense model's FLOPs: True, or with this granularity.
        say: takes a sentence for the user.
    """

    data: str | None = None
    devices: Sequence[str] = ()
    price: float | None = None
    match: int | bool = False
    say: Callable[[str], None] = lambda text: None


def plan_run(config: ExperimentConfig, request: PlanRequest) -> Plan:
    """What the run of ``config`` will take; nothing is prepared, built or written.

    Raises:
        ConfigError: an unknown device, base or router, a negative price, a model that cannot be (exit 2).
        NotFoundError: ``data`` names no dataset (exit 4).
        MissingDependencyError: ``train.device`` is not on this machine, and no other was named (exit 5).
    """
    check_price(request.price)
    config = resolve_router(with_absolute_router(config))
    if request.match is not False and config.moe is None:
        raise ConfigError("a dense model has no experts to match", "Plan one with experts, for example --preset moe.")
    if not isinstance(request.match, bool) and request.match < 1:
        raise ConfigError(f"a granularity of {request.match} cannot be", "Give 1 or more.")
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)  # as the run will: this machine's rate depends on it
    devices = _devices(config, request.devices)
    data, config = _data(config, request)
    shape = _shape(config, data)
    plan = make_plan(config, shape, data, devices, price=request.price, match=request.match)
    measured = measured_rates(plan, devices)
    if not measured:
        return plan
    return make_plan(config, shape, data, devices, measured=measured, price=request.price, match=request.match)


def measured_rates(plan: Plan, devices: Sequence[Device]) -> dict[str, tuple[str, float]]:
    """By device, the newest run of this very shape there that says how fast it was, and its tokens per second.

    The same shape: parameters, router, block size, micro-batch, precision and, on a CPU, threads.
    """
    found: dict[str, tuple[str, float]] = {}
    for run in newest_first(readable_runs(paths.runs_dir(), problems=[])):
        record = run.record
        seconds, tokens = record.get("train_seconds"), record.get("train_tokens")
        name = next((device_of(str(device)) for device in record.get("devices") or []), None)
        if not seconds or not tokens or name is None or not _same_shape(plan, run.path, record):
            continue
        for device in devices:
            if _is(device, name, record):
                found.setdefault(device.name, (run.id, tokens / seconds))
    return found


def _is(device: Device, name: str, record: Mapping[str, Any]) -> bool:
    """Whether a run on ``name`` says how fast ``device`` is."""
    if device.kind == "cpu":
        return name == THIS and record.get("threads") == torch.get_num_threads()
    return device.name in (name, f"{THIS}: {name}")


def _same_shape(plan: Plan, folder: Path, record: Mapping[str, Any]) -> bool:
    if record.get("parameters") != plan.model.parameters.to_json():
        return False
    try:
        own = run_config(folder)
    except MoectlError:
        return False
    ours, theirs = plan.config, own
    if (ours.moe is None) != (theirs.moe is None):
        return False
    if ours.moe is not None and theirs.moe is not None:
        same = ours.moe.router == theirs.moe.router and ours.moe.backend == theirs.moe.backend
        if not same or ours.moe.capacity != theirs.moe.capacity:
            return False
    keys = ("batch_size", "precision", "deterministic")
    return all(getattr(ours.train, key) == getattr(theirs.train, key) for key in keys) and (
        plan.data.block_size == theirs.data.block_size
    )


def _devices(config: ExperimentConfig, names: Sequence[str]) -> list[Device]:
    if not names:
        resolve_device(config.train.device)  # a GPU asked for where there is none
        names = (THIS, *USUAL)
    found = {device.name: device for device in map(find_device, names)}
    return list(found.values())


def _data(config: ExperimentConfig, request: PlanRequest) -> tuple[Data, ExperimentConfig]:
    """The dataset that training would take, if it is prepared; else what the config says of it."""
    folder = next(_candidates(config, request.data), None)
    if folder is None:
        size = _VOCABULARY.fullmatch(config.data.tokenizer)
        if size is None:
            raise ConfigError(
                f"how large the vocabulary of '{config.data.tokenizer}' is shows only once the data are prepared",
                "Prepare them: moectl prepare.",
            )
        request.say(f"data: not prepared yet; a vocabulary of {size[1]} is taken from data.tokenizer")
        return Data(None, int(size[1]), 0, config.data.block_size, None), config
    manifest = Manifest.load(folder)
    request.say(f"data: {manifest.id} ({', '.join(manifest.domain_names)})")
    tokens = sum(domain.train.tokens for domain in manifest.domains)
    recorded = DataConfig.model_validate(manifest.config)
    data = Data(manifest.id, manifest.vocab_size, manifest.eos_id, manifest.block_size, tokens)
    return data, config.model_copy(update={"data": recorded})


def _candidates(config: ExperimentConfig, data: str | None) -> Iterator[Path]:
    if data is not None:
        yield find_dataset(data)
    elif "data" in config.model_fields_set:
        for name in dataset_ids():
            folder = paths.data_dir() / name
            with suppress(MoectlError, ValueError):  # a damaged one is not that of this config
                if DataConfig.model_validate(Manifest.load(folder).config) == config.data:
                    yield folder
    elif dataset_ids():
        yield find_dataset(None)


def _shape(config: ExperimentConfig, data: Data) -> DecoderConfig:
    """The decoder of the config's size, or of the run that it starts from."""
    base = config.model.base
    if base in SIZES:
        shape = decoder_config(config.model, vocab_size=data.vocab_size, eos_token_id=data.eos_id)
    else:
        given = config.model.model_dump(exclude={"base"}, exclude_none=True)
        if given:
            raise ConfigError(
                f"model.{next(iter(given))} cannot be set for the trained base '{base}'", "A run brings its own shape."
            )
        try:
            loaded = load_run(base)
        except NotFoundError as error:
            hint = did_you_mean(base, SIZES) or error.hint
            raise ConfigError(
                f"no plan for the base '{base}': neither a size ({', '.join(SIZES)}) nor a run", hint
            ) from error
        assert isinstance(loaded.model, Decoder)  # the plan of another kind is made elsewhere
        shape = loaded.model.config
        if shape.moe is not None and config.moe is None:
            raise ConfigError(
                f"the base '{base}' has experts, but the config is dense", "Plan it with its moe section."
            )
    return shape if config.moe is None else shape.with_moe(config.moe)

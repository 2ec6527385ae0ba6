"""A plan from what is at hand: the config, the prepared data, and how fast earlier runs of this shape were."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moectl import paths
from moectl.config.schema import DataConfig, ExperimentConfig
from moectl.corpus.manifest import Manifest
from moectl.corpus.tokenization import parse_spec
from moectl.errors import ConfigError, MoectlError
from moectl.hf.shape import HFShape
from moectl.models.config import DecoderConfig, decoder_config
from moectl.planning.anatomy import Shape
from moectl.planning.budget import check_price
from moectl.planning.devices import THIS, USUAL, Device, device_of, find_device, this_machine
from moectl.planning.match_dense import Matching
from moectl.planning.plan import Data, Plan, make_plan
from moectl.runs.find import newest_first, readable_runs
from moectl.training.runtime import resolve_device
from moectl.walk.bases import FoundBase, find_base
from moectl.walk.data import check_fits, prepared_for
from moectl.walk.loading import run_config
from moectl.walk.models import on_base
from moectl.walk.plannable import refuse_untrainable_config


@dataclass(frozen=True)
class PlanRequest:
    """What a plan was asked for, beside its config.

    Attributes:
        data: dataset id, prefix or path; None: that of the config, else the newest.
        devices: names; none: this machine and some usual ones.
        price: dollars per hour, in place of the devices' own.
        match: look for ways to equal the dense model's FLOPs.
        say: takes a sentence for the user.
    """

    data: str | None = None
    devices: Sequence[str] = ()
    price: float | None = None
    match: Matching | None = None
    say: Callable[[str], None] = lambda text: None


def plan_run(config: ExperimentConfig, request: PlanRequest) -> Plan:
    """What the run of ``config`` will take; nothing is prepared, built or written (but a GGUF file is converted).

    Raises:
        ConfigError: an unknown device, base or router, a negative price, a model that cannot be (exit 2).
        NotFoundError: ``data`` names no dataset (exit 4).
        MissingDependencyError: ``train.device`` is not on this machine, and no other was named (exit 5).
    """
    check_price(request.price)
    config = on_base(config, request.say)
    base = find_base(config.model.base, weights=False, say=request.say)
    if request.match is not None and config.moe is None:
        raise ConfigError("a dense model has no experts to match", "Plan one with experts, for example --preset moe.")
    if request.match is not None and request.match.granularity is not None and request.match.granularity < 1:
        raise ConfigError(f"a granularity of {request.match.granularity} cannot be", "Give 1 or more.")
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)  # as the run will: this machine's rate depends on it
    match = request.match and replace(request.match, trained=base.kind != "scratch")
    if match is not None and base.moe is not None:
        raise ConfigError(
            f"the base '{base.name}' has its experts already: their number and size cannot be chosen",
            "Plan with a dense base, or with a size to start from scratch.",
        )
    devices = _devices(config, request.devices, request.say)
    data, config = _data(config, request, base)
    shape = _shape(config, data, base)
    refuse_untrainable_config(config, shape, base, request.say)
    plan = make_plan(config, shape, data, devices, price=request.price, match=match)
    measured = measured_rates(plan, devices)
    if not measured:
        return plan
    return make_plan(config, shape, data, devices, measured=measured, price=request.price, match=match)


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
    counted = plan.model.parameters.to_json()
    if {key: (record.get("parameters") or {}).get(key) for key in counted} != counted:
        return False
    try:
        own = run_config(folder)
    except MoectlError:
        return False
    ours, theirs = plan.config, own
    if ours.finetune != theirs.finetune or ours.distill != theirs.distill:
        return False
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


def _usual_devices(own: torch.device, say: Callable[[str], None]) -> list[Device]:
    """That of this machine on which the run would be, if its rates are known, and some more."""
    try:
        here = [this_machine(own)]
    except ConfigError as error:
        say(error.message)
        here = []
    return [*here, *map(find_device, USUAL)]


def _devices(config: ExperimentConfig, names: Sequence[str], say: Callable[[str], None]) -> list[Device]:
    if not names:
        return _usual_devices(resolve_device(config.train.device), say)  # refuses a GPU where there is none
    found = {device.name: device for device in map(find_device, names)}
    return list(found.values())


def _data(config: ExperimentConfig, request: PlanRequest, base: FoundBase) -> tuple[Data, ExperimentConfig]:
    """The dataset that training would take, if it is prepared; else what config and base say of it."""
    folder = prepared_for(config, request.data, base)
    if folder is None:
        block_size = config.data.block_size
        if base.vocab_size is not None and base.kind != "scratch":
            request.say(f"data: not prepared yet; training prepares them with the tokenizer of {base.name}")
            if "block_size" not in config.data.model_fields_set:
                block_size = min(block_size, base.max_length or block_size)
            return Data(None, base.vocab_size, 0, block_size, None), config
        if not config.data.tokenizer.startswith("bpe:"):
            raise ConfigError(
                f"how large the vocabulary of '{config.data.tokenizer}' is shows only once the data are prepared",
                "Prepare them: moectl prepare.",
            )
        size = parse_spec(config.data.tokenizer).bpe_size
        assert size is not None
        request.say(f"data: not prepared yet; a vocabulary of {size} is taken from data.tokenizer")
        return Data(None, size, 0, block_size, None), config
    manifest = Manifest.load(folder)
    check_fits(manifest, base, request.say)
    request.say(f"data: {manifest.id} ({', '.join(manifest.domain_names)})")
    tokens = sum(domain.train.tokens for domain in manifest.domains)
    recorded = DataConfig.model_validate(manifest.config)
    data = Data(manifest.id, manifest.vocab_size, manifest.eos_id, manifest.block_size, tokens)
    return data, config.model_copy(update={"data": recorded})


def _shape(config: ExperimentConfig, data: Data, base: FoundBase) -> Shape:
    """Of the config's size, or of the base that it starts from, with its experts."""
    if base.kind == "scratch":
        shape: Shape = decoder_config(config.model, vocab_size=data.vocab_size, eos_token_id=data.eos_id)
    elif base.description["kind"] == "decoder":
        shape = DecoderConfig.from_dict(base.description["decoder"])
    else:
        shape = HFShape.of(base.description)
    if config.moe is None:
        return shape
    return replace(shape, moe=config.moe) if shape.moe is not None else shape.with_moe(config.moe)

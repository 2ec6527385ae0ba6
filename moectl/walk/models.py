"""The model that a run starts from: drawn afresh, taken up, or upcycled from a dense base, with its receipt."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moectl.config.schema import ExperimentConfig, MoEConfig
from moectl.config.upcycling import UpcyclingSettings
from moectl.corpus.manifest import Manifest
from moectl.errors import ConfigError
from moectl.hf.folder import RECEIPT
from moectl.models.config import SIZES, decoder_config, resolve_layers
from moectl.models.decoder import Decoder
from moectl.models.language_model import LanguageModel
from moectl.models.upcycle import upcycle_decoder
from moectl.routers import resolve_router
from moectl.runs.files import dumps, write_atomic
from moectl.training import finetune
from moectl.training.diagnose import refuse_untrainable
from moectl.training.runtime import seed_all
from moectl.training.schedules import refuse_unfit
from moectl.walk.bases import Base, FoundBase, base_record, find_base, open_base, prompts_sha256
from moectl.walk.data import check_fits
from moectl.walk.receipt import Receipt
from moectl.walk.router_code import with_absolute_router
from moectl.walk.upcycle import upcycle_model

Say = Callable[[str], None]
BESIDE = "base"
"""The folder in a run's where its base's tokenizer files are kept."""


@dataclass(frozen=True)
class Origin:
    """Where a run's first weights come from.

    Attributes:
        record: for run.json: ``{"kind", "id", "step"}``, ``"sha256"`` of a base's weights, and of what else went
            into its experts.
        receipt: of the upcycling; None where nothing was upcycled.
        beside: files of the base's tokenizer, and its licence.
    """

    record: dict[str, Any]
    receipt: Receipt | None = None
    beside: tuple[Path, ...] = ()

    def fields(self) -> dict[str, Any]:
        """For run.json."""
        return {"base": self.record, "receipt": None if self.receipt is None else self.receipt.to_json()}

    def write(self, run_folder: Path) -> None:
        """Keep in the run folder what is not in its checkpoints: the receipt, and the files beside the base."""
        if self.receipt is not None:
            write_atomic(run_folder / RECEIPT, dumps(self.receipt.to_json(), indent=1) + "\n")
        if self.beside:
            (run_folder / BESIDE).mkdir(exist_ok=True)
        for file in self.beside:
            shutil.copyfile(file, run_folder / BESIDE / file.name)


def on_base(config: ExperimentConfig, say: Say = lambda text: None) -> ExperimentConfig:
    """The config with all that its base decides: a base with experts brings them, whatever the defaults are.

    What makes the experts (how many, how large, where, which router) is the base's; what trains them (losses,
    schedules, capacity, the router's own options) is the config's where it says something, else the base's.

    Raises:
        ConfigError: an unknown base, or a config that asks it for other experts than it has.
    """
    checked = resolve_router(with_absolute_router(config))  # a misspelt option is answered before anything is fetched
    if config.model.base in SIZES:
        return checked
    refuse_overrides(config)
    found = find_base(config.model.base, weights=False, say=say)
    if found.moe is None:
        if checked.moe is not None and found.num_layers is not None:
            resolve_layers(checked.moe.layers, found.num_layers)  # before anything is prepared
        return checked
    if config.moe is None:
        raise ConfigError(
            f"the base '{found.name}' has experts, but the config is dense",
            "Train on from it without --preset dense, or name a dense base.",
        )
    if "moe" not in config.model_fields_set:
        return config.model_copy(update={"moe": found.moe})
    assert checked.moe is not None
    merged = _merged(config.moe, checked.moe, found)
    return resolve_router(checked.model_copy(update={"moe": merged}))


def as_resumed(asked: ExperimentConfig, own: ExperimentConfig) -> ExperimentConfig:
    """What is asked of a run that is resumed, with what its base decided where nothing else is asked for.

    The base itself may be gone by then: what it decided is in the run's own config.
    """
    if own.model.base in SIZES or asked.model.base != own.model.base:
        return asked
    decided = {key: getattr(own.data, key) for key in ("tokenizer", "block_size")}
    kept = {key: value for key, value in decided.items() if key not in asked.data.model_fields_set}
    changes: dict[str, Any] = {"data": asked.data.model_copy(update=kept)}
    if "data" not in asked.model_fields_set:
        changes["data"] = own.data
    if "moe" not in asked.model_fields_set:
        changes["moe"] = own.moe
    return asked.model_copy(update=changes)


def build_model(config: ExperimentConfig, manifest: Manifest) -> tuple[LanguageModel, Origin]:
    """The model at step 0, and where it comes from.

    Dense and MoE runs of one seed share every weight that both have: the dense model is drawn or loaded
    first, then its chosen MLPs are replaced.

    Args:
        config: as :func:`on_base` returns it.
        manifest: of the data that it is to be trained on.

    Raises:
        ConfigError: an unknown base, overrides on a trained base, a base that does not fit; a router
            or capacity that cannot be trained, or cannot follow its schedules.
        CheckError: data of another tokenizer than the base's (exit code 3).
    """
    seed_all(config.train.seed)
    if config.model.base in SIZES:
        model, origin = _from_scratch(config, manifest)
    else:
        refuse_overrides(config)
        found = find_base(config.model.base)
        check_fits(manifest, found)
        model, origin = _from_base(config, open_base(found, moe=config.moe if found.moe is not None else None))
    if config.moe is not None:
        refuse_unfit(config.moe.schedule, model.moe_layers())
    finetune.apply(model, config.finetune)
    refuse_untrainable(model, config.train.allow_noncausal)
    return model.train(), origin


def resolve_init(moe: MoEConfig, *, trained: bool) -> MoEConfig:
    """``init: auto`` is ``copy`` from a trained base and ``random`` from scratch."""
    if moe.init != "auto":
        return moe
    return moe.model_copy(update={"init": "copy" if trained else "random"})


def refuse_overrides(config: ExperimentConfig) -> None:
    """Raises ConfigError where the shape of a trained base is to be another."""
    given = config.model.model_dump(exclude={"base"}, exclude_none=True)
    if given:
        raise ConfigError(
            f"model.{next(iter(given))} cannot be set for the trained base '{config.model.base}'",
            f"It brings its own shape. To start from scratch, use one of: {', '.join(SIZES)}.",
        )


def refuse_experts_from_nothing(moe: MoEConfig, base: FoundBase) -> None:
    """Raises ConfigError where experts are to come from fine-tunes of what is drawn afresh."""
    if moe.init == "experts-from" and base.kind == "scratch":
        raise ConfigError(
            f"moe.init experts-from needs a trained base, and '{base.name}' is drawn afresh",
            "Name the model that the experts were fine-tuned from: --base.",
        )


def _from_scratch(config: ExperimentConfig, manifest: Manifest) -> tuple[LanguageModel, Origin]:
    shape = decoder_config(config.model, vocab_size=manifest.vocab_size, eos_token_id=manifest.eos_id)
    origin = Origin({"kind": "scratch", "id": config.model.base, "step": 0})
    model = Decoder(shape)
    if config.moe is None:
        return model, origin
    refuse_experts_from_nothing(config.moe, find_base(config.model.base))
    generator = torch.Generator().manual_seed(config.train.seed)
    return upcycle_decoder(model, resolve_init(config.moe, trained=False), generator), origin


def _from_base(config: ExperimentConfig, base: Base) -> tuple[LanguageModel, Origin]:
    record = dict(base.record)
    if base.model.moe_layers():
        if config.moe is None:
            raise ConfigError(f"the base '{base.name}' has experts, but the config is dense", "Name a dense base.")
        return base.model, Origin(record, beside=tuple(base.beside))
    if config.moe is None:
        return base.model, Origin(record, beside=tuple(base.beside))
    moe = resolve_init(config.moe, trained=True)
    if moe.experts_from:
        record["experts"] = [base_record(find_base(name))["sha256"] for name in moe.experts_from]
    if (prompts := prompts_sha256(moe)) is not None:
        record["prompts"] = prompts
    model, receipt = upcycle_model(base, moe, seed=config.train.seed)
    return model, Origin(record, receipt, tuple(base.beside))


def _merged(given: MoEConfig, checked: MoEConfig, found: FoundBase) -> MoEConfig:
    """The base's experts under the config's training.

    Args:
        given: the config's moe section as the user has it: what is set in it is asked for.
        checked: the same, with the router's options complete.
    """
    own = found.moe
    assert own is not None
    changes: dict[str, Any] = {}
    for key in sorted(given.model_fields_set):
        ours, theirs = getattr(checked, key), getattr(own, key)
        if key == "router":
            if given.router_name != own.router_name and given.router_name.rpartition(":")[2] != _class_of(own):
                raise _other(found, key, given.router_name, own.router_name)
            changes[key] = {**own.router, **given.router_options}
        elif key == "layers":
            if resolve_layers(str(ours), found.num_layers or 0) != found.moe_layers:
                raise _other(found, key, ours, ",".join(map(str, found.moe_layers)))
        elif key in UpcyclingSettings.model_fields or key == "n_shared_experts":
            if ours != theirs and not (key == "init" and ours == "auto"):
                raise _other(found, key, ours, theirs)
        else:
            changes[key] = ours
    return MoEConfig.model_validate({**own.model_dump(), **{key: _plain(value) for key, value in changes.items()}})


def _class_of(moe: MoEConfig) -> str | None:
    name = moe.router_name
    return name.rpartition(":")[2] if ".py:" in name else None


def _plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def _other(found: FoundBase, key: str, ours: Any, theirs: Any) -> ConfigError:
    return ConfigError(
        f"moe.{key} is {ours}, but the base '{found.name}' has experts with {theirs}",
        f"Leave moe.{key} away: what makes the experts is the base's. To upcycle anew, name a dense base.",
    )

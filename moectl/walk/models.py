"""The model that a run starts from: drawn afresh, taken from a run, or upcycled from a dense run."""

from __future__ import annotations

from typing import Any

import torch

from moectl.config.schema import ExperimentConfig, MoEConfig
from moectl.corpus.manifest import Manifest
from moectl.errors import ConfigError, NotFoundError, did_you_mean
from moectl.models.config import SIZES, decoder_config
from moectl.models.decoder import Decoder
from moectl.models.upcycle import upcycle_decoder
from moectl.training.diagnose import refuse_untrainable
from moectl.training.runtime import seed_all
from moectl.training.schedules import refuse_unfit
from moectl.walk.loading import load_run


def build_model(config: ExperimentConfig, manifest: Manifest) -> tuple[Decoder, dict[str, Any]]:
    """The model at step 0 and a record of its base: ``{"kind", "id", "step"}``, and ``"sha256"`` of a
    checkpoint.

    Dense and MoE runs of one seed share every weight that both have: the dense model is drawn
    first, then its chosen MLPs are replaced.

    Raises:
        ConfigError: an unknown base, overrides on a trained base, a base that does not fit; a router
            or capacity that cannot be trained, or cannot follow its schedules.
        CheckError: a base that was trained with another tokenizer (exit code 3).
    """
    seed_all(config.train.seed)
    if config.model.base in SIZES:
        shape = decoder_config(config.model, vocab_size=manifest.vocab_size, eos_token_id=manifest.eos_id)
        model, base = Decoder(shape), {"kind": "scratch", "id": config.model.base, "step": 0}
    else:
        model, base = _trained_base(config, manifest)
    if config.moe is None and model.moe_layers():
        raise ConfigError(
            f"the base '{config.model.base}' has experts, but the config is dense",
            "Train on from it with the run's own moe section, or name a dense run as the base.",
        )
    if config.moe is not None:
        moe = resolve_init(config.moe, trained=base["kind"] == "run")
        generator = torch.Generator().manual_seed(config.train.seed)
        model = upcycle_decoder(model, moe, generator)
        refuse_unfit(moe.schedule, model.moe_layers())
    refuse_untrainable(model, config.train.allow_noncausal)
    return model, base


def resolve_init(moe: MoEConfig, *, trained: bool) -> MoEConfig:
    """``init: auto`` is ``copy`` from a trained base and ``random`` from scratch."""
    if moe.init != "auto":
        return moe
    return moe.model_copy(update={"init": "copy" if trained else "random"})


def _trained_base(config: ExperimentConfig, manifest: Manifest) -> tuple[Decoder, dict[str, Any]]:
    given = config.model.model_dump(exclude={"base"}, exclude_none=True)
    if given:
        raise ConfigError(
            f"model.{next(iter(given))} cannot be set for the trained base '{config.model.base}'",
            f"A run brings its own shape. To start from scratch, use one of: {', '.join(SIZES)}.",
        )
    try:
        loaded = load_run(config.model.base)
    except NotFoundError as error:
        hint = did_you_mean(config.model.base, SIZES) or error.hint
        raise ConfigError(
            f"unknown base '{config.model.base}': neither a size ({', '.join(SIZES)}) nor a run", hint
        ) from error
    manifest.check_tokenizer(
        Manifest.load(loaded.data).tokenizer.sha256,
        f"the base '{loaded.folder.name}'",
        f"Train on the base's own data (--data {loaded.data.name}), or prepare with its tokenizer:"
        f" moectl prepare --tokenizer {loaded.data}",
    )
    return loaded.model.train(), {
        "kind": "run",
        "id": loaded.folder.name,
        "step": loaded.step,
        "sha256": loaded.sha256,
    }

"""The schema: frozen, strict, and hashed by what it says, not by how it was spelt."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from moectl.config import DataConfig, ExperimentConfig, MoEConfig, OptimConfig, TrainConfig, load_config


def test_frozen() -> None:
    config = ExperimentConfig()
    with pytest.raises(ValidationError):
        config.name = "other"
    with pytest.raises(ValidationError):
        config.train.steps = 3


@pytest.mark.parametrize("section", [ExperimentConfig, DataConfig, MoEConfig, OptimConfig, TrainConfig])
def test_unknown_keys_are_refused(section: type[ExperimentConfig]) -> None:
    with pytest.raises(ValidationError, match="no_such_key"):
        section.model_validate({"no_such_key": 1})


def test_hash_is_of_content_not_of_spelling() -> None:
    spelt = [
        load_config(None, sets=["optim.lr=3e-4", "train.seed=1"]),
        load_config(None, sets=["train.seed=1", "optim.lr=0.0003"]),
        load_config(None, overrides={"train.seed": "1", "optim.lr": 0.0003}),
    ]
    assert len({config.content_hash() for config in spelt}) == 1
    assert spelt[0].content_hash() != load_config(None, sets=["optim.lr=3e-4", "train.seed=2"]).content_hash()


def test_every_section_counts_in_the_hash() -> None:
    changes = [
        "name=x",
        "data.seed=1",
        "model.base=small",
        "moe=null",
        "optim.eps=1e-7",
        "train.seed=1",
        "eval.batch_size=1",
    ]
    hashes = {load_config(None, sets=[change]).content_hash() for change in changes}
    assert len(hashes | {ExperimentConfig().content_hash()}) == len(changes) + 1


def test_hash_does_not_depend_on_the_process() -> None:
    code = "from moectl.config import ExperimentConfig; print(ExperimentConfig().content_hash())"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert seen == {ExperimentConfig().content_hash()}


def test_router_spelt_two_ways_is_one_config_once_resolved() -> None:
    from moectl.routers import resolve_router

    short = resolve_router(load_config(None, sets=["moe.router=top1"]))
    spelt = resolve_router(load_config(None, sets=["moe.router={name: top1, noise_std: 1e-1}"]))
    assert short == spelt
    assert short.content_hash() == spelt.content_hash()
    assert short.moe is not None
    assert short.moe.router == {"name": "top1", "noise_std": 0.1, "noise_anneal_fraction": 0.25}

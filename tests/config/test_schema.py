"""The schema: frozen, strict, and hashed by what it says, not by how it was spelt."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from moectl.config import (
    CapacityConfig,
    DataConfig,
    ExperimentConfig,
    MoEConfig,
    OptimConfig,
    TrainConfig,
    load_config,
    resolved_yaml,
)
from moectl.errors import ConfigError


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
    assert short.moe.router.items() >= {"name": "top1", "noise_std": 0.1, "noise_anneal_fraction": 0.25}.items()


# the MoE section: capacity, balance losses, revival


def moe_of(*sets: str) -> MoEConfig:
    moe = load_config(None, sets=[f"moe.{text}" for text in sets]).moe
    assert moe is not None
    return moe


def test_capacity_spelt_three_ways(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("moe: {capacity: 1.5}\n", encoding="utf-8")
    in_file = load_config(file).moe
    assert in_file is not None
    assert in_file.capacity == CapacityConfig(factor=1.5) == moe_of("capacity=1.5").capacity
    assert moe_of("capacity.factor=15e-1").capacity == in_file.capacity
    assert MoEConfig.model_validate({"capacity": "1.5"}).capacity == in_file.capacity
    assert moe_of("capacity={}").capacity == CapacityConfig() == moe_of("capacity=1.25").capacity
    more = load_config(file, sets=["moe.capacity.overflow=next-best"]).moe
    assert more is not None and more.capacity == CapacityConfig(factor=1.5, overflow="next-best")
    assert moe_of().capacity is None and moe_of("capacity=1.5", "capacity=null").capacity is None


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("capacity=0", "moe.capacity.factor = 0 (--set): should be greater than 0"),
        ("capacity=-1.5", "moe.capacity.factor = -1.5 (--set): should be greater than 0"),
        ("capacity=.inf", "should be a finite number"),
        ("capacity=true", "give the capacity factor, for example 1.25, or null for dropless"),
        ("capacity=plenty", "moe.capacity.factor = 'plenty'"),
        ("capacity.overflow=spill", "should be 'drop' or 'next-best'"),
        ("capacity.fill=luck", "should be 'position' or 'probability'"),
        ("capacity.min_factor=1.5", "min_factor = 1.5 has no effect: the factor is not dynamic"),
        ("capacity.max_factor=2", "max_factor = 2 has no effect: the factor is not dynamic"),
        ("capacity={factor: 1, dynamic: true}", "between min_factor (1.1) and max_factor (3), not at 1"),
        ("capacity={factor: 4, dynamic: true}", "between min_factor (1.1) and max_factor (3), not at 4"),
        ("balance_loss=swich", "'swich' is none of: switch, cv2, entropy. Did you mean 'switch'?"),
        ("balance_loss=none+cv2", "'none' stands alone"),
        ("balance_loss=cv2+cv2", "named twice"),
        ("balance_loss=7", "give names"),
        ("cv2_coef=0.5", "moe.cv2_coef = 0.5 has no effect: 'cv2' is not in moe.balance_loss (switch)"),
        ("entropy_coef=0.5", "moe.entropy_coef = 0.5 has no effect"),
        ("balance_loss={}", "give names"),
        ("balance_scope=layer", "should be 'global', 'micro' or 'sequence'"),
        ("revive_noise=0.5", "moe.revive_noise = 0.5 has no effect: moe.revive_dead is false"),
        ("revive_noise=-1", "should be greater than or equal to 0"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused(assignment: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        moe_of(assignment)
    assert says in caught.value.message and caught.value.exit_code == 2
    assert caught.value.hint


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["balance_loss=none", "lb_coef=0.1"], "moe.lb_coef = 0.1 has no effect: 'switch' is not in"),
        (["balance_loss=none", "balance_exact=true"], "moe.balance_exact has no effect: moe.balance_loss is none"),
        (["balance_scope=micro", "balance_exact=true"], "moe.balance_exact needs moe.balance_scope global, not micro"),
        (["balance_scope=sequence", "balance_exact=true"], "not sequence"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(sets: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        moe_of(*sets)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("none", ()),
        ("[]", ()),
        ("null", ()),
        ("[none]", ()),
        ("cv2", ("cv2",)),
        ("entropy+switch", ("switch", "entropy")),
        ("'entropy, cv2, switch'", ("switch", "cv2", "entropy")),
        ("[cv2, switch]", ("switch", "cv2")),
    ],
)
def test_balance_losses_by_name_in_one_order(text: str, names: tuple[str, ...]) -> None:
    assert moe_of(f"balance_loss={text}").balance_loss == names


def test_coefficients_of_losses_that_are_there_are_taken() -> None:
    moe = moe_of("balance_loss=cv2+entropy", "cv2_coef=0.5", "entropy_coef=0.25", "lb_coef=0")
    assert (moe.cv2_coef, moe.entropy_coef, moe.lb_coef) == (0.5, 0.25, 0.0)
    revived = moe_of("revive_dead=true", "revive_noise=0.5")
    assert revived.revive_noise == 0.5
    dynamic = moe_of("capacity={factor: 2, dynamic: true, min_factor: 1.5, max_factor: 2.5}").capacity
    assert dynamic is not None and (dynamic.min_factor, dynamic.max_factor) == (1.5, 2.5)


def test_resolving_twice_changes_nothing(tmp_path: Path) -> None:
    """A run's config.yaml is a resolved config, and is resolved again on resume."""
    from moectl.routers import resolve_router

    for sets in (
        [],
        ["moe.balance_loss=cv2"],
        ["moe.balance_loss=none"],
        ["moe.capacity={factor: 2, dynamic: true}"],
        ["moe.schedule.lb_coef=[[0, 1], [0.5, 0.2]]"],
    ):
        once = resolve_router(load_config(None, sets=sets))
        file = tmp_path / "config.yaml"
        file.write_text(resolved_yaml(once), encoding="utf-8")
        again = resolve_router(load_config(file))
        assert again == once and again.content_hash() == once.content_hash()
        assert once.moe is not None and isinstance(once.moe.lb_coef, float)


def test_every_new_key_counts_in_the_hash() -> None:
    changes = ["capacity=1.5", "capacity={overflow: next-best}", "balance_loss=cv2", "balance_exact=true"]
    changes += ["revive_dead=true", "schedule.noise_std=[[0, 1]]", "balance_scope=sequence"]
    hashes = {moe_of(change).content_hash() for change in changes}
    assert len(hashes | {MoEConfig().content_hash()}) == len(changes) + 1

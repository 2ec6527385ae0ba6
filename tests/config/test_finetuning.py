"""The sections ``finetune`` and ``distill``: forms that they may be written in, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moectl.config.finetuning import FinetuneConfig, LoraConfig
from moectl.config.loading import load_config, resolved_yaml
from moectl.errors import ConfigError


def finetune(*sets: str, **given: Any) -> FinetuneConfig:
    return load_config(None, sets=sets, **given).finetune


def test_by_default_everything_trains() -> None:
    settings = finetune()
    assert not settings.active and not settings.touches_experts and not settings.freezes_router
    assert settings.trained_experts(0, 3) == (0, 1, 2)


@pytest.mark.parametrize("value", ["router,dense", "[dense, router]", "dense , router", "[router, dense, router]"])
def test_parts_have_one_order_and_one_hash(value: str) -> None:
    settings = finetune(f"finetune.freeze={value}")
    assert settings.freeze == ("router", "dense")
    assert settings.content_hash() == FinetuneConfig(freeze=("router", "dense")).content_hash()


@pytest.mark.parametrize("value", ["0,3", "[3, 0]", "'3, 0, 3'", "[0, '3']"])
def test_experts_are_named_once_and_in_order(value: str) -> None:
    settings = finetune(f"finetune.train_experts={value}")
    assert settings.train_experts == (0, 3)
    assert settings.trained_experts(7, 8) == (0, 3)


def test_experts_by_layer_come_back_from_yaml(tmp_path: Path) -> None:
    config = load_config(None, sets=["finetune.train_experts={3: [1, 0], 2: 5}"])
    assert config.finetune.train_experts == {2: (5,), 3: (0, 1)}
    assert config.finetune.trained_experts(3, 8) == (0, 1) and config.finetune.trained_experts(0, 8) == ()
    (tmp_path / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")
    again = load_config(tmp_path / "config.yaml")
    assert again == config and again.content_hash() == config.content_hash()


def test_a_rank_alone_is_lora_with_its_defaults() -> None:
    for settings in (finetune("finetune.lora=4"), finetune(overrides={"finetune.lora.rank": 4})):
        assert settings.lora == LoraConfig(rank=4)
        assert settings.lora.scale == 2.0 and settings.lora.targets == ("attention", "experts")
        assert settings.active and settings.touches_experts and settings.freezes_router
        assert settings.trained_experts(0, 4) == ()
    assert LoraConfig(rank=4, alpha=2.0).scale == 0.5
    free = finetune("finetune.lora=4", "finetune.lora.train_router=true")
    assert free.lora is not None and free.lora.rank == 4 and not free.freezes_router


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["finetune.freeze=rooter"], "Did you mean 'router'"),
        (["finetune.freeze=3"], "give names out of"),
        (["finetune.freeze=[router, experts, dense]"], "leaves nothing to train"),
        (["finetune.train_experts=a"], "'a' is no expert's number"),
        (["finetune.train_experts=-1"], "no expert's number"),
        (["finetune.train_experts=1.5"], "no expert's number"),
        (["finetune.train_experts=true"], "no expert's number"),
        (["finetune.train_experts={x: 1}"], "'x' is no layer's number"),
        (["finetune.train_experts=[]"], "names no expert"),
        (["finetune.train_experts=0", "finetune.freeze=experts"], "drop one of the two"),
        (["finetune.lora=true"], "give the rank"),
        (["finetune.lora=0"], "greater than 0"),
        (["finetune.lora.rankk=4"], "unknown config key 'finetune.lora.rankk'"),
        (["finetune.lora=4", "finetune.lora.alpha=0"], "greater than 0"),
        (["finetune.lora=4", "finetune.lora.dropout=1"], "below 1"),
        (["finetune.lora=4", "finetune.lora.dropout=0.1", "finetune.lora.targets=experts"], "dropout has no effect"),
        (["finetune.lora=4", "finetune.lora.targets=heads"], "none of: attention, mlp, experts"),
        (["finetune.lora=4", "finetune.lora.targets=[]"], "targets is empty"),
        (["finetune.lora=4", "finetune.freeze=router"], "does not go with finetune.lora"),
        (["finetune.lora=4", "finetune.train_experts=0"], "does not go with finetune.lora"),
        (["moe=null", "finetune.freeze=router"], "the model is dense"),
        (["moe=null", "finetune.freeze=dense"], "leaves nothing to train"),
        (["moe=null", "finetune.train_experts=0"], "the model is dense"),
        (["moe=null", "finetune.lora=4", "finetune.lora.train_router=true"], "the model is dense"),
        (["moe.revive_dead=true", "finetune.train_experts=0"], "moe.revive_dead gives"),
        (["moe.revive_dead=true", "finetune.lora=4"], "moe.revive_dead gives"),
        (["moe.schedule.noise_std=[[0, 0.5], [0.5, 0.0]]", "finetune.freeze=router"], "moe.schedule.noise_std has no"),
        (["distill.alpha=0.5"], "distill.teacher: field required"),
        (["distill={teacher: a, alpha: 0}"], "greater than 0"),
        (["distill={teacher: a, alpha: 1.1}"], "less than or equal to 1"),
        (["distill={teacher: a, temperature: 0}"], "greater than 0"),
        (["distill={teacher: a, temperature: .nan}"], "finite"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_word(sets: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, sets=sets)
    assert said in f"{caught.value.message} {caught.value.hint}"


def test_dead_experts_may_be_revived_where_only_the_rest_is_frozen() -> None:
    assert finetune("moe.revive_dead=true", "finetune.freeze=dense").freeze == ("dense",)


def test_a_schedule_of_noise_may_stand_where_routers_learn() -> None:
    assert finetune("moe.schedule.noise_std=[[0, 0.5], [0.5, 0.0]]", "finetune.freeze=experts").active

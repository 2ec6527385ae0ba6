"""The keys that say where experts start from: each changes something, or is refused."""

from __future__ import annotations

import pytest

from moectl.config.loading import load_config
from moectl.config.schema import MoEConfig
from moectl.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"init": "copy", "granularity": 4}, "moe.granularity = 4 has no effect: moe.init is copy, not split"),
        ({"granularity": 4}, "moe.granularity = 4 has no effect: moe.init is auto"),
        ({"init": "split", "granularity": 4, "drop_ratio": 0.2}, "moe.drop_ratio = 0.2 has no effect"),
        ({"init": "drop", "init_noise": 0.1}, "moe.init_noise = 0.1 has no effect: moe.init is drop"),
        ({"init": "random", "init_noise": 0.1}, "moe.init_noise = 0.1 has no effect"),
        ({"init": "random", "allow_shrinking": True}, "moe.allow_shrinking = True has no effect"),
        ({"init": "split", "granularity": 4, "allow_shrinking": True}, "moe.allow_shrinking = True has no effect"),
        ({"init": "copy", "experts_from": ["a"]}, r"moe.experts_from = \('a',\) has no effect"),
        ({"init": "copy", "router_prompts": ["a"]}, "moe.router_prompts .* has no effect"),
        ({"init": "split", "granularity": 4, "expert_intermediate_size": 8}, "moe.expert_intermediate_size = 8 has no"),
        ({"init": "split"}, "moe.init split needs moe.granularity"),
        ({"init": "split", "granularity": 3}, "moe.num_experts 8 is no multiple of 3, which is moe.granularity:"),
        (
            {"init": "split", "granularity": 4, "n_shared_experts": 1},
            "moe.num_experts 8 is no multiple of 3, which is moe.granularity less the 1 shared",
        ),
        ({"init": "split", "granularity": 4, "n_shared_experts": 4}, "moe.granularity 4 leaves no part to route"),
        ({"init": "experts-from", "experts_from": ["a", "b"]}, "names 2 models for moe.num_experts 8"),
        (
            {"init": "experts-from", "num_experts": 2, "experts_from": ["a", "b"], "router_prompts": ["x"]},
            "moe.router_prompts has 1 texts for 2 experts",
        ),
        ({"init": "drop", "drop_ratio": 1.5}, "drop_ratio"),
        ({"init": "split", "granularity": 0}, "granularity"),
    ],
)
def test_what_has_no_effect_or_does_not_fit_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MoEConfig.model_validate(values)
    sets = [f"moe.{key}={value}" for key, value in values.items()]
    with pytest.raises(ConfigError) as error:
        load_config(None, sets=sets)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"init": "copy", "init_noise": 0.0, "allow_shrinking": True},
        {"init": "random", "init_noise": 0.0, "expert_intermediate_size": 8},
        {"init": "split", "granularity": 4, "init_noise": 0.1},
        {"init": "split", "granularity": 4, "n_shared_experts": 1, "num_experts": 6},
        {"init": "drop", "drop_ratio": 0.0},
        {"init": "experts-from", "num_experts": 2, "experts_from": ["a", "b"], "router_prompts": ["x", "@y"]},
    ],
)
def test_what_is_used_is_kept(values: dict[str, object]) -> None:
    moe = MoEConfig.model_validate(values)
    assert MoEConfig.model_validate(moe.model_dump(mode="json")) == moe
    assert MoEConfig.model_validate({**values, "lb_coef": 0.5}).content_hash() != moe.content_hash()


def test_expert_sizes() -> None:
    assert MoEConfig().expert_size(48) == 48
    assert MoEConfig(expert_intermediate_size=7).expert_size(48) == 7
    split = MoEConfig(init="split", granularity=4)
    assert split.expert_size(48) == 12
    with pytest.raises(ConfigError, match="granularity 4 does not divide the dense MLP's 50 neurons") as error:
        split.expert_size(50)
    assert error.value.hint == "Choose a divisor of 50, for example 5."

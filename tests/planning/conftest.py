"""Models to be planned: dense and with experts, in shapes that leave no size equal to another by chance."""

from __future__ import annotations

from typing import Any

import pytest

from moectl.config.schema import ExperimentConfig, MoEConfig
from moectl.models.config import DecoderConfig
from moectl.planning.anatomy import Anatomy, anatomy

SHAPE: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 10,
}


def shape(moe: dict[str, Any] | None = None, **changes: Any) -> DecoderConfig:
    """A decoder of odd sizes; ``moe`` as in a config."""
    config = DecoderConfig(**{**SHAPE, **changes})
    return config if moe is None else config.with_moe(MoEConfig(**{"num_experts": 5, "layers": "1,2", **moe}))


def model(moe: dict[str, Any] | None = None, length: int = 17, **changes: Any) -> Anatomy:
    return anatomy(shape(moe, **changes), length)


def experiment(**sections: Any) -> ExperimentConfig:
    """A config, short enough for the default warm-up to fit."""
    return ExperimentConfig.model_validate({"optim": {"warmup_steps": 0}, **sections})


@pytest.fixture(params=[None, {"router": "top1"}, {"router": "top2", "n_shared_experts": 1}], ids=["dense", "1", "2+1"])
def some_moe(request: pytest.FixtureRequest) -> dict[str, Any] | None:
    moe: dict[str, Any] | None = request.param
    return moe

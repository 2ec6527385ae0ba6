"""The decoder's shape: named sizes, layer specifications, and what is refused."""

from __future__ import annotations

import json

import pytest

from moectl.config.schema import ModelConfig, MoEConfig
from moectl.errors import ConfigError
from moectl.models.config import SIZES, DecoderConfig, decoder_config, resolve_layers


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("all", (0, 1, 2, 3, 4, 5)),
        ("last:1", (5,)),
        ("last:4", (2, 3, 4, 5)),
        ("last:6", (0, 1, 2, 3, 4, 5)),
        ("every:1", (0, 1, 2, 3, 4, 5)),
        ("every:2", (1, 3, 5)),
        ("every:4", (3,)),
        ("every:6", (5,)),
        ("3", (3,)),
        ("4,0,2,4", (0, 2, 4)),
    ],
)
def test_layers_of_a_model_of_six(spec: str, layers: tuple[int, ...]) -> None:
    assert resolve_layers(spec, 6) == layers


@pytest.mark.parametrize("spec", ["last:7", "every:7", "6", "0,6"])
def test_layers_that_are_not_there(spec: str) -> None:
    with pytest.raises(ConfigError, match="does not fit a model of 6 layers") as error:
        resolve_layers(spec, 6)
    assert error.value.exit_code == 2
    assert "0 to 5" in (error.value.hint or "")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, "cannot share"),
        ({"head_dim": 7}, "even"),
        ({"moe_layers": (1,)}, "without an moe section"),
        ({"moe_layers": (0, 4), "moe": MoEConfig()}, "layers 0 to 3"),
        ({"moe_layers": (-1,), "moe": MoEConfig()}, "layers 0 to 3"),
    ],
)
def test_shapes_that_cannot_be(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        DecoderConfig(vocab_size=10, **wrong)  # type: ignore[arg-type]
    assert error.value.exit_code == 2


def test_with_moe_puts_experts_where_the_config_says_and_takes_them_away() -> None:
    dense = DecoderConfig(vocab_size=10, num_layers=6)
    moe = dense.with_moe(MoEConfig(layers="every:2"))
    assert moe.moe_layers == (1, 3, 5)
    assert moe.with_moe(None) == dense
    assert dense.moe_layers == (), "configs do not change"


def test_experts_are_as_wide_as_the_dense_mlp_unless_said_otherwise() -> None:
    dense = DecoderConfig(vocab_size=10, intermediate_size=48)
    assert dense.expert_intermediate_size == 48
    assert dense.with_moe(MoEConfig()).expert_intermediate_size == 48
    assert dense.with_moe(MoEConfig(expert_intermediate_size=12)).expert_intermediate_size == 12


@pytest.mark.parametrize("moe", [None, MoEConfig(router={"name": "topk", "top_k": 2}, layers="1,3", init_noise=0.5)])
def test_round_trip_through_json(moe: MoEConfig | None) -> None:
    config = DecoderConfig(vocab_size=321, rope_theta=5e5, tie_word_embeddings=False).with_moe(moe)
    assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("size", SIZES)
def test_named_sizes(size: str) -> None:
    config = decoder_config(ModelConfig(base=size), vocab_size=99, eos_token_id=3)
    assert (config.vocab_size, config.eos_token_id, config.moe) == (99, 3, None)
    for name, value in SIZES[size].items():
        assert getattr(config, name) == value


def test_named_sizes_grow() -> None:
    widths = [DecoderConfig(vocab_size=1, **SIZES[size]).hidden_size for size in ("tiny", "mini", "small", "base")]
    assert widths == sorted(set(widths))


def test_overrides_win_over_the_size_also_when_false() -> None:
    model = ModelConfig(base="mini", num_layers=2, rope_theta=123.0, tie_word_embeddings=False)
    config = decoder_config(model, vocab_size=9, eos_token_id=0)
    assert (config.num_layers, config.rope_theta, config.tie_word_embeddings) == (2, 123.0, False)
    assert config.hidden_size == SIZES["mini"]["hidden_size"]


def test_unknown_size_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown base model 'tinny'") as error:
        decoder_config(ModelConfig(base="tinny"), vocab_size=9, eos_token_id=0)
    assert "'tiny'" in (error.value.hint or "")


@pytest.mark.parametrize("spec", ["all", "last:1", "every:1", "0"])
def test_a_model_without_layers_is_named(spec: str) -> None:
    with pytest.raises(ConfigError, match="no layers to give experts to"):
        resolve_layers(spec, 0)

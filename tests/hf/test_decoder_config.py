"""Qwen3-MoE's config and names as our decoder's."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.errors import ConfigError
from moectl.hf.decoder_config import canonical_name, decoder_config, decoder_name, decoder_names
from moectl.models.decoder import Decoder

transformers = pytest.importorskip("transformers")

PLAIN: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000,
    "tie_word_embeddings": False,
}


def test_every_size_arrives() -> None:
    config = decoder_config(PLAIN, backend="loop")
    sizes = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers, config.head_dim)
    assert sizes == (40, 24, 20, 4, 10)
    assert (config.num_heads, config.num_kv_heads) == (4, 2)
    assert (config.rope_theta, config.rms_norm_eps, config.tie_word_embeddings) == (500_000.0, 1e-5, False)
    assert config.moe_layers == (0, 1, 2, 3)
    assert config.moe is not None
    assert config.moe.router == {"name": "topk", "top_k": 3, "norm_topk_prob": True, "noise_std": 0.0}
    assert (config.moe.num_experts, config.expert_intermediate_size, config.moe.backend) == (6, 12, "loop")
    assert config.moe.capacity is None and config.moe.n_shared_experts == 0


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("dense", [[], [1], [0, 3], [0, 1, 2, 3]], ids=str)
def test_names_shapes_and_moe_layers_are_transformers_own(step: int, dense: list[int]) -> None:
    """The decoder's parameters under canonical names are those of the model that transformers builds."""
    config = {**PLAIN, "decoder_sparse_step": step, "mlp_only_layers": dense}
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
        ours = Decoder(decoder_config(config))
    expected = {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
    assert {canonical_name(name): tuple(p.shape) for name, p in ours.named_parameters()} == expected
    assert {decoder_name(name) for name in expected} == {name for name, _ in ours.named_parameters()}


def test_names_of_parts() -> None:
    tensor = torch.zeros(1)
    names = {
        "model.layers.3.mlp.gate.weight": "layers.3.mlp.router.weight",
        "mlp.gate.weight": "mlp.router.weight",
        "gate.weight": "router.weight",
        "mlp.gate_proj.weight": "mlp.gate_proj.weight",
        "shared_expert_gate.weight": "shared_expert_gate.weight",
        "lm_head.weight": "lm_head.weight",
        "self_attn.q_proj.weight": "self_attn.q_proj.weight",
    }
    assert list(decoder_names(dict.fromkeys(names, tensor))) == list(names.values())


@pytest.mark.parametrize("saved", ["as published", "by transformers"])
def test_the_same_config_however_it_was_written(saved: str, tmp_path: Path) -> None:
    """transformers 5 writes some keys under other names (``num_local_experts``, ``rope_parameters``)."""
    if saved == "by transformers":
        transformers.AutoConfig.for_model(**PLAIN).save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    else:
        written = {**PLAIN, "torch_dtype": "bfloat16", "architectures": ["Qwen3MoeForCausalLM"], "use_cache": True}
    assert decoder_config(written) == decoder_config(PLAIN)


def test_what_is_left_out_has_transformers_defaults() -> None:
    config = decoder_config({"model_type": "qwen3_moe"})
    default = transformers.Qwen3MoeConfig()
    assert config.hidden_size == default.hidden_size == 2048
    assert config.moe is not None
    assert config.moe.num_experts == default.num_experts == 128
    assert config.moe.router["norm_topk_prob"] is default.norm_topk_prob is False


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_type"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"head_dim": 9}, "head_dim"),
        ({"num_key_value_heads": 3}, "3 key/value heads"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
    ids=str,
)
def test_what_the_decoder_cannot_express_is_refused_by_its_key(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        decoder_config({**PLAIN, **change})
    assert error.value.exit_code == 2


@pytest.mark.parametrize(("eos", "expected"), [(None, -1), (7, 7), ([5], 5)])
def test_where_generation_ends(eos: object, expected: int) -> None:
    assert decoder_config({**PLAIN, "eos_token_id": eos}).eos_token_id == expected


def test_no_experts_is_a_dense_decoder() -> None:
    config = decoder_config({**PLAIN, "mlp_only_layers": [0, 1, 2, 3]})
    assert config.moe is None and config.moe_layers == ()


def test_the_given_config_is_left_alone() -> None:
    given = {**PLAIN, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    before = copy.deepcopy(given)
    decoder_config(given)
    assert given == before

"""Families as data: configs in both forms, published sizes, refusals that name the key, weights that all matter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moectl.errors import ConfigError
from moectl.parity.families import (
    FAMILIES,
    config_of,
    family_name,
    formula_of,
    levels_of,
    random_weights,
    weight_shapes,
)
from moectl.parity.reference import FormulaSubject
from tests.parity.cases import case

DECODERS = ("qwen3", "mixtral", "olmoe", "qwen2_moe")


def test_names() -> None:
    assert family_name("qwen3") == family_name("qwen3_moe") == family_name("Qwen3-MoE") == "qwen3"
    assert [family_name(name) for name in FAMILIES] == list(FAMILIES)
    with pytest.raises(ConfigError) as caught:
        family_name("mixtrall")
    assert "mixtrall" in caught.value.message and "'mixtral'" in (caught.value.hint or "")
    with pytest.raises(ConfigError, match="unknown size"):
        config_of("qwen3", "small")  # type: ignore[arg-type]


def test_tiny_is_small_and_square() -> None:
    formula = formula_of("qwen3", config_of("qwen3", "tiny"))
    attention, experts = formula.attention, formula.experts
    assert attention.num_heads * attention.head_dim == experts.hidden_size == 32
    assert (attention.num_heads, attention.num_kv_heads, formula.num_layers, formula.vocab_size) == (4, 2, 3, 64)
    assert (formula.router.num_experts, formula.router.top_k, experts.intermediate_size) == (8, 2, 24)
    assert formula.router.norm_topk and not formula.tie_embeddings and formula.moe_layers == (0, 1, 2)


def test_a_config_is_a_copy() -> None:
    config = config_of("qwen3", "tiny")
    config["mlp_only_layers"].append(0)
    config["rope_parameters"]["rope_theta"] = 1.0
    assert config_of("qwen3", "tiny")["mlp_only_layers"] == []
    assert config_of("qwen3", "tiny")["rope_parameters"]["rope_theta"] == 10_000.0


@pytest.mark.parametrize(
    ("family", "billions"),
    [("qwen3", 30.532), ("mixtral", 46.703), ("olmoe", 6.919), ("qwen2_moe", 14.316)],
)
def test_published_sizes(family: str, billions: float) -> None:
    """Parameters as the model cards count them: 30.5, 46.7, 6.9 and 14.3 billion."""
    shapes = weight_shapes(formula_of(family, config_of(family, "published")), "model")
    assert sum(map(math.prod, shapes.values())) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_published_blocks_without_modelled_attention() -> None:
    deepseek = formula_of("deepseek_v3", config_of("deepseek_v3", "published"))
    assert len(deepseek.moe_layers) == 58 and deepseek.router.groups_kept == 4 and deepseek.router.scaling == 2.5
    experts = sum(map(math.prod, weight_shapes(deepseek, "moe").values()))
    assert experts == 257 * 3 * 7168 * 2048 + 256 * 7168 + 256  # one shared, 256 routed, the gate and its bias
    gpt_oss = formula_of("gpt_oss", config_of("gpt_oss", "published"))
    per_layer = sum(map(math.prod, weight_shapes(gpt_oss, "moe").values()))
    assert 24 * per_layer / 1e9 == pytest.approx(19.12, abs=0.01)  # of 20.9, the rest embeddings and attention


@pytest.mark.parametrize("size", ["tiny", "published"])
@pytest.mark.parametrize("family", DECODERS)
def test_shapes_are_transformers_own(family: str, size: Any) -> None:
    config = config_of(family, size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert weight_shapes(formula_of(family, config), "model") == theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_transformers_own(family: str) -> None:
    """An absent key means what transformers' config takes it to mean."""
    config = config_of(family, "published")
    theirs = AutoConfig.for_model(FAMILIES[family].model_type)
    required = {"num_hidden_layers", "num_attention_heads", "num_experts_per_tok", "hidden_size", "vocab_size"}
    sizes = {key: value for key, value in config.items() if key in required or "intermediate" in key or "expert" in key}
    groups = {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}  # DeepSeek-V3's; others do not look
    bare = formula_of(family, sizes | groups | {"num_key_value_heads": theirs.num_key_value_heads})
    assert bare.norm.eps == theirs.rms_norm_eps
    assert bare.tie_embeddings == theirs.tie_word_embeddings
    assert bare.experts.activation == theirs.hidden_act
    if "attention" in levels_of(family):
        assert bare.attention.rope_theta == theirs.rope_parameters["rope_theta"]
        assert bare.balance_coef == theirs.router_aux_loss_coef
        assert bare.attention.head_dim == config["hidden_size"] // config["num_attention_heads"]
    if family in ("qwen3", "olmoe", "qwen2_moe", "deepseek_v3"):
        assert bare.router.norm_topk == theirs.norm_topk_prob


def test_rotary_settings_in_both_forms() -> None:
    base = {key: value for key, value in config_of("qwen3", "tiny").items() if key != "rope_parameters"}
    for rope in (
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4},  # the new form counts
    ):
        assert formula_of("qwen3", base | rope).attention.rope_theta == 5e5
    assert formula_of("qwen3", base).attention.rope_theta == 10_000.0
    mixtral = {key: value for key, value in config_of("mixtral", "tiny").items() if key != "rope_parameters"}
    assert formula_of("mixtral", mixtral).attention.rope_theta == 1e6


@pytest.mark.parametrize(
    ("change", "layers"),
    [
        ({}, (0, 1, 2)),
        ({"mlp_only_layers": [0, 2]}, (1,)),
        ({"mlp_only_layers": None}, (0, 1, 2)),
        ({"decoder_sparse_step": 2}, (1,)),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, ()),
    ],
)
def test_which_layers_have_experts(change: dict[str, Any], layers: tuple[int, ...]) -> None:
    assert formula_of("qwen3", config_of("qwen3", "tiny") | change).moe_layers == layers


def test_other_keys_that_are_honoured() -> None:
    tiny = config_of("qwen3", "tiny")
    assert formula_of("qwen3", tiny | {"num_local_experts": 8}).router.num_experts == 8
    without = {key: value for key, value in tiny.items() if key != "head_dim"} | {"num_attention_heads": 2}
    assert formula_of("qwen3", without).attention.head_dim == 16
    assert formula_of("qwen3", without | {"head_dim": None}).attention.head_dim == 16
    assert formula_of("qwen3", tiny | {"tie_word_embeddings": True}).tie_embeddings
    assert formula_of("qwen3", tiny | {"use_sliding_window": False, "sliding_window": 4}).attention.causal
    assert formula_of("mixtral", config_of("mixtral", "tiny") | {"sliding_window": 64}).num_layers == 3
    three = config_of("deepseek_v3", "tiny") | {"n_shared_experts": 3}
    assert formula_of("deepseek_v3", three).experts.shared_intermediate_size == 72
    assert formula_of("qwen3", tiny | {"output_router_logits": True}).balance_in_objective


@pytest.mark.parametrize(
    ("family", "change", "key"),
    [
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window"),
        ("mixtral", {"sliding_window": 16}, "sliding_window"),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window"),
        ("qwen2_moe", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, "rope_type"),
        ("qwen3", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
        ("qwen3", {"rope_parameters": None, "rope_scaling": {"rope_type": "dynamic"}}, "rope_type"),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("qwen3", {"rope_parameters": 1e6}, "rope_parameters"),
        ("qwen3", {"hidden_act": "mish"}, "hidden_act"),
        ("qwen3", {"attention_dropout": 0.1}, "attention_dropout"),
        ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek_v3", {"n_shared_experts": 0}, "n_shared_experts"),
        ("deepseek_v3", {"n_group": 3}, "n_group"),
        ("deepseek_v3", {"topk_group": 5}, "topk_group"),
        ("deepseek_v3", {"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ("qwen3", {"model_type": "qwen2_moe"}, "model_type"),
        ("qwen3", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("qwen3", {"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ("qwen3", {"num_experts": "8"}, "num_experts"),
        ("qwen3", {"num_experts": 8, "num_local_experts": 4}, "num_local_experts"),
        ("qwen3", {"num_attention_heads": 3}, "num_attention_heads"),
        ("qwen3", {"head_dim": 7}, "head_dim"),
        ("qwen3", {"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ("qwen3", {"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ("qwen3", {"norm_topk_prob": 1}, "norm_topk_prob"),
        ("qwen3", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("qwen3", {"hidden_size": None}, "hidden_size"),
        ("qwen3", {"vocab_size": True}, "vocab_size"),
    ],
)
def test_what_is_not_modelled_is_refused_by_its_key(family: str, change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        formula_of(family, config_of(family, "tiny") | change)
    assert f"'{key}'" in caught.value.message or key in caught.value.message.split()[2]
    assert caught.value.hint and caught.value.exit_code == 2


def test_a_missing_key_is_named() -> None:
    for key in ("hidden_size", "num_experts", "num_hidden_layers"):
        with pytest.raises(ConfigError, match=f"'{key}' is missing"):
            formula_of("qwen3", {name: value for name, value in config_of("qwen3", "tiny").items() if name != key})


def test_attention_keys_are_not_read_where_attention_is_not_modelled() -> None:
    change = {"attention_dropout": 0.1, "rope_parameters": {"rope_type": "yarn", "factor": 32.0}}
    for family in ("gpt_oss", "deepseek_v3"):
        assert formula_of(family, config_of(family, "tiny") | change).router.top_k == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights(family: str) -> None:
    for level in levels_of(family):
        formula = formula_of(family, config_of(family, "tiny"))
        weights = random_weights(formula, level, seed=3, dtype=torch.float64)
        assert {name: tuple(weight.shape) for name, weight in weights.items()} == weight_shapes(formula, level)
        again = random_weights(formula, level, seed=3, dtype=torch.float64)
        other = random_weights(formula, level, seed=4, dtype=torch.float64)
        assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
        assert not any(torch.equal(weight, other[name]) for name, weight in weights.items())
        for name, weight in weights.items():
            assert weight.dtype == torch.float64 and weight.flatten().unique().numel() == weight.numel(), name
            if name.endswith("norm.weight"):
                assert 0.5 < float(weight.mean()) < 1.5 and float(weight.std()) > 0.1
    assert random_weights(formula, level, seed=3, dtype=torch.bfloat16)[name].dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_are_neither_flat_nor_saturated(family: str) -> None:
    logits = FormulaSubject(family).run(case(family, "router", shape=(8, 64)))["mlp.router_logits"]
    assert 1.0 < float(logits.std()) < 2.0
    assert 0.2 < float(logits.softmax(dim=-1).amax(dim=-1).mean()) < 0.8


def test_the_clamp_of_gpt_oss_is_reached() -> None:
    made = case("gpt_oss", "moe")
    x = made.inputs.hidden.flatten(0, 1)  # type: ignore[union-attr]
    before = x @ made.weights["experts.gate_up_proj"] + made.weights["experts.gate_up_proj_bias"][:, None]
    assert 0.01 < float((before.abs() > 7.0).double().mean()) < 0.2

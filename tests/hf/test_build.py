"""Hugging Face's modules with given weights: no second copy, nothing missing in silence, no hub."""

from __future__ import annotations

import gc
import socket
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from moectl.errors import ConfigError
from moectl.hf.build import build, config_object
from moectl.hf.family import FAMILIES, family
from moectl.parity.families import config_of, formula_of, random_weights
from moectl.parity.lift import lifted
from tests.parity.hf_cases import COMPONENTS, WHOLE, tiny_case

QWEN = FAMILIES["qwen3"]


def built(name: str, level: Any, *, dtype: torch.dtype = torch.float64, **config: Any) -> tuple[nn.Module, Any]:
    case = tiny_case(name, level, config=config, dtype=dtype)
    return build(FAMILIES[name], level, case.config, case.weights, dtype=dtype), case


@pytest.mark.parametrize(("name", "level"), COMPONENTS)
def test_parameters_are_the_tensors_given(name: str, level: str) -> None:
    module, case = built(name, level)
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert case.weights.keys() <= held.keys()
    for key, tensor in case.weights.items():
        assert held[key].data_ptr() == tensor.data_ptr(), key
        assert not tensor.requires_grad and tensor.grad is None
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not any(tensor.is_meta for tensor in held.values())
    left = held.keys() - case.weights.keys()
    assert all("inv_freq" in key for key in left)


def test_a_model_of_100_megabytes_needs_no_second_100() -> None:
    shape = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 32, "num_hidden_layers": 1}
    config = {**config_of("qwen3", "tiny"), **shape}
    weights = random_weights(formula_of("qwen3", config), "model", seed=0, dtype=torch.float32)
    held = sum(tensor.nbytes for tensor in weights.values())
    assert held > 100e6
    gc.collect()
    before = _resident()
    module = build(QWEN, "model", config, weights, dtype=torch.float32)
    grown = _resident() - before
    assert sum(parameter.numel() for parameter in module.parameters()) * 4 == held
    assert grown < held / 4


def _resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


@pytest.mark.parametrize("name", WHOLE)
def test_rotary_frequencies_are_computed_in_the_precision_of_the_run(name: str) -> None:
    module, case = built(name, "model")
    plain = module.model.rotary_emb.inv_freq
    with lifted():
        exact = build(FAMILIES[name], "model", case.config, case.weights, dtype=torch.float64).model.rotary_emb.inv_freq
    assert plain.device.type == exact.device.type == "cpu"
    assert (plain.dtype, exact.dtype) == (torch.float32, torch.float64)
    attention = formula_of(name, case.config).attention
    steps = torch.arange(0, attention.head_dim, 2, dtype=torch.float64) / attention.head_dim
    assert torch.allclose(exact, attention.rope_theta**-steps, rtol=1e-15, atol=0)  # float64 rounding
    assert torch.allclose(plain.double(), exact, rtol=1e-6, atol=0)  # float32 rounding


@pytest.mark.parametrize("name", WHOLE)
def test_equals_the_config_of_a_model_made_by_transformers(name: str) -> None:
    module, case = built(name, "model")
    theirs = AutoModelForCausalLM.from_config(config_object(FAMILIES[name], case.config))
    assert type(module) is type(theirs)
    assert {k: v.shape for k, v in module.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert module.config._attn_implementation == "eager"
    assert module.config._experts_implementation == "eager"


def test_every_fault_of_the_weights_is_in_one_error() -> None:
    case = tiny_case("qwen3", "moe")
    weights = dict(case.weights)
    del weights["experts.down_proj"]
    weights["experts.w1"] = torch.zeros(2, 3, dtype=torch.float64)
    weights["experts.gate_up_proj"] = weights["experts.gate_up_proj"].transpose(1, 2)
    weights["gate.weight"] = weights["gate.weight"].float()
    with pytest.raises(ConfigError) as caught:
        build(QWEN, "moe", case.config, weights, dtype=torch.float64)
    assert "missing: experts.down_proj [8, 32, 24]" in caught.value.message
    assert "unknown: experts.w1 [2, 3]" in caught.value.message
    assert "wrong shape: experts.gate_up_proj is [8, 32, 48], must be [8, 48, 32]" in caught.value.message
    assert "wrong dtype: gate.weight is float32, must be float64" in caught.value.message


def test_a_missing_router_buffer_is_named() -> None:
    case = tiny_case("deepseek_v3", "router")
    weights = {"weight": case.weights["weight"]}
    with pytest.raises(ConfigError, match=r"missing: e_score_correction_bias \[\d+\]"):
        build(FAMILIES["deepseek_v3"], "router", case.config, weights, dtype=torch.float64)


def test_the_choosing_bias_is_a_buffer_and_may_stay_in_float32() -> None:
    case = tiny_case("deepseek_v3", "router", dtype=torch.bfloat16)
    weights = {**case.weights, "e_score_correction_bias": torch.ones(8)}
    gate = build(FAMILIES["deepseek_v3"], "router", case.config, weights, dtype=torch.bfloat16)
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert [name for name, _ in gate.named_parameters()] == ["weight"]


def test_tied_embeddings_stay_one_parameter_with_or_without_a_head_in_the_weights() -> None:
    case = tiny_case("qwen3", "model", config={"tie_word_embeddings": True})
    without = {name: tensor for name, tensor in case.weights.items() if name != "lm_head.weight"}
    embeddings = without["model.embed_tokens.weight"]
    for weights in (without, {**without, "lm_head.weight": embeddings.clone()}):
        model = build(QWEN, "model", case.config, weights, dtype=torch.float64)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.data_ptr() == embeddings.data_ptr()
    with pytest.raises(ConfigError, match="tied: lm_head.weight and model.embed_tokens.weight differ"):
        build(QWEN, "model", case.config, {**without, "lm_head.weight": embeddings + 1}, dtype=torch.float64)
    with pytest.raises(ConfigError, match="missing: model.embed_tokens.weight"):
        few = {name: tensor for name, tensor in without.items() if name != "model.embed_tokens.weight"}
        build(QWEN, "model", case.config, few, dtype=torch.float64)


def test_an_untied_model_keeps_two_and_misses_its_head() -> None:
    model, case = built("qwen3", "model")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    without = {name: tensor for name, tensor in case.weights.items() if name != "lm_head.weight"}
    with pytest.raises(ConfigError, match="missing: lm_head.weight"):
        build(QWEN, "model", case.config, without, dtype=torch.float64)


def test_a_layer_is_dense_or_not_as_its_weights_are() -> None:
    config = {**config_of("qwen3", "tiny"), "mlp_only_layers": [0]}
    with_experts = tiny_case("qwen3", "layer").weights
    layer = build(QWEN, "layer", config, with_experts, dtype=torch.float64)
    assert hasattr(layer.mlp, "experts")
    inner = config["intermediate_size"]
    dense = {name: tensor for name, tensor in with_experts.items() if not name.startswith("mlp.")}
    dense |= {f"mlp.{part}_proj.weight": torch.zeros(inner, 32, dtype=torch.float64) for part in ("gate", "up")}
    dense["mlp.down_proj.weight"] = torch.zeros(32, inner, dtype=torch.float64)
    assert not hasattr(build(QWEN, "layer", config, dense, dtype=torch.float64).mlp, "experts")
    with pytest.raises(ConfigError, match="no layer of this qwen3 config has a dense MLP"):
        build(QWEN, "layer", config_of("qwen3", "tiny"), dense, dtype=torch.float64)


def test_the_mode_is_as_asked() -> None:
    case = tiny_case("qwen3", "layer")
    assert not build(QWEN, "layer", case.config, case.weights, dtype=torch.float64).training
    assert build(QWEN, "layer", case.config, case.weights, dtype=torch.float64, training=True).mlp.training


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"model_type": "llama"}, "the config is one of 'llama', not of 'qwen3_moe'"),
        ({"num_experts_per_tok": "two"}, "num_experts_per_tok"),
        ({"hidden_act": "nope"}, "KeyError: 'nope'"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_its_reason(wrong: dict[str, Any], said: str) -> None:
    case = tiny_case("qwen3", "model")
    with pytest.raises(ConfigError, match=said):
        build(QWEN, "model", {**case.config, **wrong}, case.weights, dtype=torch.float64)


def test_token_ids_stop_no_gradient_and_are_no_trouble(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, _ = built("qwen3", "model", pad_token_id=1, eos_token_id=10**6)
    assert model.model.embed_tokens.padding_idx is None
    assert not caplog.records
    assert built("olmoe", "model")[0].model.embed_tokens.padding_idx is None  # OLMoE's config has one by default


def test_no_family_asks_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name, level in COMPONENTS:
        built(name, level)


def test_families_go_by_either_name_and_the_nearest_is_named() -> None:
    assert family("qwen3") is family("qwen3_moe") is QWEN
    with pytest.raises(ConfigError) as caught:
        family("mixtrl")
    assert "Did you mean 'mixtral'?" in str(caught.value.hint)

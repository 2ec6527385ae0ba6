"""What is recorded is what it says it is, and nobody listens once the context has ended."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moectl.hf import attention
from moectl.hf.build import build
from moectl.hf.family import FAMILIES
from moectl.parity.capture import captured
from moectl.parity.case import Case
from moectl.parity.families import formula_of
from moectl.parity.hugging_face import HuggingFace
from moectl.parity.lift import lifted
from moectl.parity.tape import Tape
from tests.parity.hf_cases import COMPONENTS, EVERY, WHOLE, tiny_case

#: Some hundred float64 roundings of numbers of size one to ten, added up in another order.
FLOAT64 = 1e-12


def run(family: str, level: Any, **fields: Any) -> tuple[Tape, Case]:
    case = tiny_case(family, level, **fields)
    return HuggingFace(family).run(case), case


@pytest.mark.parametrize(("family", "level"), COMPONENTS)
def test_everything_is_finite_and_float64_under_the_lift(family: str, level: Any) -> None:
    tape, _ = run(family, level)
    for name, tensor in tape.items():
        assert tensor.dtype == (torch.bool if name.endswith("chosen") else torch.float64), name
        assert tensor.isfinite().all(), name
        assert not tensor.requires_grad


@pytest.mark.parametrize("family", EVERY)
def test_the_routed_sum_is_weights_times_expert_outputs(family: str) -> None:
    tape, case = run(family, "moe")
    weights, outputs = tape["mlp.weights"], tape["mlp.expert_outputs"]
    formula = formula_of(family, case.config)
    tokens, experts = 18, formula.router.num_experts
    assert outputs.shape == (tokens, experts, 32) and weights.shape == (tokens, experts)
    assert torch.allclose(tape["mlp.routed"].flatten(0, 1), torch.einsum("te,ted->td", weights, outputs), atol=FLOAT64)
    chosen = tape["mlp.chosen"]
    assert (chosen.sum(-1) == formula.router.top_k).all()
    assert torch.equal(weights != 0, chosen)
    assert tape["mlp.router_logits"].shape == (tokens, experts)
    shared = tape.get("mlp.shared", torch.zeros(()))
    assert torch.equal(tape["mlp.output"], tape["mlp.routed"] + shared)
    assert ("mlp.shared" in tape) == (formula.experts.shared != "none")
    if "mlp.shared" in tape:
        assert shared.abs().max() > 0.01


@pytest.mark.parametrize("family", EVERY)
def test_router_logits_are_the_gates_product_with_its_input(family: str) -> None:
    tape, case = run(family, "router")
    assert case.inputs.hidden is not None
    logits = case.inputs.hidden @ case.weights["weight"].T + case.weights.get("bias", 0)
    assert torch.allclose(tape["mlp.router_logits"], logits, rtol=0, atol=FLOAT64)
    assert tape["grad.input"].abs().max() > 0 and tape["grad.weight"].abs().max() > 0


@pytest.mark.parametrize("family", EVERY)
def test_an_experts_own_output_is_its_gated_mlp(family: str) -> None:
    tape, case = run(family, "moe")
    assert case.inputs.hidden is not None
    up_and_gate, down = case.weights["experts.gate_up_proj"], case.weights["experts.down_proj"]
    x = case.inputs.hidden.flatten(0, 1)
    for expert in range(len(down)):
        if family == "gpt_oss":
            inner = x @ up_and_gate[expert] + case.weights["experts.gate_up_proj_bias"][expert]
            gate, up = inner[:, ::2].clamp(max=7.0), inner[:, 1::2].clamp(-7.0, 7.0)
            out = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            out = out @ down[expert] + case.weights["experts.down_proj_bias"][expert]
        else:
            gate, up = (x @ up_and_gate[expert].T).chunk(2, dim=-1)
            out = (F.silu(gate) * up) @ down[expert].T
        assert torch.allclose(tape["mlp.expert_outputs"][:, expert], out, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("family", WHOLE)
def test_the_residual_stream_adds_up_and_leads_from_layer_to_layer(family: str) -> None:
    tape, case = run(family, "model")
    stream = tape["embeddings"]
    assert torch.equal(stream, case.weights["model.embed_tokens.weight"][case.inputs.input_ids])
    for layer in range(3):
        at = f"layers.{layer}."
        assert torch.equal(tape[at + "attn.residual"], stream + tape[at + "attn.output"])
        assert torch.equal(tape[at + "mlp.residual"], tape[at + "attn.residual"] + tape[at + "mlp.output"])
        stream = tape[at + "mlp.residual"]
        norm = case.weights[f"model.{at}input_layernorm.weight"]
        previous = tape["embeddings"] if layer == 0 else tape[f"layers.{layer - 1}.mlp.residual"]
        assert torch.allclose(tape[at + "attn.input"], rms(previous, norm, case), rtol=0, atol=FLOAT64)
        norm = case.weights[f"model.{at}post_attention_layernorm.weight"]
        assert torch.allclose(tape[at + "mlp.input"], rms(tape[at + "attn.residual"], norm, case), rtol=0, atol=FLOAT64)
    normed = rms(stream, case.weights["model.norm.weight"], case)
    assert torch.allclose(tape["final_norm"], normed, rtol=0, atol=FLOAT64)
    logits = normed @ case.weights["lm_head.weight"].T
    assert torch.allclose(tape["logits"], logits, rtol=0, atol=FLOAT64)
    assert case.inputs.labels is not None
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), case.inputs.labels[:, 1:].flatten())
    assert abs(float(tape["loss"] - loss)) < FLOAT64


def rms(x: Tensor, weight: Tensor, case: Case) -> Tensor:
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + case.config["rms_norm_eps"]).rsqrt()


@pytest.mark.parametrize("family", WHOLE)
def test_attention_adds_up_from_its_recorded_parts(family: str) -> None:
    tape, case = run(family, "attention")
    formula = formula_of(family, case.config).attention
    places = torch.arange(9, dtype=torch.float64)
    angles = places[:, None] * formula.rope_theta ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    cos, sin = (table.repeat(1, 2) for table in (angles.cos(), angles.sin()))
    assert torch.allclose(tape["rope.cos"], cos.expand(2, 9, 8), rtol=0, atol=FLOAT64)
    assert torch.allclose(tape["rope.sin"], sin.expand(2, 9, 8), rtol=0, atol=FLOAT64)
    for name, heads in (("q", formula.num_heads), ("k", formula.num_kv_heads)):
        before, after = tape[f"attn.{name}"], tape[f"attn.{name}_rotated"]
        assert before.shape == (2, heads, 9, 8)
        left, right = before.chunk(2, dim=-1)
        assert torch.allclose(after, before * cos + torch.cat([-right, left], -1) * sin, rtol=0, atol=FLOAT64)
        assert torch.allclose(before.norm(dim=-1), after.norm(dim=-1), rtol=FLOAT64)
        assert (before - after).abs().max() > 0.1
    assert tape["attn.v"].shape == (2, formula.num_kv_heads, 9, 8)
    heads = F.scaled_dot_product_attention(
        tape["attn.q_rotated"], tape["attn.k_rotated"], tape["attn.v"], is_causal=True, enable_gqa=True
    )
    assert torch.allclose(tape["attn.heads"], heads.transpose(1, 2).flatten(2), rtol=0, atol=FLOAT64)
    bias = case.weights.get("o_proj.bias", torch.zeros(()))
    output = tape["attn.heads"] @ case.weights["o_proj.weight"].T + bias
    assert torch.allclose(tape["attn.output"], output, rtol=0, atol=FLOAT64)


def test_olmoe_records_queries_as_they_are_after_its_clamp() -> None:
    tape, _ = run("olmoe", "attention", config={"clip_qkv": 0.5})
    free, _ = run("olmoe", "attention")
    for name in ("attn.q", "attn.k", "attn.v"):
        assert torch.equal(tape[name], free[name].clamp(-0.5, 0.5)), name
        assert free[name].abs().max() > 0.5


@pytest.mark.parametrize("family", ["qwen3", "qwen2_moe"])
def test_a_dense_layer_has_no_routing(family: str) -> None:
    tape, _ = run(family, "model", config={"mlp_only_layers": [1]})
    assert "layers.0.mlp.router_logits" in tape and "layers.2.mlp.router_logits" in tape
    dense = [name.removeprefix("layers.1.mlp.") for name in tape if name.startswith("layers.1.mlp.")]
    assert dense == ["input", "output", "residual"]
    assert "grad.model.layers.1.mlp.gate_proj.weight" in tape


def test_no_hook_or_listener_stays_after_a_run_or_a_failure() -> None:
    case = tiny_case("qwen2_moe", "model")
    model = build(FAMILIES["qwen2_moe"], "model", case.config, case.weights, dtype=case.dtype)
    family = FAMILIES["qwen2_moe"]
    with captured(family, "model", model, shape=(2, 9)):
        assert any(module._forward_hooks for module in model.modules())
        assert attention._listeners and model.config._attn_implementation == attention.LISTENED
        model(case.inputs.input_ids)
    _nothing_on(model)
    with pytest.raises(RuntimeError, match="stop"), captured(family, "model", model, shape=(2, 9)):
        raise RuntimeError("stop")
    _nothing_on(model)
    with pytest.raises(AttributeError), captured(FAMILIES["olmoe"], "model", model, shape=(2, 9)):
        pass  # half of the hooks were registered when one found no q_norm
    _nothing_on(model)


def _nothing_on(model: Any) -> None:
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not attention._listeners
    assert model.config._attn_implementation == "eager"
    assert torch.get_default_dtype() == torch.float32


class _ReturnsProbabilities(Qwen3MoeTopKRouter):
    """The router as transformers had it from 5.0 to 5.5: the first thing it returns is a softmax."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, indices = super().forward(hidden_states)
        return logits.softmax(dim=-1), weights, indices


def test_router_logits_are_raw_even_where_a_release_returns_probabilities() -> None:
    case = tiny_case("qwen3", "moe")
    family = FAMILIES["qwen3"]
    expected = HuggingFace("qwen3").run(case)
    with lifted():
        module = build(family, "moe", case.config, case.weights, dtype=case.dtype)
        module.gate.__class__ = _ReturnsProbabilities
        with captured(family, "moe", module, shape=(2, 9)) as capture:
            module(case.inputs.hidden)
    assert torch.equal(capture.tape()["mlp.router_logits"], expected["mlp.router_logits"])
    assert torch.equal(capture.tape()["mlp.weights"], expected["mlp.weights"])


def test_a_tensor_is_recorded_as_it_was_before_a_block_changes_it_in_place() -> None:
    case = tiny_case("mixtral", "layer", gradients=False)
    config = {**case.config, "router_jitter_noise": 0.5}  # in training, the block multiplies its input by noise
    noisy = HuggingFace("mixtral").run(replace(case, config=config, training=True))
    quiet = HuggingFace("mixtral").run(replace(case, config=config))
    normed = rms(noisy["attn.residual"], case.weights["post_attention_layernorm.weight"], case)
    assert torch.allclose(noisy["mlp.input"], normed, rtol=0, atol=FLOAT64)
    assert torch.equal(noisy["mlp.input"], quiet["mlp.input"])
    assert (noisy["mlp.router_logits"] - quiet["mlp.router_logits"]).abs().max() > 0.01, "noise is for training"

"""moectl's own modules against Hugging Face's: every tensor, every gradient.

Tolerances are the comparison's own: 1e-10 of a tensor's largest value in float64 (measured: below 1e-14),
1e-5 in float32 (measured: below 2e-6).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moectl.errors import ConfigError
from moectl.hf.decoder_config import decoder_config
from moectl.models.decoder import Decoder
from moectl.moe.losses import load_balancing_loss
from moectl.parity.case import Case, Unsupported
from moectl.parity.compare import Comparison, compare
from moectl.parity.hugging_face import HuggingFace, rerouted_by
from moectl.parity.own import Own
from moectl.parity.own_build import build, own_name
from moectl.parity.own_capture import expert_outputs
from tests.parity.hf_cases import tiny_case

DTYPES = [torch.float64, torch.float32]
LEVELS = ["model", "layer", "moe", "attention", "router"]
OTHERS = ["mixtral", "olmoe", "qwen2_moe", "deepseek_v3"]
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0] * 9])
LEFT = torch.tensor([[False] * 4 + [True] * 5, [True] * 9])


def held(case: Case, family: str = "qwen3", backend: str = "grouped") -> Comparison:
    comparison = compare(HuggingFace(family).run(case), Own(family, backend).run(case), case)
    assert comparison.ok, comparison.first
    assert not comparison.ties
    return comparison


def not_compared(comparison: Comparison) -> list[str]:
    return [row.name for row in comparison.rows if row.verdict == "not compared"]


def scored(case: Case, mask: Tensor) -> Tensor:
    """Labels whose predicting token is real, too: what padding predicts is nobody's concern."""
    assert case.inputs.input_ids is not None
    predicted = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1) & mask
    return case.inputs.input_ids.masked_fill(~predicted, -100)


# --- every component, dtype and backend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["loop", "grouped", "full"])
@pytest.mark.parametrize("level", LEVELS)
def test_qwen3_is_ours(level: Any, backend: str, dtype: torch.dtype) -> None:
    comparison = held(tiny_case("qwen3", level, dtype=dtype), backend=backend)
    assert not_compared(comparison) == [], "each tensor and gradient that one side has, the other has"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("level", ["moe", "router"])
@pytest.mark.parametrize("family", OTHERS)
def test_other_families_moe_and_router(family: str, level: Any, backend: str, dtype: torch.dtype) -> None:
    assert not_compared(held(tiny_case(family, level, dtype=dtype), family, backend)) == []


@pytest.mark.parametrize(
    ("family", "level", "reason"),
    [
        ("mixtral", "model", "moectl's decoder is a Qwen3-MoE, no mixtral"),
        ("olmoe", "attention", "moectl's decoder is a Qwen3-MoE, no olmoe"),
        ("qwen2_moe", "layer", "moectl's decoder is a Qwen3-MoE, no qwen2_moe"),
        ("gpt_oss", "router", "adds a bias to its logits"),
        ("gpt_oss", "moe", "adds a bias to its logits"),
    ],
)
def test_what_moectl_has_not_is_said(family: str, level: Any, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        Own(family).run(tiny_case(family, level))


# --- configs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "config",
    [
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 1, "norm_topk_prob": False},
        {"num_experts_per_tok": 8},
        {"num_experts_per_tok": 8, "norm_topk_prob": False},
        {"norm_topk_prob": False},
        {"decoder_sparse_step": 2},
        {"mlp_only_layers": [0, 2]},
        {"mlp_only_layers": [0, 1, 2]},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rms_norm_eps": 1e-2},
        {"output_router_logits": True, "router_aux_loss_coef": 0.5},
        {"head_dim": 6},
        {"eos_token_id": [1, 2]},
    ],
    ids=str,
)
def test_configs(config: dict[str, Any], dtype: torch.dtype) -> None:
    assert not_compared(held(tiny_case("qwen3", "model", config=config, dtype=dtype))) == []


def test_a_dense_layer_alone() -> None:
    case = tiny_case("qwen3", "layer", config={"mlp_only_layers": [0]})
    assert "mlp.gate_proj.weight" in case.weights
    held(case)


@pytest.mark.parametrize(
    "config",
    [{"n_group": 4, "topk_group": 2}, {"norm_topk_prob": False}, {"routed_scaling_factor": 3.5}],
    ids=str,
)
def test_groups_and_scaling_of_deepseek(config: dict[str, Any]) -> None:
    for level in ("moe", "router"):
        held(tiny_case("deepseek_v3", level, config=config), "deepseek_v3")


# --- inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("more", [{}, {"doc_ids": DOCUMENTS}, {"chunks": (5, 1, 3)}], ids=["", "documents", "chunks"])
def test_padding(side: str, more: dict[str, Any], dtype: torch.dtype) -> None:
    mask = LEFT if side == "left" else LEFT.flip(1)
    case = tiny_case("qwen3", "model", dtype=dtype)
    labels = scored(case, mask)
    held(tiny_case("qwen3", "model", dtype=dtype, inputs={"attention_mask": mask, "labels": labels, **more}))


@pytest.mark.parametrize("level", ["layer", "moe", "attention"])
def test_padding_of_a_part(level: Any) -> None:
    cotangent = tiny_case("qwen3", level).inputs.cotangent * LEFT[:, :, None]
    held(tiny_case("qwen3", level, inputs={"attention_mask": LEFT, "cotangent": cotangent}))


@pytest.mark.parametrize("level", ["model", "layer", "attention"])
@pytest.mark.parametrize("restart", [False, True])
def test_documents(level: Any, restart: bool) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3], list(range(9))]) if restart else None
    held(tiny_case("qwen3", level, inputs={"doc_ids": DOCUMENTS, "positions": positions}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunks", [(9,), (1,) * 9, (5, 4), (1, 8), (4, 1, 1, 3)], ids=str)
def test_chunks_through_the_cache(chunks: tuple[int, ...], dtype: torch.dtype) -> None:
    """Gradients through the cache, too; and the tape of a chunked run is that of the whole sequence."""
    held(tiny_case("qwen3", "model", dtype=dtype, inputs={"chunks": chunks}))
    whole = tiny_case("qwen3", "model", dtype=dtype)
    cut = tiny_case("qwen3", "model", dtype=dtype, inputs={"chunks": chunks})
    assert compare(Own("qwen3").run(whole), Own("qwen3").run(cut), whole).ok


def test_documents_are_not_cached() -> None:
    with pytest.raises(Unsupported, match="one document per row"):
        Own("qwen3").run(tiny_case("qwen3", "model", inputs={"chunks": (5, 4), "doc_ids": DOCUMENTS}))


@pytest.mark.parametrize("level", ["layer", "moe", "attention"])
def test_input_that_is_not_contiguous(level: Any) -> None:
    hidden = tiny_case("qwen3", level).inputs.hidden
    assert hidden is not None
    strided = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    held(tiny_case("qwen3", level, inputs={"hidden": strided}))


@pytest.mark.parametrize(("batch", "length"), [(1, 2), (1, 64), (5, 3)])
def test_sizes(batch: int, length: int) -> None:
    held(tiny_case("qwen3", "model", batch=batch, length=length))


def test_one_token_has_logits_and_no_loss() -> None:
    comparison = held(tiny_case("qwen3", "model", batch=1, length=1, inputs={"labels": None}))
    assert "logits" in {row.name for row in comparison.rows if row.ok}


@pytest.mark.parametrize("level", LEVELS)
def test_training_mode_is_the_same(level: Any) -> None:
    held(tiny_case("qwen3", level, training=True))
    assert build("qwen3", tiny_case("qwen3", level, training=True), "grouped").module.training
    assert not build("qwen3", tiny_case("qwen3", level), "grouped").module.training


def test_logits_beyond_exponents() -> None:
    """Router logits of ±80 and more: choices by logits and weights without a quotient that underflows."""
    case = tiny_case("qwen3", "moe")
    weights = {name: 40 * w if name == "gate.weight" else w for name, w in case.weights.items()}
    comparison = held(tiny_case("qwen3", "moe", weights=weights))
    assert comparison.rows[0].name == "mlp.router_logits"
    assert Own("qwen3").run(tiny_case("qwen3", "moe", weights=weights))["mlp.router_logits"].abs().max() > 80


# --- compiled


@pytest.mark.parametrize("level", ["moe", "attention"])
def test_compiled_parts(level: Any) -> None:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    case = tiny_case("qwen3", level, dtype=torch.float32, compiled=True)
    assert not_compared(held(case)) == []
    plain = tiny_case("qwen3", level, dtype=torch.float32)
    ours, other = Own("qwen3").run(case), Own("qwen3").run(plain)
    assert list(ours) == list(other)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_it_is_said(compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None at all, and one that compiles nothing; with an empty cache, or nothing would be compiled."""
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    case = tiny_case("qwen3", "attention", dtype=torch.float32, compiled=True)
    broken = config.patch({"cpp.cxx": (compiler,), "force_disable_caches": True})
    with broken, pytest.raises(Unsupported, match=r"C\+\+ compiler"):
        Own("qwen3").run(case)


# --- routes


@pytest.mark.parametrize("level", ["model", "layer", "moe", "router"])
def test_another_sides_routes_are_taken(level: Any) -> None:
    """Routes that neither side would choose: both compute with them, and with weights of their own logits."""
    case = tiny_case("qwen3", level)
    asked: list[int] = []

    def reroute(layer: int, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(layer)
        worst_TK = logits_TE.topk(2, largest=False).indices
        return logits_TE.softmax(-1).gather(1, worst_TK), worst_TK

    ours = Own("qwen3").run(case, reroute)
    assert sorted(set(asked)) == ([0, 1, 2] if level == "model" else [0])
    theirs = HuggingFace("qwen3").run(case, reroute)
    rows = {row.name: row for row in compare(theirs, ours, case).rows if row.name != "balance_loss"}
    assert all(row.ok for row in rows.values()), [row for row in rows.values() if not row.ok]
    free = Own("qwen3").run(case)
    name = "layers.0.mlp.chosen" if level == "model" else "mlp.chosen"
    assert not torch.equal(free[name], ours[name])


def test_bfloat16_follows_the_references_routes() -> None:
    """2⁻⁸ per rounding, three layers: within 3 % of the largest logit, and with the very experts of the other side."""
    case = tiny_case("qwen3", "model", dtype=torch.bfloat16)
    theirs = HuggingFace("qwen3").run(case)
    ours = Own("qwen3").run(case, rerouted_by(theirs, case))
    for layer in range(3):
        assert torch.equal(ours[f"layers.{layer}.mlp.chosen"], theirs[f"layers.{layer}.mlp.chosen"])
    error = (ours["logits"].double() - theirs["logits"].double()).abs().max()
    assert error <= 0.03 * theirs["logits"].abs().max()
    assert ours["logits"].dtype == torch.bfloat16


def test_padding_stays_unrouted_under_another_sides_routes() -> None:
    case = tiny_case("qwen3", "moe", inputs={"attention_mask": LEFT})
    ours = Own("qwen3").run(case, lambda _, logits: (torch.ones(18, 2).double(), torch.tensor([[0, 1]] * 18)))
    assert ours["mlp.chosen"].any(1).tolist() == LEFT.flatten().tolist()
    assert not ours["mlp.weights"][~LEFT.flatten()].any()


# --- what is recorded


def test_balance_loss_is_ours_of_all_layers_pooled_times_k() -> None:
    """Theirs = k · ours(all layers' tokens as one layer's): which is not k times the mean of our losses per layer."""
    case = tiny_case("qwen3", "model")
    tape = HuggingFace("qwen3").run(case)
    layers = [tape[f"layers.{n}.mlp.router_logits"] for n in range(3)]
    logits_TE = torch.cat(layers)
    probs_TE = logits_TE.softmax(-1)
    pooled = load_balancing_loss(probs_TE, probs_TE.topk(2).indices, 8)
    torch.testing.assert_close(tape["balance_loss"], 2 * pooled, rtol=1e-12, atol=0)
    apart = [load_balancing_loss(p, p.topk(2).indices, 8) for p in (logits.softmax(-1) for logits in layers)]
    assert abs(2 * torch.stack(apart).mean() - tape["balance_loss"]) > 1e-3


def test_expert_outputs_are_what_each_expert_makes_of_each_token() -> None:
    case = tiny_case("qwen3", "moe")
    for backend in ("loop", "grouped"):
        built = build("qwen3", case, backend)
        x_TD = torch.randn(5, 32, dtype=torch.float64)
        found = expert_outputs(built.module.experts, x_TD)  # type: ignore[arg-type]
        assert found.shape == (5, 8, 32)
        for expert in range(8):
            one = built.module.experts.one(expert, x_TD)  # type: ignore[union-attr, operator]
            torch.testing.assert_close(found[:, expert], one.detach(), rtol=0, atol=1e-13)


def test_the_case_is_left_as_it_was() -> None:
    for level in ("model", "layer", "moe", "router"):
        case = tiny_case("deepseek_v3" if level in ("moe", "router") else "qwen3", level, training=True)
        before = {name: tensor.clone() for name, tensor in case.weights.items()}
        hidden = None if case.inputs.hidden is None else case.inputs.hidden.clone()
        Own(case.config["model_type"]).run(case)
        for name, tensor in case.weights.items():
            assert torch.equal(tensor, before[name]) and not tensor.requires_grad and tensor.grad is None, name
        if hidden is not None and case.inputs.hidden is not None:
            assert torch.equal(case.inputs.hidden, hidden) and not case.inputs.hidden.requires_grad
    assert torch.get_default_dtype() == torch.float32


def test_weights_are_assigned_and_not_copied() -> None:
    case = tiny_case("qwen3", "model")
    built = build("qwen3", case, "grouped")
    assert built.parameters.keys() == case.weights.keys()
    for name, parameter in built.parameters.items():
        assert parameter.data_ptr() == case.weights[name].data_ptr(), name
    tied = build("qwen3", tiny_case("qwen3", "model", config={"tie_word_embeddings": True}), "grouped")
    assert isinstance(tied.module, Decoder)
    assert tied.module.lm_head.weight is tied.module.embed_tokens.weight


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_the_backend_is_the_one_asked_for(backend: str) -> None:
    for level in ("model", "layer", "moe"):
        built = build("qwen3", tiny_case("qwen3", level), backend)
        used = [m.backend for m in built.module.modules() if hasattr(m, "backend")]
        assert used and set(used) == {backend}
    assert backend in Own("qwen3", backend).name


def test_frozen_parameters_get_no_gradient_and_the_others_the_same() -> None:
    case = tiny_case("qwen3", "layer")
    all_of_them, without = Own("qwen3").run(case), Own("qwen3", frozen=("mlp.experts.",)).run(case)
    left = {name for name in all_of_them if name.startswith("grad.mlp.experts.")}
    assert len(left) == 2
    assert set(without) == set(all_of_them) - left
    for name, tensor in without.items():
        torch.testing.assert_close(tensor, all_of_them[name], rtol=0, atol=1e-13)


def test_no_gradients_unless_asked_for() -> None:
    tape = Own("qwen3").run(tiny_case("qwen3", "model", gradients=False))
    assert "loss" in tape and not any(name.startswith("grad.") for name in tape)


def test_weights_that_do_not_fit_are_all_named() -> None:
    case = tiny_case("qwen3", "moe")
    weights = {**case.weights, "gate.weight": torch.zeros(8, 31).double(), "experts.more": torch.zeros(1)}
    del weights["experts.down_proj"]
    with pytest.raises(ConfigError) as error:
        Own("qwen3").run(tiny_case("qwen3", "moe", weights=weights))
    for part in ("missing: experts.down_proj", "unknown: experts.more", "router.weight [8, 31] for [8, 32]"):
        assert part in str(error.value)


def test_names() -> None:
    assert own_name("gate.e_score_correction_bias") == "router.expert_bias"
    assert own_name("e_score_correction_bias") == "expert_bias"
    assert own_name("shared_expert.up_proj.weight") == "shared_experts.mlp.up_proj.weight"
    assert own_name("shared_expert_gate.weight") == "shared_experts.gate.weight"
    assert own_name("shared_experts.up_proj.weight") == "shared_experts.up_proj.weight"


def test_the_decoders_of_a_case_and_of_training_are_one() -> None:
    """What is compared is the module that `moectl train` trains, not a relative of it."""
    case = tiny_case("qwen3", "model")
    module = build("qwen3", case, "grouped").module
    assert type(module) is Decoder
    assert module.config == decoder_config({**case.config, "eos_token_id": None})

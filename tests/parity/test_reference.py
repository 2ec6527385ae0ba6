"""The reference is what Hugging Face's own modules compute: every tensor and every gradient, in every family.

float64, both lifted: 1e-10 is the promise; found are sums in another order, 1e-14 at most. float32: 1e-5.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moectl.errors import ConfigError
from moectl.parity.case import Case, Inputs, Level, Unsupported
from moectl.parity.families import FAMILIES, config_of, formula_of, levels_of, random_weights
from moectl.parity.formula import Formula
from moectl.parity.hugging_face import HuggingFace
from moectl.parity.reference import FormulaSubject, run
from tests.parity.cases import DOCUMENTS, LEFT, case, error, with_inputs, worst

EXACT, SINGLE = 1e-10, 1e-5
COMPONENTS = [(family, level) for family in FAMILIES for level in levels_of(family)]
DECODERS = [family for family in FAMILIES if "model" in levels_of(family)]


def agree(family: str, given: Case, tolerance: float = EXACT) -> None:
    differences = worst(HuggingFace(family).run(given), FormulaSubject(family).run(given))
    assert {name: value for name, value in differences.items() if not value <= tolerance} == {}


def as_reference(formula: Formula) -> Formula:
    return replace(formula, casts="reference")


@pytest.mark.parametrize(("family", "level"), COMPONENTS)
def test_every_component(family: str, level: Level) -> None:
    agree(family, case(family, level))


@pytest.mark.parametrize(("family", "level"), COMPONENTS)
def test_with_hugging_faces_own_casts(family: str, level: Level) -> None:
    """Not lifted: softmax, norms, tables and losses in float32 within a float64 model, and rounded alike."""
    given = case(family, level)
    plain = HuggingFace(family, lift=False).run(given)
    anchored = FormulaSubject(family, as_reference).run(given)
    assert max(worst(plain, anchored).values()) <= EXACT
    exact = FormulaSubject(family).run(given)
    if level in ("model", "layer", "attention") or formula_of(family, given.config).router.score != "softmax_chosen":
        assert max(worst(plain, exact).values()) > 1e-9  # the casts do show


@pytest.mark.parametrize(("family", "level"), COMPONENTS)
def test_float32(family: str, level: Level) -> None:
    agree(family, case(family, level, dtype=torch.float32), SINGLE)


@pytest.mark.parametrize("level", ["model", "layer", "attention"])
@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize(
    "inputs",
    [
        {"attention_mask": LEFT},
        {"attention_mask": LEFT.flip(1)},
        {"doc_ids": DOCUMENTS},
        {"doc_ids": DOCUMENTS, "attention_mask": LEFT},
        {"positions": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], list(range(40, 49))])},
    ],
    ids=["left", "right", "documents", "documents and padding", "positions"],
)
def test_masks_and_positions(family: str, level: Level, inputs: dict[str, Any]) -> None:
    agree(family, case(family, level, **inputs))


@pytest.mark.parametrize("family", DECODERS)
def test_chunks_are_the_full_forward(family: str) -> None:
    agree(family, case(family, "model", chunks=(4, 1, 1, 3)))


@pytest.mark.parametrize("family", DECODERS)
def test_training_changes_nothing(family: str) -> None:
    agree(family, replace(case(family, "model"), training=True))


@pytest.mark.parametrize(("family", "level"), COMPONENTS)
def test_one_token(family: str, level: Level) -> None:
    given = case(family, level, shape=(1, 1))
    if level == "model":  # one token has no next one: without labels there is no loss
        given = with_inputs(given, labels=None)
    agree(family, given)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", ["one", "all"])
def test_top_k(family: str, number: str) -> None:
    """All: of those that may be chosen, which in DeepSeek-V3 are two groups' four."""
    top_k = 1 if number == "one" else 4 if family == "deepseek_v3" else 8
    for level in ("moe", "router"):
        agree(family, case(family, level, {"num_experts_per_tok": top_k}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "level", "config"),
    [
        ("qwen3", "model", {"norm_topk_prob": False}),
        ("qwen3", "model", {"mlp_only_layers": [1]}),
        ("qwen3", "model", {"decoder_sparse_step": 2}),
        ("qwen3", "model", {"mlp_only_layers": [0, 1, 2]}),
        ("qwen3", "model", {"tie_word_embeddings": True}),
        ("qwen3", "model", {"attention_bias": True}),
        ("qwen3", "model", {"output_router_logits": True, "router_aux_loss_coef": 0.5}),
        ("qwen3", "model", {"head_dim": 16}),
        ("qwen3", "model", {"num_key_value_heads": 1, "rms_norm_eps": 1e-2}),
        ("qwen3", "model", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("qwen3", "layer", {"hidden_act": "gelu"}),
        ("qwen3", "layer", {"hidden_act": "gelu_pytorch_tanh"}),
        ("qwen3", "layer", {"hidden_act": "relu"}),
        ("qwen3", "layer", {"hidden_act": "sigmoid"}),
        ("mixtral", "model", {"output_router_logits": True, "tie_word_embeddings": True}),
        ("olmoe", "model", {"norm_topk_prob": True, "clip_qkv": None}),
        ("olmoe", "model", {"attention_bias": True, "num_key_value_heads": 4}),
        ("qwen2_moe", "model", {"norm_topk_prob": True, "mlp_only_layers": [2]}),
        ("qwen2_moe", "model", {"qkv_bias": False, "output_router_logits": True}),
        ("deepseek_v3", "moe", {"n_group": 1, "topk_group": 1}),
        ("deepseek_v3", "moe", {"norm_topk_prob": False, "n_shared_experts": 2, "routed_scaling_factor": 1.0}),
    ],
)
def test_configs(family: str, level: Level, config: dict[str, Any]) -> None:
    agree(family, case(family, level, config))


def test_padding_in_the_balance_loss() -> None:
    given = case("qwen3", "model", {"output_router_logits": True, "router_aux_loss_coef": 0.5}, attention_mask=LEFT)
    agree("qwen3", given)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_layer_is_what_its_weights_are(kind: str) -> None:
    config = config_of("qwen3", "tiny") | {"mlp_only_layers": [1]}
    layer = 1 if kind == "dense" else 0
    weights = random_weights(formula_of("qwen3", config), "layer", seed=0, dtype=torch.float64, layer=layer)
    given = replace(case("qwen3", "layer", {"mlp_only_layers": [1]}), weights=weights)
    agree("qwen3", given)
    assert ("mlp.router_logits" in FormulaSubject("qwen3").run(given)) == (kind == "moe")


@pytest.mark.parametrize("family", DECODERS)
def test_routes_of_another_side(family: str) -> None:
    """A route that neither side would take: the last expert with 0.7 and the first with -0.2 of its probability."""

    def reroute(layer: int, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        probs_TE = logits_TE.softmax(dim=-1)
        weights_TK = torch.stack([0.7 * probs_TE[:, -1 - layer], -0.2 * probs_TE[:, 0]], dim=-1)
        return weights_TK, torch.tensor([[logits_TE.shape[1] - 1 - layer, 0]]).expand(len(logits_TE), 2)

    given = case(family, "model")
    theirs, ours = HuggingFace(family).run(given, reroute), FormulaSubject(family).run(given, reroute)
    assert max(worst(theirs, ours).values()) <= EXACT
    assert ours["layers.1.mlp.chosen"].nonzero()[:, 1].unique().tolist() == [0, 6]


def test_gradients_by_finite_differences() -> None:
    """Independent of autograd: every weight's gradient along one direction, by central differences."""
    given = case("qwen3", "model", {"output_router_logits": True, "mlp_only_layers": [1]})
    tape = FormulaSubject("qwen3").run(given)
    generator, step = torch.Generator().manual_seed(5), 1e-6

    def objective(name: str, moved: Tensor) -> float:
        found = FormulaSubject("qwen3").run(replace(given, weights={**given.weights, name: moved}, gradients=False))
        return float(found["loss"] + 0.001 * found["balance_loss"])

    for name, weight in given.weights.items():
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        measured = (objective(name, weight + step * direction) - objective(name, weight - step * direction)) / (
            2 * step
        )
        assert measured == pytest.approx(float((tape[f"grad.{name}"] * direction).sum()), abs=2e-8), name


def test_what_the_tape_holds() -> None:
    tape = FormulaSubject("qwen3").run(case("qwen3", "model", {"mlp_only_layers": [1]}))
    assert tape["embeddings"].shape == (2, 9, 32)
    assert tape["rope.cos"].shape == tape["rope.sin"].shape == (2, 9, 8)
    assert tape["layers.0.attn.q"].shape == tape["layers.0.attn.q_rotated"].shape == (2, 4, 9, 8)
    assert tape["layers.0.attn.k"].shape == tape["layers.0.attn.v"].shape == (2, 2, 9, 8)
    assert tape["layers.2.mlp.expert_outputs"].shape == (18, 8, 32)
    assert tape["layers.2.mlp.chosen"].dtype == torch.bool
    assert tape["layers.2.mlp.chosen"].sum(dim=1).eq(2).all()
    assert tape["layers.2.mlp.weights"].sum(dim=1).allclose(torch.ones(18, dtype=torch.float64))
    assert "layers.1.mlp.router_logits" not in tape and "layers.1.mlp.output" in tape
    assert tape["loss"].shape == tape["balance_loss"].shape == ()


def test_padding_reaches_no_real_token() -> None:
    """What stands in the padding changes no real row, at the left or at the right."""
    for mask in (LEFT, LEFT.flip(1)):
        given = case("qwen3", "model", attention_mask=mask)
        other = given.inputs.input_ids.masked_fill(~mask, 7)  # type: ignore[union-attr]
        one, two = (
            FormulaSubject("qwen3").run(with_inputs(given, input_ids=ids)) for ids in (given.inputs.input_ids, other)
        )
        assert error(one["logits"][mask], two["logits"][mask]) == 0.0
        assert error(one["balance_loss"], two["balance_loss"]) == 0.0
    first_ids = given.inputs.input_ids[:1, :6]  # type: ignore[index]
    alone = FormulaSubject("qwen3").run(with_inputs(given, input_ids=first_ids, labels=None, attention_mask=None))
    assert error(one["logits"][:1, :6], alone["logits"]) < 1e-14


def test_the_case_is_left_alone() -> None:
    given = case("qwen3", "layer")
    before = {name: weight.clone() for name, weight in given.weights.items()}
    hidden = given.inputs.hidden.clone()  # type: ignore[union-attr]
    FormulaSubject("qwen3").run(given)
    assert all(torch.equal(before[name], weight) for name, weight in given.weights.items())
    assert torch.equal(hidden, given.inputs.hidden)  # type: ignore[arg-type]
    assert not any(weight.requires_grad for weight in given.weights.values())
    assert all(weight.grad is None for weight in given.weights.values())


def test_no_gradients_unless_asked_and_possible() -> None:
    given = case("qwen3", "moe")
    assert not any(name.startswith("grad.") for name in FormulaSubject("qwen3").run(replace(given, gradients=False)))
    assert not any(name.startswith("grad.") for name in FormulaSubject("qwen3").run(with_inputs(given, cotangent=None)))
    with torch.no_grad():
        assert "grad.input" in FormulaSubject("qwen3").run(given)


def test_weights_that_have_no_part_have_no_gradient() -> None:
    given = case("qwen3", "attention")
    tape = FormulaSubject("qwen3", lambda f: replace(f, attention=replace(f.attention, qk_norm="none"))).run(given)
    assert tape["grad.q_norm.weight"].shape == (8,) and not tape["grad.q_norm.weight"].any()
    constant = case("qwen3", "router", {"num_experts_per_tok": 1})  # one chosen and normalised: its weight is 1
    assert float(FormulaSubject("qwen3").run(constant)["grad.weight"].abs().max()) < 1e-15


def test_changed_weights_have_gradients_of_the_given_ones() -> None:
    given = case("qwen3", "moe")
    order = torch.tensor([3, 0, 1, 2, 7, 6, 5, 4])

    def permuted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value[order] if name.startswith("experts.") else value for name, value in weights.items()}

    def permutation(formula: Formula) -> Formula:
        return replace(formula, experts=replace(formula.experts, permutation=tuple(order.tolist())))

    by_weights = FormulaSubject("qwen3", change_weights=permuted).run(given)
    by_formula = FormulaSubject("qwen3", permutation).run(given)
    assert max(worst(by_weights, by_formula).values()) < 1e-14
    plain = FormulaSubject("qwen3").run(given)
    assert error(plain["grad.experts.down_proj"], by_weights["grad.experts.down_proj"]) > 0.1


def test_dtypes() -> None:
    given = case("qwen3", "layer", dtype=torch.float32)
    low = {name: weight.bfloat16() for name, weight in given.weights.items()}
    formula = formula_of("qwen3", given.config)
    assert {t.dtype for t in run(formula, low, given.inputs, level="layer").values()} == {torch.float32, torch.bool}
    wide = run(formula, low, given.inputs, level="layer", dtype=torch.float64)
    assert {t.dtype for t in wide.values()} == {torch.float64, torch.bool}
    native = run(as_reference(formula), low, given.inputs, level="layer")
    assert {t.dtype for t in native.values()} == {torch.bfloat16, torch.bool}
    assert 1e-4 < error(wide["mlp.residual"], native["mlp.residual"]) < 0.05  # bfloat16 has 8 bits: 4e-3


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_attention_that_is_not_modelled(family: str) -> None:
    formula = formula_of(family, config_of(family, "tiny"))
    for level in ("model", "layer", "attention"):
        with pytest.raises(Unsupported, match="attention of"):
            run(formula, {}, Inputs(), level=level)  # type: ignore[arg-type]
        with pytest.raises(Unsupported, match="moe and router"):
            random_weights(formula, level, seed=0, dtype=torch.float32)  # type: ignore[arg-type]


def test_what_is_missing_is_named() -> None:
    given = case("qwen3", "layer")
    fewer = {name: weight for name, weight in given.weights.items() if name != "self_attn.q_norm.weight"}
    with pytest.raises(Unsupported, match=r"self_attn\.q_norm\.weight"):
        FormulaSubject("qwen3").run(replace(given, weights=fewer))
    with pytest.raises(Unsupported, match="hidden states"):
        FormulaSubject("qwen3").run(with_inputs(given, hidden=None))
    with pytest.raises(ConfigError, match="unknown family"):
        FormulaSubject("qwen4")


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_at_eighty(family: str, sign: int) -> None:
    """All near +80 or -80: probabilities saturate, and DeepSeek-V3's sum of sigmoids is less than its 1e-20."""
    given = case(family, "router", shape=(1, 1))
    h = given.inputs.hidden.flatten()  # type: ignore[union-attr]
    logits = sign * torch.linspace(78, 82, 8, dtype=torch.float64)
    given = replace(given, weights={**given.weights, "weight": logits[:, None] * h / (h @ h)})
    agree(family, given)
    weights = FormulaSubject(family).run(given)["mlp.weights"]
    if family == "deepseek_v3":
        assert (float(weights.sum()) < 1e-10) == (sign < 0)

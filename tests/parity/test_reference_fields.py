"""Every value of every field of a formula does what it says, and shows first where it should.

`CHANGES` names, for each value, the first tensor that it changes. What it changes it to is held against literal
definitions in `test_reference_attention.py` and `test_reference_moe.py`.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import pytest
import torch

from moectl.parity.case import Case, Level
from moectl.parity.families import formula_of, weight_shapes
from moectl.parity.formula import AttentionFormula, ExpertsFormula, Formula, NormFormula, RouterFormula
from moectl.parity.reference import FormulaSubject
from moectl.parity.tape import Tape, model_order
from tests.parity.cases import case, error

PARTS = {"attention": AttentionFormula, "router": RouterFormula, "experts": ExpertsFormula, "norm": NormFormula}
LEVEL: dict[str, Level] = {"attention": "attention", "router": "router", "experts": "moe", "norm": "layer", "": "model"}
ATOL = 1e-13
RESIDUALS = ("attn_residual", "mlp_residual")


class Change(NamedTuple):
    """One value of a field, beside what it takes for it to matter, and the first tensor that differs (None: none)."""

    field: str
    value: Any
    first: str | None
    base: dict[str, Any] = {}
    inputs: dict[str, Any] = {}


CHANGES = [
    Change("attention.rope_theta", 1e6, "rope.cos"),
    Change("attention.qk_norm", "flat", "attn.q"),
    Change("attention.qk_norm", "none", "attn.q"),
    Change("attention.qk_norm", "all_heads", "attn.q"),
    Change("attention.rope_table", "interleaved", "rope.cos"),
    Change("attention.rope_rotation", "neighbours", "attn.q_rotated"),
    Change("attention.rope_sign", "minus", "attn.q_rotated"),
    Change("attention.rope_sign", "none", "attn.q_rotated"),
    Change("attention.rope_offset", 1, "rope.cos"),
    Change("attention.rope_offset_of", "q", "rope.cos", {"attention.rope_offset": 1}),
    Change("attention.rope_offset_of", "k", "rope.cos", {"attention.rope_offset": 1}),
    Change("attention.rope", False, "attn.q_rotated"),
    Change("attention.rope_restarts", True, "rope.cos", inputs={"chunks": (4, 5)}),
    Change("attention.rope_restarts", True, None),
    Change("attention.v_rotated", True, "attn.heads"),
    Change("attention.scale", "hidden_size", "attn.heads"),
    Change("attention.scale", "one_over_head_dim", "attn.heads"),
    Change("attention.scale", "none", "attn.heads"),
    Change("attention.causal", False, "attn.heads"),
    Change("attention.causal_offset", 1, "attn.heads"),
    Change("attention.window", 3, "attn.heads"),
    Change("attention.window", 99, None),
    Change("attention.kv_repeat", "tiled", "attn.heads"),
    Change("attention.merge", "reshaped", "attn.heads"),
    Change("attention.split", "reshaped", "attn.q"),
    Change("attention.softmax_over", "queries", "attn.heads"),
    Change("attention.softmax_over", "heads", "attn.heads"),
    Change("attention.mask_on", "probabilities", "attn.heads"),
    Change("attention.bias", True, "attn.q"),
    Change("attention.out_bias", True, "attn.output"),
    Change("attention.clip_qkv", 0.5, "attn.q"),
    Change("router.score", "sigmoid", "mlp.weights"),
    Change("router.score", "softmax_chosen", None),  # the same as renormalising
    Change("router.score", "softmax_chosen", "mlp.weights", {"router.norm_topk": False}),
    Change("router.score", "softmax_twice", "mlp.weights"),
    Change("router.softmax_over", "tokens", "mlp.chosen"),
    Change("router.norm_topk", False, "mlp.weights"),
    Change("router.norm_all", True, None),  # renormalising the chosen undoes it
    Change("router.norm_all", True, None, {"router.norm_topk": False}),  # softmax sums to 1 already
    Change("router.norm_all", True, "mlp.weights", {"router.norm_topk": False, "router.score": "sigmoid"}),
    Change("router.choose", "smallest", "mlp.chosen"),
    Change("router.bias", True, "mlp.router_logits"),
    Change("router.choice_bias", True, "mlp.chosen"),
    Change("router.bias_weighs", True, None),
    Change("router.bias_weighs", True, "mlp.weights", {"router.choice_bias": True}),
    Change("router.groups", 4, "mlp.chosen"),
    Change("router.groups_kept", 2, "mlp.chosen", {"router.groups": 4}),
    Change("router.group_score", "max", "mlp.chosen", {"router.groups": 4, "router.score": "sigmoid"}),
    Change("router.group_mask", "zero", None, {"router.groups": 4}),
    Change("router.group_mask", "zero", "mlp.chosen", {"router.groups": 4, "router.choice_bias": True}),
    Change("router.scaling", 2.5, "mlp.weights"),
    Change("router.norm_epsilon", 0.1, "mlp.weights"),
    Change("router.dtype", "bfloat16", "mlp.router_logits"),
    Change("router.dtype", "float16", "mlp.router_logits"),
    Change("router.dtype", "float32", None),  # float32 means float32 at least
    Change("router.dtype", "float32", "mlp.router_logits", {"casts": "reference"}),
    Change("router.probs_dtype", "bfloat16", "mlp.weights"),
    Change("router.probs_dtype", "float16", "mlp.weights"),
    Change("router.probs_dtype", "float32", None),
    Change("router.softmax_dtype", "bfloat16", "mlp.weights"),
    Change("router.softmax_dtype", "float16", "mlp.weights"),
    Change("router.probs_stay", True, "mlp.weights", {"router.probs_dtype": "bfloat16"}),
    Change("router.probs_stay", True, "mlp.weights", {"router.softmax_dtype": "bfloat16"}),
    Change("router.probs_stay", True, None),
    Change("router.pairing", "sorted_indices", "mlp.weights"),
    Change("router.pairing", "reversed", "mlp.weights"),
    Change("router.pairing", "best", "mlp.weights"),
    Change("router.logit_scale", 0.5, "mlp.router_logits"),
    Change("experts.gate_up", "up_first", "mlp.expert_outputs"),
    Change("experts.gate_up", "interleaved", "mlp.expert_outputs"),
    *(Change("experts.activation", name, "mlp.expert_outputs") for name in ("gelu", "gelu_tanh", "relu", "sigmoid")),
    Change("experts.glu", "clamped", "mlp.expert_outputs"),
    Change("experts.alpha", 1.0, "mlp.expert_outputs", {"experts.glu": "clamped"}),
    Change("experts.limit", 0.5, "mlp.expert_outputs", {"experts.glu": "clamped"}),
    Change("experts.bias", True, "mlp.expert_outputs"),
    Change("experts.applied", "input", "mlp.routed"),
    Change("experts.applied", "none", "mlp.routed"),
    Change("experts.permutation", (1, 0, 2, 3, 4, 5, 6, 7), "mlp.expert_outputs"),
    Change("experts.permutation", tuple(range(8)), None),
    Change("experts.capacity", 2, "mlp.routed"),
    Change("experts.capacity", 18, None),
    Change("experts.capacity_order", "slots", "mlp.routed", {"experts.capacity": 2}),
    Change("experts.capacity_order", "weights", "mlp.routed", {"experts.capacity": 2}),
    Change("experts.offsets", "counts", "mlp.routed"),
    Change("experts.offsets", "counts_as_ends", "mlp.routed"),
    Change("experts.offset_rows", "added", "mlp.routed", {"experts.offsets": "counts"}),
    *(
        Change("experts.combined", value, "mlp.routed")
        for value in get_args(get_type_hints(ExpertsFormula)["combined"])
        if value != "added"
    ),
    Change("experts.shared", "added", "mlp.output"),
    Change("experts.shared", "sigmoid_gated", "mlp.output"),
    Change("norm.eps", 1e-2, "attn.input"),
    Change("norm.weight", "one_plus", "attn.input"),
    Change("norm.weight", "none", "attn.input"),
    Change("norm.dtype", "bfloat16", "attn.input"),
    Change("norm.dtype", "float16", "attn.input"),
    Change("norm.kind", "layer", "attn.input"),
    Change("norm.kind", "weight_only", "attn.input"),
    Change("norm.kind", "identity", "attn.input"),
    Change("norm.eps_place", "outside", "attn.input", {"norm.eps": 1e-2}),
    Change("norm.statistic_alone", True, "attn.input", {"norm.dtype": "bfloat16"}),
    Change("norm.statistic_alone", True, None),
    Change("norm.statistic_detached", True, "grad.input"),
    Change("norm.statistic_alone", True, None, {"norm.kind": "layer"}),
    Change("tie_embeddings", True, "logits"),
    Change("order", "post_norm", "layers.0.attn.input"),
    Change("order", "parallel", "layers.0.attn.residual"),
    *(
        Change("detached", (place,), "grad.input")
        for place in (*"qkv", "router_input", "weights", "normaliser", "expert_input", "expert_outputs", *RESIDUALS)
    ),
    Change("residual_attn", "normed", "layers.0.attn.residual"),
    Change("residual_attn", "none", "layers.0.attn.residual"),
    Change("residual_mlp", "normed", "layers.0.mlp.residual"),
    Change("residual_mlp", "none", "layers.0.mlp.residual"),
    Change("qk_norm_after_rope", True, "layers.0.attn.q"),
    Change("reshaped", ("q",), "layers.0.attn.q"),
    Change("reshaped", ("k",), "layers.0.attn.k"),
    Change("reshaped", ("v",), "layers.0.attn.v"),
    Change("reshaped", ("o",), "layers.0.attn.output"),
    Change("reshaped", ("router",), "layers.0.mlp.router_logits"),
    *(Change("reshaped", (role,), "layers.0.mlp.expert_outputs") for role in ("gate_up", "gate", "up", "down")),
    Change("reshaped", ("lm_head",), "logits"),
    Change("casts", "reference", "rope.cos"),
    Change("norms", (("attn", NormFormula(eps=1.0)),), "layers.0.attn.input"),
    Change("norms", (("q", NormFormula(kind="identity")),), "layers.0.attn.q"),
    Change("norms", (("k", NormFormula(weight="none")),), "layers.0.attn.k"),
    Change("norms", (("mlp", NormFormula(eps=1.0)),), "layers.0.mlp.input"),
    Change("norms", (("final", NormFormula(eps=1.0)),), "final_norm"),
    Change("moe_layers", (0, 2), "layers.1.mlp.output"),
    Change("balance_in_objective", True, "grad.input"),
    Change("balance_coef", 0.5, "grad.input", {"balance_in_objective": True}),
    Change("balance_coef", 0.5, None),
    Change("head_bias", True, "logits"),
    Change("padding_idx", 3, "grad.model.embed_tokens.weight"),
]
#: Sizes, and names: a wrong one is another model, or none. They are tested by the families, and the layout of
#: stacked weights beside the other literal definitions.
NOT_CHANGED = {
    *(f"attention.{name}" for name in ("num_heads", "num_kv_heads", "head_dim")),
    *("router.num_experts", "router.top_k", "experts.hidden_size", "experts.intermediate_size"),
    *("experts.shared_intermediate_size", "family", "attention", "router", "experts", "norm", "num_layers"),
    *("vocab_size", "dense_intermediate_size", "router_name", "experts.layout"),
}


def changed(formula: Formula, field: str, value: Any) -> Formula:
    part, _, name = field.rpartition(".")
    if not part:
        return replace(formula, **{name: value})
    return replace(formula, **{part: replace(getattr(formula, part), **{name: value})})


def given(level: Level, **inputs: Any) -> Case:
    """A Qwen3-MoE case whose weights have what other families' parts need as well, its MLPs dense and sparse."""
    made = case("qwen3", level, {"intermediate_size": 24}, **inputs)
    formula = formula_of("qwen3", made.config)
    formula = changed(changed(formula, "attention.bias", True), "attention.out_bias", True)
    formula = changed(changed(formula, "router.bias", True), "router.choice_bias", True)
    formula = changed(changed(formula, "experts.bias", True), "experts.shared_intermediate_size", 16)
    formula = replace(formula, head_bias=True)
    shapes: dict[str, tuple[int, ...]] = {}
    for shared in ("added", "sigmoid_gated"):
        for moe_layers in ((), (0, 1, 2)):
            whole = replace(changed(formula, "experts.shared", shared), moe_layers=moe_layers)
            shapes |= weight_shapes(whole, level) if level not in ("moe", "router") or moe_layers else {}
    generator = torch.Generator().manual_seed(9)
    extra = {
        name: 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
        if name not in made.weights
    }
    if level == "layer":
        extra = {name: value for name, value in extra.items() if not name.startswith(("mlp.gate_", "mlp.up_"))}
    for name in extra:
        if name.endswith("e_score_correction_bias"):
            extra[name] -= 0.2  # below zero for most: what group_mask="zero" trips over
    return replace(made, weights={**made.weights, **extra})


def computed(made: Case, *settings: tuple[str, Any]) -> Tape:
    def change(formula: Formula) -> Formula:
        for field, value in settings:
            formula = changed(formula, field, value)
        return formula

    return FormulaSubject("qwen3", change).run(made)


def first_difference(one: Tape, two: Tape) -> str | None:
    names = sorted((name for name in one if name in two), key=model_order)
    different = (name for name in names if one[name].shape != two[name].shape or error(one[name], two[name]) > ATOL)
    return next(different, None)


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: f"{c.field}={c.value}-{'-'.join(map(str, c.base.values()))}")
def test_a_value_shows_first_where_it_should(change: Change) -> None:
    part = change.field.rpartition(".")[0]
    made = given(LEVEL[part], **change.inputs)
    base = tuple(change.base.items())
    before, after = computed(made, *base), computed(made, *base, (change.field, change.value))
    assert first_difference(before, after) == change.first


def test_no_value_is_left_out() -> None:
    """A new field, or a new value of one, needs its line in CHANGES."""
    tested = {(c.field, c.value if not isinstance(c.value, tuple) else ()) for c in CHANGES}
    tested_fields = {field for field, _ in tested}
    for part, kind in {**PARTS, "": Formula}.items():
        hints = get_type_hints(kind)
        for field in fields(kind):
            name = f"{part}.{field.name}" if part else field.name
            if name in NOT_CHANGED:
                continue
            assert name in tested_fields, name
            if get_origin(hints[field.name]) is Literal:
                others = [value for value in get_args(hints[field.name]) if value != field.default]
                assert all((name, value) in tested for value in others), (name, others)
    assert {role for c in CHANGES if c.field == "reshaped" for role in c.value} == set(
        "q k v o router gate_up gate up down lm_head".split()
    )

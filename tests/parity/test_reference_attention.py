"""Attention and norms against definitions written out a second time, one pair, one query, one head at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moectl.parity.case import Unsupported
from moectl.parity.formula import Formula
from moectl.parity.reference import FormulaSubject
from moectl.parity.tape import Tape
from tests.parity.cases import DOCUMENTS, LEFT, case, error, worst
from tests.parity.test_reference_fields import computed, given

ATOL = 1e-13
H, G, P = 4, 2, 8


@pytest.mark.parametrize(
    ("table", "rotation"),
    [("halves", "halves"), ("interleaved", "neighbours")],
)
def test_rotation_is_a_complex_product(table: str, rotation: str) -> None:
    positions = torch.tensor([[0, 5, 2, 7, 1, 0, 3, 40, 9]])
    made = given("attention", positions=positions)
    tape = computed(made, ("attention.rope_table", table), ("attention.rope_rotation", rotation))
    angles = positions[0, :, None] * 10_000.0 ** (-torch.arange(P // 2, dtype=torch.float64) * 2 / P)
    for name in ("q", "k"):
        x = tape[f"attn.{name}"]
        first, second = x.chunk(2, dim=-1) if rotation == "halves" else (x[..., 0::2], x[..., 1::2])
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
        parts = (turned.real, turned.imag)
        expected = torch.cat(parts, -1) if rotation == "halves" else torch.stack(parts, -1).flatten(-2)
        assert error(tape[f"attn.{name}_rotated"], expected) < ATOL


def test_rotation_by_hand() -> None:
    """Signs and mixed layouts, number by number: pair (a, b), cosine and sine of their own places."""
    made = given("attention")
    for sign, (of_a, of_b) in {"plus": (-1, 1), "minus": (1, -1), "none": (1, 1)}.items():
        for table in ("halves", "interleaved"):
            for rotation in ("halves", "neighbours"):
                settings = {"rope_sign": sign, "rope_table": table, "rope_rotation": rotation}
                tape = computed(made, *((f"attention.{name}", value) for name, value in settings.items()))
                q, cos, sin = tape["attn.q"][1, 3, 6], tape["rope.cos"][1, 6], tape["rope.sin"][1, 6]
                for i in range(P // 2):
                    a, b = (i, i + P // 2) if rotation == "halves" else (2 * i, 2 * i + 1)
                    angle = 6 * 10_000.0 ** (-2 * (a % (P // 2) if table == "halves" else a // 2) / P)
                    assert float(cos[a]) == pytest.approx(math.cos(angle), abs=ATOL)
                    rotated = tape["attn.q_rotated"][1, 3, 6]
                    assert float(rotated[a]) == pytest.approx(float(q[a] * cos[a] + of_a * q[b] * sin[a]), abs=ATOL)
                    assert float(rotated[b]) == pytest.approx(float(q[b] * cos[b] + of_b * q[a] * sin[b]), abs=ATOL)


def test_positions_of_one_side_alone() -> None:
    made = given("attention")
    plain = computed(made)
    both = computed(made, ("attention.rope_offset", 3))
    for moved, still in (("q", "k"), ("k", "q")):
        one = computed(made, ("attention.rope_offset", 3), ("attention.rope_offset_of", moved))
        assert error(one[f"attn.{moved}_rotated"], both[f"attn.{moved}_rotated"]) == 0
        assert error(one[f"attn.{still}_rotated"], plain[f"attn.{still}_rotated"]) == 0
        assert error(one["rope.cos"], plain["rope.cos"]) == 0
    assert error(both["attn.heads"], plain["attn.heads"]) < ATOL  # only distances count
    turned = computed(made, ("attention.v_rotated", True), ("attention.scale", "none"))
    for moved, same in (("q", True), ("k", False)):  # values are rotated as keys are
        settings = (("attention.rope_offset", 3), ("attention.rope_offset_of", moved), ("attention.causal", True))
        one = computed(made, *settings, ("attention.v_rotated", True))
        first = one["attn.heads"][:, 0, :P]  # the first token sees itself alone: its own value
        assert (error(first, turned["attn.heads"][:, 0, :P]) < ATOL) == same


def test_positions_that_begin_anew() -> None:
    tape = computed(given("attention", chunks=(4, 3, 2)), ("attention.rope_restarts", True))
    plain = computed(given("attention", positions=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])))
    assert worst(plain, tape)["attn.k_rotated"] < ATOL


def heads(tape: Tape, rule: Any, allowed: Tensor, scale: float) -> Tensor:
    """``[B, H, S, P]``, one query at a time."""
    q, k, v = tape["attn.q_rotated"], tape["attn.k_rotated"], tape["attn.v"]
    logits = torch.empty(len(q), H, q.shape[2], q.shape[2], dtype=q.dtype)
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in logits.shape)).tolist():
        of = h % G if rule.kv_repeat == "tiled" else h * G // H
        logits[b, h, i, j] = q[b, h, i] @ k[b, of, j] * scale if allowed[b, i, j] else -math.inf
    over = {"keys": 3, "queries": 2, "heads": 1}[rule.softmax_over]
    if rule.softmax_over != "keys":  # a key that no head, or no query, sees has the same, lowest logit for each
        logits = logits.masked_fill(logits.isinf(), -1e300)
    weights = logits.softmax(dim=over)
    output = torch.zeros_like(q)
    for h in range(H):
        output[:, h] = weights[:, h] @ v[:, h % G if rule.kv_repeat == "tiled" else h * G // H]
    return output


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, P**-0.5),
        ({"kv_repeat": "tiled"}, P**-0.5),
        ({"merge": "reshaped"}, P**-0.5),
        ({"scale": "hidden_size"}, 32**-0.5),
        ({"scale": "one_over_head_dim"}, 1 / P),
        ({"scale": "none"}, 1.0),
        ({"softmax_over": "queries"}, P**-0.5),
        ({"softmax_over": "heads"}, P**-0.5),
        ({"causal": False}, P**-0.5),
        ({"causal_offset": 1}, P**-0.5),
    ],
    ids=str,
)
def test_attention_one_query_at_a_time(settings: dict[str, Any], scale: float) -> None:
    mask, documents = LEFT.flip(1), torch.tensor([[0] * 9, [0] * 4 + [1] * 5])
    made = given("attention", attention_mask=mask, doc_ids=documents)
    rules: list[Any] = []

    def change(formula: Formula) -> Formula:
        rules.append(replace(formula.attention, **settings))
        return replace(formula, attention=rules[-1])

    tape = FormulaSubject("qwen3", change).run(made)
    later = settings.get("causal_offset", 0) if settings.get("causal", True) else 9
    place = torch.arange(9)
    allowed = (place[None, :] <= place[:, None] + later) & mask[:, None] & (documents[:, :, None] == documents[:, None])
    output = heads(tape, rules[0], allowed, scale)
    flat = output.reshape(2, 9, H * P) if settings.get("merge") else output.transpose(1, 2).reshape(2, 9, H * P)
    assert error(tape["attn.heads"], flat) < ATOL
    assert error(tape["attn.output"], flat @ made.weights["o_proj.weight"].T) < ATOL


def test_masked_probabilities_do_not_sum_to_one() -> None:
    made = given("attention", doc_ids=DOCUMENTS)
    whole = computed(given("attention"), ("attention.causal", False))
    masked = computed(made, ("attention.mask_on", "probabilities"))
    assert error(whole["attn.q_rotated"], masked["attn.q_rotated"]) == 0
    q, k, v = whole["attn.q_rotated"][0, 1, 4], whole["attn.k_rotated"][0, 0], whole["attn.v"][0, 0]
    probs = (k @ q / P**0.5).softmax(dim=0)
    assert error(masked["attn.heads"][0, 4, P : 2 * P], probs[3:5] @ v[3:5]) < ATOL  # document 1 is 3, 4, 5, 6


def test_cut_without_transposing() -> None:
    made = given("attention")
    v = computed(made, ("attention.split", "reshaped"))["attn.v"]
    projected = made.inputs.hidden @ made.weights["v_proj.weight"].T  # type: ignore[operator]
    assert torch.equal(v.flatten(1), projected.flatten(1))


def test_q_and_k_norms() -> None:
    made = given("attention")
    plain = made.inputs.hidden @ made.weights["q_proj.weight"].T  # type: ignore[operator]
    weight = made.weights["q_norm.weight"]
    by_head = plain.view(2, 9, H, P)
    expected = {
        "none": by_head,
        "head": by_head * (by_head.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight,
        "all_heads": by_head * (plain.square().mean(-1) + 1e-6).rsqrt()[..., None, None] * weight,
    }
    for kind, value in expected.items():
        assert error(computed(made, ("attention.qk_norm", kind))["attn.q"], value.transpose(1, 2)) < ATOL
    flat = computed(
        replace(made, weights={**made.weights, "q_norm.weight": weight.repeat(H)}), ("attention.qk_norm", "flat")
    )
    assert error(flat["attn.q"], expected["all_heads"].transpose(1, 2)) < ATOL
    with pytest.raises(Unsupported, match="neither one head's nor all heads'"):
        computed(replace(made, weights={**made.weights, "q_norm.weight": weight[:3]}))
    after = computed(made, ("qk_norm_after_rope", True))
    x = computed(made, ("attention.qk_norm", "none"))["attn.q_rotated"]
    assert error(after["attn.q"], by_head.transpose(1, 2)) < ATOL
    assert error(after["attn.q_rotated"], x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight) < ATOL


def test_norms() -> None:
    made = given("layer")
    x, w = made.inputs.hidden, made.weights["input_layernorm.weight"]
    assert x is not None
    rms, centred = x.square().mean(-1, keepdim=True), x - x.mean(-1, keepdim=True)
    expected = {
        ("kind", "rms"): w * x / (rms + 1e-6).sqrt(),
        ("kind", "layer"): F.layer_norm(x, (32,), w, None, 1e-6) + 0 * centred,
        ("kind", "weight_only"): w * x,
        ("kind", "identity"): x,
        ("eps_place", "outside"): w * x / (rms.sqrt() + 1e-6),
        ("weight", "one_plus"): (1 + w) * x / (rms + 1e-6).sqrt(),
        ("weight", "none"): x / (rms + 1e-6).sqrt(),
        ("eps", 0.5): w * x / (rms + 0.5).sqrt(),
    }
    for (field, value), normed in expected.items():
        assert error(computed(made, (f"norm.{field}", value))["attn.input"], normed) < ATOL
    low = x.bfloat16()
    low = low * torch.rsqrt(low.square().mean(-1, keepdim=True) + 1e-6)
    assert error(computed(made, ("norm.dtype", "bfloat16"))["attn.input"], w * low.double()) == 0
    alone = computed(made, ("norm.dtype", "bfloat16"), ("norm.statistic_alone", True))["attn.input"]
    mean_square = x.bfloat16().square().mean(-1, keepdim=True).double()
    assert error(alone, w * x * torch.rsqrt(mean_square + 1e-6)) < ATOL


def test_square_weights_reshaped_are_used_untransposed() -> None:
    made = case("qwen3", "attention")
    v_as_it_is = computed(made, ("reshaped", ("q", "o")), ("attention.qk_norm", "none"))
    q = made.inputs.hidden @ made.weights["q_proj.weight"]  # type: ignore[operator]
    assert error(v_as_it_is["attn.q"], q.view(2, 9, H, P).transpose(1, 2)) < ATOL

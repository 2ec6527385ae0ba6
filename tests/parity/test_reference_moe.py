"""Router, experts and losses against definitions written out a second time, one token at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moectl.parity.case import Unsupported
from moectl.parity.reference import FormulaSubject
from moectl.parity.tape import Tape
from tests.parity.cases import LEFT, case, error
from tests.parity.test_reference_fields import computed, given

ATOL = 1e-13
E, K = 8, 2


def choices(tape: Tape) -> list[dict[int, float]]:
    """Of each token: its experts and their weights."""
    return [
        {e: float(row[e]) for e in range(E) if chosen[e]}
        for row, chosen in zip(tape["mlp.weights"], tape["mlp.chosen"], strict=True)
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm_topk": False, "scaling": 2.5},
        {"score": "sigmoid", "norm_epsilon": 0.1},
        {"score": "sigmoid", "norm_all": True, "norm_topk": False},
        {"score": "sigmoid", "choice_bias": True},
        {"score": "sigmoid", "choice_bias": True, "bias_weighs": True},
        {"score": "sigmoid", "choice_bias": True, "groups": 4, "groups_kept": 2},
        {"score": "sigmoid", "choice_bias": True, "groups": 2, "groups_kept": 1, "group_score": "max"},
        {"score": "sigmoid", "choice_bias": True, "groups": 4, "groups_kept": 2, "group_mask": "zero"},
        {"score": "softmax_chosen"},
        {"score": "softmax_twice", "norm_topk": False},
        {"softmax_over": "tokens", "norm_topk": False},
        {"choose": "smallest"},
        {"bias": True},
        {"pairing": "reversed"},
        {"pairing": "sorted_indices"},
    ],
    ids=str,
)
def test_router_token_by_token(settings: dict[str, Any]) -> None:
    made = given("router")
    tape = computed(made, *((f"router.{name}", value) for name, value in settings.items()))
    logits = tape["mlp.router_logits"]
    raw = made.inputs.hidden.flatten(0, 1) @ made.weights["weight"].T  # type: ignore[union-attr]
    assert error(logits, raw + (made.weights["bias"] if settings.get("bias") else 0)) < ATOL
    over_tokens = logits.softmax(dim=0)
    bias = made.weights["e_score_correction_bias"] if settings.get("choice_bias") else torch.zeros(E)
    for token, found in enumerate(choices(tape)):
        row = logits[token]
        score = settings.get("score", "softmax")
        p = row.sigmoid() if score == "sigmoid" else row if score == "softmax_chosen" else row.softmax(0)
        p = over_tokens[token] if "softmax_over" in settings else p
        choice = (p + bias).tolist()
        groups = settings.get("groups", 1)
        size, best = E // groups, 1 if settings.get("group_score") == "max" else 2
        rank = sorted(range(groups), key=lambda g: -sum(sorted(choice[g * size : (g + 1) * size])[-best:]))
        kept = rank[: settings.get("groups_kept", 1)]
        outside = 0.0 if settings.get("group_mask") == "zero" else -math.inf
        choice = [value if e // size in kept else outside for e, value in enumerate(choice)]
        chosen = sorted(range(E), key=lambda e: choice[e], reverse="choose" not in settings)[:K]
        weigh = (p + bias if settings.get("bias_weighs") else p) / (p.sum() if settings.get("norm_all") else 1)
        weights = weigh[chosen]
        weights = weights.softmax(0) if score in ("softmax_chosen", "softmax_twice") else weights
        weights = (
            weights / (weights.sum() + settings.get("norm_epsilon", 0)) if settings.get("norm_topk", True) else weights
        )
        weights = weights * settings.get("scaling", 1.0)
        order = sorted(chosen) if settings.get("pairing") == "sorted_indices" else chosen
        order = chosen[::-1] if settings.get("pairing") == "reversed" else order
        assert found == pytest.approx(dict(zip(order, weights.tolist(), strict=True)), abs=ATOL)


def test_low_precision_routers() -> None:
    made = given("router")
    x, w = made.inputs.hidden.flatten(0, 1), made.weights["weight"]  # type: ignore[union-attr]
    low = computed(made, ("router.dtype", "bfloat16"))
    assert torch.equal(low["mlp.router_logits"], F.linear(x.bfloat16(), w.bfloat16()))
    top = low["mlp.router_logits"].double().softmax(-1).topk(K).values
    assert error(low["mlp.weights"].sort(descending=True).values[:, :K], top / top.sum(-1, keepdim=True)) < ATOL
    rounded = computed(made, ("router.probs_dtype", "float16"), ("router.norm_topk", False))["mlp.weights"]
    assert torch.equal(rounded, rounded.half().double())
    logits = computed(made)["mlp.router_logits"]
    for settings in ({"softmax_dtype": "bfloat16"}, {"probs_dtype": "bfloat16"}):
        for stay in (False, True):
            names = (*((f"router.{name}", value) for name, value in settings.items()), ("router.probs_stay", stay))
            found = computed(made, *names)["mlp.weights"].sort(descending=True).values[:, :K]
            rounded_logits = logits.bfloat16() if "softmax_dtype" in settings else logits
            top = rounded_logits.softmax(-1).bfloat16().topk(K).values
            top = top if stay else top.double()
            assert torch.equal(found, (top / top.sum(-1, keepdim=True)).double())


def expert(weights: Any, e: int, x: Tensor) -> Tensor:
    gate, up = (weights["experts.gate_up_proj"][e] @ x).chunk(2)
    return weights["experts.down_proj"][e] @ (F.silu(gate) * up)


def test_moe_token_by_token() -> None:
    made = case("qwen3", "moe")
    tape, x = FormulaSubject("qwen3").run(made), made.inputs.hidden.flatten(0, 1)  # type: ignore[union-attr]
    for token, found in enumerate(choices(tape)):
        outputs = {e: expert(made.weights, e, x[token]) for e in range(E)}
        assert error(tape["mlp.expert_outputs"][token], torch.stack(list(outputs.values()))) < ATOL
        assert error(tape["mlp.routed"].flatten(0, 1)[token], sum(w * outputs[e] for e, w in found.items())) < ATOL  # type: ignore[arg-type]


@pytest.mark.parametrize("applied", ["input", "none"])
def test_where_weights_are_applied(applied: str) -> None:
    made = case("qwen3", "moe")
    tape, x = computed(made, ("experts.applied", applied)), made.inputs.hidden.flatten(0, 1)  # type: ignore[union-attr]
    for token, found in enumerate(choices(tape)):
        each = [expert(made.weights, e, x[token] * (w if applied == "input" else 1)) for e, w in found.items()]
        assert error(tape["mlp.routed"].flatten(0, 1)[token], sum(each)) < ATOL  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["tokens", "slots", "weights"])
def test_capacity(order: str) -> None:
    made = case("qwen3", "moe", {"norm_topk_prob": False})
    tape = computed(made, ("experts.capacity", 3), ("experts.capacity_order", order))
    plain = FormulaSubject("qwen3").run(made)
    assert error(tape["mlp.weights"], plain["mlp.weights"]) == 0  # the router does not know
    slots = [sorted(found.items(), key=lambda pair: -pair[1]) for found in choices(plain)]
    queue = [(token, slot, e, w) for token, pairs in enumerate(slots) for slot, (e, w) in enumerate(pairs)]
    queue.sort(key={"tokens": lambda a: a[0], "slots": lambda a: (a[1], a[0]), "weights": lambda a: -a[3]}[order])
    room, expected = [3] * E, torch.zeros(18, 32, dtype=torch.float64)
    for token, _, e, w in queue:
        room[e] -= 1
        if room[e] >= 0:
            expected[token] += w * plain["mlp.expert_outputs"][token, e]
    assert min(room) < 0 < max(room)  # some expert has too many, some has room left
    assert error(tape["mlp.routed"].flatten(0, 1), expected) < ATOL


@pytest.mark.parametrize("offsets", ["counts", "counts_as_ends"])
@pytest.mark.parametrize("rows", ["overwritten", "added"])
@pytest.mark.parametrize("applied", ["output", "input", "none"])
def test_counts_as_offsets(offsets: str, rows: str, applied: str) -> None:
    """As beginners write it: a sorted list, and `counts` where `counts.cumsum(0)` is meant."""
    made = case("qwen3", "moe")
    tape = computed(made, ("experts.offsets", offsets), ("experts.offset_rows", rows), ("experts.applied", applied))
    x, chosen = made.inputs.hidden.flatten(0, 1), tape["mlp.chosen"]  # type: ignore[union-attr]
    expert_of, token_of = chosen.T.nonzero(as_tuple=True)  # sorted by expert, then token
    counts = chosen.sum(dim=0).tolist()
    buffer = torch.zeros(len(token_of), 32, dtype=torch.float64)
    for e in range(E):
        start = counts[e - 1] if e > 0 else 0
        end = counts[e] if offsets == "counts_as_ends" else start + counts[e]
        for row in range(start, min(end, len(token_of))):
            w = tape["mlp.weights"][token_of[row], expert_of[row]]
            y = expert(made.weights, e, x[token_of[row]] * (w if applied == "input" else 1)) * (
                w if applied == "output" else 1
            )
            buffer[row] = y if rows == "overwritten" else buffer[row] + y
    assert error(tape["mlp.routed"].flatten(0, 1), torch.zeros_like(x).index_add(0, token_of, buffer)) < ATOL


def test_layouts_of_stacked_weights() -> None:
    made = given("moe")
    plain = computed(made, ("experts.bias", True))
    gate_up, bias = made.weights["experts.gate_up_proj"], made.weights["experts.gate_up_proj_bias"]
    turned = {
        "experts.gate_up_proj": gate_up.mT.contiguous(),
        "experts.down_proj": made.weights["experts.down_proj"].mT.contiguous(),
    }
    swapped = {"experts.gate_up_proj": gate_up.roll(24, 1), "experts.gate_up_proj_bias": bias.roll(24, 1)}
    zipped = {
        "experts.gate_up_proj": torch.stack(gate_up.chunk(2, dim=1), dim=2).flatten(1, 2),
        "experts.gate_up_proj_bias": torch.stack(bias.chunk(2, dim=1), dim=2).flatten(1, 2),
    }
    for changed, setting in (
        (turned, ("experts.layout", "in_out")),
        (swapped, ("experts.gate_up", "up_first")),
        (zipped, ("experts.gate_up", "interleaved")),
    ):
        other = computed(replace(made, weights={**made.weights, **changed}), ("experts.bias", True), setting)
        assert error(plain["mlp.output"], other["mlp.output"]) < ATOL
        assert error(plain["grad.input"], other["grad.input"]) < ATOL


@pytest.mark.parametrize("roles", [("gate_up",), ("down",), ("gate", "up"), ("router",)])
def test_memory_read_as_a_transpose(roles: tuple[str, ...]) -> None:
    """``w.reshape(in, out)`` is multiplied from the right, where ``w.T`` is meant."""
    made = case("qwen3", "moe")
    tape, x = computed(made, ("reshaped", roles)), made.inputs.hidden.flatten(0, 1)  # type: ignore[union-attr]
    router, gate_up, down = (made.weights[n] for n in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"))
    if roles == ("router",):
        assert error(tape["mlp.router_logits"], x @ router.reshape(32, E)) < ATOL
        return
    for e in range(E):
        both = x @ (gate_up[e].reshape(32, 48) if roles == ("gate_up",) else gate_up[e].T)
        gate, up = both.chunk(2, dim=-1)
        if roles == ("gate", "up"):
            gate, up = x @ gate_up[e][:24].reshape(32, 24), x @ gate_up[e][24:].reshape(32, 24)
        y = (F.silu(gate) * up) @ (down[e].reshape(24, 32) if roles == ("down",) else down[e].T)
        assert error(tape["mlp.expert_outputs"][:, e], y) < ATOL


def test_permuted_experts_take_their_biases_along() -> None:
    made, order = given("moe"), (3, 0, 1, 2, 7, 6, 5, 4)
    plain = computed(made, ("experts.bias", True))
    permuted = computed(made, ("experts.bias", True), ("experts.permutation", order))
    assert torch.equal(permuted["mlp.expert_outputs"], plain["mlp.expert_outputs"][:, list(order)])


def test_transposed_storage_read_as_its_transpose() -> None:
    """Stored ``[E, in, out]``, ``w.reshape(out, in).T`` is multiplied from the right, where ``w`` is meant."""
    made = case("gpt_oss", "moe")
    gate_up, weights = made.weights["experts.gate_up_proj"], dict(made.weights)
    plain = FormulaSubject("gpt_oss", lambda f: replace(f, reshaped=("gate_up",))).run(made)
    weights["experts.gate_up_proj"] = gate_up.reshape(E, 48, 32).mT.contiguous()
    assert (
        error(plain["mlp.output"], FormulaSubject("gpt_oss").run(replace(made, weights=weights))["mlp.output"]) < 1e-12
    )


def test_halves_that_are_no_matrices() -> None:
    with pytest.raises(Unsupported, match="no matrices of their own"):
        computed(case("qwen3", "moe"), ("reshaped", ("gate",)), ("experts.gate_up", "interleaved"))


def test_shared_experts() -> None:
    made = given("moe")
    x, w = made.inputs.hidden, made.weights
    assert x is not None
    for kind, name in (("added", "shared_experts"), ("sigmoid_gated", "shared_expert")):
        gate, up, down = (w[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        shared = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
        if kind == "sigmoid_gated":
            shared = shared * torch.sigmoid(x @ w["shared_expert_gate.weight"].T)
        tape = computed(made, ("experts.shared", kind))
        assert error(tape["mlp.shared"], shared) < ATOL
        assert error(tape["mlp.output"], tape["mlp.routed"] + shared) < ATOL


def test_losses() -> None:
    made = case("qwen3", "model", {"mlp_only_layers": [1]}, attention_mask=LEFT)
    tape, labels = FormulaSubject("qwen3").run(made), made.inputs.labels
    assert labels is not None
    scored = [(b, s) for b in range(2) for s in range(8) if labels[b, s + 1] != -100]
    nats = [-tape["logits"][b, s].log_softmax(0)[labels[b, s + 1]] for b, s in scored]
    assert float(tape["loss"]) == pytest.approx(float(torch.stack(nats).mean()), abs=ATOL)
    real = LEFT.flatten()
    probs = torch.cat([tape[f"layers.{n}.mlp.router_logits"][real] for n in (0, 2)]).softmax(-1)
    chosen = torch.cat([tape[f"layers.{n}.mlp.chosen"][real] for n in (0, 2)]).double()
    assert float(tape["balance_loss"]) == pytest.approx(float(E * (chosen.mean(0) * probs.mean(0)).sum()), abs=ATOL)
    alike = {name: torch.zeros_like(w) if name.endswith("gate.weight") else w for name, w in made.weights.items()}
    assert float(FormulaSubject("qwen3").run(replace(made, weights=alike))["balance_loss"]) == pytest.approx(K)


def test_padding_index_stops_one_gradient() -> None:
    made = case("qwen3", "model")
    ids = made.inputs.input_ids
    assert ids is not None
    token = int(ids[0, 0])
    plain, stopped = FormulaSubject("qwen3").run(made), computed(made, ("padding_idx", token))
    name = "grad.model.embed_tokens.weight"
    assert plain[name][token].any() and not stopped[name][token].any()
    others = torch.arange(64) != token
    assert error(plain[name][others], stopped[name][others]) == 0

"""The recorded run is transformers' own run, and what is recorded is what it says it is."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moectl.hf.family import FAMILIES
from moectl.parity.case import Case, Unsupported
from moectl.parity.families import formula_of
from moectl.parity.hugging_face import HuggingFace, rerouted_by
from moectl.parity.lift import lifted
from moectl.parity.reference import FormulaSubject
from moectl.parity.tape import Tape
from tests.parity.hf_cases import COMPONENTS, EVERY, WHOLE, bare_model, tiny_case

#: Some hundred float64 roundings of numbers of size one to ten, added up in another order.
FLOAT64 = 1e-12
#: What both sides of a comparison in float64 are held to, relative to the tensor's scale.
PARITY = 1e-10
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9]).bool()
RIGHT = LEFT.flip(1)


def run(family: str, level: Any, **fields: Any) -> tuple[Tape, Case]:
    case = tiny_case(family, level, **fields)
    return HuggingFace(family).run(case), case


ALL = torch.ones_like(LEFT)


def same_tapes(one: Tape, other: Tape, tolerance: float, *, rows: Tensor = ALL) -> None:
    """``rows``: ``[B, S]`` bool, which tokens count. The tolerance is relative to each tensor's scale."""
    assert list(one) == list(other)
    for name in one:
        a, b = tokens(name, one[name], rows).double(), tokens(name, other[name], rows).double()
        assert a.shape == b.shape, name
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())), name


def tokens(name: str, tensor: Tensor, rows: Tensor) -> Tensor:
    """Those of ``rows``; a parameter's gradient, a number and a lone router's tokens as they are."""
    if tensor.dim() < 2 or (name.startswith("grad.") and name != "grad.input"):
        return tensor
    if tensor.shape[0] == rows.numel():
        return tensor[rows.flatten()]
    by_head = name.rpartition("attn.")[2] in ("q", "k", "v", "q_rotated", "k_rotated")
    return (tensor.transpose(1, 2) if by_head else tensor)[rows]


# --- The run is transformers' own


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lift", [True, False])
def test_watching_changes_no_bit(family: str, dtype: torch.dtype, lift: bool) -> None:
    case = tiny_case(family, "model", dtype=dtype, training=lift, inputs={"attention_mask": RIGHT})
    tape = HuggingFace(family, lift=lift).run(case)
    inputs = case.inputs
    given = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    with lifted() if lift and dtype == torch.float64 else nullcontext():
        model = bare_model(case)
        out = model(**given, labels=inputs.labels)
        out.loss.backward()
        aux_loss = model(**given, output_router_logits=True).aux_loss
        hidden = model(**given, output_hidden_states=True).hidden_states
    assert torch.equal(tape["logits"], out.logits)
    assert torch.equal(tape["loss"], out.loss)
    assert torch.equal(tape["balance_loss"], aux_loss)
    assert tape["logits"].dtype == dtype
    for layer, states in enumerate(hidden[1:-1]):
        assert torch.equal(tape[f"layers.{layer}.mlp.residual"], states)
    for name, parameter in model.named_parameters():
        assert torch.equal(tape[f"grad.{name}"], parameter.grad), name


@pytest.mark.parametrize("family", WHOLE)
def test_the_balance_loss_is_in_the_objective_if_the_config_says_so(family: str) -> None:
    tape, case = run(family, "model", config={"output_router_logits": True, "router_aux_loss_coef": 0.5})
    with lifted():
        model = bare_model(case)
        model(input_ids=case.inputs.input_ids, labels=case.inputs.labels).loss.backward()
    plain, _ = run(family, "model")
    gate = "grad.model.layers.1.mlp.gate.weight"
    assert torch.allclose(tape[gate], model.model.layers[1].mlp.gate.weight.grad, rtol=0, atol=FLOAT64)
    assert (tape[gate] - plain[gate]).abs().max() > 1e-4
    assert torch.equal(tape["loss"], plain["loss"]), "the tape's loss is without it"


@pytest.mark.parametrize(("family", "level"), COMPONENTS)
def test_equals_the_formula(family: str, level: Any) -> None:
    case = tiny_case(family, level)
    ours, theirs = FormulaSubject(family).run(case), HuggingFace(family).run(case)
    assert set(ours) == set(theirs)
    same_tapes(theirs, in_order(ours, theirs), PARITY)


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("level", ["model", "layer", "attention"])
@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_equals_the_formula_on_padded_rows(family: str, level: Any, mask: Tensor) -> None:
    inputs: dict[str, Any] = _unscored({"attention_mask": mask})
    if level != "model":
        cotangent = tiny_case(family, level).inputs.cotangent
        assert cotangent is not None
        inputs = {"attention_mask": mask, "cotangent": cotangent * mask[..., None]}
    case = tiny_case(family, level, inputs=inputs)
    ours, theirs = FormulaSubject(family).run(case), HuggingFace(family).run(case)
    same_tapes(theirs, in_order(ours, theirs), PARITY, rows=mask)


def in_order(tape: Tape, other: Tape) -> Tape:
    """``tape`` with its tensors in the order of ``other``."""
    ordered = Tape()
    for name in other:
        ordered.record(name, tape[name])
    return ordered


def test_gradients_of_the_input_are_those_of_the_objective() -> None:
    for level in ("moe", "layer", "attention"):
        case = tiny_case("qwen3", level)
        tape = HuggingFace("qwen3").run(case)
        assert case.inputs.hidden is not None and case.inputs.cotangent is not None
        step = 1e-6 * torch.randn(case.inputs.hidden.shape, generator=torch.Generator().manual_seed(1)).double()
        output = "mlp.residual" if level == "layer" else "attn.output" if level == "attention" else "mlp.output"
        ends = [
            HuggingFace("qwen3").run(tiny_case("qwen3", level, gradients=False, inputs={"hidden": hidden}))[output]
            for hidden in (case.inputs.hidden - step, case.inputs.hidden + step)
        ]
        measured = float(((ends[1] - ends[0]) * case.inputs.cotangent).sum())
        told = float(2 * (tape["grad.input"] * step).sum())
        assert math.isclose(measured, told, rel_tol=1e-5)  # the third derivative times 1e-12, and cancellation


def test_without_gradients_there_are_none_and_an_input_without_cotangent_has_none() -> None:
    assert not [name for name in run("qwen3", "model", gradients=False)[0] if name.startswith("grad.")]
    assert not [name for name in run("qwen3", "moe", inputs={"cotangent": None})[0] if name.startswith("grad.")]


def test_without_the_lift_float64_is_float32_where_transformers_says_so() -> None:
    case = tiny_case("qwen3", "model")
    exact, plain = HuggingFace("qwen3").run(case), HuggingFace("qwen3", lift=False).run(case)
    error = (exact["logits"] - plain["logits"]).abs().max()
    assert 1e-9 < error < 1e-5
    assert plain["logits"].dtype == torch.float64


# --- Inputs that hurt


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("chunks", [(9,), (4, 5), (1,) * 9, (5, 1, 3)])
def test_pieces_with_a_cache_make_the_whole(family: str, chunks: tuple[int, ...]) -> None:
    whole, _ = run(family, "model")
    pieces, _ = run(family, "model", inputs={"chunks": chunks})
    same_tapes(whole, pieces, PARITY)


def test_pieces_keep_to_padding_and_documents() -> None:
    docs = torch.tensor([[7, 7, 7, 0, 0, 0, 0, 2, 2], [1, 1, 1, 1, 1, 1, 3, 3, 3]])
    for inputs in ({"attention_mask": LEFT}, {"attention_mask": RIGHT}, {"doc_ids": docs}):
        whole, _ = run("qwen3", "model", inputs=_unscored(inputs))
        pieces, _ = run("qwen3", "model", inputs={**_unscored(inputs), "chunks": (4, 1, 4)})
        same_tapes(whole, pieces, PARITY, rows=inputs.get("attention_mask", ALL))


def _unscored(inputs: dict[str, Any]) -> dict[str, Any]:
    """Labels of padding taken away, as a data loader does."""
    if "attention_mask" not in inputs:
        return inputs
    ids = tiny_case("qwen3", "model").inputs.input_ids
    assert ids is not None
    scored = inputs["attention_mask"] & F.pad(inputs["attention_mask"], (1, 0))[:, :-1]
    return {**inputs, "labels": ids.masked_fill(~scored, -100)}


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_padding_changes_nothing_for_real_tokens(family: str, mask: Tensor) -> None:
    padded, case = run(family, "model", inputs=_unscored({"attention_mask": mask}))
    row = 0 if not mask[0].all() else 1  # the other row is whole
    real = mask[row]
    ids = case.inputs.input_ids
    assert ids is not None
    short = ids[row, real][None]
    alone, _ = run(family, "model", inputs={"input_ids": short, "labels": short})
    assert torch.allclose(padded["logits"][row, real], alone["logits"][0], rtol=0, atol=PARITY)
    assert torch.allclose(padded["rope.cos"][row, real], alone["rope.cos"][0], rtol=0, atol=0)
    only, _ = run(
        family,
        "model",
        inputs={"input_ids": ids[row][None], "labels": None, "attention_mask": real[None]},
    )
    assert math.isclose(float(only["balance_loss"]), float(alone["balance_loss"]), rel_tol=FLOAT64)


@pytest.mark.parametrize("level", ["layer", "attention"])
@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_a_lone_component_keeps_to_its_padding_too(level: Any, mask: Tensor) -> None:
    name = "mlp.residual" if level == "layer" else "attn.output"
    padded, case = run("qwen3", level, inputs={"attention_mask": mask})
    assert case.inputs.hidden is not None
    for row in range(2):
        alone, _ = run("qwen3", level, inputs={"hidden": case.inputs.hidden[row, mask[row]][None], "cotangent": None})
        assert torch.allclose(padded[name][row, mask[row]], alone[name][0], rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("level", ["model", "layer", "attention"])
def test_a_document_does_not_see_its_neighbours(level: Any) -> None:
    docs = torch.tensor([[4, 4, 4, 4, 9, 9, 9, 9, 9], [0, 0, 1, 1, 1, 1, 1, 4, 4]])
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 0, 1]])
    packed, case = run("qwen3", level, inputs={"doc_ids": docs, "positions": places})
    name = {"model": "logits", "layer": "mlp.residual", "attention": "attn.output"}[level]
    whole = case.inputs.input_ids if level == "model" else case.inputs.hidden
    assert whole is not None
    for row in range(2):
        for doc in docs[row].unique():
            mine = docs[row] == doc
            piece = whole[row, mine][None]
            given = {"input_ids": piece, "labels": None} if level == "model" else {"hidden": piece, "cotangent": None}
            alone, _ = run("qwen3", level, inputs=given)
            assert torch.allclose(packed[name][row, mine], alone[name][0], rtol=0, atol=PARITY)


def test_positions_that_start_anew_are_not_taken_for_documents() -> None:
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, 9)
    tape, case = run("qwen3", "model", inputs={"positions": places})
    ids = case.inputs.input_ids
    assert ids is not None
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % 64
    changed, _ = run("qwen3", "model", inputs={"positions": places, "input_ids": other})
    assert (tape["logits"][:, -1] - changed["logits"][:, -1]).abs().max() > 1e-6
    assert torch.equal(tape["rope.cos"][:, 4], tape["rope.cos"][:, 0])


@pytest.mark.parametrize(("family", "level"), COMPONENTS)
def test_strides_do_not_matter(family: str, level: Any) -> None:
    plain, case = run(family, level)
    inputs = {}
    for name in ("input_ids", "hidden"):
        tensor = getattr(case.inputs, name)
        if tensor is not None:
            inputs[name] = tensor.transpose(0, 1).contiguous().transpose(0, 1)
            assert not inputs[name].is_contiguous()
    strided, _ = run(family, level, inputs=inputs)
    for name in plain:
        assert torch.equal(plain[name], strided[name]), name


def test_one_token() -> None:
    for level in ("model", "layer", "moe", "attention", "router"):
        tape, _ = run("qwen3", level, batch=1, length=1)
        scored = {name for name in tape if name == "loss" or name.startswith("grad.")} if level == "model" else set()
        assert all(tensor.isfinite().all() for name, tensor in tape.items() if name not in scored), level
        assert all(tape[name].isnan().all() for name in scored & {"loss"}), "there is no next token to score"
    assert tape["mlp.router_logits"].shape == (1, 8)


# --- Routes from elsewhere


@pytest.mark.parametrize("family", EVERY)
def test_its_own_choice_put_back_changes_nothing(family: str) -> None:
    for level in ("model", "moe", "router"):
        if level in FAMILIES[family].without:
            continue
        tape, case = run(family, level)
        same_tapes(tape, HuggingFace(family).run(case, rerouted_by(tape, case)), PARITY)


@pytest.mark.parametrize("family", EVERY)
def test_another_choice_is_followed_with_this_sides_own_logits(family: str) -> None:
    own, case = run(family, "moe")
    other = Tape()
    other.record("mlp.chosen", own["mlp.chosen"].roll(1, dims=1))
    tape = HuggingFace(family).run(case, rerouted_by(other, case))
    assert torch.equal(tape["mlp.chosen"], other["mlp.chosen"])
    assert torch.equal(tape["mlp.router_logits"], own["mlp.router_logits"])
    assert torch.equal(tape["mlp.expert_outputs"], own["mlp.expert_outputs"])
    routed = torch.einsum("te,ted->td", tape["mlp.weights"], tape["mlp.expert_outputs"])
    assert torch.allclose(tape["mlp.routed"].flatten(0, 1), routed, rtol=0, atol=FLOAT64)
    assert torch.equal(tape["mlp.weights"] != 0, other["mlp.chosen"])
    gate = f"grad.{FAMILIES[family].gate}.weight"
    assert tape[gate].abs().max() > 1e-6, "the injected weights still teach the router"


def test_each_layer_gets_its_own_route() -> None:
    tape, case = run("qwen3", "model")
    asked: list[int] = []

    def fixed(layer: int, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(layer)
        indices = torch.tensor([[layer, layer + 3]]).expand(len(router_logits), 2)
        return torch.full((len(router_logits), 2), 0.5, dtype=router_logits.dtype), indices

    rerouted = HuggingFace("qwen3").run(case, fixed)
    assert asked == [0, 1, 2]
    for layer in range(3):
        assert rerouted[f"layers.{layer}.mlp.chosen"][:, [layer, layer + 3]].all()
        assert (rerouted[f"layers.{layer}.mlp.chosen"].sum(-1) == 2).all()
        gate = f"grad.model.layers.{layer}.mlp.gate.weight"
        assert (rerouted[gate] == 0).all() and (tape[gate] != 0).any(), "constant weights teach no router"
    assert not torch.equal(tape["logits"], rerouted["logits"])


def test_a_slot_that_another_side_left_empty_weighs_nothing() -> None:
    for family in ("qwen3", "gpt_oss", "deepseek_v3"):
        own, case = run(family, "moe")
        fewer = own["mlp.chosen"].clone()
        fewer[0] = False
        first = int(own["mlp.chosen"][1].nonzero()[0])
        fewer[1, first] = False
        other = Tape()
        other.record("mlp.chosen", fewer)
        tape = HuggingFace(family).run(case, rerouted_by(other, case))
        assert (tape["mlp.weights"][0] == 0).all()
        assert tape["mlp.weights"][1, first] == 0
        full = formula_of(family, case.config).router
        if full.norm_topk or full.score == "softmax_chosen":
            assert math.isclose(float(tape["mlp.weights"][1].sum()), full.scaling, rel_tol=FLOAT64)
        assert torch.allclose(tape["mlp.weights"][2:], own["mlp.weights"][2:], rtol=0, atol=FLOAT64)
        assert all(tensor.isfinite().all() for tensor in tape.values())


# --- Nothing stays behind, and what is not computed says why


@pytest.mark.parametrize(("family", "level"), COMPONENTS)
def test_a_case_is_left_as_it_was(family: str, level: Any) -> None:
    case = tiny_case(family, level, training=True)
    tensors = {**case.weights, **{n: t for n, t in case.inputs._asdict().items() if isinstance(t, Tensor)}}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    first = HuggingFace(family).run(case)
    second = HuggingFace(family).run(case)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]) and not tensor.requires_grad and tensor.grad is None, name
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("level", ["model", "layer", "attention"])
def test_components_beyond_the_formula_are_refused_with_the_reason(family: str, level: Any) -> None:
    case = Case("test", level, tiny_case(family, "moe").config, {}, tiny_case(family, "moe").inputs)
    with pytest.raises(Unsupported, match=f"{family} {level}: its attention"):
        HuggingFace(family).run(case)


def test_chunks_are_for_models_and_not_for_routes_from_elsewhere() -> None:
    with pytest.raises(Unsupported, match="a lone layer keeps no cache"):
        run("qwen3", "layer", inputs={"chunks": (4, 5)})
    tape, case = run("qwen3", "model", inputs={"chunks": (4, 5)})
    with pytest.raises(Unsupported, match="fed in chunks"):
        HuggingFace("qwen3").run(case, rerouted_by(tape, case))

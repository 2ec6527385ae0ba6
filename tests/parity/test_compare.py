"""Rows by hand: what holds, what differs, what was not compared, and that nothing passes by being absent."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moectl.parity.case import Case, Inputs
from moectl.parity.compare import Comparison, Row, after_injection, compare, compare_tensor, largest
from moectl.parity.families import config_of
from moectl.parity.tape import Tape

B, S, D, E = 2, 3, 4, 4
CONFIG = {**config_of("qwen3", "tiny"), "num_experts": E}


def case(level: str = "moe", mask: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Case:
    return Case("by hand", level, CONFIG, {}, Inputs(attention_mask=mask), dtype)  # type: ignore[arg-type]


def tape(**tensors: Tensor) -> Tape:
    made = Tape()
    for name, tensor in tensors.items():
        made.record(name.replace("__", "."), tensor)
    return made


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def one_off(tensor: Tensor, by: float, place: int = 0) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[place] += by
    return changed


def row_of(reference: Tensor, candidate: Tensor, name: str = "mlp.output", **fields: object) -> Row:
    return compare_tensor(name, reference, candidate, case(**fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scale", "error", "ok"),
    [(1.0, 0.9e-10, True), (1.0, 1.1e-10, False), (0.01, 0.9e-10, True), (20.0, 1.9e-9, True), (20.0, 2.1e-9, False)],
)
def test_error_against_tolerance(scale: float, error: float, ok: bool) -> None:
    """10^-10 times the largest reference value, and that at least one."""
    reference = scale * ones(B, S, D)
    row = row_of(reference, one_off(reference, error, place=5))
    assert row.verdict == ("ok" if ok else "differs")
    assert row.max_abs == pytest.approx(error, rel=1e-4)
    assert row.max_rel == pytest.approx(error / scale, rel=1e-4)
    assert row.tolerance == pytest.approx(1e-10 * max(1.0, scale))
    assert row.ratio == pytest.approx(error / (1e-10 * max(1.0, scale)), rel=1e-4)


def test_float32_has_its_own_tolerance() -> None:
    reference = ones(B, S, D).float()
    assert row_of(reference, one_off(reference, 9e-6), dtype=torch.float32).ok
    assert not row_of(reference, one_off(reference, 2e-5), dtype=torch.float32).ok


def test_other_shapes_differ_and_are_both_named() -> None:
    row = row_of(ones(B, S, D), ones(B * S, D))
    assert row.verdict == "differs" and row.max_abs is None
    assert "[6, 4]" in row.note and "[2, 3, 4]" in row.note


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sides", ["reference", "candidate", "both"])
def test_not_a_number_differs_even_from_itself(value: float, sides: str) -> None:
    good, bad = ones(B, S, D), one_off(ones(B, S, D), value)
    row = row_of(bad if sides != "candidate" else good, bad if sides != "reference" else good)
    assert row.verdict == "differs" and row.ratio == math.inf
    assert all(f"1 in the {side}" in row.note for side in ("reference", "candidate") if sides in (side, "both"))


@pytest.mark.parametrize(
    ("name", "shape", "padded"),
    [
        ("mlp.output", (B, S, D), (1, 2, 0)),
        ("mlp.router_logits", (B * S, E), (5, 1)),
        ("attn.q", (B, 2, S, D), (1, 1, 2, 3)),
        ("layers.1.attn.k_rotated", (B, 2, S, D), (1, 0, 2, 3)),
        ("grad.input", (B, S, D), (1, 2, 1)),
        ("rope.cos", (B, S, D), (1, 2, 1)),
    ],
)
def test_padding_is_compared_nowhere(name: str, shape: tuple[int, ...], padded: tuple[int, ...]) -> None:
    """The last token of the second row is padding; one before it is not."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    reference, candidate = ones(*shape), ones(*shape)
    candidate[padded] = math.nan
    assert row_of(reference, candidate, name, mask=mask).verdict == "ok"
    assert row_of(reference, candidate, name).verdict == "differs"
    for place in range(reference.numel()):
        other = one_off(reference, 1.0, place)
        index = torch.unravel_index(torch.tensor(place), shape)
        sequence = 2 if name.rpartition(".")[2] in ("q", "k_rotated") else 1
        token = int(index[0]) if len(shape) == 2 else int(index[0]) * S + int(index[sequence])
        assert row_of(reference, other, name, mask=mask).verdict == ("ok" if token == 5 else "differs"), index


def test_padding_does_not_set_the_scale() -> None:
    mask = torch.tensor([[True, True, True], [True, True, False]])
    huge = ones(B, S, D)
    huge[1, 2] = 1e9
    assert row_of(huge, one_off(huge, 1e-6), mask=mask).verdict == "differs"
    assert largest("mlp.output", huge, case(mask=mask)) == 1.0


def test_parameters_gradients_have_no_padding() -> None:
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert row_of(ones(S * B, D), one_off(ones(S * B, D), 1.0, 23), "grad.gate.weight", mask=mask).ok is False


def test_missing_tensors_are_told_and_the_output_may_not_miss() -> None:
    reference = tape(mlp__router_logits=ones(6, E), mlp__output=ones(B, S, D))
    whole = compare(reference, tape(mlp__output=ones(B, S, D)), case())
    assert [row.verdict for row in whole.rows] == ["not compared", "ok"]
    assert "shows no such tensor" in whole.rows[0].note
    assert whole.ok and whole.compared == 1
    inside = compare(reference, tape(mlp__router_logits=ones(6, E)), case())
    assert not inside.ok and inside.missing == ("mlp.output",) and inside.first is None


def test_nothing_compared_does_not_hold() -> None:
    assert not compare(tape(mlp__output=ones(B, S, D)), tape(), case()).ok
    assert not compare(tape(), tape(), case()).ok
    assert not Comparison((), level="moe").ok


def test_empty_tensors_compare_nothing() -> None:
    none = torch.ones(0, S, D, dtype=torch.float64)
    assert not compare(tape(mlp__output=none), tape(mlp__output=none), case()).ok


def test_what_only_the_candidate_has_is_told() -> None:
    rows = compare(
        tape(mlp__output=ones(B, S, D)), tape(mlp__output=ones(B, S, D), mlp__shared=ones(B, S, D)), case()
    ).rows
    assert rows[-1].name == "mlp.shared" and rows[-1].verdict == "not compared"


def test_the_first_is_the_first_in_model_order() -> None:
    names = ("grad.input", "mlp.output", "attn.q", "rope.cos")
    reference, candidate = Tape(), Tape()
    for name in names:
        reference.record(name, ones(B, S, D))
        candidate.record(name, ones(B, S, D) + (name != "rope.cos"))
    comparison = compare(reference, candidate, case())
    assert [row.name for row in comparison.rows] == ["rope.cos", "attn.q", "mlp.output", "grad.input"]
    assert comparison.first is not None and comparison.first.name == "attn.q"


def routed(chosen: list[list[int]], shift: float = 0.0) -> Tape:
    """Six tokens; the third one's second and third expert score the same."""
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]] * 6, dtype=torch.float64)
    scores[2] = torch.tensor([2.0, 1.0, 1.0, -1.0])
    picked = torch.zeros(6, E, dtype=torch.bool).scatter(1, torch.tensor(chosen), True)
    output = ones(B, S, D)
    output[0, 2] += shift
    return tape(
        mlp__router_logits=scores,
        mlp__chosen=picked,
        mlp__weights=picked / 2.0,
        mlp__expert_outputs=ones(6, E, D),
        mlp__output=output,
        grad__input=ones(B, S, D) + shift,
    )


FIRST, OTHER = [[0, 1]] * 6, [[0, 1]] * 2 + [[0, 2]] + [[0, 1]] * 3


def test_a_tie_is_no_mismatch_and_its_token_is_left_out() -> None:
    comparison = compare(routed(FIRST), routed(OTHER, shift=1.0), case())
    assert {row.name: row.verdict for row in comparison.rows} == {
        "mlp.router_logits": "ok", "mlp.chosen": "tie", "mlp.weights": "ok", "mlp.expert_outputs": "ok",
        "mlp.output": "ok", "grad.input": "not compared",
    }  # fmt: skip
    assert comparison.ok and [flip.token for flip in comparison.ties] == [2]
    assert "1 token at a tie" in comparison.rows[1].note and "tie" in comparison.rows[-1].note


def test_other_tokens_of_a_tied_batch_are_compared() -> None:
    candidate = routed(OTHER)
    candidate._tensors["mlp.output"][1, 1, 1] += 1e-6
    comparison = compare(routed(FIRST), candidate, case())
    assert comparison.first is not None and comparison.first.name == "mlp.output"


def test_a_wrong_choice_beside_a_tie_is_a_mismatch() -> None:
    wrong = [*OTHER[:5], [0, 3]]
    comparison = compare(routed(FIRST), routed(wrong), case())
    assert comparison.first is not None and comparison.first.name == "mlp.chosen" and not comparison.ties
    assert "2 of 6 tokens" in comparison.first.note


def test_what_follows_from_a_tie_is_compared_with_the_routes_given() -> None:
    free = compare(routed(FIRST), routed(OTHER, shift=1.0), case())
    held = after_injection(free, compare(routed(FIRST), routed(FIRST), case()))
    assert held.ok and held.ties == free.ties
    assert [row.verdict for row in held.rows] == ["ok", "tie", "ok", "ok", "ok", "ok"]
    broken = after_injection(free, compare(routed(FIRST), routed(FIRST, shift=1e-6), case()))
    assert broken.first is not None and broken.first.name == "mlp.output"


def test_given_routes_say_nothing_of_later_choices() -> None:
    def model(chosen: list[list[int]]) -> Tape:
        made = Tape()
        for layer in range(2):
            for name, tensor in routed(chosen if layer == 0 else FIRST).items():
                if name.startswith("mlp."):
                    made.record(f"layers.{layer}.{name}", tensor)
        made.record("logits", ones(B, S, D))
        return made

    free = compare(model(FIRST), model(OTHER), case("model"))
    held = after_injection(free, compare(model(FIRST), model(FIRST), case("model")))
    verdicts = {row.name: row.verdict for row in held.rows}
    assert verdicts["layers.0.mlp.chosen"] == "tie"
    assert verdicts["layers.1.mlp.chosen"] == verdicts["layers.1.mlp.weights"] == "not compared"
    assert verdicts["layers.1.mlp.output"] == verdicts["logits"] == "ok" and held.ok

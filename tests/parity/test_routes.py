"""Ties by hand: two experts whose scores differ by less than rounding, and all that only looks like it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moectl.parity.case import Case, Inputs
from moectl.parity.families import config_of, formula_of
from moectl.parity.routes import at_boundary, choice_scores, flips, layer_of, margins, router_of, tied_tokens
from moectl.parity.tape import Tape

QWEN3 = formula_of("qwen3", config_of("qwen3", "tiny")).router
DEEPSEEK = formula_of("deepseek_v3", config_of("deepseek_v3", "tiny")).router
GPT_OSS = formula_of("gpt_oss", config_of("gpt_oss", "tiny")).router


def case(**fields: object) -> Case:
    config = {**config_of("qwen3", "tiny"), "num_experts": 4}
    return Case("by hand", "moe", config, {}, Inputs(), **fields)  # type: ignore[arg-type]


def tape(logits: Tensor, chosen: list[list[int]]) -> Tape:
    made = Tape()
    made.record("mlp.router_logits", logits)
    made.record("mlp.chosen", torch.zeros(logits.shape, dtype=torch.bool).scatter(1, torch.tensor(chosen), True))
    return made


def logits(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("gap", "tie"), [(0.0, True), (1e-12, True), (0.9e-9, True), (1.1e-9, False), (1e-3, False), (1.0, False)]
)
def test_a_gap_below_the_limit_is_a_tie(gap: float, tie: bool) -> None:
    """Chosen by probability; 1 - e^-gap of two softmax scores is the gap, to second order."""
    scores = logits([1.0, 0.5, 0.5 - gap, -1.0])
    found = flips(tape(scores, [[0, 1]]), tape(scores, [[0, 2]]), case(), "mlp.chosen")
    assert [flip.tie for flip in found] == [tie]
    assert found[0].margin == pytest.approx(-math.expm1(-gap), abs=1e-15)
    assert (found[0].reference, found[0].candidate) == ((0, 1), (0, 2))


def test_the_same_set_is_no_flip_however_near() -> None:
    scores = logits([1.0, 0.5, 0.5, -1.0])
    assert flips(tape(scores, [[0, 1]]), tape(scores, [[1, 0]]), case(), "mlp.chosen") == []
    assert tied_tokens(tape(scores, [[0, 1]]), case()) == 1


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        ([0, 3], "expert 3 is far below the boundary"),
        ([1, 2], "expert 0 is far above it, and was dropped"),
        ([0, 0], "one of the two was dropped"),
    ],
)
def test_a_tie_excuses_no_other_choice(chosen: list[int], why: str) -> None:
    scores = logits([1.0, 0.5, 0.5, -1.0])
    (found,) = flips(tape(scores, [[0, 1]]), tape(scores, [chosen]), case(), "mlp.chosen")
    assert not found.tie, why


def test_equals_within_the_choice_are_not_at_the_boundary() -> None:
    """Experts 0 and 1 tie, both are chosen, and the next is far: dropping one of them is a mistake."""
    scores = logits([1.0, 1.0, -3.0, -4.0])
    assert not at_boundary(QWEN3, choice_scores(QWEN3, scores), 1e-9).any()
    (found,) = flips(tape(scores, [[0, 1]]), tape(scores, [[0, 2]]), case(), "mlp.chosen")
    assert not found.tie
    assert tied_tokens(tape(scores, [[0, 1]]), case()) == 0


def test_the_limit_grows_with_the_logits() -> None:
    """A logit of 80 is known to 80 times the tolerance, and so is a score relative to the next."""
    scores = logits([80.0, 40.0, 40.0 - 5e-8, -80.0], [1.0, 0.5, 0.5 - 5e-8, -1.0])
    reference, candidate = tape(scores, [[0, 1], [0, 1]]), tape(scores, [[0, 2], [0, 2]])
    assert [flip.tie for flip in flips(reference, candidate, case(), "mlp.chosen")] == [True, False]


def test_scores_that_underflow_tie_in_float32_and_not_in_float64() -> None:
    """e^-160 is 0 in float32: the reference chooses among zeros."""
    rows = logits([80.0, -80.0, -81.0, -82.0])
    reference, candidate = tape(rows, [[0, 1]]), tape(rows, [[0, 3]])
    assert not flips(reference, candidate, case(), "mlp.chosen")[0].tie
    low = tape(rows.float(), [[0, 1]])
    assert flips(low, candidate, case(dtype=torch.float32), "mlp.chosen")[0].tie


def test_padding_flips_nothing() -> None:
    scores = logits([1.0, 0.5, 0.0, -1.0], [1.0, 0.5, 0.0, -1.0])
    padded = case()
    padded = replace(padded, inputs=Inputs(attention_mask=torch.tensor([[True, False]])))
    found = flips(tape(scores, [[0, 1], [0, 1]]), tape(scores, [[0, 1], [2, 3]]), padded, "mlp.chosen")
    assert found == []
    assert len(flips(tape(scores, [[0, 1], [0, 1]]), tape(scores, [[0, 1], [2, 3]]), case(), "mlp.chosen")) == 1


def test_margin_is_infinite_where_all_are_chosen() -> None:
    everything = replace(QWEN3, top_k=4, num_experts=4)
    assert margins(everything, choice_scores(everything, logits([1.0, 1.0, 1.0, 1.0]))).tolist() == [math.inf]


def test_sigmoid_scores_are_chosen_with_their_bias() -> None:
    """σ(0) + 0.1 = 0.6 ties with σ(ln 1.5) = 0.6; the scale is 0.5 + 0.1."""
    plain = replace(DEEPSEEK, groups=1, groups_kept=1, top_k=1, num_experts=2)
    rows = logits([0.0, math.log(1.5)])
    biased = choice_scores(plain, rows, torch.tensor([0.1, 0.0], dtype=torch.float64))
    assert biased.values[0].tolist() == pytest.approx([0.6, 0.6], abs=1e-15)
    assert margins(plain, biased).item() < 1e-15
    assert margins(plain, choice_scores(plain, rows)).item() == pytest.approx(0.1 / 0.6)


def test_gpt_oss_chooses_by_logits() -> None:
    two = replace(GPT_OSS, top_k=2, num_experts=4)
    assert margins(two, choice_scores(two, logits([3.0, 2.0, 1.5, 0.0]))).item() == pytest.approx(0.5)


def test_groups_out_of_the_running() -> None:
    """Two groups of two, one kept. σ: [.9 .1 | .6 .6]: sums 1.0 and 1.2, so the second stays although .9 is best."""
    grouped = replace(DEEPSEEK, groups=2, groups_kept=1, top_k=1, num_experts=4)
    sigma = torch.tensor([[0.9, 0.1, 0.6, 0.6 - 1e-12]], dtype=torch.float64)
    scores = choice_scores(grouped, torch.logit(sigma))
    assert at_boundary(grouped, scores, 1e-9).tolist() == [[False, False, True, True]]
    tied = torch.tensor([[0.9, 0.3, 0.6, 0.6]], dtype=torch.float64)
    assert at_boundary(grouped, choice_scores(grouped, torch.logit(tied)), 1e-9).all()


def test_names() -> None:
    assert layer_of("layers.12.mlp.chosen") == 12
    assert layer_of("mlp.chosen") is None
    assert router_of(case()).num_experts == 4

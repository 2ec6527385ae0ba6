"""Capacity against one assignment after the other in plain Python: who stays, moves or is lost, at which weight."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moectl.errors import ConfigError
from moectl.moe import RouterOutput
from moectl.moe.capacity import FILLS, OVERFLOWS, Capacity, apply_capacity
from moectl.moe.dispatch import dispatch
from moectl.routers import build_router
from tests.moe.reference import (
    Case,
    Limited,
    apply_limit,
    by_hand,
    capacity_by_hand,
    crowded,
    gradients,
    limit_by_hand,
)

FLOAT64 = 1e-14  # one product and one quotient of numbers of order one
FACTORS = ["0.2", "0.7", "1.0", "1.1", "1.5"]

factors = st.sampled_from(FACTORS)
overflows = st.sampled_from(OVERFLOWS)
fills = st.sampled_from(FILLS)


def routing_of(case: Case, probs: list[list[float]]) -> RouterOutput:
    table = torch.tensor(probs, dtype=torch.float64).reshape(case.num_tokens, case.num_experts)
    return case.routing()._replace(router_probs=table)


def one_slot(chosen: list[int], probs: list[list[float]], keep: list[bool] | None = None) -> RouterOutput:
    """Top-1 with weight 1."""
    indices, table = torch.tensor(chosen)[:, None], torch.tensor(probs, dtype=torch.float64)
    kept = None if keep is None else torch.tensor(keep)[:, None]
    return by_hand(indices, torch.ones(len(chosen), 1, dtype=torch.float64), table.shape[1], kept, table)


def experts_of(routing: RouterOutput) -> list[list[int | None]]:
    assert routing.keep is not None
    rows = zip(routing.topk_indices.tolist(), routing.keep.tolist(), strict=True)
    return [[expert if kept else None for expert, kept in zip(*row, strict=True)] for row in rows]


# --- how many


@given(st.integers(0, 40), st.integers(1, 8), st.integers(1, 16), st.integers(1, 3000))
def test_capacity_is_the_exact_ceiling(tokens: int, top_k: int, num_experts: int, thousandths: int) -> None:
    written = f"{thousandths / 1000:.3f}"
    limit = Capacity(float(written)).per_expert(tokens, top_k, num_experts)
    assert limit.dtype == torch.int64
    assert int(limit) == capacity_by_hand(written, top_k, tokens, num_experts)
    assert int(Capacity(float(written)).per_expert(torch.tensor(tokens), top_k, num_experts)) == int(limit)


def test_a_factor_means_what_is_written() -> None:
    """In floats, 50 · 1.1 is 55.00000000000001: a 56th place that nobody asked for."""
    assert math.ceil(50 * 1.1) == 56
    assert int(Capacity(1.1).per_expert(50, 1, 1)) == 55
    assert int(Capacity(1.1).per_expert(51, 1, 1)) == 57
    assert int(Capacity(2 / 3).per_expert(3, 1, 1)) == 2
    assert int(Capacity(1.234567).per_expert(10**6, 1, 1)) == 1234567


def test_very_small_and_very_large_factors() -> None:
    assert int(Capacity(1e-12).per_expert(5, 2, 4)) == 1, "above 0 is at least one place"
    assert int(Capacity(1e-12).per_expert(0, 2, 4)) == 0
    for factor in (1e5, 1e300, 99999.123457):
        assert int(Capacity(factor).per_expert(10**6, 16, 512)) >= 10**6, "no overflow into negative numbers"


@pytest.mark.parametrize("factor", [0, 0.0, -1.0, math.inf, math.nan, True])
def test_a_factor_must_be_a_finite_number_above_0(factor: float) -> None:
    with pytest.raises(ConfigError, match="finite number above 0") as error:
        Capacity(factor)
    assert error.value.hint is not None


def test_unknown_overflow_and_fill_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="overflow 'nextbest'") as error:
        Capacity(1.0, overflow="nextbest")  # type: ignore[arg-type]
    assert "next-best" in str(error.value.hint)
    with pytest.raises(ConfigError, match="fill 'positon'") as error:
        Capacity(1.0, fill="positon")  # type: ignore[arg-type]
    assert "position" in str(error.value.hint)


def test_a_capacity_is_a_value() -> None:
    capacity = Capacity(1.25, "next-best", in_eval=True)
    other = dataclasses.replace(capacity, factor=2.0)
    assert int(other.per_expert(4, 1, 4)) == 2
    assert capacity == Capacity(1.25, "next-best", "position", in_eval=True) != other
    for same in (copy.deepcopy(capacity), pickle.loads(pickle.dumps(capacity))):
        assert same == capacity
        assert hash(same) == hash(capacity)
        assert int(same.per_expert(4, 1, 4)) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        capacity.factor = 2.0  # type: ignore[misc]


def test_a_capacity_made_while_a_model_is_built_on_meta_still_counts() -> None:
    with torch.device("meta"):
        capacity = Capacity(1.25)
    assert int(capacity.per_expert(8, 1, 4)) == 3


def test_only_filling_by_position_is_causal() -> None:
    assert Capacity(1.0, "drop", "position").causal
    assert Capacity(1.0, "next-best", "position").causal
    assert not Capacity(1.0, "drop", "probability").causal
    assert not Capacity(1.0, "next-best", "probability").causal


# --- who


@given(crowded(), factors, overflows, fills)
def test_equals_one_assignment_after_the_other(
    drawn: tuple[Case, list[list[float]]], factor: str, overflow: str, fill: str
) -> None:
    case, probs = drawn
    limit = capacity_by_hand(factor, case.top_k, case.num_tokens, case.num_experts)
    expected = limit_by_hand(case, probs, limit, overflow, fill)
    limited, dropped = apply_capacity(routing_of(case, probs), Capacity(float(factor), overflow, fill))  # type: ignore[arg-type]
    assert experts_of(limited) == expected.experts
    assert dropped.tolist() == expected.dropped
    assert dropped.dtype == torch.int64


@given(crowded(), factors, overflows, fills)
def test_invariants(drawn: tuple[Case, list[list[float]]], factor: str, overflow: str, fill: str) -> None:
    """No expert over its limit, no token twice at one, none lost while there is room, none moved without need."""
    case, probs = drawn
    capacity = Capacity(float(factor), overflow, fill)  # type: ignore[arg-type]
    routing = routing_of(case, probs)
    limit = int(capacity.per_expert(case.num_tokens, case.top_k, case.num_experts))
    limited, dropped = apply_capacity(routing, capacity)
    left = experts_of(limited)
    before = case.assignments()
    after = [
        (expert, token, slot) for token, row in enumerate(left) for slot, expert in enumerate(row) if expert is not None
    ]
    load = Counter(expert for expert, _, _ in after)
    assert all(count <= limit for count in load.values())
    assert len(after) + int(dropped.sum()) == len(before)
    assert {(token, slot) for _, token, slot in after} <= {(token, slot) for _, token, slot in before}
    assert len({(expert, token) for expert, token, _ in after}) == len(after)
    stayed = set(after) & set(before)
    for expert, token, slot in set(before) - stayed:
        assert load[expert] == limit, (expert, token, slot, "left an expert that had room")
    if overflow == "drop":
        assert stayed == set(after)
    else:
        lost = {(token, slot) for _, token, slot in before} - {(token, slot) for _, token, slot in after}
        for token, _ in lost:
            held = {expert for expert, other, _ in after if other == token}
            room = [e for e in range(case.num_experts) if load[e] < limit and e not in held and probs[token][e] > 0]
            assert not room, (token, room, "dropped although an expert had room")


@given(crowded(), overflows, fills)
def test_enough_room_changes_nothing(drawn: tuple[Case, list[list[float]]], overflow: str, fill: str) -> None:
    """A factor of E is room for every token at every expert: dropless, to the bit."""
    case, probs = drawn
    routing = routing_of(case, probs)
    capacity = Capacity(float(case.num_experts), overflow, fill)  # type: ignore[arg-type]
    limited, free = dispatch(routing, capacity), dispatch(routing)
    for mine, theirs in zip(limited[:4], free[:4], strict=True):
        assert torch.equal(mine, theirs)
    assert limited.dropped is not None
    assert not limited.dropped.any()


@given(crowded(), factors, overflows, st.integers(0, 13))
def test_by_position_nobody_notices_later_tokens(
    drawn: tuple[Case, list[list[float]]], factor: str, overflow: str, cut: int
) -> None:
    case, probs = drawn
    capacity = Capacity(float(factor), overflow)  # type: ignore[arg-type]
    cut = min(cut, case.num_tokens)
    later = routing_of(case, probs)
    other = later._replace(
        topk_indices=torch.cat([later.topk_indices[:cut], later.topk_indices[cut:].flip(0)]),
        router_probs=torch.cat([later.router_probs[:cut], later.router_probs[cut:].flip(0, 1)]),
    )
    one, two = apply_capacity(later, capacity)[0], apply_capacity(other, capacity)[0]
    assert experts_of(one)[:cut] == experts_of(two)[:cut]
    assert torch.equal(one.topk_weights[:cut], two.topk_weights[:cut])


def test_token_major_fill_takes_all_slots_of_a_token_before_the_next() -> None:
    """Slot by slot, token 2's first choice would come before token 0's second."""
    routing = by_hand(torch.tensor([[0, 1], [0, 1], [1, 2]]), torch.ones(3, 2), 3)
    limited, dropped = apply_capacity(routing, Capacity(1.0))
    assert experts_of(limited) == [[0, 1], [0, 1], [None, 2]]
    assert dropped.tolist() == [0, 1, 0]


def test_by_probability_the_most_probable_stay_and_of_equals_the_earlier() -> None:
    routing = one_slot([0, 0, 0, 0], [[0.5, 0.5], [0.9, 0.1], [0.5, 0.5], [0.9, 0.1]])
    limited, dropped = apply_capacity(routing, Capacity(1.5, fill="probability"))
    assert experts_of(limited) == [[0], [0], [None], [0]]
    assert dropped.tolist() == [1, 0]


def test_a_chain_of_full_experts_is_followed_to_its_end() -> None:
    """All tokens want the experts in one order: token t ends at expert t, and what is left over is lost."""
    num_experts = 12
    probs = [[2.0**-expert for expert in range(num_experts)]] * (2 * num_experts)
    for fill in FILLS:
        routing = one_slot([0] * (2 * num_experts), probs)
        limited, dropped = apply_capacity(routing, Capacity(0.5, "next-best", fill))  # type: ignore[arg-type]
        assert experts_of(limited) == [[expert] for expert in range(num_experts)] + [[None]] * num_experts
        assert dropped.tolist() == [num_experts] + [0] * (num_experts - 1), "by the expert that the router chose"


def test_the_chain_under_compile_which_cannot_stop_early() -> None:
    routing = one_slot([0] * 10, [[2.0**-expert for expert in range(5)]] * 10)
    torch.compiler.reset()
    compiled = torch.compile(apply_capacity, backend="eager", fullgraph=True)
    for fill in FILLS:
        limited, _ = compiled(routing, Capacity(0.5, "next-best", fill))  # type: ignore[arg-type]
        assert experts_of(limited) == [[0], [1], [2], [3], [4]] + [[None]] * 5


def test_an_expert_of_probability_0_is_no_substitute() -> None:
    """It may have been dropped out; its weight would be 0 in any case."""
    probs = [[0.5, 0.0, 0.5, 0.0]] * 4
    limited, dropped = apply_capacity(one_slot([0, 0, 0, 0], probs), Capacity(1.0, "next-best"))
    assert experts_of(limited) == [[0], [2], [None], [None]]
    assert dropped.tolist() == [2, 0, 0, 0]


def test_an_unused_slot_neither_takes_a_place_nor_counts_as_lost() -> None:
    for overflow in OVERFLOWS:
        routing = one_slot([0, 0, 0, 1], [[0.6, 0.4]] * 4, [False, True, False, True])
        capacity = Capacity(0.5, overflow)  # type: ignore[arg-type]
        limited, dropped = apply_capacity(routing, capacity)
        assert experts_of(limited) == [[None], [0], [None], [1]]
        assert dropped.tolist() == [0, 0]


def test_the_limit_follows_from_the_real_tokens() -> None:
    """Four real tokens of eight, all at expert 0: room for 2, where eight tokens would have had room for 4."""
    mask = torch.tensor([True, False] * 4)
    routing = one_slot([0] * 8, [[0.6, 0.4]] * 8, mask.tolist())
    _, dropped = apply_capacity(routing, Capacity(1.0), mask)
    assert dropped.tolist() == [2, 0]


def test_a_token_that_a_router_lets_pass_is_real_all_the_same() -> None:
    """Its own ``keep`` says who goes nowhere; the mask alone says who is padding."""
    routing = one_slot([0] * 8, [[0.6, 0.4]] * 8, [True, False] * 4)
    assert apply_capacity(routing, Capacity(1.0))[1].tolist() == [0, 0]


@pytest.mark.parametrize("fill", FILLS)
def test_a_token_that_names_an_expert_twice_finds_another_for_the_second_slot(fill: str) -> None:
    routing = by_hand(torch.tensor([[1, 1], [0, 2]]), torch.ones(2, 2), 3, probs=torch.tensor([[0.2, 0.5, 0.3]] * 2))
    limited, dropped = apply_capacity(routing, Capacity(3.0, "next-best", fill))  # type: ignore[arg-type]
    assert experts_of(limited) == [[1, 2], [0, 2]]
    assert not dropped.any()


def test_no_tokens_and_one_token() -> None:
    for overflow in OVERFLOWS:
        for fill in FILLS:
            capacity = Capacity(1.0, overflow, fill)  # type: ignore[arg-type]
            nothing = by_hand(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), 3)
            plan = dispatch(nothing, capacity)
            assert plan.dropped is not None
            assert plan.dropped.tolist() == plan.tokens_per_expert.tolist() == [0, 0, 0]
            one = dispatch(by_hand(torch.tensor([[2, 0]]), torch.ones(1, 2), 3), capacity)
            assert one.expert_ids.tolist() == [0, 2]


def test_large_batches_settle_as_small_ones_do() -> None:
    """300 tokens of a skewed router, k = 3 of 16, against the pass in Python."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 16, generator=generator, dtype=torch.float64) - 0.2 * torch.arange(16)
    probs = logits.softmax(-1)
    indices = probs.topk(3).indices
    case = Case(16, 3, indices.tolist(), None, 0)
    routing = by_hand(indices, probs.gather(1, indices), 16, probs=probs)
    for overflow in OVERFLOWS:
        for fill in FILLS:
            limited, dropped = apply_capacity(routing, Capacity(1.1, overflow, fill))  # type: ignore[arg-type]
            expected = limit_by_hand(case, probs.tolist(), capacity_by_hand("1.1", 3, 300, 16), overflow, fill)
            assert experts_of(limited) == expected.experts
            assert dropped.tolist() == expected.dropped
            assert (indices != limited.topk_indices).any() == (overflow == "next-best")


# --- at which weight


@given(crowded(max_tokens=8), factors, overflows, fills)
def test_weights_and_their_gradients(
    drawn: tuple[Case, list[list[float]]], factor: str, overflow: str, fill: str
) -> None:
    """Gradients of the router's weights and of its probabilities; zero for what was dropped."""
    case, probs = drawn
    probs = [[p + 2.0**-20 for p in row] for row in probs]  # a chosen expert of probability 0 has no ratio
    routing = routing_of(case, probs)
    leaves = (routing.topk_weights.clone().requires_grad_(), routing.router_probs.clone().requires_grad_())
    routing = routing._replace(topk_weights=leaves[0], router_probs=leaves[1])
    limit = capacity_by_hand(factor, case.top_k, case.num_tokens, case.num_experts)
    capacity = Capacity(float(factor), overflow, fill)  # type: ignore[arg-type]

    def fast() -> Tensor:
        return apply_capacity(routing, capacity)[0].topk_weights

    def slow() -> Tensor:
        return apply_limit(routing, limit_by_hand(case, probs, limit, overflow, fill)).topk_weights

    torch.testing.assert_close(fast(), slow(), rtol=FLOAT64, atol=FLOAT64)
    if slow().requires_grad:
        for mine, reference in zip(gradients(fast, *leaves), gradients(slow, *leaves), strict=True):
            torch.testing.assert_close(mine, reference, rtol=10 * FLOAT64, atol=10 * FLOAT64)


@pytest.mark.parametrize(
    ("name", "options"),
    [("switch", {}), ("topk", {"top_k": 2, "norm_topk_prob": False}), ("topk", {"top_k": 2, "norm_topk_prob": True})],
)
def test_a_substitute_has_the_weight_that_the_router_gives_that_expert(name: str, options: dict[str, object]) -> None:
    """Its probability; with renormalisation over the chosen, divided by the sum over those."""
    torch.manual_seed(0)
    router = build_router(name, hidden_size=4, num_experts=5, noise_std=0.0, **options).double().eval()
    torch.nn.init.normal_(router.weight)
    routing = router(torch.randn(20, 4, dtype=torch.float64))
    limited, _ = apply_capacity(routing, Capacity(1.0, "next-best"))
    own = routing.router_probs.gather(1, limited.topk_indices)
    if options.get("norm_topk_prob"):
        own = own / routing.router_probs.gather(1, routing.topk_indices).sum(1, keepdim=True)
    moved = limited.topk_indices != routing.topk_indices
    assert 3 < int(moved.sum()) < moved.numel()
    torch.testing.assert_close(limited.topk_weights[limited.keep], own[limited.keep], rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_probabilities_give_finite_weights_and_gradients(dtype: torch.dtype) -> None:
    """Logits of ±80 and far beyond: a chosen expert may have a probability that is denormal, or 0."""
    for scale in (1.0, 80.0, 400.0):
        torch.manual_seed(0)
        logits = (scale * torch.randn(40, 6)).to(dtype).requires_grad_()
        probs = logits.softmax(-1)
        indices = torch.stack([torch.randperm(6)[:2] for _ in range(40)])  # chosen without regard to probability
        for fill in FILLS:
            routing = by_hand(indices, probs.gather(1, indices), 6, probs=probs)
            limited, _ = apply_capacity(routing, Capacity(0.8, "next-best", fill))  # type: ignore[arg-type]
            assert limited.topk_weights.isfinite().all()
            assert (limited.topk_weights <= 1 + 1e-6).all()
            (gradient,) = torch.autograd.grad(limited.topk_weights.sum(), logits, retain_graph=True)
            assert gradient.isfinite().all()


def test_a_nan_token_harms_no_other() -> None:
    probs = torch.tensor([[0.6, 0.4]] * 4, dtype=torch.float64)
    probs[2] = math.nan
    routing = one_slot([0, 0, 0, 0], probs.tolist())
    limited, _ = apply_capacity(routing, Capacity(1.0, "next-best"))
    assert experts_of(limited) == [[0], [0], [None], [1]]
    assert limited.topk_weights.isfinite().all()


def test_the_decision_itself_is_left_alone() -> None:
    """Balance is judged by what the router wanted, not by what capacity made of it."""
    routing = one_slot([0, 0, 0], [[0.6, 0.4]] * 3)
    before = [field.clone() for field in routing if field is not None]
    limited, _ = apply_capacity(routing, Capacity(1.0, "next-best"))
    assert limited is not routing
    for field, kept in zip([f for f in routing if f is not None], before, strict=True):
        assert torch.equal(field, kept)
    for name in ("router_logits", "router_probs", "router_probs_clean", "entropy"):
        assert getattr(limited, name) is getattr(routing, name)


def test_the_reference_itself_on_a_case_by_hand() -> None:
    """Room for 2 each. Token 2 finds 0 full and takes 1, so that token 3 finds 1 full, and takes 2."""
    probs = [[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.1, 0.6, 0.3]]
    case = Case(3, 1, [[0], [0], [0], [1], [1]], None, 0)
    assert capacity_by_hand("1.1", 1, 5, 3) == math.ceil(Fraction(11, 6)) == 2
    next_best = Limited([[0], [0], [1], [1], [2]], [0, 0, 0])
    assert limit_by_hand(case, probs, 2, "next-best", "position") == next_best
    assert limit_by_hand(case, probs, 2, "drop", "position") == Limited([[0], [0], [None], [1], [1]], [1, 0, 0])
    by_probability = Limited([[0], [0], [2], [1], [1]], [0, 0, 0])
    assert limit_by_hand(case, probs, 2, "next-best", "probability") == by_probability

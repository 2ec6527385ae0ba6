"""Dispatch and combine against Python lists: every assignment arrives once, in order, and comes back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from moectl.moe import RouterOutput
from moectl.moe.capacity import FILLS, OVERFLOWS, Capacity
from moectl.moe.dispatch import Dispatch, combine, count_sorted, dispatch
from moectl.moe.stats import expert_counts
from tests.moe.reference import Case, by_hand, cases

FLOAT64_SUM = 1e-14  # a handful of float64 products, added in another order than the reference adds them


@given(cases())
def test_plan_is_the_sorted_list_of_assignments(case: Case) -> None:
    routing = case.routing()
    plan = dispatch(routing)
    expected = case.assignments()
    used = len(expected)
    assert plan.expert_ids.tolist()[:used] == [expert for expert, _, _ in expected]
    assert plan.token_ids.tolist()[:used] == [token for _, token, _ in expected]
    assert plan.weights.tolist()[:used] == [float(routing.topk_weights[token, slot]) for _, token, slot in expected]
    assert plan.tokens_per_expert.tolist() == [
        sum(expert == wanted for expert, _, _ in expected) for wanted in range(case.num_experts)
    ]
    assert plan.token_ids.dtype == plan.expert_ids.dtype == plan.tokens_per_expert.dtype == torch.int64
    assert plan.dropped is None


@given(cases())
def test_the_shape_does_not_depend_on_the_decision_and_unused_slots_come_last(case: Case) -> None:
    plan = dispatch(case.routing())
    slots, used = case.num_tokens * case.top_k, len(case.assignments())
    assert plan.token_ids.shape == plan.expert_ids.shape == plan.weights.shape == (slots,)
    assert plan.expert_ids.tolist()[used:] == [case.num_experts] * (slots - used)
    assert plan.weights.tolist()[used:] == [0.0] * (slots - used)
    every_slot = sorted(token for token in range(case.num_tokens) for _ in range(case.top_k))
    assert sorted(plan.token_ids.tolist()) == every_slot, "a permutation of all slots: each is gathered from a real row"


def test_whatever_weight_an_unused_slot_holds_it_counts_0() -> None:
    weights = torch.tensor([[math.nan, 0.5], [0.25, math.inf]], requires_grad=True)
    keep = torch.tensor([[False, True], [True, False]])
    routing = by_hand(torch.tensor([[0, 1], [1, 0]]), torch.ones(2, 2), 2)._replace(topk_weights=weights, keep=keep)
    plan = dispatch(routing)
    assert plan.weights.tolist() == [0.5, 0.25, 0.0, 0.0]
    plan.weights.sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [[0.0, 1.0], [1.0, 0.0]]


@given(cases())
def test_keeping_every_slot_is_the_same_as_no_keep(case: Case) -> None:
    routing = case.routing()._replace(keep=None)
    everything = routing._replace(keep=torch.ones_like(routing.topk_indices, dtype=torch.bool))
    one, other = dispatch(routing), dispatch(everything)
    assert one.dropped is None
    assert other.dropped is None
    for mine, theirs in zip(one[:4], other[:4], strict=True):
        assert torch.equal(mine, theirs)


@given(cases())
def test_combine_adds_each_weighted_output_to_its_token(case: Case) -> None:
    plan = dispatch(case.routing())
    outputs = torch.full((case.num_tokens * case.top_k, 3), math.nan, dtype=torch.float64)
    outputs[: len(case.assignments())] = torch.randn(len(case.assignments()), 3, dtype=torch.float64)
    expected = torch.zeros(case.num_tokens, 3, dtype=torch.float64)
    for row, (_, token, _) in enumerate(case.assignments()):
        expected[token] += plan.weights[row] * outputs[row]
    combined = combine(plan, outputs, case.num_tokens)
    torch.testing.assert_close(combined, expected, rtol=0, atol=FLOAT64_SUM)
    visited = {token for _, token, _ in case.assignments()}
    for token in set(range(case.num_tokens)) - visited:
        assert combined[token].tolist() == [0.0, 0.0, 0.0]


@given(cases(max_tokens=6, max_experts=4))
def test_identity_experts_return_each_token_times_its_weights(case: Case) -> None:
    """The round trip: what is gathered by ``token_ids`` and combined comes home to its own row."""
    routing = case.routing()
    x = torch.randn(case.num_tokens, 4, dtype=torch.float64)
    plan = dispatch(routing)
    weights = routing.topk_weights if routing.keep is None else routing.topk_weights * routing.keep
    expected = weights.sum(1, keepdim=True) * x
    torch.testing.assert_close(combine(plan, x[plan.token_ids], case.num_tokens), expected, rtol=0, atol=FLOAT64_SUM)


def test_gradients_reach_every_used_weight_and_no_other() -> None:
    keep = torch.tensor([[True, True], [False, True], [False, False]])
    indices = torch.tensor([[2, 0], [1, 2], [0, 1]])
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    plan = dispatch(by_hand(indices, weights, 3, keep))
    plan.weights.sum().backward()
    assert weights.grad is not None
    assert torch.equal(weights.grad, keep.double())


def test_combine_is_differentiable_in_outputs_and_weights() -> None:
    indices = torch.tensor([[0, 1], [1, 2], [2, 0]])
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    outputs = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)

    def run(weights: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        return combine(dispatch(by_hand(indices, weights, 3)), outputs, 3)

    assert torch.autograd.gradcheck(run, (weights, outputs))


def test_garbage_in_unused_rows_reaches_no_gradient() -> None:
    weights = torch.rand(2, 1, dtype=torch.float64, requires_grad=True)
    plan = dispatch(by_hand(torch.tensor([[1], [0]]), weights, 2, torch.tensor([[True], [False]])))
    outputs = torch.tensor([[2.0, 3.0], [math.nan, math.inf]], dtype=torch.float64, requires_grad=True)
    combine(plan, outputs, 2).sum().backward()
    assert weights.grad is not None
    assert outputs.grad is not None
    assert weights.grad.tolist() == [[5.0], [0.0]]
    assert outputs.grad.tolist() == [[weights[0].item()] * 2, [0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_combine_accumulates_low_precision_in_float32(dtype: torch.dtype) -> None:
    """1 + 64·2⁻¹² is 1.015625. Added up in half precision every small term would round away and leave 1."""
    outputs = torch.tensor([[1.0]] + [[2.0**-12]] * 64, dtype=dtype)
    plan = Dispatch(
        token_ids=torch.zeros(65, dtype=torch.int64),
        expert_ids=torch.zeros(65, dtype=torch.int64),
        weights=torch.ones(65),
        tokens_per_expert=torch.tensor([65]),
    )
    combined = combine(plan, outputs, 1)
    assert combined.dtype == dtype
    assert combined.item() == 1.015625  # exact in both dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_combine_rounds_once(dtype: torch.dtype) -> None:
    """Products and sums in float32, one rounding at the end: not a bit apart from the float32 result rounded."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(6, generator=generator)[:4] for _ in range(50)])
    plan = dispatch(by_hand(indices, torch.rand(50, 4, generator=generator).softmax(1), 6))
    outputs = torch.randn(200, 8, generator=generator).to(dtype)
    assert torch.equal(combine(plan, outputs, 50), combine(plan, outputs.float(), 50).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_combine_returns_the_dtype_of_the_outputs(dtype: torch.dtype) -> None:
    routing = by_hand(torch.tensor([[0], [1]]), torch.ones(2, 1), 2)
    assert combine(dispatch(routing), torch.randn(2, 3).to(dtype), 2).dtype == dtype


def test_combine_with_float32_weights_keeps_float64_outputs_exact() -> None:
    plan = dispatch(by_hand(torch.tensor([[0]]), torch.ones(1, 1, dtype=torch.float32), 1))
    outputs = torch.tensor([[1.0 + 2.0**-40]], dtype=torch.float64)
    assert torch.equal(combine(plan, outputs, 1), outputs)


def test_no_tokens() -> None:
    plan = dispatch(by_hand(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), 3))
    assert plan.tokens_per_expert.tolist() == [0, 0, 0]
    assert combine(plan, torch.zeros(0, 5), 0).shape == (0, 5)


def test_one_expert_takes_all_in_token_order() -> None:
    plan = dispatch(by_hand(torch.full((9, 1), 3), torch.ones(9, 1), 5))
    assert plan.tokens_per_expert.tolist() == [0, 0, 0, 9, 0]
    assert plan.token_ids.tolist() == list(range(9))


def test_order_within_an_expert_is_stable_at_sizes_where_unstable_sorts_are_not() -> None:
    """torch's default sort is stable by luck on short inputs; 5,000 assignments leave luck behind."""
    indices = torch.randint(0, 7, (5000, 1), generator=torch.Generator().manual_seed(0))
    plan = dispatch(by_hand(indices, torch.ones(5000, 1), 7))
    for expert in range(7):
        mine = plan.token_ids[plan.expert_ids == expert]
        assert torch.equal(mine, (indices[:, 0] == expert).nonzero().squeeze(1))


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 9))
def test_counts_of_sorted_ids(ids: list[int], num_experts: int) -> None:
    """Ids from ``num_experts`` on are unused slots."""
    counts = count_sorted(torch.tensor(sorted(ids), dtype=torch.int64), num_experts)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [ids.count(expert) for expert in range(num_experts)]


def test_counts_are_exact_where_float32_is_not() -> None:
    """2²⁴ + 1 is the first whole number that float32 has not."""
    assert count_sorted(torch.ones(2**24 + 1, dtype=torch.int64), 2).tolist() == [0, 2**24 + 1]


CAPACITIES = [None, *(Capacity(1.0, overflow, fill) for overflow in OVERFLOWS for fill in FILLS)]


def random_routing(num_tokens: int, *, masked: bool, device: str = "cpu") -> tuple[RouterOutput, torch.Tensor | None]:
    probs = torch.rand(num_tokens, 4, device=device)
    indices = torch.sort(probs, descending=True).indices[:, :2].contiguous()
    mask = probs[:, 0] > 0.3 if masked else None
    keep = None if mask is None else mask[:, None].expand(num_tokens, 2)
    entropy = probs.sum(1)
    return RouterOutput(indices, probs.gather(1, indices), probs, probs, probs, entropy, keep), mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("capacity", CAPACITIES, ids=str)
def test_nothing_waits_for_the_device(capacity: Capacity | None, masked: bool) -> None:
    """Tensors on the meta device have shapes and no values: whoever reads one, or asks how many there are, fails."""
    routing, mask = random_routing(9, masked=masked, device="meta")
    plan = dispatch(routing, capacity, token_mask=mask)
    out = combine(plan, torch.rand(18, 3, device="meta"), 9)
    for field in (*plan, out):
        assert field is None or field.device.type == "meta"
    assert plan.token_ids.shape == (18,)
    assert (plan.dropped is None) == (capacity is None)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("capacity", CAPACITIES, ids=str)
def test_one_graph_fits_all_token_counts(capacity: Capacity | None, masked: bool) -> None:
    """The first size is compiled as it is, the second for any size (torch's automatic dynamic shapes), then no more."""
    graphs = CompileCounter()

    def run(routing: RouterOutput, mask: torch.Tensor | None) -> tuple[Dispatch, torch.Tensor]:
        plan = dispatch(routing, capacity, token_mask=mask)
        return plan, combine(plan, routing.router_probs[plan.token_ids], routing.router_probs.shape[0])

    torch.compiler.reset()
    compiled = torch.compile(run, backend=graphs, fullgraph=True)
    for num_tokens in range(3, 23):
        torch.manual_seed(num_tokens)
        routing = random_routing(num_tokens, masked=masked)
        (plan, out), (expected, combined) = compiled(*routing), run(*routing)
        for mine, theirs in zip(plan, expected, strict=True):
            assert mine is theirs is None or torch.equal(mine, theirs)
        assert torch.equal(out, combined)
    assert graphs.frame_count == 2


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(6, 9))
def test_counts_of_flat_ids(ids: list[int], num_experts: int) -> None:
    counts = expert_counts(torch.tensor(ids, dtype=torch.int64), num_experts)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [ids.count(expert) for expert in range(num_experts)]

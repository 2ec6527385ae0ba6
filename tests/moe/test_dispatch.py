"""Dispatch and combine against Python lists: every assignment arrives once, in order, and comes back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moectl.moe.dispatch import Dispatch, combine, dispatch
from moectl.moe.stats import expert_counts
from tests.moe.reference import Case, by_hand, cases

FLOAT64_SUM = 1e-14  # a handful of float64 products, added in another order than the reference adds them


@given(cases())
def test_plan_is_the_sorted_list_of_assignments(case: Case) -> None:
    routing = case.routing()
    plan = dispatch(routing)
    expected = case.assignments()
    assert plan.expert_ids.tolist() == [expert for expert, _, _ in expected]
    assert plan.token_ids.tolist() == [token for _, token, _ in expected]
    assert plan.weights.tolist() == [float(routing.topk_weights[token, slot]) for _, token, slot in expected]
    assert plan.tokens_per_expert.tolist() == [
        sum(expert == wanted for expert, _, _ in expected) for wanted in range(case.num_experts)
    ]
    assert plan.token_ids.dtype == plan.expert_ids.dtype == plan.tokens_per_expert.dtype == torch.int64


@given(cases())
def test_keeping_every_slot_is_the_same_as_no_keep(case: Case) -> None:
    routing = case.routing()._replace(keep=None)
    everything = routing._replace(keep=torch.ones_like(routing.topk_indices, dtype=torch.bool))
    for one, other in zip(dispatch(routing), dispatch(everything), strict=True):
        assert torch.equal(one, other)


@given(cases())
def test_combine_adds_each_weighted_output_to_its_token(case: Case) -> None:
    plan = dispatch(case.routing())
    outputs = torch.randn(len(case.assignments()), 3, dtype=torch.float64)
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


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(6, 9))
def test_counts_of_flat_ids(ids: list[int], num_experts: int) -> None:
    counts = expert_counts(torch.tensor(ids, dtype=torch.int64), num_experts)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [ids.count(expert) for expert in range(num_experts)]

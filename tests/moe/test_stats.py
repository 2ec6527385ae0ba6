"""Statistics of routing against counting by hand."""

from __future__ import annotations

import math
import statistics
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moectl.moe import stats
from moectl.moe.losses import load_balancing_loss
from tests.moe.reference import Case, cases

counts = st.lists(st.integers(0, 50), min_size=1, max_size=8)


@given(cases(), st.data())
def test_expert_counts_equal_counting(case: Case, data: st.DataObject) -> None:
    real = data.draw(st.lists(st.booleans(), min_size=case.num_tokens, max_size=case.num_tokens))
    routing = case.routing()
    everywhere = stats.expert_counts(routing.topk_indices, case.num_experts, routing.keep)
    counted = Counter(expert for expert, _, _ in case.assignments())
    assert everywhere.dtype == torch.int64
    assert everywhere.tolist() == [counted[expert] for expert in range(case.num_experts)]
    mask = torch.tensor(real, dtype=torch.bool)
    on_real = stats.expert_counts(routing.topk_indices, case.num_experts, routing.keep, mask)
    counted = Counter(expert for expert, token, _ in case.assignments() if real[token])
    assert on_real.tolist() == [counted[expert] for expert in range(case.num_experts)]


@given(counts)
def test_shares_sum_to_one_or_are_zero(values: list[int]) -> None:
    shares = stats.shares(torch.tensor(values))
    assert shares.dtype == torch.float64
    assert shares.sum().item() == pytest.approx(1.0 if any(values) else 0.0)
    assert shares.tolist() == pytest.approx([value / max(sum(values), 1) for value in values])
    assert stats.max_share(torch.tensor(values)) == pytest.approx(max(values) / max(sum(values), 1))


def test_shares_of_a_table_are_row_by_row() -> None:
    table = stats.shares(torch.tensor([[1, 3], [0, 0], [2, 0]]))
    assert table.tolist() == [[0.25, 0.75], [0.0, 0.0], [1.0, 0.0]]


@given(counts)
def test_load_cv_is_population_deviation_over_mean(values: list[int]) -> None:
    expected = statistics.pstdev(values) / statistics.fmean(values) if any(values) else 0.0
    assert stats.load_cv(torch.tensor(values)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "cv", "effective"),
    [([5, 5, 5, 5], 0.0, 4.0), ([9, 0, 0, 0], math.sqrt(3), 1.0), ([1, 1, 0, 0], 1.0, 2.0), ([0, 0], 0.0, 0.0)],
)
def test_load_by_hand(values: list[int], cv: float, effective: float) -> None:
    assert stats.load_cv(torch.tensor(values)) == pytest.approx(cv)
    assert stats.effective_experts(torch.tensor(values)) == pytest.approx(effective)


@given(counts)
def test_effective_experts_lie_between_one_and_those_in_use(values: list[int]) -> None:
    effective = stats.effective_experts(torch.tensor(values))
    used = sum(value > 0 for value in values)
    assert (1 if used else 0) - 1e-9 <= effective <= used + 1e-9


def test_dropped_fraction() -> None:
    assert stats.dropped_fraction(torch.tensor([1, 0, 2]), torch.tensor([5, 4, 3])) == pytest.approx(0.25)
    assert stats.dropped_fraction(torch.tensor([0, 0]), torch.tensor([0, 0])) == 0.0
    assert stats.dropped_fraction(torch.tensor([3, 1]), torch.tensor([3, 1])) == 1.0


def test_dead_experts() -> None:
    assert stats.dead_experts(torch.tensor([3, 0, 1, 0])) == [1, 3]
    assert stats.dead_experts(torch.tensor([3, 1])) == []


@given(cases(max_tokens=12))
def test_balance_value_is_the_loss(case: Case) -> None:
    """The number that is logged and the number that is trained on are one."""
    routing = case.routing()
    probs = torch.randn(case.num_tokens, case.num_experts, dtype=torch.float64).softmax(-1)
    loss = load_balancing_loss(probs, routing.topk_indices, case.num_experts, None, routing.keep)
    chosen = stats.expert_counts(routing.topk_indices, case.num_experts, routing.keep)
    mean = probs.sum(0) / max(case.num_tokens, 1)
    assert stats.balance_value(chosen, mean) == pytest.approx(loss.item(), abs=1e-12)


@pytest.mark.parametrize(("experts", "k"), [(8, 1), (8, 2), (5, 5)])
def test_collapse_value_is_the_balance_value_of_a_collapse(experts: int, k: int) -> None:
    chosen, mean = torch.zeros(experts, dtype=torch.int64), torch.zeros(experts)
    chosen[:k], mean[:k] = 7, 1 / k
    assert stats.balance_value(chosen, mean) == pytest.approx(stats.collapse_value(experts, k))
    balanced = torch.full((experts,), 7)
    assert stats.balance_value(balanced, torch.full((experts,), 1 / experts)) == pytest.approx(1.0)

"""Information between domain and expert: hand-computed values, invariances, bounds, the permutation null."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moectl.inspection.specialization import (
    GroupCounts,
    count_by_group,
    entropy,
    mutual_information,
    normalized_mutual_information,
    permutation_null,
    permutation_test,
)

LN2 = math.log(2)
tables = arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=st.integers(0, 1000))


def textbook_nmi(table: np.ndarray) -> float:
    """The definition, term by term, with nothing of the implementation in it."""
    total = table.sum()
    if total == 0:
        return 0.0
    joint = table / total
    rows, columns = joint.sum(1), joint.sum(0)
    information = sum(
        joint[d, e] * math.log(joint[d, e] / (rows[d] * columns[e])) for d, e in np.ndindex(*joint.shape) if joint[d, e]
    )
    h_rows, h_columns = (-sum(p * math.log(p) for p in margin if p) for margin in (rows, columns))
    return information / math.sqrt(h_rows * h_columns) if h_rows > 1e-12 and h_columns > 1e-12 else 0.0


def test_entropy_by_hand() -> None:
    assert entropy([1, 1, 2]) == pytest.approx(1.5 * LN2)
    assert entropy([5, 0]) == 0.0
    assert entropy([0, 0]) == 0.0


def test_two_by_two_by_hand() -> None:
    """Rows (3, 1) and (1, 3): I = ln 2 - H(1/4), and both entropies are ln 2."""
    h_quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert mutual_information([[3, 1], [1, 3]]) == pytest.approx(LN2 - h_quarter, abs=1e-12)
    assert normalized_mutual_information([[3, 1], [1, 3]]) == pytest.approx((LN2 - h_quarter) / LN2, abs=1e-12)


def test_unequal_domains_by_hand() -> None:
    """6 tokens against 2, each with an expert of its own, one shared: counts are taken as they are."""
    table = np.array([[4, 0, 2], [0, 1, 1]])
    information = 4 / 8 * math.log(4 * 8 / (6 * 4)) + 2 / 8 * math.log(2 * 8 / (6 * 3))
    information += 1 / 8 * math.log(1 * 8 / (2 * 1)) + 1 / 8 * math.log(1 * 8 / (2 * 3))
    h_domain = -(6 / 8 * math.log(6 / 8) + 2 / 8 * math.log(2 / 8))
    h_expert = -(4 / 8 * math.log(4 / 8) + 1 / 8 * math.log(1 / 8) + 3 / 8 * math.log(3 / 8))
    assert normalized_mutual_information(table) == pytest.approx(
        information / math.sqrt(h_domain * h_expert), abs=1e-12
    )


@pytest.mark.parametrize("domains", [2, 3, 7])
def test_perfect_separation_is_one(domains: int) -> None:
    assert normalized_mutual_information(np.eye(domains) * 50) == pytest.approx(1.0)


def test_perfect_separation_over_several_experts_each_is_less() -> None:
    """Two domains with two experts of their own each: I = ln 2, H(expert) = ln 4."""
    assert normalized_mutual_information([[5, 5, 0, 0], [0, 0, 5, 5]]) == pytest.approx(1 / math.sqrt(2))


@pytest.mark.parametrize("table", [[[9, 0], [5, 0]], [[3, 4], [0, 0]], [[7, 2]], [[7], [2]], [[0, 0], [0, 0]]])
def test_zero_when_an_entropy_is_zero(table: list[list[int]]) -> None:
    assert normalized_mutual_information(table) == 0.0


def test_independence_is_zero() -> None:
    assert normalized_mutual_information(np.outer([1, 2, 5], [3, 1, 1, 4])) == pytest.approx(0.0, abs=1e-12)


@given(tables)
def test_agrees_with_the_definition_and_stays_in_bounds(table: np.ndarray) -> None:
    value = normalized_mutual_information(table)
    assert 0.0 <= value <= 1.0
    assert value == pytest.approx(textbook_nmi(table), abs=1e-9)


@given(tables, st.randoms(use_true_random=False))
def test_names_do_not_matter(table: np.ndarray, random) -> None:
    rows, columns = list(range(table.shape[0])), list(range(table.shape[1]))
    random.shuffle(rows)
    random.shuffle(columns)
    shuffled = table[rows][:, columns]
    assert normalized_mutual_information(shuffled) == pytest.approx(normalized_mutual_information(table), abs=1e-9)
    assert normalized_mutual_information(3 * table) == pytest.approx(normalized_mutual_information(table), abs=1e-9)
    with_dead = np.hstack([table, np.zeros((len(table), 2), dtype=np.int64)])
    assert normalized_mutual_information(with_dead) == pytest.approx(normalized_mutual_information(table), abs=1e-9)


def test_takes_tensors() -> None:
    assert normalized_mutual_information(torch.tensor([[3, 1], [1, 3]])) == pytest.approx(0.18872187554)


@pytest.mark.parametrize("counts", [[1, 2, 3], [[[1]]], [[1, -1], [2, 3]], [[float("nan"), 1], [2, 3]]])
def test_refuses_what_is_no_table_of_counts(counts: list) -> None:
    with pytest.raises(ValueError, match="counts must"):
        normalized_mutual_information(counts)


def test_counts_by_group_leave_out_unused_slots() -> None:
    grouped = count_by_group(
        experts=[[0, 1], [1, -1], [2, 0], [-1, -1]], domains=["b", "b", "a", "a"], groups=[7, 7, 3, 4], num_experts=3
    )
    assert grouped.counts.tolist() == [[1, 0, 1], [0, 0, 0], [1, 2, 0]]
    assert grouped.domains.tolist() == [0, 0, 1]
    assert grouped.by_domain().tolist() == [[1, 0, 1], [1, 2, 0]]


def test_a_group_in_two_domains_is_refused() -> None:
    with pytest.raises(ValueError, match=r"group 5 lies in two domains"):
        permutation_test([0, 1], [0, 1], [5, 5], 2)


@pytest.mark.parametrize(
    ("experts", "domains", "groups"), [([0, 1, 2], [0, 1], [0, 1]), ([0, 1], [0, 1], [0]), ([[[0]]], [0], [0])]
)
def test_shapes_that_do_not_fit_are_refused(experts: list, domains: list, groups: list) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        permutation_test(experts, domains, groups, 4)


def test_an_expert_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="expert 4 is not below"):
        permutation_test([0, 4], [0, 1], [0, 1], 4)


def test_vectorised_null_equals_shuffling_tokens_group_by_group() -> None:
    """The reference moves the label of every single token of a group, one shuffle at a time."""
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(9), rng.integers(5, 40, 9))
    label_of_group = np.arange(9) % 3
    experts = rng.integers(0, 5, len(groups))
    test = permutation_test(experts, label_of_group[groups], groups, 5, draws=40, seed=3)

    shuffles = np.random.default_rng(3).permuted(np.broadcast_to(label_of_group, (40, 9)), axis=1)
    expected = []
    for labels in shuffles:
        table = np.zeros((3, 5))
        np.add.at(table, (labels[groups], experts), 1)
        expected.append(textbook_nmi(table))
    assert test.null == pytest.approx(np.array(expected), abs=1e-12)
    reached = sum(value >= test.statistic - 1e-12 for value in expected)
    assert test.p_value == pytest.approx((1 + reached) / 41)


def test_null_in_pieces_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    grouped = GroupCounts(rng.integers(0, 9, (30, 4)), np.arange(30) % 3, 3)
    monkeypatch.setattr("moectl.inspection.specialization._CHUNK", 1)
    null = permutation_null(grouped, draws=25)
    assert null.shape == (25,) and np.isfinite(null).all() and (null > 0).all()


def test_real_dependence_is_found_and_seeded() -> None:
    groups = np.repeat(np.arange(30), 50)
    domains = groups % 3
    experts = np.where(np.random.default_rng(0).random(1500) < 0.5, domains, 3)
    first, again, other = (permutation_test(experts, domains, groups, 4, draws=500, seed=seed) for seed in (0, 0, 1))
    assert first.p_value == pytest.approx(1 / 501)
    assert first.statistic > first.null.max()
    assert np.array_equal(first.null, again.null)
    assert not np.array_equal(first.null, other.null)


def test_p_values_are_honest_without_dependence() -> None:
    """Groups that differ among themselves, domains that mean nothing: about 5 % of p-values below 0.05."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(24), 20)
    small = 0
    for seed in range(200):
        favourite = rng.integers(0, 4, 24)
        experts = np.where(rng.random(480) < 0.6, favourite[groups], rng.integers(0, 4, 480))
        labels = rng.permutation(np.arange(24) % 3)
        small += permutation_test(experts, labels[groups], groups, 4, draws=99, seed=seed).p_value <= 0.05
    assert 2 <= small <= 20  # 10 expected; 99.7 % of binomial(200, 0.05) lies in 2..20


def test_shuffling_tokens_instead_would_call_it_specialised() -> None:
    """Why groups matter: the same meaningless domains look certain when every token is its own group."""
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(12), 100)
    favourite = rng.integers(0, 4, 12)
    experts = np.where(rng.random(1200) < 0.6, favourite[groups], rng.integers(0, 4, 1200))
    domains = groups % 3
    by_token = permutation_test(experts, domains, np.arange(1200), 4, draws=99)
    by_group = permutation_test(experts, domains, groups, 4, draws=99)
    assert by_token.p_value == 0.01
    assert by_group.p_value > 0.05

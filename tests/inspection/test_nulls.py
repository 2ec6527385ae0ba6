"""One layer beside its three references: what counts as above them."""

from __future__ import annotations

import numpy as np
import pytest

from moectl.inspection.nulls import specialization
from moectl.inspection.specialization import GroupCounts, nmi, normalized_mutual_information
from moectl.resampling import centred_interval, group_weights

DOMAINS = np.arange(30) % 3


def draw(strength: float, seed: int, tokens: int = 400) -> GroupCounts:
    """30 groups of three domains over 6 experts; ``strength`` of the tokens follow the domain."""
    rng = np.random.default_rng(seed)
    rows = []
    for domain in DOMAINS:
        shares = (1 - strength) * rng.dirichlet(np.full(6, 20.0)) + strength * np.eye(6)[domain]
        rows.append(rng.multinomial(tokens, shares))
    return GroupCounts(np.array(rows), DOMAINS, 3)


def gates(strength: float) -> np.ndarray:
    return np.stack([draw(strength, 1000 + seed).counts for seed in range(100)])


def test_values_and_nulls_are_what_they_are_called() -> None:
    observed, random_gates, start = draw(0.5, 0), gates(0.1), draw(0.0, 2)
    found = specialization(observed, random_gates, start, permutations=300, bootstrap=200)
    assert found.value == pytest.approx(normalized_mutual_information(observed.by_domain()))
    each = np.array([normalized_mutual_information(GroupCounts(g, DOMAINS, 3).by_domain()) for g in random_gates])
    null = found.null_random_router
    assert (null.mean, null.maximum, null.draws) == (pytest.approx(each.mean()), pytest.approx(each.max()), 100)
    assert null.value == pytest.approx(np.quantile(each, 0.95))
    assert null.p_value == pytest.approx(1 / 101)
    assert found.step0 is not None
    assert found.step0.value == pytest.approx(normalized_mutual_information(start.by_domain()))
    assert found.null_permutation.draws == 300
    assert found.mutual_information / np.sqrt(found.domain_entropy * found.expert_entropy) == pytest.approx(found.value)


def test_strong_specialisation_exceeds_all_three() -> None:
    found = specialization(draw(0.5, 0), gates(0.1), draw(0.0, 2), bootstrap=200)
    assert found.exceeds_all
    assert found.interval is not None and found.interval.low < found.value < found.interval.high


def test_above_shuffles_and_step_0_but_not_above_random_gates() -> None:
    """The common case: domains differ in vocabulary, and any gate shows it."""
    found = specialization(draw(0.3, 0), gates(0.3), draw(0.0, 2), bootstrap=200)
    assert found.null_permutation.exceeded and found.step0 is not None and found.step0.exceeded
    assert not found.null_random_router.exceeded
    assert not found.exceeds_all
    assert found.strongest == "null_random_router"


def test_not_above_its_own_start() -> None:
    found = specialization(draw(0.3, 0), gates(0.0), draw(0.35, 2), bootstrap=200)
    assert found.null_random_router.exceeded
    assert found.step0 is not None and not found.step0.exceeded and found.step0.margin < 0
    assert not found.exceeds_all


def test_without_step_0_nothing_exceeds_all() -> None:
    found = specialization(draw(0.5, 0), gates(0.0), None, bootstrap=50)
    assert found.step0 is None and not found.exceeds_all
    assert found.to_dict()["step0"] is None


def test_the_same_counts_are_not_above_themselves() -> None:
    observed = draw(0.3, 0)
    found = specialization(observed, gates(0.0), observed, bootstrap=200)
    assert found.step0 is not None and found.step0.interval == (0.0, 0.0) and not found.step0.exceeded


def test_one_group_in_a_domain_gives_no_interval_and_no_claim() -> None:
    observed = draw(0.8, 0)
    keep = np.array([0, 1, 2, 4, 5])  # domain 0 keeps one group
    small = GroupCounts(observed.counts[keep], DOMAINS[keep], 3)
    found = specialization(small, gates(0.0)[:, keep], small, bootstrap=50)
    assert found.interval is None
    assert not found.null_random_router.exceeded and found.null_random_router.interval is None
    assert found.to_dict()["interval"] is None


def test_resampled_margins_equal_resampling_groups_by_hand() -> None:
    """The slow reference repeats whole groups and builds every table anew."""
    observed, start = draw(0.3, 0), draw(0.0, 2)
    found = specialization(observed, gates(0.1)[:3], start, bootstrap=60, seed=4)
    weights = group_weights(DOMAINS, 60, 4).astype(int)
    margins = []
    for row in weights:
        chosen = np.repeat(np.arange(30), row)
        tables = [GroupCounts(c.counts[chosen], DOMAINS[chosen], 3).by_domain() for c in (observed, start)]
        margins.append(float(nmi(tables[0]) - nmi(tables[1])))
    assert found.step0 is not None and found.step0.interval is not None
    assert found.step0.interval == pytest.approx(centred_interval(found.step0.margin, np.array(margins)), abs=1e-12)


def test_pieces_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = specialization(draw(0.3, 0), gates(0.1), draw(0.0, 2), bootstrap=40)
    monkeypatch.setattr("moectl.inspection.nulls._CHUNK", 1)
    assert specialization(draw(0.3, 0), gates(0.1), draw(0.0, 2), bootstrap=40) == whole


def test_bootstrap_keeps_each_domains_number_of_groups() -> None:
    weights = group_weights(np.array([0, 0, 1, 1, 1]), 500, seed=0)
    assert (weights[:, :2].sum(1) == 2).all() and (weights[:, 2:].sum(1) == 3).all()
    assert weights.mean(0) == pytest.approx(np.ones(5), abs=0.15)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Means of groups: with 30 groups the bootstrap interval covers in roughly 95 % of repetitions."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        groups = rng.normal(3.0, 1.0, 30)
        weights = group_weights(np.zeros(30, dtype=np.int64), 300, seed)
        low, high = centred_interval(groups.mean(), weights @ groups / 30)
        covered += low <= 3.0 <= high
    assert 0.88 <= covered / 200 <= 0.99

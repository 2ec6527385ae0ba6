"""One layer beside its three references: what counts as above them."""

from __future__ import annotations

import numpy as np
import pytest

from moectl.inspection.nulls import specialization
from moectl.inspection.specialization import GroupCounts, nmi, normalized_mutual_information
from moectl.resampling import centred_interval, group_weights, smallest_stratum

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
    assert found.step0.interval == pytest.approx(centred_interval(found.step0.margin, np.array(margins), 10), abs=1e-12)


def test_pieces_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = specialization(draw(0.3, 0), gates(0.1), draw(0.0, 2), bootstrap=40)
    monkeypatch.setattr("moectl.inspection.nulls._CHUNK", 1)
    assert specialization(draw(0.3, 0), gates(0.1), draw(0.0, 2), bootstrap=40) == whole


def test_bootstrap_keeps_each_domains_number_of_groups() -> None:
    weights = group_weights(np.array([0, 0, 1, 1, 1]), 500, seed=0)
    assert (weights[:, :2].sum(1) == 2).all() and (weights[:, 2:].sum(1) == 3).all()
    assert weights.mean(0) == pytest.approx(np.ones(5), abs=0.15)


@pytest.mark.parametrize(("size", "without"), [(4, 0.80), (8, 0.89)])
def test_interval_covers_the_truth_as_often_as_it_says(size: int, without: float) -> None:
    """Means of few groups; the plain quantiles of the bootstrap cover in 80 and 89 % of repetitions."""
    rng = np.random.default_rng(0)
    repetitions, covered, unwidened = 2000, 0, 0
    strata = np.zeros(size, dtype=np.int64)
    for seed in range(repetitions):
        groups = rng.normal(3.0, 1.0, size)
        samples = group_weights(strata, 1000, seed) @ groups / size
        low, high = centred_interval(groups.mean(), samples, size)
        covered += low <= 3.0 <= high
        plain = groups.mean() + np.quantile(samples, (0.025, 0.975)) - samples.mean()
        unwidened += plain[0] <= 3.0 <= plain[1]
    assert 0.93 <= covered / repetitions <= 0.965
    assert unwidened / repetitions == pytest.approx(without, abs=0.02)


def test_the_nmi_of_eight_groups_a_domain_is_covered_too() -> None:
    """The whole path; the truth is the NMI of 400 times as many groups."""
    labels = np.arange(24) % 3

    def population(rng: np.random.Generator, copies: int) -> GroupCounts:
        domains = np.tile(labels, copies)
        rows = []
        for domain in domains:
            shares = 0.7 * rng.dirichlet(np.full(6, 20.0)) + 0.3 * np.eye(6)[domain]
            rows.append(rng.multinomial(400, shares))
        return GroupCounts(np.array(rows), domains, 3)

    truth = float(nmi(population(np.random.default_rng(99), 400).by_domain()))
    rng = np.random.default_rng(0)
    covered, repetitions = 0, 300
    for seed in range(repetitions):
        found = specialization(population(rng, 1), np.ones((1, 24, 6), np.int64), None, permutations=1, seed=seed)
        assert found.interval is not None
        covered += found.interval.low <= truth <= found.interval.high
    assert covered / repetitions >= 0.93


def test_the_smallest_domain_sets_the_width() -> None:
    assert smallest_stratum(np.array([0, 0, 0, 2, 2])) == 2
    assert smallest_stratum(np.array([], dtype=np.int64)) == 0
    samples = np.random.default_rng(0).normal(size=1000)
    two, eight, many = (np.diff(centred_interval(0.0, samples, groups))[0] for groups in (2, 8, 10_000))
    plain = np.diff(np.quantile(samples, (0.025, 0.975)))[0]
    assert two / plain == pytest.approx(12.7062 / 1.959964 * 2**0.5, rel=1e-4)
    assert eight / plain == pytest.approx(2.3646 / 1.959964 * (8 / 7) ** 0.5, rel=1e-4)
    assert many / plain == pytest.approx(1.0, rel=1e-3)
    with pytest.raises(ValueError, match="at least two groups"):
        centred_interval(0.0, samples, 1)

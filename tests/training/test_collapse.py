"""What a collapse check says, by hand-made counts."""

from __future__ import annotations

import pytest
import torch

from moectl.config.schema import CollapseConfig
from moectl.errors import CheckError
from moectl.training.collapse import CollapseDetector, Finding


def check(
    counts: dict[int, list[int]], tokens: int, experts_choose: tuple[int, ...] = (), **config: float
) -> list[Finding]:
    detector = CollapseDetector(CollapseConfig.model_validate(config))
    return detector.check({n: torch.tensor(each) for n, each in counts.items()}, tokens, experts_choose)


def test_checks_are_counted_in_plain_english() -> None:
    detector = CollapseDetector(CollapseConfig())
    said = [str(detector.check({3: torch.tensor([1000, 0])}, tokens=1000)[0]) for _ in range(2)]
    assert said == [
        "layer 3 warning: expert 0 takes 100.0% of tokens (50.0% balanced, 100% at worst; 1 check)",
        "layer 3 warning: expert 0 takes 100.0% of tokens (50.0% balanced, 100% at worst; 2 checks in a row)",
    ]


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        ([601, 133, 133, 133], "dominance"),
        ([600, 134, 133, 133], None),
        ([395, 395, 186, 24], "starvation"),  # 2.4 % is under 1/(10·4), of an expected 250
        ([392, 393, 190, 25], None),
    ],
)
def test_bounds_of_one_expert_per_token(counts: list[int], found: str | None) -> None:
    """Over 60 % of 1000 tokens; under a tenth of an even share."""
    findings = check({0: counts}, tokens=1000)
    assert [finding.kind for finding in findings] == ([] if found is None else [found])


def test_dominance_is_a_share_of_tokens_whatever_k() -> None:
    """Top-2: an expert of 61 % of the tokens has 30.5 % of the assignments."""
    assert check({0: [610, 490, 450, 450]}, tokens=1000)[0].share == 0.61
    assert check({0: [590, 510, 450, 450]}, tokens=1000) == []


def test_starvation_needs_enough_tokens_to_be_told_from_chance() -> None:
    assert check({0: [40, 40, 40, 0]}, tokens=120) == []
    assert check({0: [40, 40, 40, 0]}, tokens=120, min_expected_count=30)[0].expert == 3


@pytest.mark.parametrize(("k", "experts"), [(4, 4), (7, 8), (5, 8)])
def test_an_even_load_of_many_experts_per_token_is_no_dominance(k: int, experts: int) -> None:
    """With k = E every expert takes all tokens, with 5 of 8 an even load is over 60 % already."""
    assert check({0: [1000 * k // experts] * experts}, tokens=1000) == []


def test_a_schedule_that_lowers_k_between_two_checks_is_no_collapse() -> None:
    """Half of the time all 8 of 8, then 2 of 8 evenly: each expert has 62.5 % of the tokens, and is even."""
    assert check({0: [500 + 125] * 8}, tokens=1000) == []
    # The same with one expert on every token throughout: a mean k of 3, so that it stands out again.
    assert check({0: [1000] + [2000 // 7] * 7}, tokens=1000)[0].kind == "dominance"


def test_where_an_even_load_is_as_high_as_the_bound_halfway_from_it_to_all_is_dominance() -> None:
    """Two of three experts: an even load is 2/3 each, above the default bound of 0.6, and 5/6 is halfway to all."""
    for load, found in (([1000, 500, 500], True), ([840, 580, 580], True), ([830, 585, 585], False)):
        findings = check({0: load}, tokens=1000)
        assert [(each.kind, each.expert) for each in findings] == ([("dominance", 0)] if found else []), load
    assert check({0: [1000, 1000, 1000]}, tokens=1000) == [], "k = E: every expert takes all"


def test_where_experts_choose_none_can_dominate_but_one_may_starve() -> None:
    """Expert choice with a large capacity takes 80 % of the tokens by construction."""
    load = [800, 800, 800, 800]
    skewed = [900, 300, 300, 5]
    assert check({0: load, 1: skewed}, tokens=1000, experts_choose=(0, 1)) == [
        Finding(1, "starvation", 3, 5 / 1505, 1 / 4, 1, False)
    ]
    assert [finding.kind for finding in check({1: skewed}, tokens=1000)] == ["dominance"]


def test_three_in_a_row_are_a_collapse_and_a_good_check_between_is_not() -> None:
    detector = CollapseDetector(CollapseConfig())
    bad, good = {0: torch.tensor([900, 100])}, {0: torch.tensor([500, 500])}
    rows = [detector.check(counts, 1000) for counts in (bad, bad, good, bad, bad, bad, bad)]
    assert [found[0].in_a_row if found else 0 for found in rows] == [1, 2, 0, 1, 2, 3, 4]
    assert [bool(found and found[0].collapsed) for found in rows] == [False] * 5 + [True] * 2


def test_the_worst_layer_comes_first_and_each_has_its_own_count() -> None:
    detector = CollapseDetector(CollapseConfig())
    detector.check({1: torch.tensor([700, 300]), 2: torch.tensor([500, 500])}, 1000)
    second = detector.check({1: torch.tensor([700, 300]), 2: torch.tensor([990, 10])}, 1000)
    assert [(finding.layer, finding.in_a_row) for finding in second] == [(1, 2), (2, 1)]


def test_no_tokens_are_no_trouble() -> None:
    assert check({0: [0, 0, 0]}, tokens=0) == []


def test_a_restored_detector_goes_on_counting() -> None:
    detector, bad = CollapseDetector(CollapseConfig()), {4: torch.tensor([900, 100])}
    detector.check(bad, 1000)
    detector.check(bad, 1000)
    restored = CollapseDetector(CollapseConfig(), [4])
    restored.load_state_dict(detector.state_dict())
    assert restored.check(bad, 1000)[0].collapsed
    for wrong in ({}, {"5": 0}, {"4": 0, "5": 0}):
        with pytest.raises(CheckError, match="bad checks of the layers"):
            restored.load_state_dict({"in_a_row": wrong})
    assert CollapseDetector(CollapseConfig(), [4, 6]).state_dict() == {"in_a_row": {"4": 0, "6": 0}}

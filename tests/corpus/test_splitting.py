from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moectl.corpus.splitting import eval_groups, num_eval_groups, split
from moectl.corpus.texts import DomainTexts, Text, text_hash
from moectl.errors import MoectlError


def domain(name: str, texts: list[tuple[str, str]]) -> DomainTexts:
    return DomainTexts(name, [Text(text, group, "test") for text, group in texts], "test", "r", "l", 0)


@pytest.mark.parametrize(
    ("groups", "expected"), [(10, 1), (19, 1), (20, 2), (60, 6), (100, 10), (199, 10), (200, 10), (219, 10), (1000, 50)]
)
def test_eval_size_is_the_formula_of_the_specification(groups: int, expected: int) -> None:
    assert num_eval_groups(groups) == expected


def test_under_ten_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="9 groups"):
        num_eval_groups(9)
    nine = domain("code", [(f"text {n}", f"g{n % 9}") for n in range(30)])
    with pytest.raises(MoectlError, match="'code' has 9 groups") as caught:
        split([nine], seed=0)
    assert caught.value.exit_code == 1
    assert caught.value.hint is not None and "group" in caught.value.hint


def test_one_text_is_not_one_texts() -> None:
    with pytest.raises(MoectlError, match=r"has 1 group \(1 text\), too few"):
        split([domain("code", [("a", "g")])], seed=0)
    with pytest.raises(MoectlError, match=r"has 1 group \(2 texts\)"):
        split([domain("code", [("a", "g"), ("b", "g")])], seed=0)


def test_groups_are_drawn_by_seed_and_name_not_by_order() -> None:
    names = [f"g{n}" for n in range(100)]
    assert eval_groups("code", names, 0) == eval_groups("code", reversed(names), 0)
    assert eval_groups("code", names, 0) != eval_groups("code", names, 1)
    assert eval_groups("code", names, 0) != eval_groups("math", names, 0)


# Few distinct texts in many groups over two domains, so that duplicates across the split are common.
_TEXTS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 24)), min_size=40, max_size=120)


@settings(max_examples=60, deadline=None)
@given(first=_TEXTS, second=_TEXTS, seed=st.integers(0, 5))
def test_no_group_and_no_text_is_on_both_sides(
    first: list[tuple[int, int]], second: list[tuple[int, int]], seed: int
) -> None:
    domains = [
        domain(
            name,
            [(f"Text\tnumber {text}" if text % 2 else f"text NUMBER {text}", f"g{group}") for text, group in pairs],
        )
        for name, pairs in (("code", first), ("math", second))
    ]
    try:
        result = split(domains, seed)
    except MoectlError as error:  # too few groups, or all held-out texts are duplicates
        assert error.exit_code == 1
        return
    sides: dict[str, set[str]] = {"train": set(), "eval": set()}
    for before, after in zip(domains, result, strict=True):
        groups: dict[str, set[str]] = {"train": set(), "eval": set()}
        for item in after.placed:
            groups[item.split].add(item.text.group)
            sides[item.split].add(text_hash(item.text.text))
        assert not groups["train"] & groups["eval"]
        assert groups["eval"]
        assert [item.text.text for item in after.placed] == [text.text for text in before.texts]
        assert after.duplicates_moved == sum(item.text.group.startswith("duplicate:") for item in after.placed)
    assert not sides["train"] & sides["eval"]


def test_a_duplicate_in_another_domain_and_another_case_is_moved_and_counted() -> None:
    code = [(f"code {n}", f"c{n}") for n in range(20)]
    held = sorted(eval_groups("code", [group for _, group in code], 0))
    at = [group for _, group in code].index(held[0])
    prose = [(f"prose {n}", f"p{n}") for n in range(20)]
    kept = next(n for n in range(20) if f"p{n}" not in eval_groups("prose", [group for _, group in prose], 0))
    prose[kept] = (f"  CODE\n{at} ", f"p{kept}")
    result = split([domain("code", code), domain("prose", prose)], 0)
    assert [item.duplicates_moved for item in result] == [1, 0]
    assert result[0].placed[at].split == "train"
    assert result[0].placed[at].text.text == f"code {at}"


def test_nothing_left_to_hold_out_is_an_error() -> None:
    with pytest.raises(MoectlError, match="every held-out text"):
        split([domain("code", [("the same", f"g{n}") for n in range(12)])], 0)

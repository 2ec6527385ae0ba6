"""One entry by any spelling of its code, and search that finds what a person would type."""

from __future__ import annotations

import pytest

from moectl.catalogue import Entry, entries, entry, search
from moectl.errors import ConfigError


def made(code: str, **fields: str) -> Entry:
    blank = dict.fromkeys(("title", "symptom", "cause", "fix", "check", "avoid", "source"), "nothing")
    return Entry(code=code, severity="slow", component="router", **{**blank, **fields})


@pytest.mark.parametrize("code", ["7", "07", "007", "moe7", "MOE007", "moe-7", "MoE_007", "moe 7", " 7 ", "0000007"])
def test_every_spelling_of_a_code(code: str) -> None:
    assert entry(code).code == "MOE007"


def test_every_code_is_found() -> None:
    assert [entry(one.code) for one in entries()] == list(entries())


@pytest.mark.parametrize(
    ("code", "nearest"),
    [
        ("MOE961", "MOE096"),
        ("norm_topk_prob", "MOE016"),
        ("pickled", "MOE069"),
        ("moe0", "MOE00"),
        ("٧", "MOE001 to MOE"),
        ("", "MOE001 to MOE"),
        ("9" * 5000, "MOE001 to MOE"),
        ("OWN001", "MOE001 to MOE"),
        ("\x00", "MOE001 to MOE"),
    ],
)
def test_unknown_code_is_usage_and_names_what_to_try(code: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as error:
        entry(code)
    assert error.value.exit_code == 2
    assert nearest in (error.value.hint or "")
    assert "moectl explain --list" in (error.value.hint or "")
    assert len(error.value.message) < 120


def test_own_entries_are_found_by_their_own_codes() -> None:
    own = made("OWN012")
    assert entry("own12", [own]) is own
    assert entry("12", [own]).code == "MOE012"


# What somebody types who has the symptom, and the entry that must be the first answer.
ASKED = [
    ("dead experts", "MOE043"),
    ("DEAD EXPERT", "MOE043"),
    ("nan", "MOE072"),
    ("norm_topk_prob", "MOE016"),
    ("norm topk prob ignored", "MOE016"),
    ("softmax after topk", "MOE015"),
    ("gate up swapped", "MOE007"),
    ("expert choice leaks future tokens", "MOE042"),
    ("recompilation", "MOE050"),
    ("recompiling every step", "MOE050"),
    ("pickle", "MOE069"),
    ("resume experts initial", "MOE056"),
    ("index_add_ must have the same scalar type", "MOE090"),
    ("lora", "MOE087"),
    ("gpu idle", "MOE089"),
    ("training hangs", "MOE086"),
    ("weight decay router", "MOE047"),
    ("router gets no gradient", "MOE032"),
    ("quantization misses experts", "MOE087"),
    ("zero gate", "MOE034"),
    ("one seed", "MOE092"),
    ("document boundary attention packed", "MOE053"),
    ("z-loss", "MOE078"),
    ("rope theta", "MOE020"),
    ("interleaved rope", "MOE019"),
    ("transposed weight", "MOE018"),
    ("auxilliary loss evaluation", "MOE045"),
    ("MOE033", "MOE033"),
]


@pytest.mark.parametrize(("words", "code"), ASKED)
def test_the_first_answer_is_the_right_one(words: str, code: str) -> None:
    assert search(words)[0].code == code


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("experts dead", "EXPERT DEADS"),
        ("normalise weights", "normalize weight"),
        ("quantisation", "quantization"),
        ("losses over batches", "loss over batch"),
        ("entropies", "entropy"),
    ],
)
def test_case_plural_and_spelling_make_no_difference(one: str, other: str) -> None:
    found = [each.code for each in search(one)]
    assert found
    assert found == [each.code for each in search(other)]


@pytest.mark.parametrize("words", ["", "   ", "the of and", "?!", "xyzzyqq", "xyzzyqq plughq wibbleq", "🦜"])
def test_nothing_found_is_an_empty_answer(words: str) -> None:
    assert search(words) == []


def test_order_more_words_before_heavier_fields_before_rarer_words() -> None:
    in_title = made("A001", title="zebra")
    in_source = made("B001", source="zebra")
    in_both = made("C001", avoid="zebra lion")
    assert search("zebra lion", [in_source, in_title, in_both])[0] is in_both
    assert search("zebra", [in_source, in_title])[0] is in_title
    rare = made("D001", title="lion")
    crowd = [made(f"E{number:03d}", title="zebra") for number in range(5)]
    assert search("zebra lion", [*crowd, rare])[0] is rare


def test_half_of_the_words_is_enough_and_less_is_not() -> None:
    one = made("A001", title="zebra lion")
    assert search("zebra lion tiger heron", [one]) == [one]
    assert search("zebra tiger heron", [one]) == []


def test_beginnings_and_slips_find_too_and_count_less() -> None:
    whole, longer = made("A001", title="normal"), made("B001", title="normalised")
    assert search("normal", [longer, whole]) == [whole, longer]
    assert search("normalsied", [longer]) == [longer]
    assert search("nor", [longer]) == []


def test_every_field_is_searched() -> None:
    for field in ("title", "symptom", "cause", "fix", "check", "avoid", "source"):
        one = made("A001", **{field: "a zebra stands here"})
        assert search("zebras", [made("B001"), one]) == [one], field
    assert search("attention")  # the component
    assert {each.severity for each in search("crash")[:3]} == {"crash"}

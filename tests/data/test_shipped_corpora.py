"""The shipped corpora: sizes, groups, cleanliness, and no shortcut that a router could learn instead of the domain."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.corpora import common, problems, stdlib_code

ROOT = Path(__file__).resolve().parents[2]
CORPORA = ROOT / "data" / "corpora"
DOMAINS = ("code", "math", "prose")

Row = dict[str, str]


def load(domain: str) -> list[Row]:
    text = (CORPORA / f"{domain}.jsonl").read_bytes().decode("utf-8", errors="strict")
    assert text.endswith("\n")
    return [json.loads(line) for line in text[:-1].split("\n")]


ROWS = {domain: load(domain) for domain in DOMAINS}


def size(row: Row) -> int:
    return len(row["text"].encode("utf-8"))


def normalised(text: str) -> str:
    return " ".join(text.lower().split())


def by_group(domain: str) -> Counter[str]:
    count: Counter[str] = Counter()
    for row in ROWS[domain]:
        count[row["group"]] += size(row)
    return count


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_row_has_exactly_the_three_keys_and_real_content(domain: str) -> None:
    for row in ROWS[domain]:
        assert list(row) == ["text", "group", "source"]
        assert all(isinstance(value, str) and value.strip() for value in row.values())
        assert row["text"] == row["text"].rstrip() and "\r" not in row["text"] and "\0" not in row["text"]
        assert "\ufffd" not in row["text"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_size_of_domain_texts_and_groups(domain: str) -> None:
    rows, groups = ROWS[domain], by_group(domain)
    total = sum(map(size, rows))
    assert 350_000 <= total <= 450_000
    assert len(rows) >= 200
    assert len(groups) >= 40
    assert max(groups.values()) <= 0.10 * total
    low = 150 if domain == "math" else 500
    assert all(low <= size(row) <= 8_000 for row in rows)


def test_domains_are_of_like_size() -> None:
    totals = [sum(map(size, rows)) for rows in ROWS.values()]
    assert max(totals) < 1.1 * min(totals)


def test_no_text_twice_in_or_across_domains() -> None:
    count = Counter(normalised(row["text"]) for rows in ROWS.values() for row in rows)
    assert [text[:80] for text, times in count.items() if times > 1] == []


def test_groups_belong_to_one_domain() -> None:
    names = [set(by_group(domain)) for domain in DOMAINS]
    assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])


def test_no_editors_boilerplate_in_prose() -> None:
    bad = re.compile(
        r"gutenberg|e-?text|all rights reserved|small print|public domain|dramatis person|persons represented|"
        r"transcriber|\[footnote|by william shakespeare|https?://|the end of the \w+ book",
        re.IGNORECASE,
    )
    works = [row for row in ROWS["prose"] if not row["group"].startswith("jargon-file/")]  # those may cite addresses
    hits = [(row["group"], m.group(0)) for row in works for m in bad.finditer(row["text"])]
    assert hits == []
    numbered = [row["group"] for row in ROWS["prose"] if re.search(r"\S {3,}\d+$", row["text"], re.MULTILINE)]
    assert [group for group in numbered if group.startswith("milton/")] == []


def test_prose_has_several_registers_and_none_rules() -> None:
    poems = {"sonnets", "rape-of-lucrece", "lovers-complaint", "passionate-pilgrim", "phoenix-and-the-turtle"}
    share: Counter[str] = Counter()
    for row in ROWS["prose"]:
        work, *rest = row["group"].split("/")
        kind = {"jargon-file": "glossary", "milton": "verse", "shakespeare": "drama"}[work]
        if work == "shakespeare" and rest[0] in poems:
            kind = "verse"
        if row["group"] == "milton/areopagitica":
            kind = "speech"
        share[kind] += size(row)
    total = sum(share.values())
    assert set(share) == {"glossary", "verse", "drama", "speech"}
    assert max(share.values()) <= 0.6 * total
    assert min(share.values()) >= 0.05 * total


def test_code_comes_from_files_with_no_notice_but_the_foundations() -> None:
    for row in ROWS["code"]:
        assert stdlib_code.is_plain_psf(row["text"]), row["source"]
        assert re.fullmatch(r"CPython 3\.\d+\.\d+ Lib/[\w/]+\.py", row["source"])
        assert re.search(r"^\s*(async )?(def|class) ", row["text"], re.MULTILINE)


def test_is_plain_psf_tells_foreign_notices() -> None:
    assert stdlib_code.is_plain_psf("# Copyright (C) 2001 Python Software Foundation\nx = 1\n")
    assert stdlib_code.is_plain_psf("x = 1\n")
    assert not stdlib_code.is_plain_psf("# Copyright 2001 by Somebody Else.\n")
    assert not stdlib_code.is_plain_psf("# Licensed to PSF under a Contributor Agreement.\n")


def test_math_is_half_formal_half_word_problems() -> None:
    groups = by_group("math")
    words = sum(n for name, n in groups.items() if name.startswith("problems/"))
    formal = sum(n for name, n in groups.items() if name.startswith("set.mm/"))
    assert words + formal == sum(groups.values())
    assert 0.4 <= words / (words + formal) <= 0.6
    assert sum(name.startswith("problems/") for name in groups) >= 60
    assert sum(name.startswith("set.mm/") for name in groups) >= 60


def openings(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        yield row["text"].split()[0]


@pytest.mark.parametrize("domain", ["math", "prose"])
def test_no_constant_opening(domain: str) -> None:
    rows = ROWS[domain]
    word, times = Counter(openings(rows)).most_common(1)[0]
    assert times <= 0.15 * len(rows), word
    beginnings = Counter(row["text"][:12] for row in rows)
    assert beginnings.most_common(1)[0][1] <= 0.06 * len(rows)


def test_word_problems_and_their_solutions_open_in_many_ways() -> None:
    words = [row["text"] for row in ROWS["math"] if row["group"].startswith("problems/")]
    assert not any(re.match(r"(problem|question|task|exercise)\b *\d*[:.]", text, re.IGNORECASE) for text in words)
    solutions: Counter[str] = Counter()
    for text in words:
        problem, solution = text.split("\n\n")  # exactly two parts
        assert problem and not re.match(r"(rationale|solution|answer)\b *:", solution, re.IGNORECASE)
        solutions[solution.split()[0]] += 1
    word, times = solutions.most_common(1)[0]
    assert times <= 0.2 * len(words), word
    assert len(solutions) >= 80


def test_formal_texts_carry_no_credits_and_no_markup() -> None:
    formal = [row["text"] for row in ROWS["math"] if row["group"].startswith("set.mm/")]
    bad = re.compile(r"\((contributed|revised|proof shortened|proof modification|new usage)|&\w+;|<html", re.I)
    assert [m.group(0) for text in formal for m in bad.finditer(text)] == []
    assert all(re.search(r" \$[ap] .* \$\.", text) for text in formal)
    assert not any("$=" in text for text in formal)


def test_word_problems_are_rebuilt_byte_for_byte_from_the_seed() -> None:
    shipped = [line for line in (CORPORA / "math.jsonl").read_bytes().splitlines(True) if b'"problems/' in line]
    assert b"".join(shipped) == common.dumps(problems.build(problems.SEED))
    assert str(problems.SEED) in (CORPORA / "README.md").read_text(encoding="utf-8").replace(",", "")


def test_another_seed_gives_other_problems() -> None:
    ours = {row.text for row in problems.build(problems.SEED)}
    theirs = {row.text for row in problems.build(problems.SEED + 1)}
    assert len(ours & theirs) < 0.05 * len(ours)


@pytest.mark.parametrize("domain", DOMAINS)
def test_readme_states_the_counts(domain: str) -> None:
    readme = (CORPORA / "README.md").read_text(encoding="utf-8")
    rows = ROWS[domain]
    counts = f"| `{domain}.jsonl` | {len(rows)} | {len(by_group(domain))} | {sum(map(size, rows)):,} |"
    assert counts in readme


def test_every_source_has_its_licence() -> None:
    notices = {path.name: path.read_text(encoding="utf-8") for path in (CORPORA / "LICENCES").iterdir()}
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in notices["PSF-CPython-3.11.7.txt"]
    assert "Python Software Foundation" in notices["NOTICE.txt"]
    assert "CC0" in notices["CC0-set.mm.txt"]
    sources = {row["source"].split()[0] for rows in ROWS.values() for row in rows}
    assert sources == {"CPython", "set.mm", "moectl", "shakespeare", "Jargon"}


def test_spread_is_even_within_budget_and_never_empty() -> None:
    texts = [str(i) * 10 for i in range(10)] * 10
    chosen = common.spread(texts, 200)
    assert sum(map(common.size, chosen)) == 200
    assert common.spread(["x" * 50], 10) == ["x" * 50]
    assert common.spread([], 10) == []
    places = common._corput(37)
    assert sorted(places) == list(range(37)) and max(places[:4]) > 24 and min(places[:4]) < 12


def test_bundle_keeps_every_piece_in_order() -> None:
    pieces = [f"piece {i} " * (i % 7 + 1) for i in range(40)]
    texts = common.bundle(pieces, low=60, high=120)
    assert "\n\n".join(texts) == "\n\n".join(pieces)
    assert all(common.size(text) <= 130 for text in texts)

"""A project's own entries: added without touching what is there, read back as they were said."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moectl.catalogue import markdown
from moectl.catalogue.own import Mistake, add, own_entries, refuse_target
from moectl.errors import ConfigError, MoectlError

DAY = date(2026, 3, 4)
ONE = Mistake(
    "Wrong split", "data", "wrong conclusion", "We split blocks.", "Nobody asked.", "Split by file.", "Test it."
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "GOTCHAS.md"


def test_a_new_file_is_a_document_that_reads_itself(file: Path) -> None:
    added = add(ONE, file, DAY)
    assert file.read_text(encoding="utf-8") == (
        "# Mistakes we made\n\nAdded to by `moectl gotcha new`, read by `moectl explain`. Edit freely.\n\n"
        "<!-- moectl gotcha OWN001 -->\n## OWN001: Wrong split (2026-03-04)\n\n"
        "- severity: wrong conclusion\n- component: data\n\n"
        "**The mistake.** We split blocks.\n\n**Why.** Nobody asked.\n\n**Fix.** Split by file.\n\n"
        "**How to avoid.** Test it.\n\n<!-- end of OWN001 -->\n"
    )
    assert own_entries(file) == (added,)
    assert (added.code, added.title, added.severity, added.component) == (
        "OWN001",
        "Wrong split",
        "wrong conclusion",
        "data",
    )
    assert (added.symptom, added.cause, added.fix, added.avoid) == (
        "We split blocks.",
        "Nobody asked.",
        "Split by file.",
        "Test it.",
    )
    assert added.check == "by reading"
    assert added.source == f"{file}, 2026-03-04"


def test_today_is_the_date_where_none_is_given(file: Path) -> None:
    assert add(ONE, file).source.endswith(date.today().isoformat())


@pytest.mark.parametrize(
    "before",
    [
        b"# Ours\n\nText.\n",
        b"no line end",
        b"# CRLF\r\n\r\nText\r\n",
        b"\xef\xbb\xbf# BOM\n",
        b"\xef\xbb\xbf",
        b"\n\n\n",
        b"trailing blanks   \n\n\n\n",
        "Ünïcode – ✓\n".encode(),
        b"## OWN007: taken away its marks\n",
        b"x" * (5 * 2**20) + b"\n",
    ],
)
def test_what_is_there_stays_byte_for_byte(file: Path, before: bytes) -> None:
    file.write_bytes(before)
    first = add(ONE, file, DAY)
    between = file.read_bytes()
    second = add(replace(ONE, title="Another"), file, DAY)
    after = file.read_bytes()
    assert between.startswith(before)
    assert after.startswith(between)
    assert own_entries(file) == (first, second)
    crlf = b"\r\n" in before
    assert after.count(b"\n") == (after.count(b"\r\n") if crlf else after.count(b"\n"))
    assert (b"\r" in after) == crlf
    numbers = (8, 9) if b"OWN007" in before else (1, 2)
    assert [first.code, second.code] == [f"OWN{number:03d}" for number in numbers]
    assert b"Mistakes we made" in after if not before.strip(b"\xef\xbb\xbf\n") else b"Mistakes we made" not in after


def test_an_entry_begins_after_an_empty_line(file: Path) -> None:
    for before in (b"a", b"a\n", b"a\n\n", b"a\r\nb\r\n"):
        file.write_bytes(before)
        add(ONE, file, DAY)
        text = file.read_bytes().replace(b"\r\n", b"\n")
        head = before.replace(b"\r\n", b"\n").rstrip(b"\n")
        assert text.startswith(head + b"\n\n<!-- moectl gotcha OWN001 -->\n")


def test_numbers_go_on_from_the_highest_and_are_never_used_twice(file: Path) -> None:
    for _ in range(3):
        add(ONE, file, DAY)
    text = file.read_text(encoding="utf-8")
    begin, end = text.index("<!-- moectl gotcha OWN002"), text.index("<!-- moectl gotcha OWN003")
    file.write_text(text[:begin] + text[end:] + "A word on OWN900.\n", encoding="utf-8")
    assert add(ONE, file, DAY).code == "OWN004"
    file.write_text("## OWN999: many (2026-01-01)\n", encoding="utf-8")
    assert add(ONE, file, DAY).code == "OWN1000"
    assert [each.code for each in own_entries(file)] == ["OWN1000"]


AWKWARD = [
    "# heading",
    "text\n## OWN050: not an entry (2020-01-01)\n\nmore",
    "**Why.** a label",
    "**How to avoid.**",
    "first\n**Fix.** second",
    "underline\n---\nand\n===",
    "\\# already escaped\n\\\\## twice",
    "```python\n# a remark\n**Fix.** in code\n```",
    "~~~\n```\n# inside\n~~~",
    "<!-- end of OWN001 -->",
    "before\n<!-- end of OWN001 -->\nafter",
    "<!-- moectl gotcha OWN050 -->",
    "a | b || c * _d_ [x](y) ![z](q) <b>&amp;</b>",
    "- severity: crash\n- component: none",
    "tabs\tand    blanks",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_markdown_is_kept_and_ends_no_field(file: Path, text: str) -> None:
    added = add(Mistake("T", "c", "slow", text, text, text, text), file, DAY)
    add(ONE, file, DAY)
    first, second = own_entries(file)
    assert first == added
    assert (first.symptom, first.cause, first.fix, first.avoid) == (text, text, text, text)
    assert (first.severity, first.component) == ("slow", "c")
    assert second.code == "OWN002" and second.title == ONE.title


PIECES = [*"#*`~-=\\<!> \nWhyFix.", "**Why.** ", "\n```\n", "<!--", "\n~~~", "\n# x"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(st.sampled_from(PIECES)).map("".join))
@example("```\n**Fix.** x")
@example("\\")
def test_any_text_comes_back(tmp_path: Path, text: str) -> None:
    file = tmp_path / "any.md"
    file.unlink(missing_ok=True)
    if not text.strip():
        with pytest.raises(ConfigError):
            add(replace(ONE, mistake=text), file, DAY)
        assert not file.exists()
        return
    add(replace(ONE, mistake=text), file, DAY)
    add(ONE, file, DAY)
    first, second = own_entries(file)
    said = text.strip()
    assert first.symptom.startswith(said)
    assert set(first.symptom[len(said) :].strip()) <= set("`~")  # code that was left open is closed
    assert (first.cause, first.fix, second.symptom) == (ONE.why, ONE.fix, ONE.mistake)


@pytest.mark.parametrize(
    "title", ["A (with brackets)", "`code` | pipe", "# hash", "Ends in (2020-01-01)", "<!-- x -->", "ü ✓"]
)
def test_titles_of_all_sorts(file: Path, title: str) -> None:
    assert add(replace(ONE, title=title), file, DAY).title == title
    assert own_entries(file)[0].title == title


def test_neither_open_code_nor_an_open_comment_swallows_what_follows(file: Path) -> None:
    add(replace(ONE, mistake="```\ncode", why="~~~python\ncode\n```", fix="<!-- open"), file, DAY)
    text = file.read_text(encoding="utf-8")
    assert "```\ncode\n```\n\n**Why.**\n\n~~~python\ncode\n```\n~~~\n\n**Fix.** &lt;!-- open\n" in text
    assert text.count("<!--") == text.count("-->") == 2
    assert own_entries(file)[0].fix == "<!-- open"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"title": ""}, "title is empty"),
        ({"title": " \n "}, "title is empty"),
        ({"title": "two\nlines"}, "title must be one line"),
        ({"title": "two\u2028lines"}, "title must be one line"),
        ({"component": "a\r\nb"}, "component must be one line"),
        ({"fix": "\t"}, "fix is empty"),
        ({"why": "bell\x07"}, "control character"),
        ({"mistake": "half \ud800 a pair"}, "control character"),
        ({"severity": "sluggish"}, "unknown severity 'sluggish'"),
    ],
)
def test_what_is_no_entry_is_refused_and_writes_nothing(file: Path, change: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        add(replace(ONE, **change), file, DAY)
    assert says in error.value.message
    assert not file.exists()


def test_a_generated_file_is_refused(file: Path) -> None:
    file.write_text(markdown(), encoding="utf-8")
    for action in (lambda: add(ONE, file, DAY), lambda: refuse_target(file)):
        with pytest.raises(ConfigError) as error:
            action()
        assert "generated" in error.value.message
        assert "--file" in (error.value.hint or "")
    assert file.read_text(encoding="utf-8") == markdown()
    assert own_entries(file) == ()


def test_a_file_without_entries_or_with_torn_ones_is_read_in_peace(file: Path) -> None:
    assert own_entries(file) == ()
    file.write_text("# Notes\n\nMOE001 is a good one.\n", encoding="utf-8")
    assert own_entries(file) == ()
    add(ONE, file, DAY)
    add(replace(ONE, title="Kept"), file, DAY)
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("**Why.** ", "", 1), encoding="utf-8")
    assert [each.title for each in own_entries(file)] == ["Kept"]


def test_edits_by_hand_are_read(file: Path) -> None:
    add(ONE, file, DAY)
    text = (
        file.read_text(encoding="utf-8").replace("Split by file.", "Split by repository.").replace("Wrong split", "Bad")
    )
    file.write_text(text, encoding="utf-8")
    (one,) = own_entries(file)
    assert (one.title, one.fix) == ("Bad", "Split by repository.")


ADDER = (
    "import sys; from pathlib import Path; from moectl.catalogue.own import Mistake, add\n"
    "for i in range(int(sys.argv[3])):\n"
    "    add(Mistake(f'{sys.argv[2]}-{i}', 'data', 'slow', 'm', 'w', 'f', 'a'), Path(sys.argv[1]))\n"
)


@pytest.mark.parametrize("before", [None, b"# Ours\n"])
def test_several_at_once_lose_nothing(file: Path, before: bytes | None) -> None:
    if before is not None:
        file.write_bytes(before)
    each, workers = 15, 4
    running = [
        subprocess.Popen([sys.executable, "-c", ADDER, str(file), str(worker), str(each)]) for worker in range(workers)
    ]
    assert [process.wait(timeout=120) for process in running] == [0] * workers
    found = own_entries(file)
    assert {one.title for one in found} == {f"{worker}-{i}" for worker in range(workers) for i in range(each)}
    assert [one.code for one in found] == [f"OWN{number:03d}" for number in range(1, workers * each + 1)]
    assert os.listdir(file.parent) == [file.name]  # no lock, no temporary file


def test_not_utf8_is_refused_and_left_alone(file: Path) -> None:
    file.write_bytes(b"caf\xe9\n")
    for action in (lambda: add(ONE, file, DAY), lambda: own_entries(file), lambda: refuse_target(file)):
        with pytest.raises(MoectlError) as error:
            action()
        assert "not UTF-8" in error.value.message
        assert "iconv" in (error.value.hint or "")
    assert file.read_bytes() == b"caf\xe9\n"

"""GOTCHAS.md: what is in the repository is what the catalogue makes, byte for byte."""

from __future__ import annotations

import re
from pathlib import Path

from moectl.catalogue import entries, markdown
from moectl.catalogue.document import GENERATED, labelled

ROOT = Path(__file__).resolve().parents[2]


def test_the_file_in_the_repository_is_up_to_date() -> None:
    """Mend it with: moectl explain --markdown > GOTCHAS.md"""
    assert (ROOT / "GOTCHAS.md").read_bytes().decode("utf-8") == markdown()


def test_it_says_that_it_is_generated_and_how() -> None:
    text = markdown()
    assert text.startswith(GENERATED + "\n")
    assert "do not edit" in text
    assert "`moectl explain --markdown > GOTCHAS.md`" in text
    assert text.endswith("\n") and not text.endswith("\n\n")


def test_the_index_leads_to_every_entry() -> None:
    text = markdown()
    links = re.findall(r"^\| \[(MOE\d{3})\]\(#(moe\d{3})\) \|", text, re.MULTILINE)
    assert [code for code, _ in links] == [one.code for one in entries()]
    assert [anchor for _, anchor in links] == re.findall(r'^<a id="(moe\d{3})"></a>$', text, re.MULTILINE)
    assert f"{len(entries())} entries: " in text


def test_every_field_of_every_entry_is_in_it() -> None:
    text = markdown()
    for one in entries():
        for field in (one.title, one.symptom, one.cause, one.fix, one.check, one.avoid, one.source):
            assert field in text, one.code


def test_rows_of_the_index_have_four_cells() -> None:
    rows = [line for line in markdown().splitlines() if line.startswith("| [MOE")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}


def test_code_begins_on_a_line_of_its_own() -> None:
    assert labelled("Fix", "```python\nx\n```") == "**Fix.**\n\n```python\nx\n```"
    assert labelled("Fix", "Do it.") == "**Fix.** Do it."
    assert not re.search(r"\*\* *```", markdown())

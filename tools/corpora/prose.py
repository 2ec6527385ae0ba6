"""The `prose` domain: Shakespeare and Milton (public domain) and the Jargon File (public domain).

Only the words of the works themselves are kept: title pages, lists of persons, prefaces, notes, line numbers and
anything an editor added around them are cut off. The Shakespeare files are the modern-spelling transcriptions;
annotated editions (Bell's Comus, Beeching's preface) are not used.
"""

from __future__ import annotations

import re
from pathlib import Path

from .common import Row, bundle, size, spread, tidy

PLAY_BYTES, BOOK_BYTES, LETTER_BYTES = 4_400, 4_300, 5_900
POEM_BYTES = {"sonnets": 13_000, "rape_of_lucrece": 9_000, "lovers_complaint": 6_000, "passionate_pilgrim": 5_000}
_HEADING = re.compile(r"^[\[\s]*(act|scene|actus|scoena|induction|prologue|epilogue)\b[^a-z]*", re.IGNORECASE)
_FIRST_ACT = re.compile(r"^\s*act\s+(1|i|first)\b\.?\s*$", re.IGNORECASE | re.MULTILINE)
_ROMAN = re.compile(r"^\s*[IVXLC]+\.?\s*$")
_VERSE = {"sonnets", "rape_of_lucrece", "lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle"}
_RUDE = re.compile(r"fuck|\bshit|\bpiss|\bcrap|sex|\bwhore|bitch|\bslut|\bcunt|\btits?\b|\bdick\b|asshole|nigger", re.I)


def _paragraphs(text: str) -> list[str]:
    return [p.strip("\n").rstrip() for p in re.split(r"\n[ \t]*\n", tidy(text)) if p.strip()]


def _is_scenery(paragraph: str) -> bool:
    """Act and scene headings with their place notes, rulers, 'THE END', numbers of poems."""
    first = paragraph.strip().splitlines()[0].strip()
    return bool(
        (_HEADING.match(first) and len(paragraph) < 220)
        or (_ROMAN.match(first) and len(paragraph) < 12)
        or re.fullmatch(r"[_*\-= ]+|(the )?end\.?|finis\.?", paragraph.strip(), re.IGNORECASE)
    )


def play(text: str) -> list[str]:
    """Passages of whole speeches, from the first act on."""
    starts = list(_FIRST_ACT.finditer(text))
    if not starts:
        raise ValueError("no first act found")
    body = [p for p in _paragraphs(text[starts[0].end() :]) if not _is_scenery(p)]
    return bundle(body, low=1_100, high=2_900)


def poem(text: str) -> list[str]:
    """Stanzas bundled to short texts; the title, the author's line and a dedication above a ruler are dropped."""
    text = re.split(r"\n_{20,}\n", text)[-1]
    text = re.sub(r"\A.*?by William Shakespeare", "", text, flags=re.DOTALL)
    return bundle((p for p in _paragraphs(text) if not _is_scenery(p)), low=1_100, high=2_400)


def epic(text: str, heading: str) -> list[tuple[int, list[str]]]:
    """(book number, passages) of Milton's epics: verse paragraphs, without line numbers and end marks."""
    books = re.split(heading, text, flags=re.MULTILINE)[1:]
    found = []
    for number, book in enumerate(books, start=1):
        lines = [re.sub(r"\s{2,}\d+\s*$", "", line).rstrip() for line in book.splitlines()]
        lines = [line for line in lines if line.strip() and "THE END" not in line]
        passages: list[list[str]] = [[]]
        for line in lines:
            if line.startswith("  ") and sum(map(len, passages[-1])) > 900:
                passages.append([])
            passages[-1].append(line)
        texts = [piece for lines in passages for piece in _cut_lines(lines)]
        found.append((number, [tidy(t) for t in texts]))
    return found


def _cut_lines(lines: list[str], limit: int = 2_600) -> list[str]:
    """Cut a very long verse paragraph after a line that ends a sentence."""
    texts, held = [], []
    for line in lines:
        held.append(line)
        if sum(map(len, held)) > limit - 800 and re.search(r"[.?!:][\"']?$", line):
            texts.append("\n".join(held))
            held = []
    return [*texts, "\n".join(held)] if held else texts


def jargon(text: str) -> dict[str, list[str]]:
    """Initial letter to texts of whole glossary entries, in order; what would not do in class is left out."""
    text = text.replace("\u00a0", " ")
    glossary = text[text.index("\nGlossary\n") : text.index("\nAppendix A. Hacker Folklore")]
    glossary = "\n".join(line.removeprefix("   ") for line in glossary.splitlines())
    entries = [e for e in re.split(r"\n(?=:[^\n:]+:)", glossary)[1:] if e.count("\n") > 2 and not _RUDE.search(e)]
    by_letter: dict[str, list[str]] = {}
    for entry in entries:
        entry = tidy(re.sub(r"\n\n[^\n]{1,3}\n*\Z", "", entry))
        initial = next((c.upper() for c in entry if c.isalpha()), "")
        if initial.isascii():
            by_letter.setdefault(initial, []).append(entry)
    return {letter: bundle(found, low=900, high=2_600) for letter, found in sorted(by_letter.items())}


def build(plays: Path, milton: Path, jargon_text: str) -> list[Row]:
    """Rows of the prose domain from the two folders of text files and the Jargon File's text."""
    rows: list[Row] = []
    for path in sorted(plays.glob("*_gut.txt")):
        name = path.name.removesuffix("_gut.txt")
        text = path.read_text(encoding="utf-8-sig")
        texts = poem(text) if name in _VERSE else play(text)
        budget = POEM_BYTES.get(name, PLAY_BYTES)
        group = "shakespeare/" + name.replace("_", "-")
        rows.extend(Row(t, group, f"shakespeare 0.6 {path.name}") for t in spread(texts, budget))
    for name, heading in (
        ("paradise_lost_(no_introduction)", r"^BOOK [IVX]+\.?\s*$"),
        ("paradise_regained", r"^THE [A-Z]+ BOOK\s*$"),
    ):
        path = milton / f"{name}_gut.txt"
        for number, texts in epic(path.read_text(encoding="utf-8-sig"), heading):
            group = f"milton/{name.split('_(')[0].replace('_', '-')}/book-{number:02}"
            usable = [t for t in texts if 500 <= size(t) <= 3_500]
            source = f"shakespeare 0.6 {path.name}"
            rows.extend(Row(t, group, source) for t in spread(usable, BOOK_BYTES))
    path = milton / "areopagitica_gut.txt"
    speech = path.read_text(encoding="utf-8-sig")
    speech = speech[speech.index("They, who to states and governors") :]
    texts = bundle((p for p in _paragraphs(speech)), low=900, high=3_000)
    rows.extend(Row(t, "milton/areopagitica", f"shakespeare 0.6 {path.name}") for t in spread(texts, 30_000))
    for letter, found in jargon(jargon_text).items():
        rows.extend(Row(t, f"jargon-file/{letter}", "Jargon File 4.4.7") for t in spread(found, LETTER_BYTES))
    return [row for row in rows if size(row.text) >= 500]

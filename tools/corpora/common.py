"""What the corpus builders share: the row format, choosing an even spread, cutting, writing.

A corpus is one JSON Lines file; each line is ``{"text": str, "group": str, "source": str}``.
Everything here is a pure function of its arguments, so that the same sources give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

MIN_BYTES = 150
MAX_BYTES = 8_000


class Row(NamedTuple):
    """One text: its content, the group that keeps it on one side of a split, and where it came from."""

    text: str
    group: str
    source: str


def size(text: str) -> int:
    """Length of ``text`` in UTF-8 bytes."""
    return len(text.encode("utf-8"))


def normalised(text: str) -> str:
    """Text with case and white space folded: two texts that agree here count as duplicates."""
    return re.sub(r"\s+", " ", text).strip().casefold()


def spread(texts: Sequence[str], budget: int) -> list[str]:
    """Texts taken evenly from the whole sequence, in its order, whose bytes together stay within ``budget``.

    Places are tried in van der Corput order (middle, quarters, eighths ...), each taken if it still fits. At
    least one text comes back, even where the first is larger than the budget.
    """
    chosen: list[int] = []
    left = budget
    for place in _corput(len(texts)) if texts else ():
        if not chosen or size(texts[place]) <= left:
            chosen.append(place)
            left -= size(texts[place])
    return [texts[place] for place in sorted(chosen)]


def _corput(count: int) -> list[int]:
    """All of ``range(count)`` ordered so that every prefix is spread evenly (base-2 van der Corput)."""
    bits = max(1, (count - 1).bit_length())
    order = (int(format(i, f"0{bits}b")[::-1], 2) for i in [*range(1, 2**bits), 0])
    places: dict[int, None] = {}
    for value in order:
        places.setdefault(value * count >> bits)
    return [*places, *(i for i in range(count) if i not in places)]


def bundle(pieces: Iterable[str], *, low: int, high: int, joint: str = "\n\n") -> list[str]:
    """Join neighbouring pieces into texts of about ``low`` to ``high`` bytes; pieces above ``high`` stay whole."""
    texts: list[str] = []
    held: list[str] = []
    held_bytes = 0
    for piece in pieces:
        if held and held_bytes + size(piece) > high:
            texts.append(joint.join(held))
            held, held_bytes = [], 0
        held.append(piece)
        held_bytes += size(piece) + len(joint)
        if held_bytes >= low:
            texts.append(joint.join(held))
            held, held_bytes = [], 0
    if held:
        texts.append(joint.join(held))
    return texts


def tidy(text: str) -> str:
    """No trailing blanks, no runs of more than two newlines' worth of emptiness, no outer white space."""
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\t", "    ").split("\n")]
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip("\n").rstrip()


def distinct(rows: Iterable[Row]) -> list[Row]:
    """Rows in order, without later copies of a text (compared after ``normalised``) and without odd sizes."""
    seen: set[str] = set()
    kept: list[Row] = []
    for row in rows:
        key = normalised(row.text)
        if key in seen or not MIN_BYTES <= size(row.text) <= MAX_BYTES:
            continue
        seen.add(key)
        kept.append(row)
    return kept


def dumps(rows: Iterable[Row]) -> bytes:
    """The file's bytes: one JSON object a line, keys in a fixed order, UTF-8 unescaped."""
    lines = (json.dumps(row._asdict(), ensure_ascii=False) for row in rows)
    return "".join(line + "\n" for line in lines).encode("utf-8")


def write(path: Path, rows: Sequence[Row]) -> str:
    """Write ``rows`` and return one line that says what was written."""
    data = dumps(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return f"{path.name}: {describe(rows)}, sha256 {hashlib.sha256(data).hexdigest()[:16]}"


def describe(rows: Sequence[Row]) -> str:
    """Texts, groups, bytes and the largest group's share."""
    total = sum(size(row.text) for row in rows)
    by_group: Counter[str] = Counter()
    for row in rows:
        by_group[row.group] += size(row.text)
    name, largest = max(by_group.items(), key=lambda item: (item[1], item[0]))
    return f"{len(rows)} texts, {len(by_group)} groups, {total} bytes, largest group {name} {largest / total:.1%}"

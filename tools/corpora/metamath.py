"""Half of the `math` domain: comments, hypotheses and statements of set.mm, the Metamath proof library (CC0).

Proofs are compressed strings without meaning to a reader and are left out; so are the credits
("Contributed by ..."), which stand under every theorem and would be the easiest thing to learn.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path

from .common import Row, bundle, size, spread, tidy

BYTES_PER_GROUP = 2_300
SOURCE = "set.mm 28-Dec-2020"
_TOKEN = re.compile(r"\$\(.*?\$\)|\$[{}]|(\S+)\s+\$([aep])\s(.*?)\$\.|\$[cvd]\s.*?\$\.|\S+\s+\$f\s.*?\$\.", re.DOTALL)
_HEADING = re.compile(r"^\$\(\s*(#\*#\*|=-=-|-\.-\.)[^\n]*\n\s*(\S[^\n]*)\n", re.DOTALL)
_CREDIT = re.compile(
    r"\s*\((?:Contributed|Revised|Proof shortened|Proof modification|Proof|New usage|Modified|Suggested|Revision|"
    r"Moved|Unnecessary|Intuitionistic|Removed|Reduced|Shortened|Minor|Special|Tweaked|Obsolete|Temporarily|"
    r"Use of|Based on|Correct|Restated|Extended|Theorem scheme|Existence)[^()]*(?:\([^()]*\)[^()]*)*\)"
)


def clean_comment(comment: str) -> str:
    """Plain prose: no credits, no markup of labels, formulas between tight backquotes."""
    text = re.sub(r"\s+", " ", comment).strip()
    text = _CREDIT.sub("", text)
    text = re.sub(r"~ (\S+)( (?=[.,;:)]))?", r"\1", text)
    text = html.unescape(text).replace("``", "\0")
    text = re.sub(r"` ([^`]*?) `( (?=[.,;:)]))?", r"`\1`", text).replace("\0", "`")
    text = re.sub(r"(?<!\w)_([^_`]+?)_(?!\w)", r"\1", text)
    return text.strip()


def _wrap(text: str, width: int = 88) -> str:
    """Break at blanks, leaving formulas between backquotes in one piece where they fit."""
    lines, line = [], ""
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return "\n".join([*lines, line])


def statements(source: str) -> Iterator[tuple[str, str]]:
    """(section title, item) in file order; an item is a comment, the hypotheses in scope and the statement."""
    section, comment = "", ""
    scopes: list[list[str]] = [[]]
    for match in _TOKEN.finditer(source):
        token = match.group(0)
        if token.startswith("$("):
            heading = _HEADING.match(token)
            if heading:
                if heading.group(1) != "-.-.":
                    section = heading.group(2).strip()
                comment = ""
            else:
                comment = token[2:-2]
        elif token == "${":
            scopes.append([])
        elif token == "$}":
            scopes.pop()
        elif match.group(2) == "e":
            scopes[-1].append(f"{match.group(1)} $e {_formula(match.group(3))} $.")
        elif match.group(2) in ("a", "p"):
            body = match.group(3).split("$=")[0]
            prose = clean_comment(comment)
            comment = ""
            if len(prose) >= 25 and "<HTML" not in prose and "http" not in prose and "OLD" not in match.group(1):
                hypotheses = [line for scope in scopes for line in scope]
                statement = f"{match.group(1)} ${match.group(2)} {_formula(body)} $."
                if len(hypotheses) > 6:
                    continue
                yield section, "\n".join([_wrap(prose), *hypotheses, statement])
        else:
            comment = ""


def _formula(body: str) -> str:
    return re.sub(r"\s+", " ", body).strip()


def build(path: Path, *, budget: int) -> list[Row]:
    """Rows from set.mm without its members' own workspaces: one group per section, about ``budget`` bytes."""
    source = path.read_text(encoding="ascii")
    source = source[: source.index("Mathboxes for user contributions\n")]
    groups: dict[str, list[str]] = {}
    for section, item in statements(source):
        groups.setdefault(section, []).append(item)
    eligible = {name: items for name, items in groups.items() if name and sum(map(size, items)) >= 5_000}
    wanted = round(budget / BYTES_PER_GROUP)
    names = list(eligible)
    step = len(names) / wanted
    rows: list[Row] = []
    for name in (names[int((i + 0.5) * step)] for i in range(wanted)):
        texts = bundle((i for i in eligible[name] if size(i) < 1_500), low=600, high=1_600)
        texts = [tidy(t) for t in texts if size(t) >= 500]
        group = "set.mm/" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        rows.extend(Row(text, group, SOURCE) for text in spread(texts, BYTES_PER_GROUP + 200))
    return rows

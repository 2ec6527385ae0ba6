"""A project's own mistakes: dated entries that ``moectl gotcha new`` adds to the project's GOTCHAS.md.

Everything that is in the file stays as it is, byte for byte; only an entry is added at its end. An entry
is a section that a person can read and mend; two comments that Markdown does not show mark where it
begins and ends, and what is between them is read back.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from moectl.catalogue.document import GENERATED, labelled
from moectl.catalogue.entry import FENCE, SEVERITIES, Entry
from moectl.catalogue.text_file import replaced, text_of
from moectl.errors import ConfigError, unknown

FILE = Path("GOTCHAS.md")
_LABELS = {"symptom": "The mistake", "cause": "Why", "fix": "Fix", "avoid": "How to avoid"}
_HEAD = "# Mistakes we made\n\nAdded to by `moectl gotcha new`, read by `moectl explain`. Edit freely.\n"
_BLOCK = re.compile(
    r"^<!-- moectl gotcha (?P<code>OWN[0-9]{3,10}) -->$\n(?P<body>.*?)^<!-- end of (?P=code) -->$", re.M | re.S
)
_NUMBER = re.compile(r"^(?:<!-- moectl gotcha |## )OWN([0-9]{3,9})\b", re.M)
_HEADING = re.compile(r"^## OWN[0-9]+: (?P<title>.*?) \((?P<date>[0-9-]+)\)$", re.M)
_FACTS = re.compile(r"^- (?P<name>severity|component): (?P<value>.*)$", re.M)
_LABEL = re.compile(rf"^\*\*({'|'.join(_LABELS.values())})\.\*\*(?: |\n|$)", re.M)
_LABEL_LINE = re.compile(rf"\\*{_LABEL.pattern[1:]}")
_HEADING_LINE = re.compile(r"\\*(#|[-=]+\s*$)")


@dataclass(frozen=True)
class Mistake:
    """What a person says of a mistake; text is Markdown.

    Attributes:
        title: in a line.
        component: where it was made.
        severity: one of :data:`moectl.catalogue.SEVERITIES`.
        mistake: what was done, and how it showed.
        why: how it came to it.
        fix: what mended it.
        avoid: what keeps it away.
    """

    title: str
    component: str
    severity: str
    mistake: str
    why: str
    fix: str
    avoid: str


def own_entries(file: Path = FILE) -> tuple[Entry, ...]:
    """The entries of a project's file, in its order; none where there is no file, or a generated one.

    Raises:
        MoectlError: the file cannot be read, or is not UTF-8.
    """
    if not os.path.lexists(file):
        return ()
    text = text_of(file).replace("\r\n", "\n")
    if _is_generated(text):
        return ()
    found = (_read(match["code"], match["body"], file) for match in _BLOCK.finditer(text))
    return tuple(each for each in found if each is not None)


def refuse_target(file: Path) -> None:
    """Raise what :func:`add` would raise for this file, before anybody has written a word.

    Raises:
        ConfigError: a folder, or generated from the catalogue. MoectlError: unreadable, or not UTF-8.
    """
    if os.path.exists(file):
        _refuse_generated(text_of(file), file)


def add(mistake: Mistake, file: Path = FILE, today: date | None = None) -> Entry:
    """Add an entry at the end of ``file``, which is made where there is none, and return it as it reads back.

    The number is one above the highest in the file. Safe against others that add at the same time, and
    against being stopped halfway: the file is replaced as a whole, under a lock.

    Raises:
        ConfigError: a field is empty or no plain text, the title no single line, the severity unknown, or
            the file is generated. MoectlError: the file cannot be read or written, or is not UTF-8.
    """
    fields = {name: _cleaned(name, value) for name, value in vars(mistake).items()}
    if fields["severity"] not in SEVERITIES:
        raise unknown("severity", fields["severity"], SEVERITIES)
    with replaced(file) as draft:
        _refuse_generated(draft.text, file)
        existing = draft.text.replace("\r\n", "\n")
        number = max((int(match[1]) for match in _NUMBER.finditer(existing)), default=0) + 1
        section = _section(f"OWN{number:03d}", fields, today or date.today())
        if existing.strip("\ufeff \t\n"):
            lead = "" if existing.endswith("\n\n") else "\n" if existing.endswith("\n") else "\n\n"
        else:
            lead = f"{_HEAD}\n"
        draft.append(lead + section)
    match = _BLOCK.search(section)
    assert match is not None
    added = _read(match["code"], match["body"], file)
    assert added is not None
    return added


def _is_generated(text: str) -> bool:
    return text.lstrip("\ufeff").startswith(GENERATED)


def _refuse_generated(text: str, file: Path) -> None:
    if _is_generated(text):
        raise ConfigError(
            f"{file} is generated from moectl's catalogue: what is added to it would be lost",
            "Name a file of your own: moectl gotcha new --file OUR_GOTCHAS.md",
        )


def _section(code: str, fields: dict[str, str], day: date) -> str:
    bodies = dict(zip(_LABELS.values(), (fields[name] for name in ("mistake", "why", "fix", "avoid")), strict=True))
    parts = [
        f"<!-- moectl gotcha {code} -->\n## {code}: {fields['title']} ({day.isoformat()})",
        f"- severity: {fields['severity']}\n- component: {fields['component']}",
        *(labelled(label, _shielded(body)) for label, body in bodies.items()),
        f"<!-- end of {code} -->\n",
    ]
    return "\n\n".join(parts)


def _read(code: str, body: str, file: Path) -> Entry | None:
    """An entry as it stands in the file now; None where a person has taken its heading or a label away."""
    heading = _HEADING.search(body)
    pieces = _LABEL.split(body)
    texts = {pieces[at]: _unshielded(pieces[at + 1].strip()) for at in range(1, len(pieces) - 1, 2)}
    if heading is None or set(texts) != set(_LABELS.values()):
        return None
    facts = {match["name"]: match["value"].strip() for match in _FACTS.finditer(pieces[0])}
    return Entry(
        code=code,
        title=heading["title"].replace("&lt;!--", "<!--"),
        severity=facts.get("severity", ""),
        component=facts.get("component", ""),
        **{field: texts[label] for field, label in _LABELS.items()},
        check="by reading",
        source=f"{file}, {heading['date']}",
    )


def _cleaned(name: str, value: str) -> str:
    """A field without the blanks around it, in lines that end alike, and of characters that a text may hold."""
    text = re.sub(r"\r\n?", "\n", value).strip()
    if not text:
        raise ConfigError(f"the entry's {name} is empty", "Say it in a sentence; --help lists what is asked for.")
    if name in ("title", "component", "severity") and len(text.splitlines()) > 1:
        raise ConfigError(f"the entry's {name} must be one line", "Put the rest into --mistake.")
    if any(ord(character) < 32 and character not in "\n\t" for character in text) or not _encodable(text):
        raise ConfigError(f"the entry's {name} holds a control character", "Write it as plain text.")
    return text.replace("<!--", "&lt;!--")  # a comment would swallow what follows it, and the marks are comments


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, from an argument that is no text
        return False
    return True


def _shielded(text: str) -> str:
    """``text`` with a backslash before each line that would end the field, and with its code blocks closed."""
    lines, fence = [], ""
    for line, fence in _with_fences(text):
        lines.append(f"\\{line}" if _ends_field(line, fence) else line)
    return "\n".join([*lines, fence] if fence else lines)


def _unshielded(text: str) -> str:
    lines = (line[1:] if line[:1] == "\\" and _ends_field(line, fence) else line for line, fence in _with_fences(text))
    return "\n".join(lines).replace("&lt;!--", "<!--")


def _with_fences(text: str) -> Iterator[tuple[str, str]]:
    """Each line, with the fence that is open after it or ""."""
    fence = ""
    for line in text.split("\n"):
        mark = FENCE.match(line)
        if mark is not None and fence in ("", mark[1]):
            fence = "" if fence else mark[1]
        yield line, fence


def _ends_field(line: str, fence: str) -> bool:
    """Whether a line, with any number of backslashes before it, is a heading or begins another field."""
    return _LABEL_LINE.match(line) is not None or (not fence and _HEADING_LINE.match(line) is not None)

"""One entry, and how it is written: a Markdown file with a title, two facts and a section per question."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moectl.errors import MoectlError

#: What a mistake does, worst first: silent ones before those that announce themselves.
SEVERITIES = ("wrong results", "wrong training", "wrong conclusion", "crash", "slow")
#: Where it is made, in the order of a model's own making.
COMPONENTS = (
    "attention",
    "model",
    "router",
    "dispatch",
    "experts",
    "balance",
    "training",
    "checkpoint",
    "data",
    "evaluation",
)
#: The sections of an entry's file, in their order; also the fields of :class:`Entry` that hold them.
SECTIONS = ("symptom", "cause", "fix", "check", "avoid", "source")
FENCE = re.compile(r"^\s*(```|~~~)")
_TITLE = re.compile(r"# (?P<code>[A-Z]+[0-9]{3,}): (?P<title>\S.*)")
_FACT = re.compile(r"- (?P<name>severity|component): (?P<value>\S.*)")


@dataclass(frozen=True)
class Entry:
    """One mistake. Text is Markdown: paragraphs, inline code and fenced code.

    Attributes:
        code: ``MOE016``, or ``OWN001`` for a project's own.
        title: the mistake, in a line.
        severity: one of :data:`SEVERITIES`.
        component: one of :data:`COMPONENTS`; a project's own may name another.
        symptom: what is seen.
        cause: why that is.
        fix: what to change.
        check: the command that finds it, or "by reading".
        avoid: the habit that keeps it away.
        source: paper, reference implementation or report.
    """

    code: str
    title: str
    severity: str
    component: str
    symptom: str
    cause: str
    fix: str
    check: str
    avoid: str
    source: str


class EntryError(MoectlError):
    """A file of the catalogue that is not written as one."""


def parse(text: str, name: str) -> Entry:
    """An entry from its file's text.

    Args:
        text: of the file.
        name: of the file, for the error.

    Raises:
        EntryError: no title, an unknown severity or component, or sections missing, empty or out of order.
    """
    blocks = _sections(text)
    head = blocks.pop(0)[1].strip().splitlines()
    title = _TITLE.fullmatch(head[0]) if head else None
    if title is None:
        raise _bad(name, "its first line must be '# CODE: title'")
    facts = {match["name"]: match["value"].strip() for line in head[1:] if (match := _FACT.fullmatch(line))}
    for fact, known in (("severity", SEVERITIES), ("component", COMPONENTS)):
        if facts.get(fact) not in known:
            raise _bad(name, f"'- {fact}: …' must be one of {', '.join(known)}, not {facts.get(fact)!r}")
    found = tuple(heading.lower() for heading, _ in blocks)
    if found != SECTIONS:
        raise _bad(name, f"its sections must be {', '.join(SECTIONS)}, not {', '.join(found)}")
    bodies = {heading.lower(): body.strip() for heading, body in blocks}
    empty = [section for section in SECTIONS if not bodies[section]]
    if empty:
        raise _bad(name, f"it says nothing under {', '.join(empty)}")
    return Entry(title["code"], title["title"].strip(), facts["severity"], facts["component"], **bodies)


def _sections(text: str) -> list[tuple[str, str]]:
    """``(heading, body)`` of each ``##`` section, the part before the first under ""; code is left alone."""
    blocks: list[tuple[str, list[str]]] = [("", [])]
    in_code = False
    for line in text.splitlines():
        in_code ^= FENCE.match(line) is not None
        if line.startswith("## ") and not in_code:
            blocks.append((line[3:].strip(), []))
        else:
            blocks[-1][1].append(line)
    return [(heading, "\n".join(lines)) for heading, lines in blocks]


def _bad(name: str, what: str) -> EntryError:
    return EntryError(f"the catalogue's file {name} cannot be read: {what}", "Mend it, or reinstall moectl.")

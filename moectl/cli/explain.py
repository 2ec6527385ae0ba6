"""``moectl explain``: the catalogue of mistakes, by code, by words, or whole."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from moectl.cli.output import UNWRAPPED, out

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType
    from rich.text import Text

    from moectl.catalogue import Entry

_WIDTH = 100  # of a paragraph, however wide the terminal is
_COLOURS = {
    "wrong results": "bold red",
    "wrong training": "bold magenta",
    "wrong conclusion": "bold yellow",
    "crash": "bold blue",
    "slow": "bold green",
}


def command(
    codes: Annotated[
        list[str] | None, typer.Argument(metavar="[CODE]...", help="MOE007, moe7 or 7; OWN001 for your project's own")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="all entries, one line each")] = False,
    search: Annotated[
        str | None, typer.Option("--search", metavar="WORDS", help="entries that speak of these words, the best first")
    ] = None,
    component: Annotated[str | None, typer.Option(help="of --list and --search: only this part of a model")] = None,
    severity: Annotated[str | None, typer.Option(help="of --list and --search: only what does this")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="the whole catalogue as one document: what GOTCHAS.md is made of")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="one JSON document")] = False,
) -> None:
    """Explain a known mistake: symptom, cause, fix, the check that finds it, how to avoid it, and a source.

    Bare, it lists them all. A GOTCHAS.md in the current folder that moectl gotcha new has written is
    read as well. Exit codes: 2 for an unknown code, 4 where a search finds nothing.
    """
    from moectl.errors import ConfigError

    words = " ".join([search, *(codes or [])]) if search is not None else None
    one_of = [name for name, given in (("--list", list_), ("--search", search is not None)) if given]
    one_of += ["--markdown"] if markdown else []
    one_of += ["a code"] if codes and search is None else []
    filters = [name for name, given in (("--component", component), ("--severity", severity)) if given is not None]
    if len(one_of) > 1 or (filters and one_of in (["--markdown"], ["a code"])) or (markdown and json_):
        both = [*one_of, *filters, *(["--json"] if markdown and json_ else [])]
        raise ConfigError(f"{' and '.join(both)} do not go together", "See `moectl explain --help`.")
    if markdown:
        from moectl.catalogue import markdown as document

        out().data(document())
    elif codes and search is None:
        _show(codes, json_)
    else:
        _list(words, component, severity, json_)


def _show(codes: list[str], json_: bool) -> None:
    from moectl.catalogue import entry
    from moectl.catalogue.own import own_entries

    among = own_entries() if any(code.strip().lower().startswith("own") for code in codes) else ()
    found = list(dict.fromkeys(entry(code, among) for code in codes))
    if json_:
        out().data({"entries": [asdict(each) for each in found]})
        return
    for number, each in enumerate(found):
        if number:
            out().data("\n")
        out().render(_card(each), piped_width=UNWRAPPED)


def _list(words: str | None, component: str | None, severity: str | None, json_: bool) -> None:
    from moectl.catalogue import COMPONENTS, SEVERITIES, entries
    from moectl.catalogue import search as find
    from moectl.errors import NotFoundError

    every = [*entries(), *_own()]
    component = _one_of("component", component, [*COMPONENTS, *(each.component for each in every)])
    severity = _one_of("severity", severity, SEVERITIES)
    among = [each for each in every if component in (None, each.component) and severity in (None, each.severity)]
    found = among if words is None else find(words, among)
    if not found:
        within = " of ".join(filter(None, (severity, component)))
        what = f"of '{words}'" if words is not None else "of that"
        raise NotFoundError(
            f"no entry{f' ({within})' if within else ''} speaks {what}",
            f"Try fewer words, or what you see instead of why: moectl explain --list shows all {len(every)}.",
        )
    if json_:
        out().data({"entries": [asdict(each) for each in found]})
        return
    rows = [(each.code, each.title.replace("`", ""), each.severity, each.component) for each in found]
    out().table(None, ("code", "mistake", "severity", "component"), rows)
    out().say(f"Read one with: moectl explain {found[0].code}")


def _own() -> tuple[Entry, ...]:
    """The project's own entries; a file that cannot be read is no reason to say nothing of the others."""
    from moectl.catalogue.own import own_entries
    from moectl.errors import MoectlError

    try:
        return own_entries()
    except MoectlError as error:
        out().warn(f"your own entries are left out: {error.message}")
        return ()


def _one_of(kind: str, value: str | None, known: list[str] | tuple[str, ...]) -> str | None:
    from moectl.errors import unknown

    if value is None:
        return None
    wanted = re.sub(r"[\s_-]+", " ", value.strip().lower())
    by_name = {name.lower(): name for name in known}
    if wanted not in by_name:
        raise unknown(kind, value, known)
    return by_name[wanted]


def _card(entry: Entry) -> RenderableType:
    """One entry as it is read in a terminal; off a terminal the same text without its colours."""
    from rich.console import Group
    from rich.constrain import Constrain
    from rich.padding import Padding
    from rich.text import Text

    from moectl.catalogue.entry import SECTIONS

    title = Text.assemble((entry.code, "bold cyan"), "  ", _inline(entry.title, "bold"))
    facts = Text.assemble((entry.severity, _COLOURS.get(entry.severity, "bold")), f" · {entry.component}")
    parts: list[RenderableType] = [title, facts]
    for name in SECTIONS:
        parts += [Text(), Text(name.capitalize(), style="bold")]
        for each in _paragraphs(getattr(entry, name)):
            part = Padding(each, (0, 0, 0, 2))
            parts.append(part if each.overflow == "fold" else Constrain(part, _WIDTH))
    return Group(*parts)


def _paragraphs(text: str) -> Iterator[Text]:
    """Paragraphs flow to the width; code keeps its lines, with a blank line before each."""
    from rich.text import Text

    from moectl.catalogue.entry import FENCE

    for number, block in enumerate(_blocks(text)):
        if number:
            yield Text()
        if FENCE.match(block):
            yield _code(block.splitlines()[1:-1])
        else:
            yield _inline(" ".join(block.split()))


def _code(lines: list[str]) -> Text:
    """Code, its remarks in a column: red for what is wrong, green for what is right."""
    from rich.text import Text

    split = [line.partition("  # ") for line in lines]
    column = max((len(code) for code, mark, _ in split if mark), default=0)
    if any(column + len(mark + remark) > _WIDTH for _, mark, remark in split):
        column = 0
    rows = []
    for code, mark, remark in split:
        colour = next((name for word, name in (("wrong", "red"), ("right", "green")) if remark.startswith(word)), "dim")
        rows.append(Text.assemble(code, " " * (column - len(code)) if mark else "", (mark + remark, colour)))
    text = Text("\n").join(rows)
    text.overflow = "fold"
    return text


def _blocks(text: str) -> list[str]:
    """The paragraphs and the fenced code of a text, in order."""
    from moectl.catalogue.entry import FENCE

    blocks: list[list[str]] = [[]]
    fence = ""
    for line in text.split("\n"):
        mark = FENCE.match(line)
        if mark is not None and not fence:
            fence = mark[1]
            blocks.append([line])
        elif fence:
            blocks[-1].append(line)
            if mark is not None and mark[1] == fence:
                fence = ""
                blocks.append([])
        elif line.strip():
            blocks[-1].append(line)
        else:
            blocks.append([])
    return ["\n".join(lines) for lines in blocks if lines]


def _inline(text: str, style: str = "") -> Text:
    """A line of Markdown with its code in colour; the backticks stay where there is no colour to tell it by."""
    from rich.text import Text

    line = Text(style=style)
    for piece in re.split(r"(`[^`]+`)", text):
        line.append(piece, "cyan" if piece.startswith("`") else "")
    return line

"""``moectl gotcha``: a project's own mistakes, beside those of the catalogue."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moectl.cli.output import out

app = typer.Typer(help="Write down a mistake of your own, so that it is made once")
_File = Annotated[Path, typer.Option("--file", help="the project's file; it is made where there is none")]
_Json = Annotated[bool, typer.Option("--json", help="one JSON document")]


@app.command()
def new(
    title: Annotated[str | None, typer.Option(help="the mistake, in a line")] = None,
    component: Annotated[str | None, typer.Option(help="where: router, data, evaluation, …")] = None,
    severity: Annotated[
        str | None, typer.Option(help="wrong results, wrong training, wrong conclusion, crash or slow")
    ] = None,
    mistake: Annotated[str | None, typer.Option(help="what was done, and how it showed")] = None,
    why: Annotated[str | None, typer.Option(help="how it came to it")] = None,
    fix: Annotated[str | None, typer.Option(help="what mended it")] = None,
    avoid: Annotated[str | None, typer.Option(help="what keeps it away from now on")] = None,
    file: _File = Path("GOTCHAS.md"),
    json_: _Json = False,
) -> None:
    """Add a dated entry to your project's GOTCHAS.md; everything that is there stays as it is.

    In a terminal, what is not given is asked for. Text is Markdown. A file that moectl generates from its
    own catalogue is refused. moectl explain reads the entries back.
    """
    from moectl.catalogue.own import Mistake, add, refuse_target
    from moectl.errors import ConfigError

    given = {"title": title, "component": component, "severity": severity, "mistake": mistake}
    given |= {"why": why, "fix": fix, "avoid": avoid}
    refuse_target(file)
    missing = [name for name, value in given.items() if value is None]
    if missing and not (sys.stdin.isatty() and sys.stderr.isatty()):
        options = ", ".join(f"--{name}" for name in missing)
        raise ConfigError(
            f"missing: {options} (there is no terminal to ask at)", "Give all of them: moectl gotcha new --help."
        )
    answers = {name: _ask(name) if value is None else value for name, value in given.items()}
    answers["severity"] = _severity(answers["severity"])
    added = add(Mistake(**answers), file)
    if json_:
        out().data({"file": str(file), "entry": asdict(added)})
        return
    out().data(f"{added.code}  {added.title}")
    out().say(f"added to {file}; read it with: moectl explain {added.code}")


@app.command()
def ls(file: _File = Path("GOTCHAS.md"), json_: _Json = False) -> None:
    """List the entries of your project's GOTCHAS.md."""
    from moectl.catalogue.own import own_entries
    from moectl.errors import NotFoundError

    if not file.exists():
        raise NotFoundError(f"there is no {file}", "Start one: moectl gotcha new.")
    found = own_entries(file)
    if json_:
        out().data({"file": str(file), "entries": [asdict(each) for each in found]})
        return
    rows = [
        (each.code, each.source.rpartition(", ")[2], each.title.replace("`", ""), each.severity, each.component)
        for each in found
    ]
    out().table(None, ("code", "date", "mistake", "severity", "component"), rows)
    if not found:
        out().say(f"{file} holds no entry of your own; add one: moectl gotcha new")


def _ask(name: str) -> str:
    """An answer from the terminal; an empty one is asked for again."""
    from moectl.catalogue import COMPONENTS, SEVERITIES
    from moectl.errors import ConfigError, MoectlError

    questions = {
        "title": "The mistake, in a line",
        "component": f"Where ({', '.join(COMPONENTS)}, or your own word)",
        "severity": f"What it does ({', '.join(SEVERITIES)})",
        "mistake": "What was done, and how it showed",
        "why": "Why it came to it",
        "fix": "What mended it",
        "avoid": "What keeps it away from now on",
    }
    while True:
        sys.stderr.write(f"{questions[name]}: ")
        sys.stderr.flush()
        try:
            answer = input().strip()
        except EOFError as error:
            raise ConfigError(f"no answer for --{name}: nothing was written", "Run it again, or give it.") from error
        if answer and name == "severity":
            try:
                return _severity(answer)
            except MoectlError as error:
                out().say(f"{error.message}. {error.hint}")
        elif answer:
            return answer


def _severity(text: str) -> str:
    """One of the known severities, as it is spelt there."""
    from moectl.catalogue import SEVERITIES
    from moectl.errors import unknown

    wanted = " ".join(text.lower().replace("-", " ").replace("_", " ").split())
    if wanted not in SEVERITIES:
        raise unknown("severity", text, SEVERITIES)
    return wanted

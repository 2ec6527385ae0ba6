"""``moectl routers``: which routers there are, what each can be told, whether it keeps the contract, and a new one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moectl.cli.output import out, to_jsonable

if TYPE_CHECKING:
    from moectl.plugins import RouterEntry

app = typer.Typer(help="List, show and check routers, and start one of your own")
_Json = Annotated[bool, typer.Option("--json", help="one JSON document")]
_Name = Annotated[str, typer.Argument(help="a router's name, or path.py:Class")]


@app.command()
def ls(
    check: Annotated[bool, typer.Option("--check", help="import each, every package in a process of its own")] = False,
    json_: _Json = False,
) -> None:
    """List every router that can be named, from moectl and from installed plug-ins.

    Nothing is imported to list them, so a broken plug-in is still listed; what reading its source
    shows to be wrong is said. --check imports them too, and ends in exit code 3 if one cannot be used.
    """
    from moectl.errors import CheckError
    from moectl.plugins import reading, router_entries

    entries = router_entries()
    tried = _try(list(entries.values())) if check else {}
    listed = []
    for name, entry in entries.items():
        read = reading(entry)
        problem = tried[name] if check else entry.clash or read.problem
        loads = (problem is None) if check else None
        listed.append({**entry._asdict(), "summary": read.summary, "problem": problem, "loads": loads})
    if json_:
        out().data({"routers": listed})
    else:
        rows = [(each["name"], _package(each), _what(each)) for each in listed]
        out().table(None, ("router", "package", "what it does"), rows)
        for entry in entries.values():
            if entry.rivals:
                out().warn(f"'{entry.name}' is {entry.clash}: uninstall {entry.surplus}")
    if check:
        broken = [str(each["name"]) for each in listed if each["problem"]]
        if broken:
            raise CheckError(
                f"{len(broken)} of {len(listed)} routers cannot be used: {', '.join(broken)}",
                "The others are not touched by it. Update or uninstall the packages that bring these.",
            )
        out().say(f"all {len(listed)} load")


@app.command()
def show(name: _Name, json_: _Json = False) -> None:
    """Show what a router does, and its options with their defaults."""
    from moectl.routers import describe_router

    described = describe_router(name)
    if json_:
        out().data(described)
        return
    text = f"{described['name']}  ({described['class']})\n\n{described['doc']}\n\n{_nature(described)}.\n\n"
    out().data(text.replace("``", "`"))
    rows = [
        (
            option["name"],
            option["type"],
            None if option["required"] else json.dumps(to_jsonable(option["default"])),
            option["description"] or None,
        )
        for option in described["options"]
    ]
    if rows:
        out().table("Options", ("option", "type", "default", "meaning"), rows)
        option = described["options"][0]
        out().say(f"Set one with: moectl train --router {name} --set moe.router.{option['name']}=…")


@app.command()
def check(
    name: _Name,
    num_experts: Annotated[int, typer.Option(min=2, help="experts of the router that is built")] = 8,
    hidden_size: Annotated[int, typer.Option(min=1, help="width of its tokens")] = 64,
    sets: Annotated[list[str] | None, typer.Option("--set", help="an option, as key=value; may be repeated")] = None,
    json_: _Json = False,
) -> None:
    """Check that a router keeps the contract: shapes, masks, gradients, causality, compilation and more.

    Ends in exit code 3 when a check fails. A plug-in's own tests run the same with
    moectl.testing.check_router.
    """
    from moectl.config.loading import parse_set
    from moectl.errors import CheckError
    from moectl.plugins import is_file, router_entry

    given = dict(parse_set(text) for text in sets or [])
    options = {key.removeprefix("moe.router."): value for key, value in given.items()}
    if not is_file(name):
        router_entry(name)  # before torch is loaded: a misspelt name is answered at once
    from moectl.testing import run_checks

    report = run_checks(name, hidden_size=hidden_size, num_experts=num_experts, **options)
    if json_:
        out().data({**report._asdict(), "ok": report.ok, "checks": [each._asdict() for each in report.checks]})
    else:
        title = f"{name}  (D = {hidden_size}, E = {num_experts}{''.join(f', {k}={v}' for k, v in options.items())})"
        # A check that could not be run has nothing to say; the summary counts it.
        rows = [each for each in report.checks if not each.says.startswith("not run, because")]
        out().table(title, ("check", "result", "evidence"), rows)
        out().say(report.summary())
    if not report.ok:
        failed = ", ".join(each.name for each in report.failed)
        raise CheckError(
            f"the router '{name}' does not keep the contract: {failed}",
            "Each row says what was seen and what is asked for. `moectl routers check` again when it is mended.",
        )


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="lower-case, with hyphens: my-router")],
    into: Annotated[Path, typer.Option(help="the folder to write the package in")] = Path(),
    json_: _Json = False,
) -> None:
    """Start a router of your own: an installable package with one module, its test and a README.

    Nothing is ever overwritten.
    """
    from moectl.scaffold import new_router

    made = new_router(name, into)
    if json_:
        out().data(made)
        return
    out().data("\n".join(str(made.folder / file) for file in made.files))
    out().say(
        f"\nNext:\n  cd {made.folder}\n  moectl routers check ./{made.target}"
        f"\n  pip install -e '.[test]'\n  moectl routers check {name} && pytest"
        f"\n  moectl train --router {name}"
    )


def _try(entries: list[RouterEntry]) -> dict[str, str | None]:
    from moectl.testing.trial import router_problems

    packages = len({entry.distribution for entry in entries if not entry.rivals})
    with out().progress("importing packages", total=packages) as bar:
        started = iter(range(packages))
        return router_problems(entries, tried=lambda package: bar.update(next(started), note=package))


def _what(entry: dict[str, Any]) -> str | None:
    """The summary; before it, what is wrong."""
    parts = [f"BROKEN: {entry['problem']}"] if entry["problem"] else []
    return " · ".join([*parts, *filter(None, [entry["summary"].replace("``", "`")])]) or None


def _nature(described: dict[str, Any]) -> str:
    causal = {True: "causal", False: "not causal: needs --allow-noncausal to train"}
    parts = [causal.get(described["causal"], "causal or not by its options")]
    parts.append("tokens choose experts" if described["token_choice"] else "experts choose tokens: takes no capacity")
    parts += [] if described["learns"] else ["no learned gate"]
    return "; ".join(parts)


def _package(entry: dict[str, Any]) -> str:
    return f"{entry['distribution']} {entry['version']}".strip()

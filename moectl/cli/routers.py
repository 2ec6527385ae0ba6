"""``moectl routers``: which routers there are, and what each can be told."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from moectl.cli.output import out

app = typer.Typer(help="List the routers there are, and the options of one")
_Json = Annotated[bool, typer.Option("--json", help="one JSON document")]


@app.command()
def ls(json_: _Json = False) -> None:
    """List every router that can be named, from moectl and from installed plug-ins.

    Nothing is imported to list them, so a broken plug-in is still listed.
    """
    from moectl.plugins import router_entries, summary

    entries = [{**entry._asdict(), "summary": summary(entry)} for entry in router_entries().values()]
    if json_:
        out().data({"routers": entries})
        return
    rows = [(entry["name"], _package(entry), entry["summary"].replace("``", "`") or None) for entry in entries]
    out().table(None, ("router", "package", "what it does"), rows)
    for entry in entries:
        if entry["rivals"]:
            claimants = ", ".join((entry["distribution"], *entry["rivals"]))
            out().warn(f"'{entry['name']}' is claimed by {claimants}: uninstall all but one")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="a router's name, or path.py:Class")],
    json_: _Json = False,
) -> None:
    """Show what a router does, and its options with their defaults."""
    from moectl.routers import describe_router

    described = describe_router(name)
    if json_:
        out().data(described)
        return
    out().data(f"{described['name']}  ({described['class']})\n\n{described['doc']}\n".replace("``", "`"))
    out().data("")
    rows = [
        (option["name"], option["type"], json.dumps(option["default"]), option["description"] or None)
        for option in described["options"]
    ]
    if rows:
        out().table("Options", ("option", "type", "default", "meaning"), rows)
        option = described["options"][0]
        out().say(f"Set one with: moectl train --router {name} --set moe.router.{option['name']}=…")


def _package(entry: dict[str, Any]) -> str:
    return f"{entry['distribution']} {entry['version']}".strip()

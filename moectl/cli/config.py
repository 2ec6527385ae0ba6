"""``moectl config``: what a config comes to."""

from __future__ import annotations

from typing import Annotated

import typer

from moectl.cli.output import out

app = typer.Typer(help="Show what a config comes to, every default written out", no_args_is_help=False)


@app.command()
def show(
    config: Annotated[
        str | None, typer.Argument(help="a YAML file, or the name of a shipped one; default: moectl's defaults")
    ] = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="every key, the router's own options too")] = False,
    preset: Annotated[str | None, typer.Option(help="dense, moe, no-lb or top2")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="set one key; repeat for more")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="one JSON document")] = False,
) -> None:
    """Print a config as YAML, checked; without --resolved only what differs from the defaults.

    The content hash goes to stderr: it names the run, and is that of the resolved config.
    """
    from moectl.config.loading import load_config, resolved_yaml
    from moectl.routers import resolve_router

    loaded = load_config(config, sets=set_ or (), preset=preset)
    full = resolve_router(loaded)
    shown = full if resolved else loaded
    if json_:
        values = shown.model_dump(mode="json", exclude_defaults=not resolved)
        out().data({"config": values, "content_hash": full.content_hash()})
        return
    out().data(resolved_yaml(shown, only_set=not resolved))
    out().say(f"content hash {full.content_hash()}")
    if not resolved:
        out().say("All other keys have their defaults: --resolved shows them.")

"""``moectl runs``: what was run, and what came of it."""

from __future__ import annotations

from typing import Annotated

import typer

from moectl.cli.output import UNWRAPPED, out

app = typer.Typer(help="List, show, compare and re-index what was run.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command("ls")
def ls(
    status: Annotated[
        str | None, typer.Option(help="running, finished, interrupted, collapsed, failed or lost.")
    ] = None,
    router: Annotated[str | None, typer.Option(help="Only runs with this router.")] = None,
    group: Annotated[str | None, typer.Option(help="Only runs of this group (of an ablation).")] = None,
    limit: Annotated[int | None, typer.Option("--limit", "-n", min=1, help="Only so many, the newest.")] = None,
    as_json: Json = False,
) -> None:
    """List all runs, the newest first."""
    from moectl.cli import runs_view
    from moectl.errors import unknown
    from moectl.runs.catalog import list_runs
    from moectl.runs.rundir import STATUSES

    if status is not None and status not in STATUSES:
        raise unknown("status", status, STATUSES)
    entries, warnings = list_runs(status=status, router=router, group=group, limit=limit)
    for warning in warnings:
        out().warn(warning)
    if as_json:
        out().data({"runs": [entry.to_dict() for entry in entries]})
    elif entries:
        out().render(runs_view.listing(entries), piped_width=UNWRAPPED)
    elif status or router or group:
        out().say("No run fits.")
    else:
        out().say("There is no run yet. `moectl train` makes one; `moectl quickstart` takes the whole walk.")


@app.command("show")
def show(
    run: Annotated[str | None, typer.Argument(help="Id, prefix or folder; default: the newest finished run.")] = None,
    as_json: Json = False,
) -> None:
    """Show everything about one run: what it was, where it comes from, what came of it."""
    from moectl.cli import runs_view
    from moectl.runs.catalog import describe
    from moectl.runs.find import find_run

    found = describe(find_run(run))
    for problem in found["problems"]:
        out().warn(problem)
    if as_json:
        out().data(found)
        return
    out().render(runs_view.description(found), piped_width=UNWRAPPED)


@app.command("compare")
def compare(
    runs: Annotated[list[str] | None, typer.Argument(help="Two runs or more; the first is the baseline.")] = None,
    group: Annotated[
        str | None, typer.Option(help="All runs of this group; its first variant is the baseline.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare runs on pure LM loss, at equal tokens; seeds of one configuration are taken together.

    Each configuration is held against the first at the last evaluation that both have, so that one which
    stopped early is compared at the tokens it reached. Says no run is better where tokens, data, eval set or
    loss definition differ, or from one seed.
    """
    from moectl.cli import runs_view
    from moectl.errors import ConfigError
    from moectl.runs.compare import compare as compare_runs
    from moectl.runs.find import find_run
    from moectl.runs.groups import evaluated

    if not runs and group is None:
        raise ConfigError("which runs?", "moectl runs compare RUN OTHER [...], or --group GROUP")
    folders = [find_run(run) for run in runs or []]
    if group is not None:
        found, without = evaluated(group)
        folders += found
        for id in without:
            out().warn(f"{id} has not been evaluated yet, and is left out")
    result = compare_runs(folders)
    if as_json:
        out().data(result.to_dict())
    else:
        out().render(runs_view.comparison(result), piped_width=UNWRAPPED)


@app.command("reindex")
def reindex(as_json: Json = False) -> None:
    """Rebuild the registry from the run folders, which are the truth."""
    from moectl import paths
    from moectl.runs.store import rebuild

    registry, indexed = rebuild(paths.registry_path(), paths.runs_dir())
    registry.close()
    for warning in registry.warnings:
        out().warn(warning)
    if as_json:
        out().data({"registry": str(registry.path), **indexed._asdict(), "warnings": registry.warnings})
    else:
        gone = f"; {indexed.removed} whose folder is gone forgotten" if indexed.removed else ""
        out().say(f"Indexed {indexed.runs} runs, {indexed.values:,} values{gone}: {registry.path}")


@app.command("rm")
def rm(
    run: Annotated[str, typer.Argument(help="Id, prefix or folder.")],
    yes: Annotated[bool, typer.Option("--yes", help="Really delete; without it, only says what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Delete one run: its folder, checkpoints too, and its rows. One that is being written is refused."""
    from moectl.runs.catalog import remove
    from moectl.runs.find import find_run

    removed = remove(find_run(run), confirmed=yes)
    for warning in removed["warnings"]:
        out().warn(warning)
    if as_json:
        out().data(removed)
    else:
        out().say(f"Removed {removed['removed']}: {removed['files']} files, {removed['size_bytes'] / 1e6:.1f} MB.")

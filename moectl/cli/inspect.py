"""``moectl inspect``: what the experts have learned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moectl.cli.output import out
from moectl.marks import marked

if TYPE_CHECKING:
    from moectl.walk.inspect import InspectedRun, InspectedSeeds

app = typer.Typer(help="See which experts take which text, beside honest nulls.", no_args_is_help=True)


@app.command("routing")
def routing(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Id, prefix or folder; default: the newest finished run with experts."),
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw a figure too: out.png, out.svg or out.pdf.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="A checkpoint's step; default: the last.")] = None,
    draws: Annotated[int, typer.Option(min=100, help="Shuffles of the domain labels (permutation null).")] = 1000,
    gates: Annotated[int, typer.Option(min=100, help="Freshly drawn gates (random-router null).")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of shuffles, gates and bootstrap.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Which expert takes which domain, layer by layer, and whether that is more than chance.

    Several runs are taken as seeds of one configuration, and judged together.
    """
    from moectl.inspection.routing import InspectSettings
    from moectl.walk.inspect import inspect_run, inspect_seeds

    if figure is not None:
        from moectl.reports.figures import check_figure_path

        check_figure_path(figure)
    settings = InspectSettings(permutations=draws, gates=gates, seed=seed)
    options: dict[str, Any] = {"step": step, "device": device, "settings": settings, "say": out().say}
    if runs and len(runs) > 1:
        _report_seeds(inspect_seeds(runs, **options), figure, as_json)
    else:
        _report_run(inspect_run(runs[0] if runs else None, **options), figure, as_json)


def _report_run(result: InspectedRun, figure: Path | None, as_json: bool) -> None:
    if figure is not None:
        from moectl.reports.figures import routing_figure

        out().say(f"figure: {routing_figure(result.report, figure, title=result.title)}")
    if as_json:
        out().data(result.to_dict())
        return
    from moectl.reports.terminal import routing_report

    out().say(f"{result.title} · data {result.header['data']}")
    out().render(routing_report(result.report))


def _report_seeds(result: InspectedSeeds, figure: Path | None, as_json: bool) -> None:
    if figure is not None and not result.verdicts:
        out().warn("no figure: it shows the verdict over seeds, and there is none")
    elif figure is not None:
        from moectl.reports.figures import seeds_figure

        title = marked(f"{result.runs[0].header['router']}, seeds {', '.join(map(str, result.seeds))}", result.marks)
        out().say(f"figure: {seeds_figure(result.verdicts, figure, title=title)}")
    if as_json:
        out().data(result.to_dict())
        return
    from moectl.reports.terminal import balance_table, nmi_table, notes_of, verdict_table

    for run in result.runs:
        out().say(run.title)
        out().render(balance_table(run.report))
        out().render(nmi_table(run.report))
    for problem in result.problems:
        out().warn(problem)
    if result.verdicts:
        out().render(verdict_table(result.verdicts, result.seeds, result.marks))
    else:
        out().say("No verdict: it needs runs of one configuration and different seeds.")
    out().render(notes_of([run.report for run in result.runs]))

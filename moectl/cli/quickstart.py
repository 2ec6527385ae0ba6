"""``moectl quickstart``: the whole walk on the text that ships."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moectl.cli.output import out
from moectl.marks import marked

if TYPE_CHECKING:
    from moectl.walk.inspect import InspectedRun
    from moectl.walk.quickstart import Contestant, Quickstart


def command(
    seed: Annotated[int | None, typer.Option(help="Seed of both runs.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of both runs.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any config key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Prepare data, train a dense and a Mixture-of-Experts model on the same tokens, and measure both.

    Takes a few minutes on two cores. Run again, it finds what is done and only shows it.
    """
    from moectl.cli.train import progress_note
    from moectl.walk.quickstart import quickstart
    from moectl.walk.train import RunRequest

    changes = [f"train.{key}={value}" for key, value in _given(seed=seed, steps=steps, threads=threads).items()]
    with out().progress("quickstart") as bar:

        def progress(run: str, total: int) -> Any:
            bar.describe(run)
            return lambda step, values: bar.update(step, total, progress_note(values))

        request = RunRequest(command=sys.argv, say=out().say, progress=progress)
        result = quickstart(request, sets=[*changes, *(sets or [])], draw=_draw)
    out().data(result.to_dict()) if as_json else _report(result)


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _draw(routing: InspectedRun, path: Path) -> Path:
    from moectl.reports.figures import routing_figure

    return routing_figure(routing.report, path, title=routing.title)


def _report(result: Quickstart) -> None:
    from moectl.reports.terminal import balance_table, heat_map, nmi_table, what_one_run_says

    report = result.routing.report
    columns = ["run", "parameters", "active", "tokens", "tokens/s", "LM loss", "95 %", "bits/byte", "commit"]
    rows = [_row(result.dense), _row(result.moe)]
    out().table(
        "Two runs, the same tokens, seed and schedule; held-out language-model loss alone",
        columns,
        rows,
        caption="LM loss in nats per token over the whole held-out split; 95 % by bootstrap over groups of texts.",
    )
    for verdict in result.comparison.verdicts:
        out().data(verdict.text)
    out().data(f"Training throughput: the MoE keeps {result.throughput_ratio:.0%} of the dense run's tokens/s.\n")
    out().render(balance_table(report))
    deepest = report.by_depth()[-1]
    out().render(heat_map(deepest, report))
    out().render(nmi_table(report))
    for line in (*what_one_run_says(report), *report.notes):
        out().data(f"- {line}")
    if result.figure is not None:
        out().data(f"\nFigure: {result.figure}")
    out().data("\nNext:")
    for what, line in _next(result):
        out().data(f"  {line:<72} # {what}")


def _row(contestant: Contestant) -> list[Any]:
    overall, record = contestant.losses.report.overall, contestant.record
    interval = overall.interval
    commit = str(record["commit"])[:8] + ("*" if record.get("dirty") else "")
    return [
        marked(contestant.outcome.id, record["marks"]),
        f"{record['parameters']['total']:,}",
        f"{record['parameters']['active']:,}",
        f"{record['tokens']:,}",
        f"{contestant.tokens_per_second:,.0f}",
        marked(f"{overall.lm_loss:.4f}", record["marks"]),
        None if interval is None else f"{interval.low:.3f}–{interval.high:.3f}",
        f"{overall.bits_per_byte:.4f}",
        commit,
    ]


def _next(result: Quickstart) -> list[tuple[str, str]]:
    dense, moe = result.dense.outcome.id, result.moe.outcome.id
    return [
        ("every number of a run, and where it comes from", f"moectl runs show {moe}"),
        ("another seed; three make a verdict", f"moectl quickstart --seed {int(result.moe.record['seed']) + 1}"),
        ("is one better? says what may be said", f"moectl runs compare {dense} {moe}"),
    ]

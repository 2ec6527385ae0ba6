"""``moectl ablate``: presets, routers or own variants against each other, several seeds of each, as one group."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moectl.cli.output import UNWRAPPED, Bar, out

if TYPE_CHECKING:
    from moectl.walk.ablate import Ablation
    from moectl.walk.group_runs import Report


def command(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A YAML config, or a shipped one's name.")
    ] = None,
    presets: Annotated[
        str | None, typer.Option(help="With commas; the first is the baseline. Default: dense,moe,no-lb,top2.")
    ] = None,
    routers: Annotated[
        str | None, typer.Option(help="Routers too, with commas: the preset moe with each of them.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:KEY=VALUE,...", help="The config with these changes too; may be repeated."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="How many (3), or which (0,1,2).")] = "3",
    data: Annotated[str | None, typer.Option(help="A prepared dataset; default: as train takes it.")] = None,
    base: Annotated[str | None, typer.Option(help="What all start from: a size, a run or a model folder.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of every run.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of every run.")] = None,
    name: Annotated[str | None, typer.Option(help="The group's name; default: the config's and a hash.")] = None,
    parallel: Annotated[int, typer.Option(help="Runs at a time: a GPU each, or a part of the CPU's cores.")] = 1,
    price_per_hour: Annotated[float | None, typer.Option(help="US dollars for one device.")] = None,
    max_cost: Annotated[
        float | None, typer.Option(help="US dollars for the whole group: used up, all runs end with a checkpoint.")
    ] = None,
    max_cost_per_run: Annotated[float | None, typer.Option(help="US dollars for each run.")] = None,
    commit: Annotated[str | None, typer.Option(help="Record this commit instead of asking git.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any config key, in all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> int:
    """Train variants of one config with several seeds each, and compare them at equal tokens.

    Type the same command again, and it goes on: runs that have ended are not trained again, interrupted and lost
    ones continue exactly. Every run has a process of its own; what happens to one does not touch the others.

    Exit codes: 0 all runs have ended (a collapse is a result), 1 a run failed or its process died, 130 stopped by
    Ctrl-C or a budget, with checkpoints.
    """
    from moectl.config.variants import configs_of, group_name, seeds_of, variants_of
    from moectl.walk.ablate import AblationRequest, ablate
    from moectl.walk.group_runs import GroupTerms

    given = {
        "model.base": base,
        "train.steps": steps,
        "train.device": device,
        "train.threads": threads,
    }
    overrides = {key: value for key, value in given.items() if value is not None}
    numbers = seeds_of(seeds)
    configs = configs_of(config, variants_of(presets, routers, variant or ()), sets=sets or (), overrides=overrides)
    with out().progress("ablate") as bar:
        request = AblationRequest(
            name=name or group_name(config, sets or (), overrides, data),
            configs=configs,
            seeds=numbers,
            data=data,
            parallel=parallel,
            terms=GroupTerms(price_per_hour, max_cost, max_cost_per_run),
            command=sys.argv,
            commit=commit,
            say=out().say,
            progress=_shown(bar),
        )
        ablation = ablate(request)
    out().data(_document(ablation)) if as_json else _report(ablation)
    return ablation.exit_code


def _shown(bar: Bar) -> Callable[[Report], None]:
    from moectl.cli.train import progress_note

    def progress(report: Report) -> None:
        running = [
            f"{run} {step:,}/{steps:,}" + (f" {progress_note(note)}" if "train/tokens_per_second" in note else "")
            for run, step, steps, note in report.running
        ]
        cost = [] if report.cost is None else [f"{report.cost:.2f} dollars"]
        bar.update(
            report.steps, report.of_steps, " · ".join([f"{report.ended} of {report.runs} runs", *cost, *running])
        )

    return progress


def _report(ablation: Ablation) -> None:
    from moectl.cli import runs_view

    _runs_table(ablation)
    if ablation.comparison is not None:
        out().data("")
        out().render(runs_view.comparison(ablation.comparison), piped_width=UNWRAPPED)
    for result in ablation.results:
        if result.trouble is not None:
            out().warn(f"{result.run}: {result.trouble}")
    if ablation.stopped is not None:
        out().say(f"{ablation.group}: {ablation.stopped}")
    out().say(f"next: {_next(ablation)}")


def _runs_table(ablation: Ablation) -> None:
    from moectl.cli.plan import duration

    rows = [
        [
            result.run,
            result.status,
            f"{result.step:,} of {result.steps:,}",
            None if result.duration_s is None else duration(result.duration_s),
            None if result.cost is None else f"{result.cost:.4f}",
            result.reason or result.trouble,
        ]
        for result in ablation.results
    ]
    total = None if ablation.cost is None else f"{ablation.cost:.4f} dollars for the whole group"
    out().table(f"Group {ablation.group}", ["run", "status", "steps", "time", "$", "reason"], rows, caption=total)


def _next(ablation: Ablation) -> str:
    if ablation.stopped is not None and "budget" in ablation.stopped:
        return "the same command with a higher --max-cost goes on"
    if any(result.status in ("interrupted", "lost", "not begun") for result in ablation.results):
        return "the same command goes on"
    if any(result.status == "failed" for result in ablation.results):
        return f"moectl runs ls --group {ablation.group} --status failed"
    return f"moectl runs compare --group {ablation.group}"


def _document(ablation: Ablation) -> dict[str, Any]:
    return {
        "group": ablation.group,
        "stopped": ablation.stopped,
        "cost": ablation.cost,
        "projection": None if ablation.projection is None else asdict(ablation.projection),
        "runs": [asdict(result) for result in ablation.results],
        "comparison": None if ablation.comparison is None else ablation.comparison.to_dict(),
    }

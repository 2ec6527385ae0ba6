"""``moectl distill``: the model of a run into a dense one."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moectl.cli.output import out

if TYPE_CHECKING:
    from moectl.evaluation.losses import EvalReport
    from moectl.walk.distill import Distillate


def command(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="The teacher: a finished run; default: the newest.")
    ] = None,
    into: Annotated[
        str, typer.Option(help="dense: the teacher's own base; or a size, a dense run or folder.")
    ] = "dense",
    steps: Annotated[int | None, typer.Option(help="Of each student; default: the teacher's.")] = None,
    temperature: Annotated[float, typer.Option(help="Softens both distributions.")] = 2.0,
    alpha: Annotated[float, typer.Option(help="The teacher's share of the loss.")] = 0.5,
    seeds: Annotated[int, typer.Option(help="Pairs of students, for an interval over seeds.")] = 1,
    data: Annotated[str | None, typer.Option(help="A prepared dataset; default: the teacher's own.")] = None,
    commit: Annotated[str | None, typer.Option(help="Record this commit instead of asking git.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any config key, for both students.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Distil a run into a dense model, and train the same dense model directly beside it.

    The loss is alpha · T² · KL(teacher ‖ student) + (1 - alpha) · LM loss (arXiv 1503.02531). Both students have the
    same first weights, data, order and number of tokens; what is done already is not trained again. Which is better
    is said from their held-out losses, where the 95 % interval of the difference does not hold zero.
    """
    from moectl.walk.distill import DistillRequest, distill

    with out().progress("distill") as bar:

        def progress(name: str, total: int) -> Any:
            from moectl.cli.train import progress_note

            bar.describe(name)
            return lambda step, values: bar.update(step, total, progress_note(values))

        result = distill(
            DistillRequest(
                run, into, temperature, alpha, steps, seeds, data, sets or [], sys.argv, commit, out().say, progress
            )
        )
    if as_json:
        out().data(result.to_dict())
    else:
        _show(result)


def _show(result: Distillate) -> None:
    tokens = f"{result.pairs[0].direct.tokens:,}"
    rows: list[list[str | None]] = [["teacher", result.teacher, None, *_row(result.teacher_loss)]]
    for pair in result.pairs:
        for name, outcome in (("direct", pair.direct), ("distilled", pair.distilled)):
            rows.append([name, outcome.id, str(pair.seed), *_row(pair.losses[name])])
    setting = f"T = {result.temperature:g}, alpha = {result.alpha:g}"
    title = f"Held-out language-model loss after {tokens} tokens each ({setting})"
    out().table(title, ["model", "run", "seed", "nats/token", "95 %"], rows)
    out().say(result.verdict)


def _row(report: EvalReport) -> list[str | None]:
    interval = report.overall.interval
    return [f"{report.overall.lm_loss:.4f}", None if interval is None else f"{interval.low:.4f} to {interval.high:.4f}"]

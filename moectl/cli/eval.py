"""``moectl eval``: held-out loss, domain by domain."""

from __future__ import annotations

from typing import Annotated

import typer

from moectl.cli.output import out
from moectl.marks import marked


def command(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="Id, prefix or folder; default: the newest finished run.")
    ] = None,
    step: Annotated[int | None, typer.Option(min=0, help="A checkpoint's step; default: the last.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure pure language-model loss, perplexity and bits per byte over the whole held-out split.

    The result of a run's last step is kept in its folder and in the registry.
    """
    from moectl.reports.terminal import loss_table
    from moectl.walk.evaluate import evaluate_run

    with out().progress("eval") as bar:
        result = evaluate_run(run, step=step, device=device, progress=bar, say=out().warn)
    if as_json:
        out().data(result.to_dict())
        return
    header = result.header
    out().say(marked(f"{header['run']} · step {header['step']:,} · data {header['data']}", header["marks"]))
    out().render(loss_table(result.report))

"""``moectl export``: a checkpoint that plain transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moectl.cli.output import out


def command(
    to: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new folder; never an existing one.")],
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN", help="Id, prefix or folder, or a folder of `upcycle`; default: the newest run with experts."
        ),
    ] = None,
    format: Annotated[
        str, typer.Option("--format", help="hf: a checkpoint of transformers; moectl: the folder that moectl loads.")
    ] = "hf",
    family: Annotated[
        str, typer.Option(help="auto, mixtral, qwen3_moe, qwen2_moe, glm4_moe, or own: with its own modelling file.")
    ] = "auto",
    layout: Annotated[str, typer.Option(help="fused: experts stacked; per-expert: one tensor each.")] = "fused",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as trained.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="A checkpoint's step; default: the last.")] = None,
    replicate_dense: Annotated[
        bool, typer.Option("--replicate-dense", help="Mixtral: write dense layers as equal experts (larger).")
    ] = False,
    shard_size: Annotated[
        float, typer.Option("--max-shard-size", min=1e-6, help="Gigabytes (10⁹ bytes) in one file of weights.")
    ] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a run with experts as a checkpoint that plain transformers loads, without moectl.

    The smallest family that computes exactly the same is chosen, and why is said: Mixtral, Qwen3-MoE, Qwen2-MoE or
    GLM-4-MoE. What none of them can say (a GPT-2, say) gets a folder with its own modelling file, for
    trust_remote_code=True. Before the folder gets its name it is loaded back, and its logits are held beside the
    run's; where they differ nothing is kept, and the exit code is 3.
    """
    from moectl import paths

    paths.use_project_cache()

    from moectl.walk.export import ExportRequest, export_model

    request = ExportRequest(format, family, layout, dtype, step, replicate_dense, int(shard_size * 1e9))
    result = export_model(run, to, request, say=out().say)
    if as_json:
        out().data({**result.to_json(), "out": str(to)})
        return
    out().data(result.to_text())
    out().say(f"written to {to}")

"""``moectl grow``: more experts for a trained Mixture of Experts, and the same function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moectl.cli.output import out


def command(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A run with experts, or a folder of moectl upcycle.")],
    to: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new folder; never an existing one.")],
    times: Annotated[int, typer.Option(metavar="M", help="Every expert becomes M; as many per token, times M.")] = 1,
    parts: Annotated[
        bool, typer.Option("--parts", help="Each of the M keeps a part of the neurons: a token costs what it did.")
    ] = False,
    add: Annotated[
        int, typer.Option(metavar="N", help="N new experts, copies that nobody visits before the next step.")
    ] = 0,
    noise: Annotated[
        float, typer.Option(help="In standard deviations: of added experts; of copies, where it cancels in their sum.")
    ] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of that noise.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the receipt as one JSON document.")] = False,
) -> None:
    """Give a Mixture of Experts more experts, without changing what it computes.

    The logits of a float32 and a float64 copy are compared before and after; if they differ by more than rounding,
    nothing is written. What the model's own dtype rounds is printed beside.
    Train on from the new folder: moectl train --base DIR.

    Examples: --times 2 (16 experts out of 8), --times 2 --parts (of half the size each), --add 4.
    """
    from moectl.walk.grow import Growth, grow_to_folder

    receipt = grow_to_folder(base, to, Growth(times, parts, add, noise), seed=seed)
    if as_json:
        out().data(receipt.to_json())
    else:
        out().data(receipt.to_text())
        out().say(f"written to {to}")

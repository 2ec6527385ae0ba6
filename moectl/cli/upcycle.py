"""``moectl upcycle``: a dense base into a Mixture of Experts, with a receipt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moectl.cli.output import out


def command(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="A Hugging Face folder, a dense run, a .gguf, a hub id, smollm2.")
    ],
    to: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new folder; never an existing one.")],
    layers: Annotated[str | None, typer.Option("--moe-layers", help="all, last:4, every:2, or a list: 8,9,10.")] = None,
    experts: Annotated[int | None, typer.Option("--experts", help="Experts per layer; default: 8.")] = None,
    router: Annotated[str | None, typer.Option(help="A router's name; default: top1.")] = None,
    init: Annotated[str | None, typer.Option(help="copy, split, drop, random or experts-from; default: copy.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of gates, noise and redrawn neurons.")] = 0,
    sets: Annotated[list[str] | None, typer.Option("--set", help="A key of the moe section, as moe.KEY=VALUE.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the receipt as one JSON document.")] = False,
) -> None:
    """Replace MLPs of a dense model by experts that start from them, and say what that did.

    Families gpt2, llama (SmolLM2, TinyLlama, Mistral), qwen2 and qwen3, and moectl's own dense runs. The receipt
    gives the largest change of a logit, parameters, FLOPs per token and memory beside the dense model's; it is
    kept as receipt.json in the new folder.

    Examples: --init split --router topk --set moe.router.top_k=4 --set moe.granularity=4 (parts at equal FLOPs);
    --init copy --set moe.init_noise=0 (exactly the dense function).
    """
    from moectl.config.loading import load_config, parse_set
    from moectl.errors import ConfigError

    for text in sets or []:
        key = parse_set(text)[0]
        if not key.startswith("moe."):
            raise ConfigError(f"--set {key} changes nothing here", "Upcycling reads the moe section: moe.KEY=VALUE.")
    overrides = {"moe.layers": layers, "moe.num_experts": experts, "moe.router.name": router, "moe.init": init}
    config = load_config(None, sets=sets or [], overrides=overrides)
    assert config.moe is not None

    from moectl.routers import resolve_router
    from moectl.walk.router_code import with_absolute_router
    from moectl.walk.upcycle import upcycle_to_folder

    moe = resolve_router(with_absolute_router(config)).moe
    assert moe is not None
    receipt = upcycle_to_folder(base, to, moe, seed=seed, say=out().say)
    if as_json:
        out().data(receipt.to_json())
    else:
        out().data(receipt.to_text())
        out().say(f"written to {to}")

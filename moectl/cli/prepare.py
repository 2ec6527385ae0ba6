"""``moectl prepare``: raw text to a prepared dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moectl.cli.output import out

if TYPE_CHECKING:
    from moectl.corpus.prepare import PrepareResult


def command(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="A YAML config.")] = None,
    domains: Annotated[str | None, typer.Option(help="Domains, by comma: code,math,prose.")] = None,
    source: Annotated[
        str | None,
        typer.Option(help="sample, hub, hub:OWNER/NAME, a folder, or a .jsonl or .parquet file."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="bpe:SIZE trains one; else a tokenizer.json, a folder with one, or a base: smollm2."),
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per block.")] = None,
    balance_tokens: Annotated[
        bool | None,
        typer.Option("--balance-tokens/--no-balance-tokens", help="Cut every domain to the smallest one's tokens."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of split and balance.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any config key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Split, tokenize and pack raw text into an immutable dataset.

    The same text and settings give the same dataset: a second call finds it and does nothing. A config whose model
    starts from a trained base (model.base) and names no tokenizer gets the base's.
    """
    from moectl.config.loading import load_config
    from moectl.corpus.prepare import prepare

    names = [name.strip() for name in domains.split(",") if name.strip()] if domains is not None else None
    given = {
        "domains": names,
        "source": source,
        "tokenizer": tokenizer,
        "block_size": block_size,
        "balance_tokens": balance_tokens,
        "seed": seed,
    }
    overrides: dict[str, Any] = {f"data.{key}": value for key, value in given.items() if value is not None}
    loaded = load_config(config, sets=sets or (), overrides=overrides)
    data = loaded.data
    if "base" in loaded.model.model_fields_set:  # a trained one brings its tokenizer
        from moectl.walk.data import data_config

        data = data_config(loaded, out().say)
    result = prepare(data, progress=out().say)
    if as_json:
        out().data(_document(result))
    else:
        _report(result)
    for warning in result.manifest.warnings:
        out().warn(warning)


def _document(result: PrepareResult) -> dict[str, Any]:
    manifest = result.manifest.model_dump(mode="json", exclude={"files"})
    return {
        "id": manifest.pop("id"),
        "folder": str(result.folder),
        "created_now": result.created,
        "content_sha256": result.manifest.content_sha256,
        **manifest,
    }


def _report(result: PrepareResult) -> None:
    manifest = result.manifest
    rows = []
    for domain in manifest.domains:
        for name, side in (("train", domain.train), ("eval", domain.eval)):
            per_token = side.bytes / side.tokens
            rows.append([domain.name, name, side.texts, side.groups, side.tokens, side.blocks, f"{per_token:.2f}"])
    cut = [f"{domain.name} {domain.truncated_tokens:,}" for domain in manifest.domains if domain.truncated_tokens]
    moved = [f"{domain.name} {domain.duplicates_moved}" for domain in manifest.domains if domain.duplicates_moved]
    out().table(
        f"Dataset {manifest.id}",
        ["domain", "split", "texts", "groups", "tokens", "blocks", "bytes/token"],
        rows,
    )
    if cut:
        out().say(f"Training tokens given up for balance: {', '.join(cut)}.")
    if moved:
        out().say(f"Held-out texts that training also holds, moved to train: {', '.join(moved)}.")
    verdict = "Prepared" if result.created else "Already prepared, verified, nothing to do:"
    out().say(f"{verdict} {result.folder} (vocabulary {manifest.vocab_size:,}, blocks of {manifest.block_size} tokens)")

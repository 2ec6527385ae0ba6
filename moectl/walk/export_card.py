"""The model card of an exported checkpoint: what it is, where it comes from, and what was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moectl import __version__
from moectl.hf.export import Plan
from moectl.models import accounting
from moectl.walk.export_check import Checked
from moectl.walk.export_source import Source

#: An absolute path, or one under the user's folder: what of it is before the last part is this machine's business.
_PATH = re.compile(r"(?<![\w.:/])(?:~|[A-Za-z]:)?[/\\](?:[^\s'\"=:,/\\]+[/\\])+")


def model_card(source: Source, plan: Plan, checked: Checked, *, dtype: str, stored: str) -> str:
    """Markdown with the front matter that the hub reads.

    Args:
        dtype: of the weights.
        stored: how experts are stored, in words.
    """
    facts, router = plan.facts, plan.facts.router
    counted = accounting.count(source.model)
    kind = f"{facts.num_experts} experts of {facts.expert_size:,} neurons, {router.top_k} per token"
    shared = f", and {facts.shared_size:,} shared neurons" if facts.shared_size else ""
    lines = [
        *_front_matter(source, plan),
        f"# {source.name}",
        "",
        f"A Mixture-of-Experts language model made with moectl {__version__}: {facts.layers} layers, of which"
        f" {_numbers(facts.moe_layers)} have {kind}{shared}; router `{router.name}`.",
        f"{counted.total:,} parameters, {counted.active:,} active per token; weights in {dtype}, {stored}.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")' if source.tokenizer else "# no tokenizer came with it",
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{"" if plan.target else ", trust_remote_code=True"})',
        "```",
        "",
        f"Class `{plan.architecture}`: {plan.sentence()}.",
        *_remarks(plan),
        "",
        "## The same function",
        "",
        "Loaded back by transformers from this folder's files and held beside the trained model:",
        f"{checked.sentence()}.",
        "",
        *_origin(source),
        *_measured(source),
        *_data(source),
        *_receipt(source),
    ]
    return "\n".join(lines).rstrip() + "\n"


def without_paths(text: str) -> str:
    """``text`` with every absolute path cut to its last part."""
    return _PATH.sub("", text)


def _front_matter(source: Source, plan: Plan) -> list[str]:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if source.licence:
        lines.append(f"license: {source.licence.lower()}")
    return [
        *lines,
        "tags:",
        "- moe",
        "- mixture-of-experts",
        *(["- custom_code"] if plan.target is None else []),
        "---",
        "",
    ]


def _remarks(plan: Plan) -> list[str]:
    lines = []
    if plan.replicate_dense:
        lines.append("Dense layers are written as equal experts: whichever a token visits, it gets the same.")
    if plan.target is not None and plan.target.name == "glm4_moe" and not plan.facts.shared_size:
        lines.append(
            "The family must have a shared expert and the model has none: it is one without a neuron, at which torch"
            " remarks `Initializing zero-element tensors is a no-op` when the model is loaded. Nothing is missing."
        )
    if plan.target is not None and plan.target.shared == "gated":
        if plan.facts.shared_size:
            lines.append(
                "The family's shared experts stand behind a sigmoid: its gate is zero, which halves their output, and"
                " their `down_proj` is doubled."
            )
        else:
            lines.append("The family must have a shared expert and the model has none: it is one of zeros.")
    return lines


def _origin(source: Source) -> list[str]:
    record, base = source.record, source.record.get("base") or {}
    rows: list[tuple[str, Any]] = [
        ("run", source.name if record else None),
        ("folder", None if record else source.name),
        ("step", None if source.step is None else f"{source.step:,} of {record.get('steps', 0):,}"),
        ("status", record.get("status")),
        ("training tokens", f"{record['tokens']:,}" if record.get("tokens") else None),
        ("seed", record.get("seed")),
        ("base", _base(base) if base else without_paths(str(source.receipt.get("base") or "")) or None),
        ("base's licence", source.licence or ("not known" if base.get("kind") != "scratch" else None)),
        ("commit", record.get("commit")),
        ("changes not committed", {True: "yes", False: "no"}.get(record.get("dirty"))),  # type: ignore[arg-type]
        ("moectl's source", record.get("source_sha256")),
        ("config hash", record.get("config_hash")),
        ("marks", ", ".join(record.get("marks") or []) or None),
        ("created", record.get("created")),
        ("command", f"`{without_paths(str(record['command']))}`" if record.get("command") else None),
    ]
    return ["## Where it comes from", "", *_table(("", ""), rows), ""]


def _base(base: Mapping[str, Any]) -> str:
    if base.get("kind") == "scratch":
        return f"none: from scratch, size {base.get('id')}"
    named = without_paths(str(base.get("id")))
    sha = f", SHA-256 {base['sha256']}" if base.get("sha256") else ""
    return f"{base.get('kind')} {named}, step {base.get('step', 0)}{sha}"


def _measured(source: Source) -> list[str]:
    title = ["## Held-out losses", ""]
    if source.losses is None:
        final = (source.record.get("metrics") or {}).get("eval/lm_loss")
        is_final = source.step is not None and source.step == source.record.get("step")
        if final is None or not is_final:
            return [*title, "Not measured at this step (`moectl eval` does).", ""]
        return [*title, f"{_number(final)} nats per token, without an interval (`moectl eval` gives one).", ""]
    rows = []
    domains: Mapping[str, Any] = source.losses.get("domains") or {}
    for name, losses in {"all": source.losses, **domains}.items():
        low, high = losses.get("lm_loss_interval") or (None, None)
        interval = "not known" if low is None else f"{_number(low)} to {_number(high)}"
        row = (name, _number(losses["lm_loss"]), interval, _number(losses["bits_per_byte"]), f"{losses['tokens']:,}")
        rows.append(row)
    head = ("domain", "nats per token", "95 %, by group", "bits per byte", "tokens")
    return [*title, *_table(head, rows), ""]


def _data(source: Source) -> list[str]:
    manifest = source.manifest
    if manifest is None:
        return []
    rows = [
        (domain.name, without_paths(domain.source), domain.revision, domain.licence, f"{domain.train.tokens:,}")
        for domain in manifest.domains
    ]
    return [
        "## Data",
        "",
        f"Prepared set `{manifest.id}`, SHA-256 of its contents `{manifest.content_sha256}`, in blocks of"
        f" {manifest.block_size} tokens; tokenizer SHA-256 `{manifest.tokenizer.sha256}`.",
        "",
        *_table(("domain", "source", "revision", "licence", "training tokens"), rows),
        "",
    ]


def _receipt(source: Source) -> list[str]:
    receipt = source.receipt
    if not receipt:
        return []
    error = receipt.get("error") or {}
    parameters = receipt.get("parameters") or {}
    rows: list[tuple[str, Any]] = [
        ("init", receipt.get("init")),
        ("layers", _numbers(receipt["layers"]) if receipt.get("layers") else None),
        *((f"max abs. change of a logit, {name}", _number(value)) for name, value in error.items()),
        *((f"parameters, {name}", f"{counts.get('total', 0):,}") for name, counts in parameters.items()),
        ("FLOPs beside dense", _number(receipt["flops_ratio"]) if "flops_ratio" in receipt else None),
    ]
    return ["## Upcycling, before the first step", "", *_table(("", ""), rows), ""]


def _table(head: tuple[str, ...], rows: list[Any]) -> list[str]:
    kept = [row for row in rows if row[-1] is not None]
    cells = [" | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) for row in kept]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {row} |" for row in cells)]


def _numbers(layers: Any) -> str:
    return ", ".join(map(str, layers))


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, (int, float)) else str(value)

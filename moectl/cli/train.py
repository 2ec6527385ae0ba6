"""``moectl train``: one run, from config to checkpoint and record."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from moectl.cli.output import Bar, out
from moectl.errors import ConfigError
from moectl.marks import marked

if TYPE_CHECKING:
    from moectl.config.schema import ExperimentConfig
    from moectl.walk.train import RunOutcome, RunRequest


def command(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A YAML config, or a shipped one's name.")
    ] = None,
    router: Annotated[str | None, typer.Option(help="Router: a name (moectl routers ls) or path.py:Class.")] = None,
    preset: Annotated[str | None, typer.Option(help="dense, moe, no-lb or top2.")] = None,
    data: Annotated[str | None, typer.Option(help="A prepared dataset; default: the newest, else the sample.")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="tiny, mini, small or base, from scratch; or a run, a folder, a .gguf, a hub id, smollm2."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, noise and data order.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    name: Annotated[str | None, typer.Option(help="The run's name; default: label, seed and a hash.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Continue this run, exactly where it stopped. auto: the newest that can go on; with a CONFIG or"
            " options the run of that config, which is started where there is none.",
        ),
    ] = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic", help="Bit-exact with several threads too.")
    ] = None,
    allow_noncausal: Annotated[
        bool | None,
        typer.Option("--allow-noncausal", help="Train where later tokens change earlier outputs; marks every number."),
    ] = None,
    freeze: Annotated[
        list[str] | None, typer.Option(help="Keep as it is: router, experts or dense (all the rest); several allowed.")
    ] = None,
    train_experts: Annotated[
        str | None, typer.Option(metavar="0,3", help="Of all experts only these move, in every MoE layer.")
    ] = None,
    lora: Annotated[
        int | None, typer.Option(metavar="RANK", help="Train low-rank adapters alone, of attention and experts.")
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(help="US dollars for this device: what the run costs is recorded.")
    ] = None,
    max_cost: Annotated[
        float | None,
        typer.Option(help="US dollars, all sittings together: used up, the run ends with a checkpoint to go on from."),
    ] = None,
    commit: Annotated[str | None, typer.Option(help="Record this commit instead of asking git.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any config key.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Train nothing; say what it would take (plan).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> int:
    """Train one model; the same config, data and source as a finished run is not trained twice.

    Exit codes: 0 finished, 1 failed (a loss that is not finite), 3 collapsed under early stop,
    130 interrupted, with a checkpoint to resume from.
    """
    given = {
        "moe.router.name": router,
        "model.base": base,
        "train.steps": steps,
        "train.seed": seed,
        "train.device": device,
        "train.threads": threads,
        "train.deterministic": deterministic,
        "train.allow_noncausal": allow_noncausal,
        "finetune.freeze": ",".join(freeze) if freeze else None,
        "finetune.train_experts": train_experts,
        "finetune.lora.rank": lora,
        "name": name,
    }
    from moectl.walk.budget import Terms

    overrides = {key: value for key, value in given.items() if value is not None}
    terms = Terms(price_per_hour, max_cost)
    terms.check(remembered=resume is not None)
    if dry_run:
        asked = _Plan(data, price_per_hour, as_json)
        return _plan(config, sets or [], overrides, preset, resume, asked)
    with out().progress("train") as bar:
        request = replace(_request(data, commit, bar), terms=terms)
        outcome = _outcome(config, sets or [], overrides, preset, resume, request)
    out().data(_document(outcome)) if as_json else _report(outcome)
    return outcome.exit_code


class _Plan(NamedTuple):
    data: str | None
    price: float | None
    as_json: bool


def _outcome(
    path: str | None,
    sets: list[str],
    overrides: Mapping[str, Any],
    preset: str | None,
    resume: str | None,
    request: RunRequest,
) -> RunOutcome:
    from moectl.walk.train import AUTO, resume_run, start_run

    asked = path is not None or preset is not None or bool(sets) or bool(overrides)
    if resume is None or (resume == AUTO and asked):
        return start_run(_load(path, sets, overrides, preset), replace(request, go_on=resume is not None))
    if request.data is not None or request.commit is not None:
        option = "--data" if request.data is not None else "--commit"
        raise ConfigError(f"{option} does not go with --resume", "A resumed run keeps its data and its record.")
    if not asked:
        return resume_run(resume, request)
    return resume_run(resume, request, lambda own: _load(path or str(own), sets, overrides, preset))


def _plan(
    path: str | None,
    sets: list[str],
    overrides: Mapping[str, Any],
    preset: str | None,
    resume: str | None,
    asked: _Plan,
) -> int:
    from moectl.cli.plan import show

    if resume is not None:
        raise ConfigError("--dry-run does not go with --resume", "A resumed run keeps its plan: moectl runs show RUN.")
    show(_load(path, sets, overrides, preset), asked.data, price=asked.price, as_json=asked.as_json)
    return 0


def _load(path: str | None, sets: list[str], overrides: Mapping[str, Any], preset: str | None) -> ExperimentConfig:
    from moectl.config.loading import load_config

    return load_config(path, sets=sets, overrides=overrides, preset=preset)


def _request(data: str | None, commit: str | None, bar: Bar) -> RunRequest:
    from moectl.walk.train import RunRequest

    def progress(run: str, steps: int) -> Any:
        bar.describe(run)
        return lambda step, values: bar.update(step, steps, progress_note(values))

    return RunRequest(data=data, command=sys.argv, commit=commit, say=out().say, progress=progress)


def progress_note(values: Mapping[str, float]) -> str:
    """One line of numbers for the bar: pure language-model loss, speed, and the worst layer's balance."""
    parts = [f"lm {values['train/lm_loss']:.3f}", f"{values['train/tokens_per_second']:,.0f} tok/s"]
    if "balance/worst" in values:
        parts.append(balance_note(values))
    if "eval/lm_loss" in values:
        parts.append(f"held-out {values['eval/lm_loss']:.3f}")
    return " · ".join(parts)


def balance_note(values: Mapping[str, float]) -> str:
    """The worst layer's balance beside what it would be balanced and collapsed, and what running counts cost it."""
    where = (
        f"layer {values['balance/worst_layer']:.0f}, the worst" if "balance/worst_layer" in values else "worst layer"
    )
    note = (
        f"balance {values['balance/worst']:.2f} ({where}; 1 balanced, {values['balance/collapse_value']:.4g} collapsed"
    )
    deviation = values.get("balance/running_deviation", 0.0)
    return note + (f"; running counts off by {deviation:.1g})" if deviation > 1e-6 else ")")


def _report(outcome: RunOutcome) -> None:
    if outcome.already_done:
        out().say(f"{outcome.id} has {outcome.status} before: the same config, data and source. Nothing to do.")
    else:
        out().say(f"{outcome.id}: {outcome.status} at step {outcome.step} ({outcome.reason})")
    if "eval/lm_loss" in outcome.metrics:
        _losses_table(outcome)
    if "balance/worst" in outcome.metrics:
        out().say(marked(f"routing: {balance_note(outcome.metrics)}", outcome.marks))
    out().say(f"next: {_next(outcome)}")


def _losses_table(outcome: RunOutcome) -> None:
    names = sorted(
        {name.split("/")[1] for name in outcome.metrics if name.startswith("eval/") and name.count("/") == 2}
    )
    rows = [[marked("all", outcome.marks), *_losses(outcome.metrics, "eval")]]
    rows += [[marked(domain, outcome.marks), *_losses(outcome.metrics, f"eval/{domain}")] for domain in names]
    out().table(
        marked(f"{outcome.id} · held-out language-model loss", outcome.marks),
        ["domain", "nats/token", "perplexity", "bits/byte"],
        rows,
    )


def _losses(metrics: Mapping[str, float], prefix: str) -> list[str | None]:
    values = (metrics.get(f"{prefix}/{name}") for name in ("lm_loss", "perplexity", "bits_per_byte"))
    return [None if value is None else f"{value:.4g}" for value in values]


def _next(outcome: RunOutcome) -> str:
    if outcome.status == "interrupted":
        more = " --max-cost MORE" if "budget" in outcome.reason else ""
        return f"moectl train --resume {outcome.id}{more}"
    if outcome.status == "failed":
        return f"moectl runs show {outcome.id}, then a lower optim.lr or a longer optim.warmup_steps"
    if not any(name.startswith("balance/") for name in outcome.metrics):
        return f"moectl eval {outcome.id}"
    return f"moectl inspect routing {outcome.id}"


def _document(outcome: RunOutcome) -> dict[str, Any]:
    return {
        "id": outcome.id,
        "status": outcome.status,
        "reason": outcome.reason,
        "step": outcome.step,
        "tokens": outcome.tokens,
        "already_done": outcome.already_done,
        "marks": list(outcome.marks),
        "metrics": outcome.metrics,
    }

"""``moectl plan``: what a run will take, before it is started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moectl.cli.output import out

if TYPE_CHECKING:
    from moectl.planning.budget import Cost
    from moectl.planning.match_dense import Matching
    from moectl.planning.plan import Plan

_PARTS = {"mlp": "dense MLPs", "head": "output head", "router": "routers"}


def command(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A YAML config, or a shipped one's name.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="dense, moe, no-lb or top2.")] = None,
    data: Annotated[str | None, typer.Option(help="A prepared dataset; default: as train takes it.")] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="For this device (H100, L4, ..., here, cpu, cuda); may be repeated.")
    ] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="US dollars, in place of the devices' own.")] = None,
    match_dense: Annotated[
        bool, typer.Option("--match-dense", help="Which experts would equal the dense model's FLOPs?")
    ] = False,
    granularity: Annotated[
        int | None, typer.Option(help="The same, with experts of 1/G of the dense MLP.", metavar="G")
    ] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any config key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say what a run takes: parameters, FLOPs, memory, passes over the data, time and money.

    Nothing is trained, prepared or written, and the model is never built: 30 billion parameters are
    planned in seconds. Rates that earlier runs of the same shape have measured are preferred.
    """
    from moectl.config.loading import load_config

    loaded = load_config(config, sets=sets or (), preset=preset)
    from moectl.planning.match_dense import Matching

    match = Matching(granularity) if match_dense or granularity is not None else None
    show(loaded, data, devices=device or (), price=price_per_hour, match=match, as_json=as_json)


def show(
    config: Any,
    data: str | None = None,
    *,
    devices: Sequence[str] = (),
    price: float | None = None,
    match: Matching | None = None,
    as_json: bool = False,
) -> None:
    """Plan, and print the plan."""
    from moectl.walk.plan import PlanRequest, plan_run

    plan = plan_run(config, PlanRequest(data=data, devices=devices, price=price, match=match, say=out().say))
    if as_json:
        out().data(plan.to_json())
        return
    out().data("\n".join([*_model(plan), "", *_run(plan)]) + "\n")
    _memory_table(plan)
    out().data("")
    _device_table(plan)
    if plan.matches is not None:
        out().data("")
        _match_table(plan)
    for warning in plan.warnings:
        out().warn(warning)


def _model(plan: Plan) -> list[str]:
    model, tokens = plan.model, plan.tokens
    count, moe, flops = model.parameters, model.moe, model.flops
    lines = [_row("model", f"{plan.config.model.base}, {model.config.num_layers} layers of width"
                  f" {model.config.hidden_size}, vocabulary {model.config.vocab_size:,}")]  # fmt: skip
    if moe is not None and plan.config.moe is not None:
        shared = f", {plan.config.moe.n_shared_experts} shared" if plan.config.moe.n_shared_experts else ""
        layers = ", ".join(map(str, model.config.moe_layers[:8])) + (
            ", ..." if len(model.config.moe_layers) > 8 else ""
        )
        lines.append(
            _row("experts", f"{moe.num_experts} of {moe.size} columns, {moe.per_token:.3g} per token"
                 f" ({plan.config.moe.router_name}){shared}, in layers {layers}")
        )  # fmt: skip
    lines.append(_row("parameters", f"{count.total:,} = {count.active:,} active + {count.inactive:,} inactive"))
    lines.append(_row("", _shares(dict(model.parts), count.total)))
    against = "" if plan.dense is None else f", {flops.total / plan.dense.flops.total:.3f} × the dense model's"
    lines.append(
        _row("FLOPs per token", f"{scaled(flops.total, 'FLOP')} forward{against};"
             f" {scaled(model.training_flops, 'FLOP')} forward and backward")
    )  # fmt: skip
    lines.append(
        _row("", _shares({name: value for name, value in flops.to_json().items() if name != "total"}, flops.total))
    )
    if moe is not None:
        share = moe.per_token / moe.num_experts
        lines.append(
            _row("tokens per expert", f"{tokens.micro_batch * share:,.0f} of a micro-batch,"
                 f" {tokens.routed * share:,.0f} of a step, {tokens.steps * tokens.routed * share:,.0f} of the run")
        )  # fmt: skip
    return lines


def _run(plan: Plan) -> list[str]:
    tokens = plan.tokens
    epochs = tokens.epochs
    passes = (
        "data not prepared" if epochs is None else f"{epochs:.2f} passes over {tokens.available:,} ({plan.data.id})"
    )
    return [
        _row("tokens", f"{tokens.total:,} in {tokens.steps:,} steps of {tokens.per_step:,}; {passes}"),
        _row("compute-optimal", f"{tokens.optimal:,} tokens: 20 per active parameter, as for a dense model"
             f" (arXiv:2203.15556); this run has {tokens.total / plan.model.parameters.active:.3g}"),
    ]  # fmt: skip


def _memory_table(plan: Plan) -> None:
    kinds = {cost.memory.device: cost.memory for cost in plan.costs}
    rows = []
    for name, memory in kinds.items():
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations)
        rest = memory.step - sum(parts)
        rows.append(
            [name, *(scaled(part, "B") for part in (*parts, rest, memory.step, memory.evaluation, memory.checkpointed))]
        )
    share = next(iter(kinds.values())).expert_share
    note = "Recomputed: activation checkpointing, where each layer keeps its input alone."
    note = f"Experts are {share:.0%} of weights, gradients and optimizer state. {note}" if share else note
    columns = ["memory", "weights", "gradients", "optimizer", "activations", "other", "training", "evaluation"]
    out().table(None, [*columns, "if recomputed"], rows, caption=note)


def _device_table(plan: Plan) -> None:
    from moectl.planning.devices import prices_of

    rows = []
    for cost in plan.costs:
        full = f"{cost.memory.peak / cost.device.memory:.0%} of {scaled(cost.device.memory, 'B')}"
        price = None if cost.usd_per_hour is None else f"{cost.usd_per_hour:.2f}"
        spent = None if cost.usd is None else f"{cost.usd:,.2f}"
        memory = full if cost.fits else f"{full}: does not fit"
        rate, time = f"{cost.tokens_per_second:,.0f}", duration(cost.seconds)
        rows.append([cost.device.name, rate, _source(cost), time, price, spent, memory])
    note = (
        "Training alone. Assumed rates want products that fill the device; small models have less: a few steps there"
        f"\ngive the measured rate. Prices are rough, of {prices_of()}: --price-per-hour has yours."
    )
    for cost in plan.costs:
        if cost.computed_as is not None:
            note += f"\n{cost.device.name} computes {plan.config.train.precision} as {cost.computed_as}."
    out().table(None, ["device", "tokens/s", "from", "time", "$/h", "$", "memory"], rows, caption=note)


def _match_table(plan: Plan) -> None:
    rows = [
        [match.changes, f"{match.top_k} of {match.num_experts}", match.size, f"{match.columns:.4g}",
         " ".join(f"--set '{text}'" if " " in text else f"--set {text}" for text in match.sets) or "as it is"]
        for match in plan.matches or ()
    ]  # fmt: skip
    title = f"Equal to the dense MLP's {plan.model.config.intermediate_size} columns per token, but for the gate"
    out().table(title, ["way", "experts", "columns", "÷ dense", "set"], rows)
    if not rows:
        out().say("no whole number of columns does it")


def _source(cost: Cost) -> str:
    if cost.run is not None:
        return f"measured: {cost.run}"
    return f"assumed: {cost.utilisation:.0%} of {scaled(cost.peak, 'FLOP/s')}"


def _shares(parts: dict[str, float], total: float) -> str:
    return " · ".join(f"{_PARTS.get(name, name)} {value / total:.1%}" for name, value in parts.items() if value)


def _row(name: str, text: str) -> str:
    return f"{name:<18}{text}"


def scaled(value: float, unit: str) -> str:
    """Three digits and a prefix.

    >>> scaled(4_325_376, "FLOP")
    '4.33 MFLOP'
    """
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:
            return f"{_digits(value / factor)} {prefix}{unit}"
    return f"{_digits(value) if value else 0} {unit}"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """In the unit that a person would say.

    >>> duration(5400)
    '1.5 h'
    """
    for size, unit in ((86_400 * 2, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{_digits(seconds / (86_400 if unit == 'days' else size))} {unit}"
    return f"{_digits(seconds)} s"

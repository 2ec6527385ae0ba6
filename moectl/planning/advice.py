"""What the numbers of a plan say: warnings, each with the number that it rests on, and what to change."""

from __future__ import annotations

from collections.abc import Sequence

from moectl.config.schema import ExperimentConfig
from moectl.planning.anatomy import Anatomy
from moectl.planning.budget import HARMLESS_EPOCHS, TOKENS_PER_PARAMETER, Cost, Tokens
from moectl.planning.memory import plan_memory

_FEW_ROWS = 16  # of one product: below, fetching an expert's weights takes longer than multiplying with them
_MUCH_ROUTING = 0.05
_WASTED_EPOCHS = 16


def data_advice(model: Anatomy, tokens: Tokens) -> list[str]:
    """On how much is read and how often."""
    said = []
    epochs = tokens.epochs
    if epochs is not None and epochs > HARMLESS_EPOCHS:
        worth = "more passes add next to nothing" if epochs > _WASTED_EPOCHS else "each further pass adds less"
        said.append(
            f"the data are read {epochs:.1f} times: past {HARMLESS_EPOCHS} {worth} (arXiv:2305.16264)."
            f" Prepare more text, or set train.steps={max(1, round(tokens.steps * HARMLESS_EPOCHS / epochs))}."
        )
    ratio = tokens.total / model.parameters.active
    if ratio < TOKENS_PER_PARAMETER / 2:
        said.append(
            f"{ratio:.2g} tokens per active parameter: compute-optimal for a dense model is about"
            f" {TOKENS_PER_PARAMETER} (arXiv:2203.15556), here {tokens.optimal:,} tokens. A smaller model would"
            " reach a lower loss for the same FLOPs."
        )
    return said


def expert_advice(model: Anatomy, tokens: Tokens) -> list[str]:
    """On what the experts get to see, and when a dense model is the better choice."""
    moe = model.moe
    if moe is None:
        return []
    said = []
    slots = moe.num_experts * moe.top_k
    rows = tokens.micro_batch * moe.per_token / moe.num_experts
    if tokens.micro_batch < slots:
        said.append(
            f"a micro-batch has {tokens.micro_batch:,} tokens, fewer than E·k = {slots}: {rows:.1f} tokens per expert,"
            " too few to balance or to train on. Raise train.batch_size."
        )
    elif rows < _FEW_ROWS:
        said.append(
            f"an expert gets {rows:.0f} tokens of a micro-batch: below about {_FEW_ROWS} fetching its weights takes"
            " longer than multiplying with them. Raise train.batch_size, or take fewer experts."
        )
    seen = tokens.total * moe.per_token / moe.num_experts
    if seen < moe.expert_parameters:
        said.append(
            f"dense is likely better: an expert has {moe.expert_parameters:,} parameters per layer and sees"
            f" {seen:,.0f} tokens in the whole run, fewer than one per parameter. Take fewer experts, more steps,"
            " or --preset dense."
        )
    share = model.flops.router / (model.flops.router + model.flops.experts)
    if share > _MUCH_ROUTING:
        said.append(
            f"routing takes {share:.0%} of the experts' FLOPs: experts of {moe.size} columns are small beside a gate"
            f" of {moe.num_experts} rows. Take fewer, larger experts, or --preset dense."
        )
    if moe.backend == "full":
        said.append(
            f"backend 'full' computes all {moe.num_experts} experts for every token: it is for exactness tests."
        )
    return said


def memory_advice(
    model: Anatomy, dense: Anatomy | None, config: ExperimentConfig, block_size: int, costs: Sequence[Cost]
) -> list[str]:
    """On devices that the run does not fit: what to change, and whether the dense parent would fit."""
    said = []
    for cost in costs:
        if cost.fits:
            continue
        room, device = cost.device.memory, cost.device
        line = f"{device.name} has {room / 1e9:.3g} GB, the run takes {cost.memory.peak / 1e9:.3g} GB ("
        line += f"in {cost.memory.during}): "
        change = _what_fits(model, config, block_size, cost)
        if change is None and dense is not None:
            at_least = plan_memory(dense, config, block_size, device.kind).peak
            line += f"{cost.memory.expert_share:.0%} of weights, gradients and optimizer state are experts', "
            line += "so take fewer of them"
            line += f"; the dense parent takes {at_least / 1e9:.3g} GB" + (" and fits." if at_least <= room else ".")
        else:
            line += change or "no micro-batch fits: take a smaller model."
        said.append(line)
    return said


def _what_fits(model: Anatomy, config: ExperimentConfig, block_size: int, cost: Cost) -> str | None:
    """The largest micro-batch of the same step that fits, and an evaluation that does; None where none does."""
    train, factor = config.train, 1
    while train.batch_size % factor == 0:
        batch, accumulated = train.batch_size // factor, train.grad_accum * factor
        for evaluated in dict.fromkeys((config.eval.batch_size, min(batch, config.eval.batch_size), 1)):
            changes = {
                "train": train.model_copy(update={"batch_size": batch, "grad_accum": accumulated}),
                "eval": config.eval.model_copy(update={"batch_size": evaluated}),
            }
            peak = plan_memory(model, config.model_copy(update=changes), block_size, cost.device.kind).peak
            if peak <= cost.device.memory:
                sets = [f"train.batch_size={batch}", f"train.grad_accum={accumulated}"] * (factor > 1)
                sets += [f"eval.batch_size={evaluated}"] * (evaluated != config.eval.batch_size)
                return f"with {' '.join(f'--set {text}' for text in sets)} it takes {peak / 1e9:.3g} GB and fits."
        factor *= 2
    return None

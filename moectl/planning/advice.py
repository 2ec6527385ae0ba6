"""What the numbers of a plan say: warnings, each with the number that it rests on, and what to change."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moectl.config.schema import ExperimentConfig
from moectl.planning.anatomy import Anatomy
from moectl.planning.budget import HARMLESS_EPOCHS, TOKENS_PER_PARAMETER, Cost, Tokens
from moectl.planning.memory import plan_memory

_FEW_ROWS = 16  # of one product: below, fetching an expert's weights takes longer than multiplying with them
_MUCH_ROUTING = 0.05
_WASTED_EPOCHS = 16
_MOST = 0.5
# benchmarks/plan_memory.py measured it.
_UNPREDICTED = (
    "the memory of {precision} on a CPU is not predicted well: dense models took up to 1.6 times as much, and with"
    " experts oneDNN keeps a product for every number of tokens that one of them has had, 1.4 GB more after 60 steps"
    " (half of it with ONEDNN_PRIMITIVE_CACHE_CAPACITY=16). That of float32 is."
)


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
    precision = config.train.precision
    if precision.startswith("bfloat16") and any(
        cost.device.kind == "cpu" and cost.computed_as is None for cost in costs
    ):
        said.append(_UNPREDICTED.format(precision=precision))
    for cost in costs:
        if cost.fits:
            continue
        room, device = cost.device.memory, cost.device
        line = f"{device.name} has {room / 1e9:.3g} GB, the run takes {cost.memory.peak / 1e9:.3g} GB ("
        line += f"in {cost.memory.during}): "
        change = _what_fits(model, config, block_size, cost)
        if change is not None:
            line += change
        elif dense is None or _smallest(dense, config, block_size, device.kind) > room:
            line += "no micro-batch fits: take a smaller model."
        else:
            least = _smallest(dense, config, block_size, device.kind)
            line += "no micro-batch fits. "
            share = cost.memory.expert_share
            if share > _MOST:
                line += f"{share:.0%} of weights, gradients and optimizer state are experts', so take fewer of them"
            else:
                line += "Take smaller experts, or fewer per token"
            line += f"; the dense parent takes {least / 1e9:.3g} GB with a micro-batch of 1 and fits."
        said.append(line)
    return said


def _smallest(model: Anatomy, config: ExperimentConfig, block_size: int, device: str) -> float:
    """Bytes with a micro-batch of one row, in training and evaluation."""
    changes = {
        "train": config.train.model_copy(update={"batch_size": 1, "grad_accum": 2}),
        "eval": config.eval.model_copy(update={"batch_size": 1}),
    }
    return plan_memory(model, config.model_copy(update=changes), block_size, device).peak


def _what_fits(model: Anatomy, config: ExperimentConfig, block_size: int, cost: Cost) -> str | None:
    """The largest micro-batch of the same step that fits, and an evaluation that does; None where none does."""
    train = config.train
    for batch in _divisors(train.batch_size):
        factor = train.batch_size // batch
        accumulated = train.grad_accum * factor
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
    return None


def _divisors(number: int) -> list[int]:
    """Largest first; of a number beyond 10¹² not all."""
    small = [each for each in range(1, min(math.isqrt(number), 10**6) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)}, reverse=True)

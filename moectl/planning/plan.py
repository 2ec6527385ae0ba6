"""The whole plan of a run, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moectl.config.schema import ExperimentConfig
from moectl.models.accounting import BACKWARD
from moectl.planning.advice import data_advice, expert_advice, memory_advice
from moectl.planning.anatomy import Anatomy, Shape, anatomy
from moectl.planning.budget import Cost, Tokens, cost_on, plan_tokens
from moectl.planning.devices import Device
from moectl.planning.match_dense import Match, Matching, match_dense
from moectl.planning.memory import plan_memory


@dataclass(frozen=True)
class Data:
    """What is known of the data.

    Attributes:
        id: the prepared dataset; None where there is none, and vocabulary and text are not known yet.
        train_tokens: of it, or None.
    """

    id: str | None
    vocab_size: int
    eos_id: int
    block_size: int
    train_tokens: int | None


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        dense: the same model without experts; None for a dense one.
        matches: ways to equal the dense model's FLOPs, where asked for.
        warnings: what speaks against the run as it is, each with its numbers.
    """

    config: ExperimentConfig
    data: Data
    model: Anatomy
    dense: Anatomy | None
    tokens: Tokens
    costs: tuple[Cost, ...]
    matches: tuple[Match, ...] | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Stable keys; bytes, seconds, FLOPs and US dollars."""
        model, tokens = self.model, self.tokens
        return {
            "config": {
                "base": self.config.model.base,
                "router": None if self.config.moe is None else self.config.moe.router_name,
                "precision": self.config.train.precision,
                "config_hash": self.config.content_hash(),
            },
            "parameters": {**model.parameters.to_json(), "parts": dict(model.parts)},
            "flops_per_token": {
                "length": model.length,
                "forward": model.flops.to_json(),
                "backward": BACKWARD * model.flops.total,
                "training": model.training_flops,
                "of_dense": None if self.dense is None else model.flops.total / self.dense.flops.total,
            },
            "experts": None if model.moe is None else self._experts(),
            "tokens": {**asdict(tokens), "epochs": tokens.epochs, "dataset": self.data.id},
            "memory": {cost.memory.device: _memory(cost) for cost in self.costs},
            "devices": [_cost(cost) for cost in self.costs],
            "match_dense": None if self.matches is None else [asdict(match) for match in self.matches],
            "warnings": list(self.warnings),
        }

    def _experts(self) -> dict[str, Any]:
        moe = self.model.moe
        assert moe is not None
        share = moe.per_token / moe.num_experts
        return {
            **asdict(moe),
            "layers": list(self.model.config.moe_layers),
            "tokens_per_step": self.tokens.routed * share,
            "tokens_per_micro_batch": self.tokens.micro_batch * share,
            "tokens_in_run": self.tokens.steps * self.tokens.routed * share,
        }


def make_plan(
    config: ExperimentConfig,
    shape: Shape,
    data: Data,
    devices: Sequence[Device],
    *,
    measured: Mapping[str, tuple[str, float]] | None = None,
    price: float | None = None,
    match: Matching | None = None,
) -> Plan:
    """Plan the run of ``config``.

    Args:
        shape: the model, with its experts.
        devices: to plan for.
        measured: by a device's name, a run of this shape there and its tokens per second.
        price: dollars per hour of every device, in place of their own.
        match: look for ways to equal the dense model's FLOPs.

    Raises:
        ConfigError: a model that cannot be.
    """
    length = data.block_size - 1
    model = anatomy(shape, length)
    dense = anatomy(shape.with_moe(None), length) if model.moe is not None else None
    tokens = plan_tokens(model, config, data.block_size, data.train_tokens)
    costs = tuple(
        cost_on(
            device,
            model,
            tokens,
            plan_memory(model, config, data.block_size, device.kind),
            precision=config.train.precision,
            measured=(measured or {}).get(device.name),
            price=price,
        )
        for device in devices
    )
    matches = None
    if match is not None and config.moe is not None and model.moe is not None:
        matches = tuple(match_dense(model, config.moe, match))
    warnings = (
        *expert_advice(model, tokens),
        *data_advice(model, tokens),
        *memory_advice(model, dense, config, data.block_size, costs),
    )
    return Plan(config, data, model, dense, tokens, costs, matches, warnings)


def _memory(cost: Cost) -> dict[str, Any]:
    return {**asdict(cost.memory), "peak": cost.memory.peak, "during": cost.memory.during}


def _cost(cost: Cost) -> dict[str, Any]:
    return {
        "name": cost.device.name,
        "kind": cost.device.kind,
        "fits": cost.fits,
        "memory": cost.device.memory,
        "peak_memory": cost.memory.peak,
        "rate_source": cost.source,
        "rate_run": cost.run,
        "computed_as": cost.computed_as,
        "utilisation": cost.utilisation,
        "tokens_per_second": cost.tokens_per_second,
        "seconds": cost.seconds,
        "usd_per_hour": cost.usd_per_hour,
        "usd": cost.usd,
    }

"""A model's sizes, read from the model itself on the meta device: nothing is allocated, whatever its size.

Letters in names and formulas: D hidden, F MLP columns, Q query columns (heads · head dimension), G key (or
value) columns, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import nn

from moectl.config.schedule import Schedule
from moectl.config.schema import MoEConfig
from moectl.models.accounting import BACKWARD, Flops, ParameterCount, count, decoder_shape, forward_flops
from moectl.models.config import DecoderConfig
from moectl.models.decoder import Decoder, DecoderLayer
from moectl.moe.layer import MoELayer

PARTS = ("embedding", "attention", "mlp", "experts", "shared experts", "router", "norms", "head")
_SAMPLES = 1000  # of a schedule, for its mean


@dataclass(frozen=True)
class MoEAnatomy:
    """One MoE layer's sizes.

    Attributes:
        num_experts: E.
        top_k: K as evaluation and the end of training have it.
        per_token: experts that compute a token, on average over the run.
        per_token_max: the most at any time of the run.
        size: F of one expert.
        shared_size: F of the shared experts together; 0 for none.
        backend: which computation of the experts.
        expert_parameters: of one expert.
    """

    num_experts: int
    top_k: int
    per_token: float
    per_token_max: float
    size: int
    shared_size: int
    backend: str
    expert_parameters: int


@dataclass(frozen=True)
class Anatomy:
    """A decoder's sizes.

    Attributes:
        config: the shape that it was read from.
        parameters: total, active per token and inactive.
        parts: parameters by what they belong to, in the order of :data:`PARTS`; a tied head is embedding.
        layers: parameters of each layer, experts apart: ``(rest, experts)``.
        moe: sizes of its MoE layers (all are alike), or None.
        length: tokens of a row, that ``flops`` are counted for.
        flops: of one token, forward, on average over the run.
    """

    config: DecoderConfig
    parameters: ParameterCount
    parts: Mapping[str, int]
    layers: tuple[tuple[int, int], ...]
    moe: MoEAnatomy | None
    length: int
    flops: Flops

    @property
    def training_flops(self) -> float:
        """Of one token, forward and backward."""
        return (1 + BACKWARD) * self.flops.total

    @property
    def query_size(self) -> int:
        """Q."""
        return self.config.num_heads * self.config.head_dim

    @property
    def key_size(self) -> int:
        """G."""
        return self.config.num_kv_heads * self.config.head_dim


def anatomy(config: DecoderConfig, length: int) -> Anatomy:
    """The sizes of the decoder that ``config`` describes, in rows of ``length`` tokens.

    Raises:
        ConfigError: a router, layer or backend that cannot be.
    """
    with torch.device("meta"):
        model = Decoder(config)
    layers = list(model.moe_layers().values())
    moe = None if config.moe is None or not layers else _moe_anatomy(layers[0], config.moe)
    flops = forward_flops(decoder_shape(config), layers, length=length)
    if moe is not None and moe.backend != "full":
        shared = len(layers) * 6 * config.hidden_size * moe.shared_size
        routed = (flops.experts - shared) * moe.per_token / moe.top_k
        flops = Flops(flops.attention, flops.mlp, routed + shared, flops.router, flops.head)
    split = tuple(_split(layer) for layer in model.layers)
    return Anatomy(config, count(model), count_parts(model), split, moe, length, flops)


def count_parts(model: Decoder) -> dict[str, int]:
    """Every parameter once, by part; parts without any are left out."""
    parts = dict.fromkeys(PARTS, 0)
    parts["embedding"] = _size(model.embed_tokens)
    parts["norms"] = _size(model.norm)
    if not model.config.tie_word_embeddings:
        parts["head"] = _size(model.lm_head)
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer)
        parts["norms"] += _size(layer.input_layernorm) + _size(layer.post_attention_layernorm)
        parts["attention"] += _size(layer.self_attn)
        if not isinstance(layer.mlp, MoELayer):
            parts["mlp"] += _size(layer.mlp)
            continue
        parts["router"] += _size(layer.mlp.router)
        parts["experts"] += _size(layer.mlp.experts)
        parts["shared experts"] += 0 if layer.mlp.shared_experts is None else _size(layer.mlp.shared_experts)
    return {name: number for name, number in parts.items() if number}


def _moe_anatomy(layer: MoELayer, moe: MoEConfig) -> MoEAnatomy:
    router, experts = layer.router, layer.experts
    schedule = moe.schedule.top_k
    mean, most = (router.top_k, router.top_k) if schedule is None else (_mean(schedule), max(schedule.values))
    # Under expert choice an expert's room is a share of all tokens; under token choice it only cuts off.
    room = float(getattr(router.config, "capacity_factor", 1.0)) if not router.token_choice else 1.0
    if layer.capacity is not None:
        room = min(1.0, layer.capacity.factor)
    return MoEAnatomy(
        num_experts=experts.num_experts,
        top_k=router.top_k,
        per_token=min(mean * room, experts.num_experts),
        per_token_max=min(most * room, experts.num_experts),
        size=experts.intermediate_size,
        shared_size=experts.intermediate_size * moe.n_shared_experts,
        backend=experts.backend,
        expert_parameters=_size(experts) // experts.num_experts,
    )


def _mean(schedule: Schedule) -> float:
    """Over the run's steps."""
    return fmean(schedule.at((sample + 0.5) / _SAMPLES) for sample in range(_SAMPLES))


def _split(layer: nn.Module) -> tuple[int, int]:
    mlp = layer.mlp
    experts = _size(mlp.experts) if isinstance(mlp, MoELayer) else 0
    return _size(layer) - experts, experts


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

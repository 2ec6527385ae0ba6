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
from moectl.hf.language_model import HFLanguageModel
from moectl.hf.shape import HFShape, parts_of
from moectl.models.accounting import (
    BACKWARD,
    Flops,
    ParameterCount,
    count,
    decoder_shape,
    experts_per_token,
    forward_flops,
)
from moectl.models.config import DecoderConfig
from moectl.models.decoder import Decoder, DecoderLayer
from moectl.moe.experts import GatedExperts
from moectl.moe.layer import MoELayer

PARTS = ("embedding", "attention", "mlp", "experts", "shared experts", "router", "norms", "head")
Shape = DecoderConfig | HFShape
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
        matrices: of one expert: 3 where it is gated, 2 where not.
        room: experts per token over K: 1 where tokens choose, a capacity apart; else the experts' own capacity factor.
        token_choice: whether tokens choose.
    """

    num_experts: int
    top_k: int
    per_token: float
    per_token_max: float
    size: int
    shared_size: int
    backend: str
    expert_parameters: int
    matrices: int
    room: float
    token_choice: bool


@dataclass(frozen=True)
class Anatomy:
    """A model's sizes.

    Attributes:
        config: the shape that it was read from.
        parameters: total, active per token and inactive.
        parts: parameters by what they belong to, in the order of :data:`PARTS`; a tied head is embedding.
        layers: parameters of each layer, experts apart: ``(rest, experts)``.
        moe: sizes of its MoE layers (all are alike), or None.
        length: tokens of a row, that ``flops`` are counted for.
        flops: of one token, forward, on average over the run.
    """

    config: Shape
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


def anatomy(config: Shape, length: int) -> Anatomy:
    """The sizes of the model that ``config`` describes, in rows of ``length`` tokens.

    Raises:
        ConfigError: a router, layer or backend that cannot be.
    """
    model = on_meta(config)
    layers = list(model.moe_layers().values())
    moe = None if config.moe is None or not layers else _moe_anatomy(layers[0], config.moe)
    shape = decoder_shape(config) if isinstance(config, DecoderConfig) else config.transformer
    flops = forward_flops(shape, layers, length=length)
    if moe is not None and moe.backend != "full":
        shared = len(layers) * 2 * shape.mlp_matrices * config.hidden_size * moe.shared_size
        routed = (flops.experts - shared) * moe.per_token / experts_per_token(layers[0])
        flops = Flops(flops.attention, flops.mlp, routed + shared, flops.router, flops.head)
    blocks = model.layers if isinstance(model, Decoder) else model.family.layers_of(model.model)
    split = tuple(_split(layer) for layer in blocks)
    return Anatomy(config, count(model), count_parts(model), split, moe, length, flops)


def on_meta(config: Shape) -> Decoder | HFLanguageModel:
    """The model that ``config`` describes, without any numbers."""
    if isinstance(config, HFShape):
        return config.build()
    with torch.device("meta"):
        return Decoder(config)


def count_parts(model: Decoder | HFLanguageModel) -> dict[str, int]:
    """Every parameter once, by part; parts without any are left out."""
    parts = _decoder_parts(model) if isinstance(model, Decoder) else parts_of(model)
    return {name: parts[name] for name in PARTS if parts.get(name)}


def _decoder_parts(model: Decoder) -> dict[str, int]:
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
    return parts


def _moe_anatomy(layer: MoELayer, moe: MoEConfig) -> MoEAnatomy:
    router, experts = layer.router, layer.experts
    schedule = moe.schedule.top_k
    mean, most = (router.top_k, router.top_k) if schedule is None else (_mean(schedule), max(schedule.values))
    room = experts_per_token(layer) / router.top_k
    used = room if layer.capacity is None else min(1.0, layer.capacity.factor)  # which only cuts off
    return MoEAnatomy(
        num_experts=experts.num_experts,
        top_k=router.top_k,
        per_token=min(mean * used, experts.num_experts),
        per_token_max=min(most * used, experts.num_experts),
        size=experts.intermediate_size,
        shared_size=experts.intermediate_size * moe.n_shared_experts,
        backend=experts.backend,
        expert_parameters=_size(experts) // experts.num_experts,
        matrices=3 if isinstance(experts, GatedExperts) else 2,
        room=room,
        token_choice=router.token_choice,
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

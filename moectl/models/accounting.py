"""What a transformer takes by formula: FLOPs per token and parameters, whichever library computes it.

A multiplication and an addition are two FLOPs. Counted are the products that the model is defined by:
projections, ``q · kᵀ`` and weights times values over the whole square of a row's length (a causal kernel
may skip half of it), MLPs, the gate, the experts that a token visits, and the head. Norms, biases,
activations and the embedding's look-up are not. A backward pass is twice the forward: one product for the
gradient of the input, one for that of the weight; what activation checkpointing computes again is not
counted. PyTorch's FlopCounterMode counts the same where it sees the products (eager attention, expert
backend ``loop``).

Letters: D hidden, F MLP columns, Q query columns (heads · head dimension), G key (or value) columns, S row
length, E experts, K experts per token, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from moectl.models.config import DecoderConfig
from moectl.models.language_model import LanguageModel
from moectl.moe.experts import GatedExperts
from moectl.moe.layer import MoELayer

BACKWARD = 2


@dataclass(frozen=True)
class TransformerShape:
    """The sizes that FLOPs follow from.

    Attributes:
        query_size: Q. key_size: G.
        mlp_size: F of a dense MLP.
        mlp_matrices: 3 for a gated MLP, 2 for a plain one.
    """

    num_layers: int
    hidden_size: int
    query_size: int
    key_size: int
    mlp_size: int
    mlp_matrices: int
    vocab_size: int


@dataclass(frozen=True)
class Flops:
    """Per token, by part. ``experts`` are those that a token visits, the shared ones included."""

    attention: float
    mlp: float
    experts: float
    router: float
    head: float

    @property
    def total(self) -> float:
        return self.attention + self.mlp + self.experts + self.router + self.head

    def to_json(self) -> dict[str, float]:
        return {**vars(self), "total": self.total}


@dataclass(frozen=True)
class ParameterCount:
    """Exact numbers of parameters; a tied head counts once.

    Attributes:
        total: all.
        inactive: of the experts that a token does not visit, over all layers.
    """

    total: int
    inactive: int

    @property
    def active(self) -> int:
        """What one token uses; embeddings count whole."""
        return self.total - self.inactive

    def to_json(self) -> dict[str, int]:
        return {"total": self.total, "active": self.active, "inactive": self.inactive}


def forward_flops(shape: TransformerShape, layers: Iterable[MoELayer], *, length: int) -> Flops:
    """Of one token in a row of ``length`` tokens, forward.

    Args:
        shape: the transformer.
        layers: its MoE layers; the other MLPs are dense.
    """
    hidden, columns = shape.hidden_size, shape.query_size
    projections = 2 * hidden * (2 * columns + 2 * shape.key_size)
    scores = 2 * 2 * length * columns
    mlp = 2 * shape.mlp_matrices * hidden * shape.mlp_size
    experts: float = 0
    router = 0
    moe_layers = list(layers)
    for layer in moe_layers:
        matrices = 3 if isinstance(layer.experts, GatedExperts) else 2
        computed = layer.experts.num_experts if layer.experts.backend == "full" else experts_per_token(layer)
        experts += computed * 2 * matrices * hidden * layer.experts.intermediate_size
        router += 2 * sum(p.numel() for p in layer.router.parameters())
        if layer.shared_experts is not None:
            experts += 2 * sum(p.numel() for p in layer.shared_experts.parameters() if p.dim() == 2)
    return Flops(
        attention=float(shape.num_layers * (projections + scores)),
        mlp=float((shape.num_layers - len(moe_layers)) * mlp),
        experts=float(experts),
        router=float(router),
        head=float(2 * hidden * shape.vocab_size),
    )


def experts_per_token(layer: MoELayer) -> float:
    """On average: ``top_k``, and where experts choose tokens, as often as their own capacity factor lets them.

    An expert capacity, which only cuts off, is not in it.
    """
    router = layer.router
    room = 1.0 if router.token_choice else float(getattr(router.config, "capacity_factor", 1.0))
    return min(router.top_k * room, router.num_experts)


def count(model: nn.Module | LanguageModel) -> ParameterCount:
    """Of any model with :class:`MoELayer` in it."""
    inactive = 0
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            per_expert = sum(p.numel() for p in layer.experts.parameters()) // layer.experts.num_experts
            inactive += round(per_expert * (layer.experts.num_experts - experts_per_token(layer)))
    return ParameterCount(sum(parameter.numel() for parameter in model.parameters()), inactive)


def weight_bytes(model: Any) -> int:
    """Memory of parameters and buffers as they are; a tensor of two names counts once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def decoder_shape(config: DecoderConfig) -> TransformerShape:
    """Of our own decoder."""
    return TransformerShape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        query_size=config.num_heads * config.head_dim,
        key_size=config.num_kv_heads * config.head_dim,
        mlp_size=config.intermediate_size,
        mlp_matrices=3,
        vocab_size=config.vocab_size,
    )

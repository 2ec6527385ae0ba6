"""Our own small decoder, Qwen3-style: RMSNorm, rotary embeddings, grouped-query attention with
q/k norm, SwiGLU, each layer's MLP dense or a Mixture of Experts. Parameter names are Qwen3-MoE's,
but for ``mlp.router.weight`` (its ``mlp.gate.weight``).

Shape suffixes: B batch, S sequence, C cached and new positions, D hidden, H heads, G key/value
heads, P head dimension, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moectl.config.schema import MoEConfig
from moectl.models.cache import KVCache
from moectl.models.config import DecoderConfig
from moectl.models.cross_entropy import linear_cross_entropy
from moectl.models.generation import choose_token, continue_text
from moectl.moe.capacity import Capacity
from moectl.moe.checkpointing import checkpointed
from moectl.moe.experts import GatedExperts
from moectl.moe.layer import MoELayer
from moectl.moe.router import at_least_float32
from moectl.routers import build_router

INIT_STD = 0.02
CAPACITY_OPTIONS = {"factor", "overflow", "fill", "in_eval"}  # the others say how training moves the factor


class RMSNorm(nn.Module):
    """Root-mean-square norm; the statistic in float32 (float64 for float64 input)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(at_least_float32(x), (x.shape[-1],), eps=self.eps).to(x.dtype)


class GatedMLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) · up(x))``."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def stacked_layout(self) -> dict[str, Tensor]:
        """These weights as one expert of :class:`GatedExperts`."""
        return {
            "gate_up_proj": torch.cat([self.gate_proj.weight, self.up_proj.weight]),
            "down_proj": self.down_proj.weight,
        }


class Attention(nn.Module):
    """Grouped-query attention with q/k norm over the head dimension, before the rotation."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None) -> Tensor:
        batch, length, _ = x_BSD.shape
        heads = (batch, length, -1, self.head_dim)
        q_BHSP = rotate(self.q_norm(self.q_proj(x_BSD).view(heads)).transpose(1, 2), *rope)
        k_BGCP = rotate(self.k_norm(self.k_proj(x_BSD).view(heads)).transpose(1, 2), *rope)
        v_BGCP = self.v_proj(x_BSD).view(heads).transpose(1, 2)
        if cache is not None:
            k_BGCP, v_BGCP = cache.extend(self.layer, k_BGCP, v_BGCP)
        out_BHSP = F.scaled_dot_product_attention(
            q_BHSP, k_BGCP, v_BGCP, attn_mask=mask, is_causal=mask is None and length > 1, enable_gqa=True
        )
        return self.o_proj(out_BHSP.transpose(1, 2).reshape(batch, length, -1))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each on the residual stream."""

    mlp: GatedMLP | MoELayer

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if layer in config.moe_layers:
            self.mlp = build_moe_layer(config, layer)
        else:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        token_mask: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rope, mask, cache)
        normed = self.post_attention_layernorm(x_BSD)
        return x_BSD + (self.mlp(normed, token_mask) if isinstance(self.mlp, MoELayer) else self.mlp(normed))


class Decoder(nn.Module):
    """``model(input_ids) -> logits``.

    Args:
        config: the shape; weights are drawn from torch's global generator.
    """

    kind: Literal["decoder", "hf"] = "decoder"
    max_length: int | None = None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def reset_parameters(self) -> None:
        """Normal(0, 0.02); what writes to the residual stream is scaled down by √(2L) (GPT-2)."""
        residual_std = INIT_STD / math.sqrt(2 * self.config.num_layers)
        routers = {id(part) for layer in self.moe_layers().values() for part in layer.router.modules()}
        for name, module in self.named_modules():
            if id(module) in routers:
                continue  # a router starts as its author wrote it
            if isinstance(module, (nn.Linear, nn.Embedding)):
                writes = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=residual_std if writes else INIT_STD)
            elif isinstance(module, GatedExperts):
                module.reset_parameters(INIT_STD, residual_std)

    def hidden_states(
        self,
        input_ids: Tensor,
        doc_ids: Tensor | None = None,
        token_mask: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Normed final hidden states ``[B, S, D]`` for ``input_ids [B, S]``.

        Args:
            doc_ids: ``[B, S]``; attention never crosses from one document to another.
            token_mask: ``[B, S]`` bool, real tokens; padding is neither attended to nor routed.
            cache: keys and values of earlier positions; extended in place.
            positions: ``[B, S]`` int64, for the rotation; None for 0, 1, 2, ... on from the cache. Only
                their differences matter, so padding on the left needs none.

        Raises:
            ValueError: ``doc_ids`` together with a cache.
        """
        if cache is not None and doc_ids is not None:
            raise ValueError("cached decoding takes no doc_ids: decode one document per row")
        length, past = input_ids.shape[1], 0 if cache is None else cache.length
        x_BSD = self.embed_tokens(input_ids)
        if positions is None:
            positions = torch.arange(past, past + length, device=input_ids.device)
        else:
            positions = positions[:, None]  # tables [B, 1, S, P], for every head
        rope = rope_tables(positions, self.config.head_dim, self.config.rope_theta, x_BSD.dtype)
        seen_mask = token_mask if cache is None else cache.extend_mask(token_mask, input_ids)
        mask = additive(attention_mask(length, past, doc_ids, seen_mask, input_ids.device), x_BSD.dtype)
        again = self.checkpointing and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            inputs = (x_BSD, rope, mask, token_mask, cache)
            x_BSD = checkpointed(layer, *inputs) if again else layer(*inputs)
        if cache is not None:
            cache.length += length
        return self.norm(x_BSD)

    def forward(
        self,
        input_ids: Tensor,
        doc_ids: Tensor | None = None,
        token_mask: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits ``[B, S, V]``; arguments as for :meth:`hidden_states`."""
        return self.lm_head(self.hidden_states(input_ids, doc_ids, token_mask, cache, positions))

    def lm_loss_sum(
        self,
        input_ids: Tensor,
        labels: Tensor,
        doc_ids: Tensor | None = None,
        token_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Summed next-token loss in nats against ``labels [B, S]`` (-100: not scored), logits never made whole."""
        hidden_ND = self.hidden_states(input_ids, doc_ids, token_mask, positions=positions).flatten(0, 1)
        return linear_cross_entropy(hidden_ND, self.lm_head.weight, labels.flatten())

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """In training, keep each layer's input alone, and compute the rest again in the backward pass."""
        self.checkpointing = enabled

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def head_weight(self) -> Tensor:
        return self.lm_head.weight

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    @property
    def moe(self) -> MoEConfig | None:
        return self.config.moe

    @property
    def eos_token_id(self) -> int | None:
        return self.config.eos_token_id

    def describe(self) -> dict[str, Any]:
        """The architecture without weights, as JSON."""
        return {"kind": self.kind, "decoder": self.config.to_dict()}

    def moe_layers(self) -> dict[int, MoELayer]:
        """The MoE layers by layer number, in model order."""
        return {n: layer.mlp for n, layer in enumerate(self.layers) if isinstance(layer.mlp, MoELayer)}

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue ``input_ids [B, S]`` with a key/value cache: ``[B, S + new]``.

        Greedy at temperature 0. Ends early once every row has produced the end-of-text token; a row
        that has ended goes on with it.
        """
        cache = KVCache(self.config.num_layers)
        return continue_text(
            lambda step_ids: self(step_ids, cache=cache)[:, -1],
            input_ids,
            max_new_tokens,
            eos_token_id=self.eos_token_id,
            choose=lambda logits_BV: choose_token(logits_BV, temperature, top_k, generator),
        )


def build_moe_layer(config: DecoderConfig, layer: int) -> MoELayer:
    """A fresh MoE layer in the shape that ``config.moe`` describes, as layer number ``layer``.

    Raises:
        ConfigError: a capacity for a router whose tokens do not choose their experts.
    """
    moe = config.moe
    assert moe is not None
    router = build_router(
        moe.router_name, hidden_size=config.hidden_size, num_experts=moe.num_experts, **moe.router_options
    )
    router.label = f"layer {layer}'s router '{moe.router_name}'"
    size = config.expert_intermediate_size
    experts = GatedExperts(moe.num_experts, config.hidden_size, size, backend=moe.backend)
    shared = GatedMLP(config.hidden_size, size * moe.n_shared_experts) if moe.n_shared_experts else None
    options = None if moe.capacity is None else moe.capacity.model_dump(include=CAPACITY_OPTIONS)
    return MoELayer(router, experts, shared, None if options is None else Capacity(**options))


def rope_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[*, S, P]`` of the half-split rotation at ``positions [*, S]``, made in float32 or above.

    Source: Su et al. 2021, arXiv:2104.09864; half-split layout of GPT-NeoX and Llama in transformers.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, head_dim, 2, device=positions.device).to(exact) / head_dim
    angles = positions[..., None].to(exact) * (1.0 / theta**exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of the last dimension of ``[B, H, S, P]`` by tables ``[S, P]`` or ``[B, 1, S, P]``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask as what is added to scores, 0 or -inf: made once, which attention would do in every layer."""
    if mask is None:
        return None
    device = mask.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


def attention_mask(
    length: int, past: int, doc_ids: Tensor | None, token_mask: Tensor | None, device: torch.device
) -> Tensor | None:
    """Who may see whom, ``[1 or B, 1, S, C]`` bool; None where plain causal attention is meant.

    ``token_mask`` is that of all ``C`` positions. A padding query sees itself, so that its row of the
    softmax stays finite.
    """
    if doc_ids is None and token_mask is None and (past == 0 or length == 1):
        return None
    causal = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)[None]
    if doc_ids is not None:
        causal = causal & (doc_ids[:, :, None] == doc_ids[:, None, :])
    if token_mask is not None:
        causal = causal & token_mask[:, None, :] | torch.ones_like(causal).tril(past).triu(past)
    return causal[:, None]

"""MoE blocks, routers, attentions and a model as they are written out there, each in its own style, names and layout.

All compute what Qwen3-MoE computes. Nothing here knows moectl.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class ModelArgs:
    dim: int = 4096
    n_heads: int = 32
    n_kv_heads: int = 8
    head_dim: int = 128
    hidden_dim: int = 14336
    num_experts: int = 8
    num_experts_per_tok: int = 2
    norm_eps: float = 1e-5
    vocab_size: int = 32000
    n_layers: int = 32
    rope_theta: float = 1e6


# 1. A reference in the style of Mixtral's: w1, w2, w3, a gate, a dataclass of settings, [T, D] only.
class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SparseFeedForward(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.gate = nn.Linear(args.dim, args.num_experts, bias=False)
        self.experts = nn.ModuleList([FeedForward(args) for _ in range(args.num_experts)])

    def forward(self, inputs):
        _, _ = inputs.shape
        chosen, which = torch.topk(self.gate(inputs), self.args.num_experts_per_tok)
        share = F.softmax(chosen, dim=1, dtype=torch.float).to(inputs.dtype)
        results = torch.zeros_like(inputs)
        for number, expert in enumerate(self.experts):
            rows, nth = torch.where(which == number)
            results[rows] += share[rows, nth, None] * expert(inputs[rows])
        return results


# 2. Conditional feed-forward with stacked w1, w2, w3 [E, F, D], [E, D, F], all chosen matrices gathered (gpt-fast).
class ConditionalFeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(config.num_experts, config.moe_intermediate_size, config.dim))
        self.w2 = nn.Parameter(torch.empty(config.num_experts, config.dim, config.moe_intermediate_size))
        self.w3 = nn.Parameter(torch.empty(config.num_experts, config.moe_intermediate_size, config.dim))

    def forward(self, x, expert_indices):
        gates = F.silu(torch.einsum("ti,taoi->tao", x, self.w1[expert_indices]))
        ups = torch.einsum("ti,taoi->tao", x, self.w3[expert_indices])
        return torch.einsum("tao,taio->tai", gates * ups, self.w2[expert_indices])


class GatheredMoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.dim, config.num_experts, bias=False)
        self.cond_ffn = ConditionalFeedForward(config)
        self.dim, self.active = config.dim, config.num_activated_experts

    def forward(self, x):
        x = x.view(-1, self.dim)
        weights = F.softmax(self.gate(x), dim=-1)
        weights, indices = torch.topk(weights, self.active, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        return torch.einsum("tai,ta->ti", self.cond_ffn(x, indices), weights)


# 3. A gate of its own with raw weight and (weights, indices), experts with names of DeepSeek's reference.
class Gate(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.topk, self.route_scale = args.n_activated_experts, args.route_scale
        self.weight = nn.Parameter(torch.empty(args.n_routed_experts, args.dim))

    def forward(self, x):
        scores = F.linear(x, self.weight).softmax(dim=-1, dtype=torch.float32)
        indices = torch.topk(scores, self.topk, dim=-1)[1]
        weights = scores.gather(1, indices)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return (weights * self.route_scale).type_as(x), indices


class RoutedExpert(nn.Module):
    def __init__(self, dim, inter_dim):
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, inter_dim, bias=False), nn.Linear(dim, inter_dim, bias=False)
        self.w2 = nn.Linear(inter_dim, dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class CountingMoE(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.dim, self.n_routed_experts = args.dim, args.n_routed_experts
        self.gate = Gate(args)
        self.experts = nn.ModuleList([RoutedExpert(args.dim, args.moe_inter_dim) for _ in range(args.n_routed_experts)])

    def forward(self, x):
        shape = x.size()
        x = x.view(-1, self.dim)
        weights, indices = self.gate(x)
        y = torch.zeros_like(x)
        counts = torch.bincount(indices.flatten(), minlength=self.n_routed_experts).tolist()
        for i in range(self.n_routed_experts):
            if counts[i] == 0:
                continue
            rows, top = torch.where(indices == i)
            y[rows] += self.experts[i](x[rows]) * weights[rows, top, None]
        return y.view(shape)


# 4. One ModuleList per matrix, a dict of settings (books on building models from scratch).
class ListsMoE(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.num_experts, self.active = cfg["num_experts"], cfg["num_experts_per_tok"]
        wide = cfg["moe_intermediate_size"]
        self.gate = nn.Linear(cfg["emb_dim"], cfg["num_experts"], bias=False, dtype=cfg["dtype"])
        self.fc1 = nn.ModuleList([nn.Linear(cfg["emb_dim"], wide, bias=False) for _ in range(self.num_experts)])
        self.fc2 = nn.ModuleList([nn.Linear(cfg["emb_dim"], wide, bias=False) for _ in range(self.num_experts)])
        self.fc3 = nn.ModuleList([nn.Linear(wide, cfg["emb_dim"], bias=False) for _ in range(self.num_experts)])

    def forward(self, x):
        scores = self.gate(x)
        top, where = torch.topk(scores, self.active, dim=-1)
        probs = torch.softmax(top, dim=-1)
        flat, out = x.reshape(-1, x.shape[-1]), torch.zeros(x.shape[0] * x.shape[1], x.shape[-1], dtype=x.dtype)
        where, probs = where.reshape(-1, self.active), probs.reshape(-1, self.active)
        for e in range(self.num_experts):
            hit = where == e
            rows = hit.any(dim=-1)
            share = (probs * hit).sum(dim=-1, keepdim=True)[rows]
            one = flat[rows]
            out[rows] += share * self.fc3[e](F.silu(self.fc1[e](one)) * self.fc2[e](one))
        return out.reshape(x.shape)


# 5. fc_1, fc_2, proj; named arguments instead of a config (litgpt's names).
class LitMLP(nn.Module):
    def __init__(self, n_embd, intermediate_size):
        super().__init__()
        self.fc_1 = nn.Linear(n_embd, intermediate_size, bias=False)
        self.fc_2 = nn.Linear(n_embd, intermediate_size, bias=False)
        self.proj = nn.Linear(intermediate_size, n_embd, bias=False)

    def forward(self, x):
        return self.proj(F.silu(self.fc_1(x)) * self.fc_2(x))


class LitMoE(nn.Module):
    def __init__(self, n_embd, moe_intermediate_size, n_expert, n_expert_per_token):
        super().__init__()
        self.k = n_expert_per_token
        self.gate = nn.Linear(n_embd, n_expert, bias=False)
        self.experts = nn.ModuleList(LitMLP(n_embd, moe_intermediate_size) for _ in range(n_expert))

    def forward(self, x):
        B, T, C = x.size()
        x = x.view(-1, C)
        probs, indices = torch.topk(self.gate(x), self.k)
        probs = probs.softmax(dim=1, dtype=torch.float).to(dtype=x.dtype)
        masks = indices.unsqueeze(-1) == torch.arange(len(self.experts), device=x.device)
        y = torch.zeros_like(x)
        for mask, expert in zip(masks.permute(2, 0, 1), self.experts, strict=True):
            token_idx, expert_idx = torch.where(mask)
            y[token_idx] += probs[token_idx, expert_idx, None] * expert(x[token_idx])
        return y.view(B, T, C)


# 6. A tutorial: d_model, num_experts, top_k; everything dense: all experts on all tokens, raw router matrix [D, E].
class DenseMoE(nn.Module):
    def __init__(self, d_model, d_ff, num_experts, top_k=2):
        super().__init__()
        self.top_k = top_k
        self.w_router = nn.Parameter(torch.randn(d_model, num_experts) * 0.02)
        self.w_gate = nn.Parameter(torch.randn(num_experts, d_model, d_ff) * 0.02)
        self.w_up = nn.Parameter(torch.randn(num_experts, d_model, d_ff) * 0.02)
        self.w_down = nn.Parameter(torch.randn(num_experts, d_ff, d_model) * 0.02)

    def forward(self, x):
        probs = (x @ self.w_router).softmax(-1)
        kth = probs.topk(self.top_k, dim=-1).values[..., -1:]
        kept = probs * (probs >= kth)
        weights = kept / kept.sum(-1, keepdim=True)
        hidden = F.silu(torch.einsum("bsd,edf->bsef", x, self.w_gate)) * torch.einsum("bsd,edf->bsef", x, self.w_up)
        return torch.einsum("bsef,efd,bse->bsd", hidden, self.w_down, weights)


# 7. Experts side by side in two large matrices [E·F, D] (dbrx and megablocks: w1, v1, w2 turned).
class SideBySideMoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.E, self.F, self.k = config.num_experts, config.ffn_hidden_size, config.moe_top_k
        if config.moe_intermediate_size != self.F:
            raise ValueError("two answers to one question")
        self.router = nn.Linear(config.d_model, self.E, bias=False)
        self.w1 = nn.Parameter(torch.empty(self.E * self.F, config.d_model))
        self.v1 = nn.Parameter(torch.empty(self.E * self.F, config.d_model))
        self.w2 = nn.Parameter(torch.empty(self.E * self.F, config.d_model))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        probs = self.router(flat).softmax(-1, dtype=torch.float32)
        weights, chosen = probs.topk(self.k, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(flat)
        w1, v1, w2 = (w.view(self.E, self.F, -1) for w in (self.w1, self.v1, self.w2))
        for e in range(self.E):
            rows, slot = (chosen == e).nonzero(as_tuple=True)
            hidden = F.silu(flat[rows] @ w1[e].t()) * (flat[rows] @ v1[e].t())
            out.index_add_(0, rows, (hidden @ w2[e]) * weights[rows, slot, None])
        return out.view(x.shape)


# 8. Sorted tokens, grouped products over [E, D, 2F] and [E, F, D] as in Llama 4; the router gives a NamedTuple.
class Decision(NamedTuple):
    expert_weights: torch.Tensor
    expert_ids: torch.Tensor
    router_logits: torch.Tensor


class TokenRouter(nn.Module):
    def __init__(self, hidden_size, num_local_experts, top_k):
        super().__init__()
        self.top_k = top_k
        self.classifier = nn.Linear(hidden_size, num_local_experts, bias=False)

    def forward(self, hidden_states):
        logits = self.classifier(hidden_states)
        top, ids = logits.topk(self.top_k, dim=-1)
        return Decision(top.softmax(-1), ids, logits)


class FusedExperts(nn.Module):
    def __init__(self, num_local_experts, hidden_size, expert_dim):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_local_experts, hidden_size, 2 * expert_dim))
        self.down_proj = nn.Parameter(torch.empty(num_local_experts, expert_dim, hidden_size))

    def forward(self, x, counts):
        start, outs = 0, []
        for e, count in enumerate(counts.tolist()):
            gate, up = (x[start : start + count] @ self.gate_up_proj[e]).chunk(2, dim=-1)
            outs.append((F.silu(gate) * up) @ self.down_proj[e])
            start += count
        return torch.cat(outs)


class SortedMoE(nn.Module):
    def __init__(self, hidden_size, intermediate_size, num_local_experts, num_experts_per_tok):
        super().__init__()
        self.router = TokenRouter(hidden_size, num_local_experts, num_experts_per_tok)
        self.experts = FusedExperts(num_local_experts, hidden_size, intermediate_size)

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, ids, _ = self.router(x)
        order = ids.flatten().argsort(stable=True)
        token = order // ids.shape[1]
        counts = torch.bincount(ids.flatten(), minlength=self.router.classifier.out_features)
        out = self.experts(x[token], counts) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, token, out).reshape(hidden_states.shape), None


# 9. gate_up as one Linear per expert, a ModuleDict, returns a dict.
class PackedExpert(nn.Module):
    def __init__(self, dim, ffn_dim):
        super().__init__()
        self.w13 = nn.Linear(dim, 2 * ffn_dim, bias=False)
        self.w2 = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x):
        gate, up = self.w13(x).chunk(2, -1)
        return self.w2(F.silu(gate) * up)


class PackedMoE(nn.Module):
    def __init__(self, dim, ffn_dim, n_experts, k):
        super().__init__()
        self.k = k
        self.gating = nn.Linear(dim, n_experts, bias=False)
        self.experts = nn.ModuleDict({str(i): PackedExpert(dim, ffn_dim) for i in range(n_experts)})

    def forward(self, x):
        probs = torch.softmax(self.gating(x), dim=-1)
        sorted_probs, order = probs.sort(dim=-1, descending=True)
        sorted_probs, order = sorted_probs[..., : self.k], order[..., : self.k]
        sorted_probs = sorted_probs / sorted_probs.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for name, expert in self.experts.items():
            share = (sorted_probs * (order == int(name))).sum(-1, keepdim=True)
            out = out + share * expert(x)
        return {"hidden_states": out, "router_probs": probs}


# 10. Noise on the router in training only, a scatter of softmaxed logits with -inf (the makeMoE tutorials).
class NoisyTopkRouter(nn.Module):
    def __init__(self, n_embed, num_experts, top_k):
        super().__init__()
        self.top_k = top_k
        self.topkroute_linear = nn.Linear(n_embed, num_experts, bias=False)
        self.noise_linear = nn.Linear(n_embed, num_experts, bias=False)

    def forward(self, mh_output):
        logits = self.topkroute_linear(mh_output)
        if self.training:
            logits = logits + 0.0 * F.softplus(self.noise_linear(mh_output))
        top, indices = logits.topk(self.top_k, dim=-1)
        sparse = torch.full_like(logits, float("-inf")).scatter(-1, indices, top)
        return F.softmax(sparse, dim=-1), indices


class MakeExpert(nn.Module):
    def __init__(self, n_embed, hidden):
        super().__init__()
        self.linear_gate = nn.Linear(n_embed, hidden, bias=False)
        self.linear_up = nn.Linear(n_embed, hidden, bias=False)
        self.linear_down = nn.Linear(hidden, n_embed, bias=False)

    def forward(self, x):
        return self.linear_down(F.silu(self.linear_gate(x)) * self.linear_up(x))


class MakeMoE(nn.Module):
    def __init__(self, n_embed, num_experts, top_k, expert_dim):
        super().__init__()
        self.router = NoisyTopkRouter(n_embed, num_experts, top_k)
        self.experts = nn.ModuleList([MakeExpert(n_embed, expert_dim) for _ in range(num_experts)])

    def forward(self, x):
        gating, indices = self.router(x)
        out = torch.zeros_like(x)
        flat, flat_gating = x.view(-1, x.size(-1)), gating.view(-1, gating.size(-1))
        for i, expert in enumerate(self.experts):
            mask = (indices == i).any(dim=-1)
            flat_mask = mask.view(-1)
            if flat_mask.any():
                given = expert(flat[flat_mask])
                out[mask] += (given * flat_gating[flat_mask, i, None]).squeeze(1)
        return out


# 11. A Sequential without a gate: two matrices per expert. No SwiGLU, so it cannot be Qwen3's.
class PlainExpert(nn.Module):
    def __init__(self, dim, hidden_size):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, hidden_size), nn.ReLU(), nn.Linear(hidden_size, dim))

    def forward(self, x):
        return self.net(x)


class UngatedMoE(nn.Module):
    def __init__(self, dim, ffn_dim, num_experts, top_k):
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(dim, num_experts)
        self.experts = nn.ModuleList([PlainExpert(dim, ffn_dim) for _ in range(num_experts)])

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(self.top_k)
        return sum(
            weights[..., i, None]
            * torch.stack([e(x) for e in self.experts], -2)
            .gather(-2, ids[..., i, None, None].expand(*x.shape[:-1], 1, x.shape[-1]))
            .squeeze(-2)
            for i in range(self.top_k)
        )


# 12. A square output projection and raw matrices, used as x @ w: which way round is only seen at other sizes.
class RawAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.h, self.g, self.p = config.n_head, config.n_kv_head, config.head_dim
        self.wq = nn.Parameter(torch.empty(config.n_embd, self.h * self.p))
        self.wk = nn.Parameter(torch.empty(config.n_embd, self.g * self.p))
        self.wv = nn.Parameter(torch.empty(config.n_embd, self.g * self.p))
        self.wo = nn.Parameter(torch.empty(self.h * self.p, config.n_embd))
        self.q_norm, self.k_norm = nn.RMSNorm(self.p, eps=config.eps), nn.RMSNorm(self.p, eps=config.eps)

    def forward(self, x, mask, cos, sin):
        b, s, _ = x.shape
        q = self.q_norm((x @ self.wq).view(b, s, self.h, self.p)).transpose(1, 2)
        k = self.k_norm((x @ self.wk).view(b, s, self.g, self.p)).transpose(1, 2)
        v = (x @ self.wv).view(b, s, self.g, self.p).transpose(1, 2)
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        k, v = k.repeat_interleave(self.h // self.g, dim=1), v.repeat_interleave(self.h // self.g, dim=1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.p)
        scores = scores.masked_fill(mask, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, -1) @ self.wo


def turn(x, cos, sin):
    return x * cos + rotated(x) * sin


def rotated(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


# 13. One matrix for q, k and v, halved tables with the heads after the sequence (nanochat's shapes).
class PackedAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.c_qkv = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=False)
        self.c_proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6)

    def forward(self, x, cos_sin, kv_cache=None):
        b, t, _ = x.size()
        sizes = [n * self.head_dim for n in (self.n_head, self.n_kv_head, self.n_kv_head)]
        q, k, v = (part.view(b, t, -1, self.head_dim) for part in self.c_qkv(x).split(sizes, dim=-1))
        cos, sin = cos_sin
        q, k = apply_rotary_emb(self.q_norm(q), cos, sin), apply_rotary_emb(self.k_norm(k), cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.n_head != self.n_kv_head)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, -1))


class HidingAttention(PackedAttention):
    """True in the mask hides, as in torch's own layers."""

    def forward(self, x, cos_sin, key_padding_mask=None):
        b, t, _ = x.size()
        sizes = [n * self.head_dim for n in (self.n_head, self.n_kv_head, self.n_kv_head)]
        q, k, v = (part.view(b, t, -1, self.head_dim).transpose(1, 2) for part in self.c_qkv(x).split(sizes, dim=-1))
        cos, sin = (table.transpose(1, 2) for table in cos_sin)
        q, k = apply_rotary_emb(self.q_norm(q), cos, sin), apply_rotary_emb(self.k_norm(k), cos, sin)
        seen = torch.ones(t, t, dtype=torch.bool).tril()
        if key_padding_mask is not None:
            seen = seen & ~key_padding_mask[:, None, None, :] | torch.eye(t, dtype=torch.bool)
        k, v = (part.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.c_proj(y.transpose(1, 2).reshape(b, t, -1))


def apply_rotary_emb(x, cos, sin):
    d = x.shape[3] // 2
    x1, x2 = x[..., :d], x[..., d:]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], 3)


# 14. A whole model with a cache of its own making: nanoGPT's outside, targets or else the last position only.
class Block(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.attn = PackedAttention(config, layer_idx)
        self.moe = GatheredBlock(config)
        self.ln_1, self.ln_2 = nn.RMSNorm(config.n_embd, eps=1e-6), nn.RMSNorm(config.n_embd, eps=1e-6)

    def forward(self, x, cos_sin):
        x = x + self.attn(self.ln_1(x), cos_sin)
        return x + self.moe(self.ln_2(x))


class GatheredBlock(GatheredMoE):
    def forward(self, x):
        return super().forward(x).view(x.shape)


class NanoModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "h": nn.ModuleList([Block(config, i) for i in range(config.n_layer)]),
                "ln_f": nn.RMSNorm(config.n_embd, eps=1e-6),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        inverse = 1.0 / config.rope_base ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angles = torch.outer(torch.arange(config.block_size).float(), inverse)
        self.register_buffer("cos", angles.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", angles.sin()[None, :, None, :], persistent=False)

    def forward(self, idx, targets=None):
        x = self.transformer.wte(idx)
        cos_sin = self.cos[:, : idx.shape[1]], self.sin[:, : idx.shape[1]]
        for block in self.transformer.h:
            x = block(x, cos_sin)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


# 15. Plain functions.
def route(x, gate_weight, top_k):
    probs = torch.softmax(x @ gate_weight.T, dim=-1)
    weights, indices = probs.topk(top_k, dim=-1)
    return indices, weights / weights.sum(-1, keepdim=True)


def moe_forward(x, gate_weight, gate_up_proj, down_proj, top_k):
    flat = x.reshape(-1, x.shape[-1])
    indices, weights = route(flat, gate_weight, top_k)
    out = torch.zeros_like(flat)
    for e in range(len(gate_up_proj)):
        rows, slot = torch.where(indices == e)
        gate, up = (flat[rows] @ gate_up_proj[e].T).chunk(2, -1)
        out = out.index_add(0, rows, weights[rows, slot, None] * ((F.silu(gate) * up) @ down_proj[e].T))
    return out.view_as(x)

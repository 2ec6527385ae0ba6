"""The same model in the other common style: all experts in fused ``[E, in, out]`` tensors, routed by a boolean map.

Other names, rotary tables made once for the whole model and handed down, attention by
``F.scaled_dot_product_attention``. Nothing here knows moectl: it is somebody else's code.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


def rms_norm(x, scale, eps):
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + eps)
    return scale * h.to(x.dtype)


class Norm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.scale, self.eps)


def rope_table(positions, head_dim, theta):
    exponents = torch.arange(0, head_dim // 2).float() * 2 / head_dim
    angles = positions[..., None].float() * theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rope(x, cos, sin):
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos[:, None] + turned * sin[:, None]).to(x.dtype)


class GroupedQueryAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_heads, self.n_kv = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.hidden_size, self.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.n_kv * self.head_dim, bias=False)
        self.wv = nn.Linear(config.hidden_size, self.n_kv * self.head_dim, bias=False)
        self.wo = nn.Linear(self.n_heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = Norm(self.head_dim, config.rms_norm_eps)
        self.k_norm = Norm(self.head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask=None):
        b, s, _ = x.shape
        q = self.wq(x).reshape(b, s, self.n_heads, self.head_dim).transpose(1, 2)
        k = self.wk(x).reshape(b, s, self.n_kv, self.head_dim).transpose(1, 2)
        v = self.wv(x).reshape(b, s, self.n_kv, self.head_dim).transpose(1, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope(q, cos, sin), rope(k, cos, sin)

        repeats = self.n_heads // self.n_kv
        k = k[:, :, None].expand(b, self.n_kv, repeats, s, self.head_dim).reshape(b, self.n_heads, s, self.head_dim)
        v = v[:, :, None].expand(b, self.n_kv, repeats, s, self.head_dim).reshape(b, self.n_heads, s, self.head_dim)
        visible = torch.ones(s, s, dtype=torch.bool, device=x.device).tril()
        if mask is not None:
            visible = visible & mask[:, None, None, :].bool()
        bias = torch.zeros(visible.shape, dtype=q.dtype, device=x.device)
        bias = bias.masked_fill(~visible, torch.finfo(q.dtype).min)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.head_dim**-0.5)
        y = y.transpose(1, 2).reshape(b, s, -1)
        return self.wo(y)


class TopKGate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.k, self.renormalize = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.num_experts))  # [in, out], like the experts
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x):
        logits = x @ self.weight
        probs = torch.softmax(logits, dim=-1, dtype=torch.float32)
        top_probs, top_experts = probs.topk(self.k, dim=-1)
        if self.renormalize:
            top_probs = top_probs / top_probs.sum(dim=-1, keepdim=True)
        routing_map = torch.zeros_like(probs, dtype=torch.bool).scatter(1, top_experts, True)
        routing_weights = torch.zeros_like(probs).scatter(1, top_experts, top_probs)
        return logits, routing_map, routing_weights.to(x.dtype)


class FusedMoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        size = config.moe_intermediate_size
        self.gate = TopKGate(config)
        self.w_gate_up = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, 2 * size))
        self.w_down = nn.Parameter(torch.empty(config.num_experts, size, config.hidden_size))
        for weight in (self.w_gate_up, self.w_down):
            nn.init.normal_(weight, std=0.02)

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        _, routing_map, routing_weights = self.gate(x)
        y = torch.zeros_like(x)
        for e in range(self.num_experts):
            rows = routing_map[:, e].nonzero().squeeze(-1)
            gate, up = (x[rows] @ self.w_gate_up[e]).chunk(2, dim=-1)
            hidden = F.silu(gate) * up
            out = hidden @ self.w_down[e]
            out = out * routing_weights[rows, e, None]
            y = y.index_add(0, rows, out)
        return y.reshape(shape)


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config, layer_idx=0):
        super().__init__()
        self.attn_norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.attn = GroupedQueryAttention(config)
        self.ffn_norm = Norm(config.hidden_size, config.rms_norm_eps)
        dense = layer_idx in config.mlp_only_layers or (layer_idx + 1) % config.decoder_sparse_step != 0
        self.ffn = SwiGLU(config) if dense else FusedMoE(config)

    def forward(self, x, cos, sin, mask=None):
        x = x + self.attn(self.attn_norm(x), cos, sin, mask)
        return x + self.ffn(self.ffn_norm(x))


class LanguageModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        self.tok_emb = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([Block(config, i) for i in range(config.num_hidden_layers)])
        self.out_norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.out_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens, mask=None, positions=None):
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        x = self.tok_emb(tokens)
        cos, sin = rope_table(positions, self.head_dim, self.theta)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        return self.out_head(self.out_norm(x))

"""Mistakes planted in the two examples as text patches: what each is, where it shows first, what it must be called.

Read the table from left to right: level, mistake, hypotheses that must be named, first tensor, patches, config.
"""

# ruff: noqa: E501 (a table: one mistake a line)

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moectl.parity.case import Level

CANDIDATES = Path(__file__).parent / "candidates"
Style = Literal["modulelist", "fused"]
CLASSES: dict[str, dict[Level, str]] = {
    "modulelist": {
        "model": "MoEModel",
        "layer": "DecoderBlock",
        "moe": "MoEBlock",
        "attention": "Attention",
        "router": "Router",
    },
    "fused": {
        "model": "LanguageModel",
        "layer": "Block",
        "moe": "FusedMoE",
        "attention": "GroupedQueryAttention",
        "router": "TopKGate",
    },
}


@dataclass(frozen=True)
class Mutant:
    """One planted mistake.

    Attributes:
        mistake: what it is called in the table.
        style: the example that it is planted in.
        level: the class that is compared.
        edits: pairs of a text that is there, and what replaces it everywhere.
        first: the first tensor that must differ; empty for an equivalent mutant.
        named: the class that the diagnosis must name: all hypotheses with this effect, and no other; empty where
            nothing must be named, because none of the hypotheses explains it.
        config: what differs from the family's tiny config.
        equivalent: the hypothesis that changes nothing in this configuration, or "" where it changes something;
            "casts" for a missing cast, which changes nothing in float64.
        in_bfloat16: what a missing cast must be called there, and the tensor whose bits tell.
    """

    mistake: str
    style: Style
    level: Level
    edits: tuple[tuple[str, str], ...]
    first: str
    named: frozenset[str]
    config: Mapping[str, Any] = field(default_factory=dict)
    equivalent: str = ""
    in_bfloat16: str = ""

    @property
    def backward(self) -> bool:
        """Whether only gradients show it."""
        return self.first.startswith("grad.")

    @property
    def id(self) -> str:
        return f"{self.style}-{self.level}-{self.mistake.replace(' ', '-')}"

    def source(self) -> str:
        text = (CANDIDATES / f"{self.style}_style.py").read_text(encoding="utf-8")
        for old, new in self.edits:
            assert old in text, f"{self.id}: {old!r} is not in the example"
            text = text.replace(old, new)
        return text

    def write(self, folder: Path) -> str:
        """The mutated file, and how the candidate is named."""
        file = folder / f"{self.style}_mutant.py"
        file.write_text(self.source(), encoding="utf-8")
        return f"{file}:{CLASSES[self.style][self.level]}"


MUTANTS: list[Mutant] = []


def _add(
    style: Style,
    level: Level,
    mistake: str,
    named: str,
    first: str,
    *edits: tuple[str, str],
    equivalent: str = "",
    in_bfloat16: str = "",
    **config: Any,
) -> None:
    patches = tuple((textwrap.dedent(old).strip("\n"), textwrap.dedent(new).strip("\n")) for old, new in edits)
    classes = frozenset(named.split())
    MUTANTS.append(Mutant(mistake, style, level, patches, first, classes, config, equivalent, in_bfloat16))


def _modulelist(level: Level, mistake: str, named: str, first: str, *edits: tuple[str, str], **more: Any) -> None:
    _add("modulelist", level, mistake, named, first, *edits, **more)


def _fused(level: Level, mistake: str, named: str, first: str, *edits: tuple[str, str], **more: Any) -> None:
    _add("fused", level, mistake, named, first, *edits, **more)


# fmt: off
# ---- routers -------------------------------------------------------------------------------------------------------

NORM, SOFTMAX = ("if self.norm_topk_prob:", "if False:"), "probs = F.softmax(router_logits.float(), dim=-1)"
TOPK = "weights, indices = torch.topk(probs, self.top_k, dim=-1)"
_modulelist("router", "top-k weights not normalised", "norm-topk norm-all", "mlp.weights", NORM)
_modulelist("moe", "top-k weights not normalised", "norm-topk norm-all", "mlp.weights", NORM)
_modulelist("model", "top-k weights not normalised", "norm-topk norm-all", "layers.0.mlp.weights", NORM)
_modulelist(
    "router", "normalised though the config says not", "norm-topk softmax-after-topk", "mlp.weights",
    ("if self.norm_topk_prob:", "if True:"), norm_topk_prob=False,
)
_modulelist(
    "router", "all probabilities normalised", "norm-topk norm-all", "mlp.weights",
    ("weights / weights.sum(dim=-1, keepdim=True)", "weights / probs.sum(dim=-1, keepdim=True)"),
)
AFTER = (f"{SOFTMAX}\n        {TOPK}", "weights, indices = torch.topk(router_logits, self.top_k, dim=-1)\n        weights = F.softmax(weights.float(), dim=-1)")
_modulelist("router", "softmax after the top-k", "", "", AFTER, equivalent="softmax-after-topk")
_modulelist(
    "moe", "softmax after the top-k, no normalisation", "norm-topk softmax-after-topk", "mlp.weights", AFTER,
    norm_topk_prob=False,
)
_modulelist(
    "moe", "softmax once more after the top-k", "softmax-twice", "mlp.weights",
    (TOPK, f"{TOPK}\n        weights = F.softmax(weights, dim=-1)"),
)
_modulelist("router", "softmax over tokens", "router-softmax", "mlp.chosen", (SOFTMAX, SOFTMAX.replace("-1", "0")))
_modulelist("moe", "softmax over tokens", "router-softmax", "mlp.chosen", (SOFTMAX, SOFTMAX.replace("-1", "0")))
_modulelist(
    "router", "smallest experts chosen", "router-choice", "mlp.chosen", (TOPK, TOPK.replace("dim=-1", "largest=False"))
)
_modulelist(
    "moe", "indices sorted, weights not", "router-choice", "mlp.weights",
    (TOPK, f"{TOPK}\n        indices = indices.sort(dim=-1).values"),
)
_modulelist("router", "sigmoid instead of softmax", "router-score", "mlp.weights", (SOFTMAX, "probs = torch.sigmoid(router_logits.float())"))
LOW = "F.linear(x.to(torch.bfloat16), self.gate.weight.to(torch.bfloat16)).to(x.dtype)"
_modulelist("router", "router logits in bfloat16", "router-precision", "mlp.router_logits", ("self.gate(x)", LOW))
_modulelist("layer", "router logits in bfloat16", "router-precision", "mlp.router_logits", ("self.gate(x)", LOW))
_modulelist(
    "router", "router probabilities in bfloat16", "router-precision", "mlp.weights",
    (SOFTMAX, f"{SOFTMAX}.to(torch.bfloat16)"),
)
_modulelist("router", "normalisation ignored at k = E", "", "", NORM, equivalent="norm-topk", num_experts_per_tok=8)

PROBS = "probs = torch.softmax(logits, dim=-1, dtype=torch.float32)"
TOP = "top_probs, top_experts = probs.topk(self.k, dim=-1)"
_fused("router", "top-k weights not normalised", "norm-topk norm-all", "mlp.weights", ("if self.renormalize:", "if False:"))
_fused("moe", "top-k weights not normalised", "norm-topk norm-all", "mlp.weights", ("if self.renormalize:", "if False:"))
_fused(
    "moe", "normalised though the config says not", "norm-topk softmax-after-topk", "mlp.weights",
    ("if self.renormalize:", "if True:"), norm_topk_prob=False,
)
_fused(
    "moe", "all probabilities normalised", "norm-topk norm-all", "mlp.weights",
    ("top_probs / top_probs.sum", "top_probs / probs.sum"),
)
LATE = (
    f"{PROBS}\n        {TOP}",
    "top_probs, top_experts = logits.topk(self.k, dim=-1)\n        probs, top_probs = logits, top_probs.softmax(dim=-1)",
)
_fused("router", "softmax after the top-k", "", "", LATE, equivalent="softmax-after-topk")
_fused(
    "router", "softmax after the top-k, no normalisation", "norm-topk softmax-after-topk", "mlp.weights", LATE,
    norm_topk_prob=False,
)
_fused("moe", "softmax once more after the top-k", "softmax-twice", "mlp.weights", (TOP, f"{TOP}\n        top_probs = top_probs.softmax(dim=-1)"))
_fused("router", "softmax over tokens", "router-softmax", "mlp.chosen", (PROBS, PROBS.replace("-1", "0")))
_fused("moe", "smallest experts chosen", "router-choice", "mlp.chosen", (TOP, TOP.replace("dim=-1", "largest=False")))
_fused("router", "indices sorted, weights not", "router-choice", "mlp.weights", (TOP, f"{TOP}\n        top_experts = top_experts.sort(dim=-1).values"))
_fused("moe", "router logits in float16", "router-precision", "mlp.router_logits", ("logits = x @ self.weight", "logits = (x.half() @ self.weight.half()).to(x.dtype)"))
_fused("router", "router probabilities in bfloat16", "router-precision", "mlp.weights", (PROBS, PROBS.replace("float32", "bfloat16")))
_fused("moe", "normalisation ignored at k = E", "", "", ("if self.renormalize:", "if False:"), equivalent="norm-topk", num_experts_per_tok=8)

# ---- experts, and the way there and back ---------------------------------------------------------------------------

SWIGLU = "F.silu(self.gate_proj(x)) * self.up_proj(x)"
MINE = "y = expert(x[token]) * weights[token, slot].unsqueeze(-1)"
_modulelist("moe", "gate and up swapped", "gate-up-swapped", "mlp.expert_outputs", (SWIGLU, "self.gate_proj(x) * F.silu(self.up_proj(x))"))
_modulelist("model", "gate and up swapped", "gate-up-swapped", "layers.0.mlp.expert_outputs", (SWIGLU, "self.gate_proj(x) * F.silu(self.up_proj(x))"))
_modulelist("moe", "experts permuted", "experts-permuted", "mlp.routed", ("enumerate(self.experts)", "enumerate(reversed(self.experts))"))
_modulelist("moe", "experts permuted: off by one", "experts-permuted", "mlp.routed", ("y = expert(", "y = self.experts[(e + 1) % self.num_experts]("))
_modulelist("moe", "down reshaped, not transposed", "expert-weight-transposed", "mlp.expert_outputs", (f"self.down_proj({SWIGLU})", f"({SWIGLU}) @ self.down_proj.weight.reshape(-1, x.shape[-1])"))
_modulelist("moe", "combine weights not applied", "weights-not-applied", "mlp.routed", (MINE, "y = expert(x[token])"))
_modulelist("moe", "combine weights on the input", "weights-on-input", "mlp.routed", (MINE, "y = expert(x[token] * weights[token, slot].unsqueeze(-1))"))
_modulelist("moe", "gelu instead of silu", "activation", "mlp.expert_outputs", ("F.silu", "F.gelu"))
_modulelist("layer", "relu instead of silu", "activation", "mlp.expert_outputs", ("F.silu", "F.relu"))
WHERE = "token, slot = torch.where(indices == e)"
_modulelist("moe", "tokens over capacity dropped", "capacity", "mlp.routed", (WHERE, f"{WHERE}\n            capacity = math.ceil(indices.numel() / self.num_experts)\n            token, slot = token[:capacity], slot[:capacity]"))
_modulelist("moe", "capacity off by one", "capacity-off-by-one", "mlp.routed", (WHERE, f"{WHERE}\n            capacity = int(indices.flatten().bincount().max()) - 1\n            token, slot = token[:capacity], slot[:capacity]"))
_modulelist(
    "moe", "shared expert added", "shared-expert", "mlp.output",
    ("self.router = Router(config)", "self.router = Router(config)\n        self.shared_expert = Expert(config.hidden_size, config.moe_intermediate_size)"),
    ("return out.reshape(batch, seq, dim), router_logits", "return (out + self.shared_expert(x)).reshape(batch, seq, dim), router_logits"),
)
LOOP = """out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(indices == e)
            y = expert(x[token]) * weights[token, slot].unsqueeze(-1)
            out.index_add_(0, token, y)
"""
SORTED = """order = indices.flatten().argsort(stable=True)
        token = order // indices.shape[1]
        counts = indices.flatten().bincount(minlength=self.num_experts).tolist()
        outs = torch.zeros(len(order), dim, dtype=x.dtype)
        for e, expert in enumerate(self.experts):
            start = {start}
            rows = slice(start, start + counts[e])
            outs[rows] = expert(x[token[rows]])
        out = torch.zeros_like(x).index_add(0, token, outs * weights.flatten()[order].unsqueeze(-1))
"""
_modulelist("moe", "counts used as offsets", "offsets", "mlp.routed", (LOOP, SORTED.format(start="counts[e - 1] if e else 0")))
_modulelist("moe", "outputs overwritten, not added", "overwritten", "mlp.routed", ("out.index_add_(0, token, y)", "out[token] = y"))

BOTH = "gate, up = (x[rows] @ self.w_gate_up[e]).chunk(2, dim=-1)"
WEIGHED = "out = out * routing_weights[rows, e, None]"
ROWS = "rows = routing_map[:, e].nonzero().squeeze(-1)"
_fused("moe", "gate and up swapped", "gate-up-swapped", "mlp.routed", ("gate, up = (", "up, gate = ("))
_fused("moe", "gate and up interleaved", "gate-up-interleaved", "mlp.routed", (BOTH, "both = x[rows] @ self.w_gate_up[e]\n            gate, up = both[:, 0::2], both[:, 1::2]"))
_fused("moe", "experts permuted", "experts-permuted", "mlp.routed", (BOTH, BOTH.replace("[e]", "[-1 - e]")), ("self.w_down[e]", "self.w_down[-1 - e]"))
_fused("model", "experts permuted", "experts-permuted", "layers.0.mlp.routed", (BOTH, BOTH.replace("[e]", "[-1 - e]")), ("self.w_down[e]", "self.w_down[-1 - e]"))
_fused("moe", "down reshaped, not transposed", "expert-weight-transposed", "mlp.routed", ("hidden @ self.w_down[e]", "F.linear(hidden, self.w_down[e].reshape(x.shape[-1], -1))"))
_fused("moe", "gate and up reshaped, not transposed", "expert-weight-transposed", "mlp.routed", ("x[rows] @ self.w_gate_up[e]", "F.linear(x[rows], self.w_gate_up[e].reshape(-1, x.shape[-1]))"))
_fused("router", "gate reshaped, not transposed", "router-weight-transposed", "mlp.router_logits", ("x @ self.weight", "F.linear(x, self.weight.reshape(-1, x.shape[-1]))"))
_fused("moe", "combine weights not applied", "weights-not-applied", "mlp.routed", (WEIGHED, ""))
_fused("moe", "combine weights on the input", "weights-on-input", "mlp.routed", (WEIGHED, ""), ("x[rows] @", "(x[rows] * routing_weights[rows, e, None]) @"))
_fused("moe", "gelu (tanh) instead of silu", "activation", "mlp.routed", ("F.silu(gate)", 'F.gelu(gate, approximate="tanh")'))
_fused("moe", "sigmoid instead of silu", "activation", "mlp.routed", ("F.silu(gate)", "torch.sigmoid(gate)"))
_fused("moe", "tokens over capacity dropped", "capacity", "mlp.routed", (ROWS, f"{ROWS}[: 5 * len(x) // (4 * self.num_experts) + 1]"))
_fused("moe", "capacity off by one", "capacity-off-by-one", "mlp.routed", (ROWS, f"{ROWS}[: int(routing_map.sum(dim=0).max()) - 1]"))
_fused(
    "moe", "shared expert added", "shared-expert", "mlp.output",
    ("self.gate = TopKGate(config)", "self.gate = TopKGate(config)\n        self.shared = SwiGLU(config)"),
    ("return y.reshape(shape)", "return (y + self.shared(x)).reshape(shape)"),
)
_fused(
    "moe", "counts used as offsets", "offsets", "mlp.routed",
    ("y = torch.zeros_like(x)", "token = routing_map.T.nonzero()[:, 1]\n        counts = routing_map.sum(dim=0).tolist()\n        parts = torch.zeros(len(token), shape[-1], dtype=x.dtype)\n        owner = routing_map.T.nonzero()[:, 0]"),
    (ROWS, "start = counts[e - 1] if e else 0\n            here = slice(start, start + counts[e])\n            rows = token[here]"),
    (WEIGHED, "parts[here] = out * routing_weights[token, owner][here, None]"),
    ("y = y.index_add(0, rows, out)", ""),
    ("return y.reshape(shape)", "return torch.zeros_like(x).index_add(0, token, parts).reshape(shape)"),
)
_fused("moe", "weights of the best choice for all", "best-weight", "mlp.routed", (WEIGHED, "out = out * routing_weights[rows].amax(dim=-1, keepdim=True)"))

_modulelist("moe", "only the best choice computed", "overwritten", "mlp.routed", (WHERE, "token, slot = torch.where(indices[:, :1] == e)"))
_modulelist("moe", "weights of the best choice for all", "best-weight", "mlp.weights", ("weights = weights.to(x.dtype)", "weights = weights.amax(dim=-1, keepdim=True).expand_as(weights).to(x.dtype)"))
_modulelist("moe", "sorted rows, unsorted weights", "weights-unsorted", "mlp.routed", (LOOP, SORTED.format(start="sum(counts[:e])").replace("weights.flatten()[order]", "weights.flatten()")))
_modulelist("moe", "sort not undone", "sort-not-undone", "mlp.routed", (LOOP, SORTED.format(start="sum(counts[:e])").replace("index_add(0, token, outs * weights.flatten()[order].unsqueeze(-1))", "add((outs.view(*indices.shape, dim) * weights[..., None]).sum(1))")))
_modulelist("moe", "token ids repeated, not interleaved", "tokens-tiled", "mlp.routed", (LOOP, SORTED.format(start="sum(counts[:e])").replace("order // indices.shape[1]", "order % len(x)")))
_modulelist("router", "logits divided by the root of the width", "logit-scale", "mlp.weights", (SOFTMAX, "probs = F.softmax(router_logits.float() / math.sqrt(x.shape[-1]), dim=-1)"))
_fused("moe", "outputs overwritten, not added", "overwritten", "mlp.routed", ("y = y.index_add(0, rows, out)", "y = y.index_copy(0, rows, out)"))
_fused("moe", "logits divided by a temperature", "logit-scale", "mlp.weights", (PROBS, PROBS.replace("(logits,", "(logits / 0.7,")))
_fused("router", "sigmoid instead of softmax", "router-score", "mlp.weights", (PROBS, "probs = torch.sigmoid(logits)"))

# ---- attention -----------------------------------------------------------------------------------------------------

EMB, HALF = "emb = torch.cat([freqs, freqs], dim=-1)", "x1, x2 = x.chunk(2, dim=-1)\n    return torch.cat([-x2, x1], dim=-1)"
NEIGHBOURS = "x1, x2 = x[..., 0::2], x[..., 1::2]\n    return torch.stack([-x2, x1], dim=-1).flatten(-2)"
INTERLEAVED = "emb = freqs.repeat_interleave(2, dim=-1)"
INV_FREQ = "inv_freq = 1.0 / (theta **"
_modulelist("attention", "RoPE interleaved", "rope-neighbours", "rope.cos", (EMB, INTERLEAVED), (HALF, NEIGHBOURS))
_modulelist("attention", "RoPE tables interleaved", "rope-tables", "rope.cos", (EMB, INTERLEAVED))
_modulelist("layer", "RoPE rotation of neighbours", "rope-neighbours", "attn.q_rotated", (HALF, NEIGHBOURS))
_modulelist("attention", "RoPE rotated backwards", "rope-sign", "attn.q_rotated", ("[-x2, x1]", "[x2, -x1]"))
_modulelist("attention", "RoPE theta 1e6", "rope-theta", "rope.cos", (INV_FREQ, "inv_freq = 1.0 / (1000000.0 **"))
_modulelist("attention", "RoPE theta 12345", "rope-theta", "rope.cos", (INV_FREQ, "inv_freq = 1.0 / (12345.0 **"))
_modulelist("model", "RoPE theta 5e5", "rope-theta", "rope.cos", (INV_FREQ, "inv_freq = 1.0 / (500000.0 **"))
_modulelist("attention", "RoPE exponents i/P", "rope-theta", "rope.cos", (".float() / head_dim))", ".float() / 2 / head_dim))"))
_modulelist("attention", "positions off by one", "rope-offset", "rope.cos", ("freqs = position_ids[:, :, None].float()", "freqs = (position_ids[:, :, None] + 1).float()"))
_modulelist("attention", "values rotated", "v-rotated", "attn.heads", ("q, k = apply_rotary(q, k, cos, sin)", "q, k = apply_rotary(q, k, cos, sin)\n        v = apply_rotary(v, v, cos, sin)[0]"))
QK = "q = self.q_norm(q)\n        k = self.k_norm(k)\n"
_modulelist("attention", "q/k norm missing", "qk-norm-missing", "attn.q_rotated", (QK, ""))
_modulelist("attention", "k norm missing", "qk-norm-missing", "attn.k_rotated", ("        k = self.k_norm(k)\n", ""))
ALL = "{0} = self.{0}_norm.weight * {0} * torch.rsqrt({0}.pow(2).mean(dim=(-2, -1), keepdim=True) + self.{0}_norm.eps)"
_modulelist("attention", "q/k norm over all heads", "qk-norm-dimension", "attn.q_rotated", (QK, f"{ALL.format('q')}\n        {ALL.format('k')}\n"))
_modulelist("attention", "q/k norm after the rotation", "qk-norm-after-rope", "attn.q", (QK, ""), ("q, k = apply_rotary(q, k, cos, sin)", "q, k = apply_rotary(q, k, cos, sin)\n        q, k = self.q_norm(q), self.k_norm(k)"))
SCALE = " / math.sqrt(self.head_dim)"
_modulelist("attention", "scale of the hidden size", "attention-scale", "attn.heads", (SCALE, " / math.sqrt(hidden_states.shape[-1])"))
_modulelist("layer", "no attention scale", "attention-scale", "attn.heads", (SCALE, ""))
CAUSAL = "        scores = scores.masked_fill(hidden_keys, torch.finfo(scores.dtype).min)\n"
_modulelist("attention", "no causal mask", "causal-mask", "attn.heads", (CAUSAL, ""))
_modulelist("model", "no causal mask", "causal-mask", "layers.0.attn.heads", (CAUSAL, ""))
_modulelist("attention", "causal mask lets the next token in", "causal-mask", "attn.heads", (".triu(1)", ".triu(2)"))
_modulelist("attention", "padding attended to", "padding-ignored", "attn.heads", ("if attention_mask is not None:", "if False:"))
_modulelist("attention", "softmax over queries", "attention-softmax", "attn.heads", ("F.softmax(scores.float(), dim=-1)", "F.softmax(scores.float(), dim=-2)"))
_modulelist("attention", "key/value heads tiled", "kv-order", "attn.heads", (".repeat_interleave(self.groups, dim=1)", ".repeat(1, self.groups, 1, 1)"))
_modulelist("attention", "key/value heads tiled, one for each", "", "", (".repeat_interleave(self.groups, dim=1)", ".repeat(1, self.groups, 1, 1)"), equivalent="kv-order", num_key_value_heads=4)
_modulelist("attention", "output reshaped before transpose", "heads-reshaped", "attn.heads", ("out.transpose(1, 2).reshape", "out.reshape"))
_modulelist(
    "attention", "q, k, v reshaped without transpose", "heads-split", "attn.q",
    (".view(batch, seq, self.num_heads, self.head_dim)", ".view(batch, self.num_heads, seq, self.head_dim)"),
    (".view(batch, seq, self.num_kv_heads, self.head_dim)", ".view(batch, self.num_kv_heads, seq, self.head_dim)"),
    ("        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)\n", ""),
)
_modulelist("attention", "biases present", "biases", "attn.q", ("head_dim, bias=False", "head_dim, bias=True"))
_modulelist("layer", "output bias present", "biases", "attn.output", ("head_dim, hidden, bias=False", "head_dim, hidden, bias=True"))
_modulelist("attention", "output projection untransposed", "attention-weight-transposed", "attn.output", ("return self.o_proj(out)", "return out @ self.o_proj.weight"))

TURNED = "turned = torch.cat((-second, first), dim=-1)"
_fused("attention", "RoPE rotation of neighbours", "rope-neighbours", "attn.q_rotated", ("first, second = x[..., :half], x[..., half:]", "first, second = x[..., 0::2], x[..., 1::2]"), (TURNED, "turned = torch.stack((-second, first), dim=-1).flatten(-2)"))
_fused("model", "RoPE interleaved", "rope-neighbours", "rope.cos", ("angles = torch.cat((angles, angles), dim=-1)", "angles = angles.repeat_interleave(2, dim=-1)"), ("first, second = x[..., :half], x[..., half:]", "first, second = x[..., 0::2], x[..., 1::2]"), (TURNED, "turned = torch.stack((-second, first), dim=-1).flatten(-2)"))
_fused("attention", "RoPE without the minus", "rope-sign", "attn.q_rotated", ("(-second, first)", "(second, first)"))
_fused("model", "RoPE theta 1e6", "rope-theta", "rope.cos", ("config.head_dim, config.rope_theta", "config.head_dim, 1000000.0"))
_fused("model", "positions off by one", "rope-offset", "rope.cos", ("cos, sin = rope_table(positions,", "cos, sin = rope_table(positions + 1,"))
_fused("model", "RoPE table cut at the wrong end", "rope-cut", "rope.cos", ("cos, sin = rope_table(positions,", "cos, sin = rope_table(positions + 64 - tokens.shape[1],"))
_modulelist("attention", "RoPE table cut at the wrong end", "rope-cut", "rope.cos", ("freqs = position_ids[:, :, None].float()", "freqs = (position_ids + 64 - x.shape[1])[:, :, None].float()"))
_modulelist("attention", "no rotation", "rope-missing", "attn.heads", ("        q, k = apply_rotary(q, k, cos, sin)\n", ""))
_modulelist("attention", "mask after the softmax", "mask-after-softmax", "attn.heads", (CAUSAL, ""), ("scores = scores.masked_fill(padding[:, None, None, :], torch.finfo(scores.dtype).min)", "hidden_keys = hidden_keys | padding[:, None, None, :]"), ("out = torch.matmul(probs, v)", "probs = probs.masked_fill(hidden_keys, 0.0)\n        out = torch.matmul(probs, v)"))
_fused("attention", "values rotated", "v-rotated", "attn.heads", ("q, k = rope(q, cos, sin), rope(k, cos, sin)", "q, k, v = rope(q, cos, sin), rope(k, cos, sin), rope(v, cos, sin)"))
_fused("attention", "q/k norm missing", "qk-norm-missing", "attn.q_rotated", ("        q, k = self.q_norm(q), self.k_norm(k)\n", ""))
_fused("attention", "q/k norm after the rotation", "qk-norm-after-rope", "attn.q", ("        q, k = self.q_norm(q), self.k_norm(k)\n", ""), ("q, k = rope(q, cos, sin), rope(k, cos, sin)", "q, k = self.q_norm(rope(q, cos, sin)), self.k_norm(rope(k, cos, sin))"))
_fused("attention", "scaled twice", "attention-scale", "attn.heads", ("scale=self.head_dim**-0.5", "scale=1.0 / self.head_dim"))
_fused("attention", "no causal mask", "causal-mask", "attn.heads", (".tril()", ""))
_fused("attention", "padding attended to", "padding-ignored", "attn.heads", ("if mask is not None:", "if False:"))
_fused("attention", "key/value heads tiled", "kv-order", "attn.heads", ("[:, :, None].expand(b, self.n_kv, repeats,", "[:, None].expand(b, repeats, self.n_kv,"))
_fused("attention", "output reshaped before transpose", "heads-reshaped", "attn.heads", ("y.transpose(1, 2).reshape", "y.reshape"))
_fused("attention", "biases present", "biases", "attn.q", ("head_dim, bias=False", "head_dim, bias=True"))
_fused("attention", "output projection untransposed", "attention-weight-transposed", "attn.output", ("return self.wo(y)", "return y @ self.wo.weight"))

# ---- norms, residuals, embeddings ----------------------------------------------------------------------------------

_modulelist("layer", "RMSNorm epsilon 1e-5", "norm-eps", "attn.input", ("self.eps = eps", "self.eps = 1e-5"))
_modulelist("attention", "RMSNorm epsilon 1e-5", "norm-eps", "attn.q", ("self.eps = eps", "self.eps = 1e-5"))
_modulelist("attention", "RMSNorm epsilon beside the root", "norm-eps", "attn.q", ("x * torch.rsqrt(variance + self.eps)", "x / (variance.sqrt() + self.eps)"))
_modulelist("layer", "RMSNorm statistic in bfloat16", "norm-precision", "attn.input", ("x.pow(2).mean(-1, keepdim=True)", "x.to(torch.bfloat16).pow(2).mean(-1, keepdim=True).to(x.dtype)"))
_modulelist("layer", "1 + weight in RMSNorm", "norm-weight", "attn.input", ("return self.weight * x", "return (1 + self.weight) * x"))
_modulelist("layer", "LayerNorm for RMSNorm", "norm-kind", "attn.input", ("x = x.float()", "x = x.float() - x.float().mean(-1, keepdim=True)"))
_modulelist("layer", "attention residual after the norm", "residual", "attn.residual", ("residual = hidden_states\n        hidden_states = self.input_layernorm(hidden_states)", "hidden_states = self.input_layernorm(hidden_states)\n        residual = hidden_states"))
_modulelist("layer", "MLP residual missing", "residual", "mlp.residual", ("return residual + hidden_states", "return hidden_states"))
_modulelist("model", "embedding tied", "tied", "logits", ("bias=False)\n\n    def forward(self, input_ids", "bias=False)\n        self.lm_head.weight = self.embed_tokens.weight\n\n    def forward(self, input_ids"))
_modulelist("model", "last norm missing", "norm-kind", "logits", ("        hidden_states = self.norm(hidden_states)\n", ""))
_fused("layer", "RMSNorm epsilon 1e-8", "norm-eps", "attn.input", ("self.eps = eps", "self.eps = 1e-8"))
_fused("model", "RMSNorm epsilon 1e-5", "norm-eps", "layers.0.attn.input", ("self.eps = eps", "self.eps = 1e-5"))
_fused("layer", "RMSNorm statistic in bfloat16", "norm-precision", "attn.input", ("h.square().mean(dim=-1, keepdim=True)", "h.bfloat16().square().mean(dim=-1, keepdim=True).to(h.dtype)"))
_fused("attention", "RMSNorm weight left out", "norm-weight", "attn.q", ("return scale * h.to(x.dtype)", "return h.to(x.dtype)"))
_fused("layer", "attention residual missing", "residual", "attn.residual", ("x = x + self.attn(", "x = self.attn("))
_fused("layer", "MLP residual after the norm", "residual", "mlp.residual", ("return x + self.ffn(self.ffn_norm(x))", "x = self.ffn_norm(x)\n        return x + self.ffn(x)"))
_fused("model", "embedding tied", "tied", "logits", ("bias=False)\n\n    def forward(self, tokens", "bias=False)\n        self.out_head.weight = self.tok_emb.weight\n\n    def forward(self, tokens"))

_modulelist("layer", "norms after the additions", "layer-order", "attn.input",
    ("        hidden_states = self.input_layernorm(hidden_states)\n", ""),
    ("hidden_states = residual + hidden_states\n        residual = hidden_states\n        hidden_states = self.post_attention_layernorm(hidden_states)\n", "hidden_states = self.input_layernorm(residual + hidden_states)\n        residual = hidden_states\n"),
    ("return residual + hidden_states", "return self.post_attention_layernorm(residual + hidden_states)"),
)
_fused("model", "attention and MLP in parallel", "layer-order", "layers.0.attn.residual", ("x = x + self.attn(self.attn_norm(x), cos, sin, mask)\n        return x + self.ffn(self.ffn_norm(x))", "return x + self.attn(self.attn_norm(x), cos, sin, mask) + self.ffn(self.ffn_norm(x))"))
_fused("layer", "no norm before the MLP", "norm-kind", "mlp.router_logits", ("self.ffn(self.ffn_norm(x))", "self.ffn(x)"))
_modulelist("attention", "attention limited to a window", "window", "attn.heads", (".triu(1)", ".triu(1) | torch.ones(seq, seq, dtype=torch.bool).tril(-5)"))
_fused("layer", "attention limited to a window", "window", "attn.heads", ("device=x.device).tril()", "device=x.device).tril().triu(-3)"))
_fused("attention", "no rotation", "rope-missing", "attn.q_rotated", ("        q, k = rope(q, cos, sin), rope(k, cos, sin)\n", ""))

# ---- what gradients alone show: every forward tensor agrees -----------------------------------------------------------

CALL = "router_logits, weights, indices = self.router(x)"
WEIGHT = "weights[token, slot].unsqueeze(-1)"
SUM = "weights.sum(dim=-1, keepdim=True)"
NOT_MODEL = "router-without-gradient"
_modulelist("moe", "router under no_grad", NOT_MODEL, "grad.input", (CALL, f"with torch.no_grad():\n            {CALL}"))
_modulelist("model", "router under no_grad", NOT_MODEL, "grad.input", (CALL, f"with torch.no_grad():\n            {CALL}"))
_modulelist("layer", "combine weights detached", NOT_MODEL, "grad.input", (WEIGHT, WEIGHT.replace(".un", ".detach().un")))
_modulelist("router", "combine weights detached", NOT_MODEL, "grad.input", ("weights = weights.to(x.dtype)", "weights = weights.to(x.dtype).detach()"))
_modulelist("moe", "router's input detached", "router-cut", "grad.input", (CALL, CALL.replace("(x)", "(x.detach())")))
_modulelist("router", "sum of the chosen detached", "router-cut", "grad.input", (SUM, f"{SUM}.detach()"))
_modulelist("moe", "experts' input detached", "experts-cut", "grad.input", ("expert(x[token])", "expert(x[token].detach())"))
_modulelist("moe", "experts' outputs detached", "experts-cut", "grad.input", ("expert(x[token])", "expert(x[token]).detach()"))
MADE = "self.router = Router(config)"
_modulelist("moe", "an expert frozen", "frozen", "grad.experts.gate_up_proj", ("y = expert(x[token])", "if e == 2:\n                expert.requires_grad_(False)\n            y = expert(x[token])"))
_modulelist("layer", "gate frozen", "frozen", "grad.mlp.gate.weight", (MADE, f"{MADE}.requires_grad_(False)"))
_modulelist("attention", "values detached", "attention-cut", "grad.input", ("out = torch.matmul(probs, v)", "out = torch.matmul(probs, v.detach())"))
_modulelist("layer", "norm's statistic under no_grad", "norm-cut", "grad.input", ("torch.rsqrt(variance + self.eps)", "torch.rsqrt(variance.detach() + self.eps)"))
_modulelist("layer", "residual detached", "residual-cut", "grad.input", ("residual = hidden_states\n        hidden_states = self.input_layernorm", "residual = hidden_states.detach()\n        hidden_states = self.input_layernorm"))
GIVEN = "self.gate(x)"
_fused("moe", "router under no_grad", NOT_MODEL, "grad.input", ("_, routing_map, routing_weights = self.gate(x)", "with torch.no_grad():\n            _, routing_map, routing_weights = self.gate(x)"))
_fused("moe", "combine weights detached", NOT_MODEL, "grad.input", (WEIGHED, WEIGHED.replace("None]", "None].detach()")))
_fused("model", "combine weights detached", NOT_MODEL, "grad.input", (WEIGHED, WEIGHED.replace("None]", "None].detach()")))
_fused("layer", "router's input detached", "router-cut", "grad.input", (GIVEN, "self.gate(x.detach())"))
_fused("moe", "experts' input detached", "experts-cut", "grad.input", ("(x[rows] @", "(x[rows].detach() @"))
_fused("moe", "expert weights as .data", "frozen", "grad.experts.down_proj", ("self.w_down[e]", "self.w_down.data[e]"))
_fused("router", "gate's weight as .data", "frozen", "grad.weight", ("x @ self.weight", "x @ self.weight.data"))
_fused("attention", "keys and values under no_grad", "attention-cut", "grad.input", ("attn_mask=bias, scale", "attn_mask=bias, scale"), ("y = F.scaled_dot_product_attention(q, k, v", "y = F.scaled_dot_product_attention(q, k.detach(), v.detach()"))
_fused("layer", "norm's statistic detached", "norm-cut", "grad.input", ("keepdim=True) + eps", "keepdim=True).detach() + eps"))

# ---- what no hypothesis makes: it must be caught, and called by no name -----------------------------------------------

_modulelist("moe", "expert outputs clamped", "", "mlp.routed", ("y = expert(x[token])", "y = expert(x[token]).clamp(-0.5, 0.5)"))
_fused("attention", "keys averaged over neighbours", "", "attn.k_rotated", ("rope(q, cos, sin), rope(k, cos, sin)", "rope(q, cos, sin), rope((k + k.roll(1, dims=2)) / 2, cos, sin)"))

# ---- what shows in bfloat16 alone: a cast that is missing changes nothing where everything is exact ------------------

_modulelist("layer", "RMSNorm not in float32", "", "", ("        x = x.float()\n", ""), equivalent="casts", in_bfloat16="norm-precision attn.input")
_modulelist("attention", "RMSNorm not in float32", "", "", ("        x = x.float()\n", ""), equivalent="casts", in_bfloat16="norm-precision attn.q")
_modulelist("router", "softmax not in float32", "", "", ("router_logits.float()", "router_logits"), equivalent="casts", in_bfloat16="router-precision mlp.weights")
_fused("layer", "RMSNorm not in float32", "", "", ("h = x.float()", "h = x"), equivalent="casts", in_bfloat16="norm-precision attn.input")
_fused("moe", "softmax not in float32", "", "", ("torch.softmax(logits, dim=-1, dtype=torch.float32)", "torch.softmax(logits, dim=-1)"), equivalent="casts", in_bfloat16="router-precision mlp.weights")
# fmt: on

"""Grouped-query attention with rotary positions.

Shape suffixes: B batch, S sequence, D hidden, H heads, G key/value heads, P head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moectl.parity.case import Inputs, Unsupported, positions_of
from moectl.parity.formula import AttentionFormula, Formula
from moectl.parity.reference.numerics import rms_norm, softmax, wide
from moectl.parity.reference.scope import Scope

#: Cosines and sines ``[B, S, P]`` for the queries, and for the keys: the same, but for a planted mistake.
Tables = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def attention(scope: Scope, x_BSD: Tensor, tables: Tables, allowed_B1SS: Tensor) -> Tensor:
    """``softmax(q·kᵀ/√P) · v`` per head, heads side by side, then the output projection: ``[B, S, D]``.

    Args:
        scope: of the attention module's weights, and of ``attn.*`` on the tape.
        tables: from :func:`rope_tables`.
        allowed_B1SS: from :func:`who_sees_whom`.
    """
    rule, casts = scope.formula.attention, scope.formula.casts
    q_BSHP, k_BSGP, v_BSGP = _heads(scope, x_BSD)
    for name, tensor in (("q", q_BSHP), ("k", k_BSGP), ("v", v_BSGP)):
        scope.record(name, tensor.transpose(1, 2))
    if rule.rope:
        q_BSHP, k_BSGP = rotate(q_BSHP, tables[0], rule), rotate(k_BSGP, tables[1], rule)
        v_BSGP = rotate(v_BSGP, tables[1], rule) if rule.v_rotated else v_BSGP
    if scope.formula.qk_norm_after_rope:
        q_BSHP, k_BSGP = _head_norm(scope, q_BSHP, "q"), _head_norm(scope, k_BSGP, "k")
    scope.record("q_rotated", q_BSHP.transpose(1, 2))
    scope.record("k_rotated", k_BSGP.transpose(1, 2))

    kv_of_H = kv_head_of_each_query_head(rule).to(x_BSD.device)
    q_BHSP = q_BSHP.transpose(1, 2)
    k_BHSP, v_BHSP = k_BSGP[:, :, kv_of_H].transpose(1, 2), v_BSGP[:, :, kv_of_H].transpose(1, 2)
    logits_BHSS = q_BHSP @ k_BHSP.transpose(2, 3) * scale_of(scope.formula)
    if rule.mask_on == "logits":
        # The lowest finite number is added, and not -inf put in place: who may see nobody (padding at the left)
        # then sees everybody alike, later tokens too, and its row of the softmax is finite.
        lowest = torch.finfo(logits_BHSS.dtype).min
        logits_BHSS = logits_BHSS + torch.zeros_like(logits_BHSS).masked_fill(~allowed_B1SS, lowest)
    over = {"keys": -1, "queries": -2, "heads": 1}[rule.softmax_over]
    weights_BHSS = softmax(logits_BHSS, over, casts)
    if rule.mask_on == "probabilities":
        weights_BHSS = weights_BHSS * allowed_B1SS

    heads_BHSP = weights_BHSS @ v_BHSP
    if rule.merge == "transposed":
        heads_BHSP = heads_BHSP.transpose(1, 2)
    merged_BSQ = heads_BHSP.reshape(*x_BSD.shape[:2], rule.num_heads * rule.head_dim)
    scope.record("heads", merged_BSQ)
    output_BSD = scope.linear(merged_BSQ, "o_proj", role="o", bias=rule.out_bias)
    scope.record("output", output_BSD)
    return output_BSD


def _heads(scope: Scope, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[B, S, H, P]``, keys and values ``[B, S, G, P]``: projected, normed, clipped, cut into heads."""
    rule = scope.formula.attention
    (batch, length, _), cut = x_BSD.shape, []
    for role, num_heads in (("q", rule.num_heads), ("k", rule.num_kv_heads), ("v", rule.num_kv_heads)):
        x = scope.linear(x_BSD, f"{role}_proj", role=role, bias=rule.bias)
        if rule.split == "transposed":
            x = x.reshape(batch, length, num_heads, rule.head_dim)
        else:
            x = x.reshape(batch, num_heads, length, rule.head_dim).transpose(1, 2)
        if role != "v" and not scope.formula.qk_norm_after_rope:
            x = _head_norm(scope, x, role)
        if rule.clip_qkv is not None:
            x = x.clamp(min=-rule.clip_qkv, max=rule.clip_qkv)
        cut.append(scope.passed(x, role))
    return cut[0], cut[1], cut[2]


def _head_norm(scope: Scope, x_BSHP: Tensor, role: str) -> Tensor:
    """RMSNorm of queries or keys: over each head, or over all heads of a token at once."""
    kind, norm = scope.formula.attention.qk_norm, scope.norm_formula(role)
    if kind == "none" or norm.kind == "identity":
        return x_BSHP
    num_heads, head_dim = x_BSHP.shape[2:]
    weight_HP = None
    if norm.weight != "none":
        weight = scope.weight(f"{role}_norm.weight")
        if weight.numel() not in (head_dim, num_heads * head_dim):
            raise Unsupported(f"'{role}_norm.weight' has {weight.numel()} numbers: neither one head's nor all heads'")
        weight_HP = weight.reshape(-1, head_dim).expand(num_heads, head_dim)
    if kind == "head":
        return rms_norm(x_BSHP, weight_HP, norm, scope.formula.casts)
    flat = None if weight_HP is None else weight_HP.flatten()
    return rms_norm(x_BSHP.flatten(2), flat, norm, scope.formula.casts).reshape(x_BSHP.shape)


def rope_tables(scope: Scope, inputs: Inputs, dtype: torch.dtype) -> Tables:
    """Cosines and sines ``[B, S, P]`` of position times frequency, ``θ^(-2i/P)`` for pair i.

    Source: Su et al. 2021, arXiv:2104.09864; halves in the order of GPT-NeoX and Llama in transformers.
    """
    rule, positions_BS = scope.formula.attention, positions_of(inputs)
    if rule.rope_restarts and inputs.chunks:
        starts = [
            start for start, length in zip(_starts(inputs.chunks), inputs.chunks, strict=True) for _ in range(length)
        ]
        positions_BS = positions_BS - torch.tensor(starts, device=positions_BS.device)
    shifted = _table(scope.formula, positions_BS + rule.rope_offset, dtype)
    if rule.rope_offset_of == "both":
        tables = shifted, shifted
    else:
        plain = _table(scope.formula, positions_BS, dtype)
        tables = (shifted, plain) if rule.rope_offset_of == "q" else (plain, shifted)
    recorded = shifted if rule.rope_offset_of == "both" else plain
    if rule.rope:
        scope.tape.record("rope.cos", recorded[0])
        scope.tape.record("rope.sin", recorded[1])
    return tables


def _starts(chunks: tuple[int, ...]) -> list[int]:
    return [sum(chunks[:number]) for number in range(len(chunks))]


def _table(formula: Formula, positions_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rule = formula.attention
    inner = wide(torch.empty(0, dtype=dtype), formula.casts).dtype
    exponents_F = torch.arange(0, rule.head_dim, 2, device=positions_BS.device).to(inner) / rule.head_dim
    frequencies_F = 1.0 / rule.rope_theta**exponents_F
    angles_BSF = positions_BS[..., None].to(inner) * frequencies_F
    if rule.rope_table == "halves":
        angles_BSP = torch.cat([angles_BSF, angles_BSF], dim=-1)
    else:
        angles_BSP = torch.repeat_interleave(angles_BSF, 2, dim=-1)
    return angles_BSP.cos().to(dtype), angles_BSP.sin().to(dtype)


def rotate(x_BSHP: Tensor, table: tuple[Tensor, Tensor], rule: AttentionFormula) -> Tensor:
    """Each pair of numbers turned by its angle: ``(a·cos - b·sin, b·cos + a·sin)``."""
    cos_BS1P, sin_BS1P = table[0][:, :, None], table[1][:, :, None]
    halves = rule.rope_rotation == "halves"
    first, second = x_BSHP.chunk(2, dim=-1) if halves else (x_BSHP[..., 0::2], x_BSHP[..., 1::2])
    pair = {"plus": (-second, first), "minus": (second, -first), "none": (second, first)}[rule.rope_sign]
    turned_BSHP = torch.cat(pair, dim=-1) if halves else torch.stack(pair, dim=-1).flatten(-2)
    return x_BSHP * cos_BS1P + turned_BSHP * sin_BS1P


def scale_of(formula: Formula) -> float:
    """What the products of queries and keys are multiplied by."""
    head_dim, hidden_size = formula.attention.head_dim, formula.experts.hidden_size
    return {
        "head_dim": head_dim**-0.5,
        "hidden_size": hidden_size**-0.5,
        "one_over_head_dim": 1.0 / head_dim,
        "none": 1.0,
    }[formula.attention.scale]


def kv_head_of_each_query_head(rule: AttentionFormula) -> Tensor:
    """``[H]``: neighbouring query heads share a key/value head (Ainslie et al. 2023, arXiv:2305.13245)."""
    heads_H = torch.arange(rule.num_heads)
    if rule.kv_repeat == "grouped":
        return heads_H // (rule.num_heads // rule.num_kv_heads)
    return heads_H % rule.num_kv_heads


def who_sees_whom(rule: AttentionFormula, inputs: Inputs, like: Tensor) -> Tensor:
    """``[B or 1, 1, S, S]`` bool: query i may attend to key j.

    No later token, no padding, no other document. Padding itself attends to the real tokens before it.

    Args:
        like: ``[B, S, ...]``, for size and device.
    """
    place_S = torch.arange(like.shape[1], device=like.device)
    allowed = torch.ones(1, like.shape[1], like.shape[1], dtype=torch.bool, device=like.device)
    if rule.causal:
        allowed = allowed & (place_S[None, :] <= place_S[:, None] + rule.causal_offset)
    if rule.window is not None:
        allowed = allowed & (place_S[None, :] > place_S[:, None] - rule.window)
    if inputs.attention_mask is not None:
        allowed = allowed & inputs.attention_mask.bool()[:, None, :]
    if inputs.doc_ids is not None:
        allowed = allowed & (inputs.doc_ids[:, :, None] == inputs.doc_ids[:, None, :])
    return allowed[:, None]

"""Auxiliary losses, as small pure functions of routing tensors. All arithmetic in float32 or above.

Shape suffixes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moectl.moe.router import at_least_float32
from moectl.moe.stats import expert_counts


def load_balancing_loss(
    router_probs: Tensor,
    topk_indices: Tensor,
    num_experts: int,
    token_mask: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    counts: Tensor | None = None,
) -> Tensor:
    """Switch load-balancing loss ``E · Σ_e f_e · P_e`` of one layer: a 0-d tensor.

    ``f_e`` is expert e's share of all chosen assignments of real tokens (so Σf = 1 for any k), not
    differentiated; ``P_e`` the mean of ``router_probs`` over real tokens. 1.0 at perfect balance for
    every k (a reference, not a lower bound), at most E/k at collapse, 0 for zero tokens. Never pool
    layers: four layers each collapsed on another pair of experts would score 1.0.

    Args:
        router_probs: ``[T, E]``, post-noise.
        topk_indices: ``[T, K]``.
        num_experts: ``E``.
        token_mask: ``[T]`` bool, real tokens; None for all.
        keep: ``[T, K]`` bool, slots in use; None for all.
        counts: ``[E]`` assignments to take ``f`` from instead, such as those of the whole global
            batch (Qiu et al. 2025, arXiv:2501.11873).

    Source: Fedus et al. 2021, arXiv:2101.03961, eq. 4-6.
    """
    probs_TE = at_least_float32(router_probs)
    if counts is None:
        counts = expert_counts(topk_indices, num_experts, keep=keep, token_mask=token_mask)
    mean_E = masked_mean(probs_TE, token_mask)
    total = counts.sum().clamp(min=1)
    share_E = counts.to(probs_TE.dtype) / total
    return num_experts * (share_E.detach() * mean_E).sum()


def router_z_loss(router_logits: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """``mean(logsumexp(logits)²)`` over real tokens of ``[T, E]`` raw logits: a 0-d tensor, 0 for zero tokens.

    Source: ST-MoE, Zoph et al. 2022, arXiv:2202.08906, eq. 5.
    """
    return masked_mean(torch.logsumexp(at_least_float32(router_logits), dim=-1).square(), token_mask)


def masked_mean(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """Mean over the first dimension (tokens), of real tokens only; 0 for zero tokens."""
    if token_mask is None:
        return values.sum(0) / max(values.shape[0], 1)
    mask_T = token_mask.reshape(-1)
    padding = ~mask_T.bool().reshape(-1, *[1] * (values.dim() - 1))
    # Filled, not multiplied by 0: padding may hold NaN, and NaN · 0 is NaN.
    return values.masked_fill(padding, 0.0).sum(0) / mask_T.sum().clamp(min=1)

"""Moving tokens to their experts and back: one stable sort, one gather, one weighted scatter-add.

Shape suffixes: T tokens, D hidden, E experts, K experts per token, A assignments in use (at most T·K).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moectl.moe.router import at_least_float32
from moectl.moe.stats import expert_counts
from moectl.moe.types import RouterOutput


class Dispatch(NamedTuple):
    """Assignments ordered by expert, so that each expert's tokens are one contiguous segment.

    Attributes:
        token_ids: ``[A]`` int64, the token of each assignment; within an expert, in token order.
        expert_ids: ``[A]`` int64, ascending.
        weights: ``[A]`` combine weights, with the router's gradient.
        tokens_per_expert: ``[E]`` int64; sums to A.
    """

    token_ids: Tensor
    expert_ids: Tensor
    weights: Tensor
    tokens_per_expert: Tensor


def dispatch(routing: RouterOutput) -> Dispatch:
    """Order the assignments of a routing decision by expert. Unused slots are left out."""
    num_experts = routing.router_probs.shape[-1]
    top_k = routing.topk_indices.shape[-1]
    expert_A = routing.topk_indices.reshape(-1)
    weight_A = routing.topk_weights.reshape(-1)
    if routing.keep is None:
        expert_ids, order_A = torch.sort(expert_A, stable=True)
    else:
        used_A = routing.keep.reshape(-1).nonzero().squeeze(1)
        expert_ids, within_A = torch.sort(expert_A[used_A], stable=True)
        order_A = used_A[within_A]
    return Dispatch(
        token_ids=order_A // top_k,
        expert_ids=expert_ids,
        weights=weight_A.index_select(0, order_A),
        tokens_per_expert=expert_counts(expert_ids, num_experts),
    )


def combine(plan: Dispatch, outputs_AD: Tensor, num_tokens: int) -> Tensor:
    """Weighted sum of the experts' outputs per token: ``[A, D] -> [T, D]``.

    Accumulates in float32 when activations are lower, and returns their dtype. A token without an
    assignment gets zeros.
    """
    exact_AD = at_least_float32(outputs_AD)
    weighted_AD = exact_AD * plan.weights.to(exact_AD.dtype)[:, None]
    combined_TD = weighted_AD.new_zeros(num_tokens, outputs_AD.shape[-1])
    return combined_TD.index_add_(0, plan.token_ids, weighted_AD).to(outputs_AD.dtype)

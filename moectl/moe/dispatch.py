"""Moving tokens to their experts and back: one stable sort, one gather, one weighted scatter-add.

Every shape is known before the routing decision is, so nothing here waits for the device, and a
compiled graph fits every batch. Shape suffixes: T tokens, D hidden, E experts, K experts per token,
A = T·K assignments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moectl.moe.capacity import Capacity, apply_capacity
from moectl.moe.router import at_least_float32
from moectl.moe.types import RouterOutput


class Dispatch(NamedTuple):
    """Assignments ordered by expert, so that each expert's tokens are one contiguous segment.

    Unused slots (padding, or lost to capacity) are at the end, with expert id ``E``, one past the
    last: only the first ``tokens_per_expert.sum()`` rows mean anything.

    Attributes:
        token_ids: ``[A]`` int64, the token of each assignment; within an expert, in token order.
        expert_ids: ``[A]`` int64, ascending; ``E`` where the slot is unused.
        weights: ``[A]`` combine weights, with the router's gradient; 0 where the slot is unused.
        tokens_per_expert: ``[E]`` int64; sums to the number of used slots.
        dropped: ``[E]`` int64, assignments lost to capacity, by the expert that the router chose;
            None without capacity.
    """

    token_ids: Tensor
    expert_ids: Tensor
    weights: Tensor
    tokens_per_expert: Tensor
    dropped: Tensor | None = None


def dispatch(routing: RouterOutput, capacity: Capacity | None = None, *, token_mask: Tensor | None = None) -> Dispatch:
    """Order the assignments of a routing decision by expert.

    Args:
        routing: the router's decision; it is not changed.
        capacity: how many tokens an expert takes, and what becomes of the others; None for no limit.
        token_mask: ``[T]`` bool, real tokens, from whose number the capacity follows; None for all.
    """
    num_experts = routing.router_probs.shape[-1]
    dropped_E = None
    if capacity is not None:
        routing, dropped_E = apply_capacity(routing, capacity, token_mask)
    expert_TK, weight_TK = routing.topk_indices, routing.topk_weights
    if routing.keep is not None:
        expert_TK = torch.where(routing.keep, expert_TK, num_experts)
        weight_TK = weight_TK.masked_fill(~routing.keep, 0.0)
    expert_ids, order_A = torch.sort(expert_TK.reshape(-1), stable=True)
    return Dispatch(
        token_ids=order_A // expert_TK.shape[-1],
        expert_ids=expert_ids,
        weights=weight_TK.reshape(-1).index_select(0, order_A),
        tokens_per_expert=count_sorted(expert_ids, num_experts),
        dropped=dropped_E,
    )


def combine(plan: Dispatch, outputs_AD: Tensor, num_tokens: int) -> Tensor:
    """Weighted sum of the experts' outputs per token: ``[A, D] -> [T, D]``.

    Accumulates in float32 when activations are lower, and returns their dtype. A token without an
    assignment gets zeros. The rows of unused slots may hold anything, NaN too.
    """
    unused_A = plan.expert_ids >= plan.tokens_per_expert.shape[0]
    exact_AD = at_least_float32(outputs_AD).masked_fill(unused_A[:, None], 0.0)
    weighted_AD = exact_AD * plan.weights.to(exact_AD.dtype)[:, None]
    combined_TD = weighted_AD.new_zeros(num_tokens, outputs_AD.shape[-1])
    return combined_TD.index_add_(0, plan.token_ids, weighted_AD).to(outputs_AD.dtype)


def count_sorted(expert_ids: Tensor, num_experts: int) -> Tensor:
    """How often each expert ``0..E-1`` occurs in ascending ids: ``[E]`` int64; larger ids are not counted.

    E + 1 binary searches. ``bincount`` has a shape that depends on its input, ``histc`` counts in
    floating point (inexact past 2²⁴ in float32), and both read every id.
    """
    edges = torch.searchsorted(expert_ids, torch.arange(num_experts + 1, device=expert_ids.device))
    return edges[1:] - edges[:-1]

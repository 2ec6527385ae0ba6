"""Descriptive statistics of routing, as pure functions over counts. Nothing here is differentiated.

Shape suffixes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expert_counts(
    topk_indices: Tensor, num_experts: int, keep: Tensor | None = None, token_mask: Tensor | None = None
) -> Tensor:
    """Assignments per expert ``[E]`` int64, over real tokens and kept slots of ``[T, K]``, or of a flat ``[A]``.

    Experts that do not occur count 0.
    """
    used_TK = torch.ones_like(topk_indices) if keep is None else keep.to(torch.int64)
    if token_mask is not None:
        used_TK = used_TK * token_mask.reshape(-1, 1)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=topk_indices.device)
    return counts_E.index_add(0, topk_indices.reshape(-1), used_TK.reshape(-1))


def shares(counts_E: Tensor) -> Tensor:
    """Counts as shares that sum to one (all zero for no counts), float64."""
    return counts_E.double() / counts_E.sum(-1, keepdim=True).clamp(min=1)


def load_cv(counts_E: Tensor) -> float:
    """Coefficient of variation of the load (population standard deviation over mean); 0 for no counts."""
    load = counts_E.double()
    mean = load.mean()
    return float(load.std(correction=0) / mean) if mean > 0 else 0.0


def max_share(counts_E: Tensor) -> float:
    """Share of the busiest expert among all assignments."""
    return float(shares(counts_E).max())


def dead_experts(counts_E: Tensor) -> list[int]:
    """Experts that were never chosen."""
    return [int(expert) for expert in (counts_E == 0).nonzero().flatten()]


def dropped_fraction(dropped_E: Tensor, chosen_E: Tensor) -> float:
    """Share of all assignments that capacity dropped; 0 for no assignments.

    Args:
        dropped_E: assignments lost, by the expert that the router chose.
        chosen_E: assignments before capacity.
    """
    return float(dropped_E.double().sum() / chosen_E.double().sum().clamp(min=1))


def effective_experts(counts_E: Tensor) -> float:
    """``exp`` of the entropy of the load: E when balanced, 1 when one expert takes all."""
    return float(torch.special.entr(shares(counts_E)).sum().exp()) if counts_E.sum() > 0 else 0.0


def balance_value(counts_E: Tensor, mean_probs_E: Tensor) -> float:
    """Switch balance value ``E · Σ f · P`` from counts ``[E]`` and mean probabilities ``[E]``.

    Read it beside its balanced value 1.0 and its collapse value E/k (:func:`collapse_value`).
    """
    return float(counts_E.numel() * (shares(counts_E) * mean_probs_E.double()).sum())


def collapse_value(num_experts: int, top_k: int) -> float:
    """The Switch balance value when the same k experts take every token with all probability: E/k."""
    return num_experts / top_k

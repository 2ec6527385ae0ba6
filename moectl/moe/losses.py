"""Auxiliary losses, as small pure functions of routing tensors. All arithmetic in float32 or above.

A balance loss is a number made of what one layer's experts got (:class:`LayerLoad`). Which tokens
that load is taken over (a micro-batch, each sequence of it, the whole optimizer step) is the
caller's to choose: losses judge, they do not collect.

Shape suffixes: T tokens, E experts, K experts per token, G groups of tokens (such as sequences).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moectl.moe.router import at_least_float32
from moectl.moe.stats import expert_counts
from moectl.moe.types import RouterOutput


class LayerLoad(NamedTuple):
    """What the experts of one layer got from some tokens: all that a balance loss looks at.

    Every field may have a leading dimension ``G``: then each group of tokens has its own numbers.

    Attributes:
        counts: ``[E]`` assignments of real tokens and kept slots; never differentiated.
        probs: ``[E]`` mean of ``router_probs`` over real tokens, with the router's gradient.
        entropy: mean entropy of the clean distribution over real tokens, nats, with its gradient.
        tokens: number of real tokens.
        pooled: ``[E]`` mean of ``router_probs`` over more tokens than these (the whole optimizer
            step, which these are a part of), without gradient; None where these tokens are all.
    """

    counts: Tensor
    probs: Tensor
    entropy: Tensor
    tokens: Tensor
    pooled: Tensor | None = None


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
    if counts is None:
        counts = expert_counts(topk_indices, num_experts, keep=keep, token_mask=token_mask)
    return _switch(counts, masked_mean(at_least_float32(router_probs), token_mask))


def cv_squared_loss(
    router_probs: Tensor,
    topk_indices: Tensor,
    num_experts: int,
    token_mask: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    counts: Tensor | None = None,
) -> Tensor:
    """``CV²(importance) + CV²(load)`` of one layer: squared coefficients of variation, a 0-d tensor.

    The importance of an expert is its mean ``router_probs`` over real tokens; its load is its share
    of their assignments. Counts have no gradient, so the load takes that of the importance (straight
    through): its term pushes as the Switch loss does, twice as hard. The paper's own smooth load
    needs the scale of the router's noise, which a routing decision does not carry.

    0 at perfect balance, which is a lower bound; ``2·(E/k - 1)`` at collapse, when the same k experts
    take all tokens and share all probability. 0 for zero tokens. Arguments as for
    :func:`load_balancing_loss`.

    Source: Shazeer et al. 2017, arXiv:1701.06538, section 4 and appendix A.
    """
    if counts is None:
        counts = expert_counts(topk_indices, num_experts, keep=keep, token_mask=token_mask)
    return _cv_squared(counts, masked_mean(at_least_float32(router_probs), token_mask), None)


def entropy_loss(probs: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Minus the mean entropy (nats) of ``[T, E]`` distributions over real tokens: a 0-d tensor.

    Added to the loss it keeps each token's distribution wide. ``-ln E`` when every token's is
    uniform, which is the lower bound; ``-ln k`` at collapse, when the same k experts share all
    probability evenly. A router that is sure of every token and yet balanced scores like a collapse
    on one expert, 0: this loss sees tokens, not loads. 0 for zero tokens. To be given the noise-free
    ``router_probs_clean``: noise is no doubt of the router's.
    """
    return -masked_mean(_entropy(at_least_float32(probs)), token_mask)


def router_z_loss(router_logits: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """``mean(logsumexp(logits)²)`` over real tokens of ``[T, E]`` raw logits: a 0-d tensor, 0 for zero tokens.

    Source: ST-MoE, Zoph et al. 2022, arXiv:2202.08906, eq. 5.
    """
    return masked_mean(torch.logsumexp(at_least_float32(router_logits), dim=-1).square(), token_mask)


class BalanceLoss(NamedTuple):
    """A balance loss by name, with the two values that its numbers are read beside.

    Attributes:
        of: the loss of a :class:`LayerLoad`, one number per group.
        balanced: its value at perfect balance, from ``E`` and ``k``.
        collapse: its value when the same k experts share all tokens and all probability.
        from_load: whether it is made of the load, so that the scope of the counts matters to it.
    """

    of: Callable[[LayerLoad], Tensor]
    balanced: Callable[[int, int], float]
    collapse: Callable[[int, int], float]
    from_load: bool = True


BALANCE_LOSSES: dict[str, BalanceLoss] = {
    "switch": BalanceLoss(
        lambda load: _switch(load.counts, load.probs),
        balanced=lambda num_experts, top_k: 1.0,
        collapse=lambda num_experts, top_k: num_experts / top_k,
    ),
    "cv2": BalanceLoss(
        lambda load: _cv_squared(load.counts, load.probs, load.pooled),
        balanced=lambda num_experts, top_k: 0.0,
        collapse=lambda num_experts, top_k: 2 * (num_experts / top_k - 1),
    ),
    "entropy": BalanceLoss(
        lambda load: -load.entropy,
        balanced=lambda num_experts, top_k: -math.log(num_experts),
        collapse=lambda num_experts, top_k: -math.log(top_k),
        from_load=False,
    ),
}


def layer_load(routing: RouterOutput, token_mask: Tensor | None = None, *, groups: int = 1) -> LayerLoad:
    """The load ``[G, ...]`` of each of ``groups`` equal runs of a call's tokens, such as the rows of a batch."""
    probs_TE = at_least_float32(routing.router_probs)
    num_tokens, num_experts = probs_TE.shape
    assert num_tokens % groups == 0, f"{num_tokens} tokens are not {groups} equal groups"
    size = num_tokens // groups
    cell_TK = routing.topk_indices
    if groups > 1:
        first_T = torch.arange(groups, device=cell_TK.device).repeat_interleave(size) * num_experts
        cell_TK = cell_TK + first_T[:, None]
    counts = expert_counts(cell_TK, groups * num_experts, keep=routing.keep, token_mask=token_mask)
    entropy_T = _entropy(at_least_float32(routing.router_probs_clean))
    if token_mask is None:
        tokens_G = torch.full((groups,), size, dtype=torch.int64, device=probs_TE.device)
    else:
        mask_T = token_mask.reshape(-1).bool()
        tokens_G = mask_T.view(groups, size).sum(1)
        probs_TE, entropy_T = probs_TE.masked_fill(~mask_T[:, None], 0.0), entropy_T.masked_fill(~mask_T, 0.0)
    divisor_G = tokens_G.clamp(min=1).to(probs_TE.dtype)
    return LayerLoad(
        counts=counts.view(groups, num_experts),
        probs=probs_TE.view(groups, size, num_experts).sum(1) / divisor_G[:, None],
        entropy=entropy_T.view(groups, size).sum(1) / divisor_G,
        tokens=tokens_G,
    )


def merged(load: LayerLoad) -> LayerLoad:
    """The groups of a load ``[G, ...]`` as one, each weighted by its real tokens."""
    tokens = load.tokens.sum()
    weight_G = load.tokens.to(load.probs.dtype) / tokens.clamp(min=1)
    return LayerLoad(
        counts=load.counts.sum(0),
        probs=(weight_G[:, None] * load.probs).sum(0),
        entropy=(weight_G * load.entropy).sum(),
        tokens=tokens,
    )


def masked_mean(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """Mean over the first dimension (tokens), of real tokens only; 0 for zero tokens."""
    if token_mask is None:
        return values.sum(0) / max(values.shape[0], 1)
    mask_T = token_mask.reshape(-1)
    padding = ~mask_T.bool().reshape(-1, *[1] * (values.dim() - 1))
    # Filled, not multiplied by 0: padding may hold NaN, and NaN · 0 is NaN.
    return values.masked_fill(padding, 0.0).sum(0) / mask_T.sum().clamp(min=1)


def _switch(counts: Tensor, probs: Tensor) -> Tensor:
    share = counts.to(probs.dtype) / counts.sum(-1, keepdim=True).clamp(min=1)
    return counts.shape[-1] * (share.detach() * probs).sum(-1)


def _cv_squared(counts: Tensor, probs: Tensor, pooled: Tensor | None) -> Tensor:
    share = counts.to(probs.dtype) / counts.sum(-1, keepdim=True).clamp(min=1)
    slope = probs - probs.detach()  # zero, with the gradient of the mean probabilities
    importance = probs if pooled is None else pooled.to(probs.dtype).detach() + slope
    return _variation(importance) + _variation(share.detach() + slope)


def _variation(x: Tensor) -> Tensor:
    """Squared coefficient of variation over the last dimension; 0 where all is zero.

    From deviations, not from ``E·Σx²/(Σx)² - 1``, which near balance is a difference of equal numbers.
    """
    mean = x.mean(-1, keepdim=True)
    return ((x - mean) / torch.where(mean > 0, mean, 1.0)).square().mean(-1)


def _entropy(probs_TE: Tensor) -> Tensor:
    """Entropy ``[T]`` of each row, nats, with a finite gradient where a probability is 0.

    That of ``torch.special.entr`` is infinite there, and NaN once it has passed a softmax.
    """
    return -(probs_TE * probs_TE.clamp(min=torch.finfo(probs_TE.dtype).tiny).log()).sum(-1)

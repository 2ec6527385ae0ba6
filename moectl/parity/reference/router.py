"""From hidden states to each token's experts and their weights.

Shape suffixes: T tokens, D hidden, E experts, K slots per token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moectl.parity.formula import RouterFormula
from moectl.parity.reference.numerics import DTYPES, wide
from moectl.parity.reference.scope import Scope


def router(scope: Scope, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Combine weights ``[T, K]``, expert numbers ``[T, K]`` and raw logits ``[T, E]``.

    Args:
        scope: of the router's weights, and of ``mlp.*`` on the tape.
    """
    logits_TE = router_logits(scope, scope.passed(x_TD, "router_input"))
    if scope.reroute is not None:
        weights_TK, indices_TK = scope.reroute(scope.layer, logits_TE)
    else:
        weights_TK, indices_TK = choose(scope, logits_TE.to(x_TD.dtype))
    weights_TK = scope.passed(weights_TK.to(x_TD.dtype), "weights")
    unused_TE = torch.zeros(logits_TE.shape, dtype=x_TD.dtype, device=x_TD.device)
    scope.record("router_logits", logits_TE)
    scope.record("chosen", unused_TE.bool().scatter(1, indices_TK, True))
    scope.record("weights", unused_TE.scatter(1, indices_TK, weights_TK))
    return weights_TK, indices_TK, logits_TE


def router_logits(scope: Scope, x_TD: Tensor) -> Tensor:
    """``x · Wᵀ (+ b)``, raw: before any softmax, and without the bias that only chooses."""
    rule = scope.formula.router
    weight_ED = scope.weight("weight")
    if "router" in scope.formula.reshaped:
        weight_ED = weight_ED.reshape(weight_ED.shape[1], weight_ED.shape[0]).T
    bias_E = scope.weight("bias") if rule.bias else None
    inner = x_TD.dtype
    if rule.dtype is not None and (rule.dtype != "float32" or scope.formula.casts == "reference"):
        inner = DTYPES[rule.dtype]
    logits_TE = F.linear(x_TD.to(inner), weight_ED.to(inner), None if bias_E is None else bias_E.to(inner))
    return logits_TE if rule.logit_scale == 1.0 else logits_TE * rule.logit_scale


def choose(scope: Scope, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The k best experts of each token and their combine weights, ``[T, K]`` both."""
    rule, casts = scope.formula.router, scope.formula.casts
    over = 0 if rule.softmax_over == "tokens" else -1
    if rule.score == "softmax_chosen":
        scores_TE = logits_TE  # no softmax before the choice, and its own dtype after it
    elif rule.score == "sigmoid":
        scores_TE = torch.sigmoid(wide(logits_TE, casts))
    elif rule.softmax_dtype is not None:
        scores_TE = torch.softmax(logits_TE.to(DTYPES[rule.softmax_dtype]), dim=over)
    else:
        scores_TE = torch.softmax(wide(logits_TE, casts), dim=over)
    if rule.probs_dtype is not None and (rule.probs_dtype != "float32" or casts == "reference"):
        rounded_TE = scores_TE.to(DTYPES[rule.probs_dtype])
        scores_TE = rounded_TE if rule.probs_stay else rounded_TE.to(scores_TE.dtype)
    if rule.softmax_dtype is not None and not rule.probs_stay:
        scores_TE = scores_TE.to(logits_TE.dtype)

    biased_TE = scores_TE
    if rule.choice_bias:
        biased_TE = scores_TE + scope.weight("e_score_correction_bias")
    choice_TE = within_best_groups(biased_TE, rule)
    indices_TK = choice_TE.topk(rule.top_k, dim=-1, largest=rule.choose == "largest").indices

    weighed_TE = biased_TE if rule.bias_weighs else scores_TE
    if rule.norm_all:
        weighed_TE = weighed_TE / weighed_TE.sum(dim=-1, keepdim=True)
    weights_TK = weighed_TE.gather(1, indices_TK)
    if rule.score in ("softmax_chosen", "softmax_twice"):
        weights_TK = torch.softmax(weights_TK, dim=over)
    if rule.norm_topk:
        sum_T1 = scope.passed(weights_TK.sum(dim=-1, keepdim=True), "normaliser")
        weights_TK = weights_TK / (sum_T1 + rule.norm_epsilon)
    weights_TK = weights_TK * rule.scaling
    if rule.pairing == "sorted_indices":
        indices_TK = indices_TK.sort(dim=-1).values
    if rule.pairing == "reversed":
        weights_TK = weights_TK.flip(-1)
    if rule.pairing == "best":
        weights_TK = weights_TK.amax(dim=-1, keepdim=True).expand_as(weights_TK)
    return weights_TK, indices_TK


def within_best_groups(scores_TE: Tensor, rule: RouterFormula) -> Tensor:
    """Scores with all experts outside the best groups put out of reach.

    Source: group-limited routing of DeepSeek-V3, arXiv:2412.19437, §2.1.2.
    """
    if rule.groups == 1:
        return scores_TE
    grouped_TGE = scores_TE.unflatten(1, (rule.groups, -1))
    best = min(2 if rule.group_score == "top2_sum" else 1, grouped_TGE.shape[-1])
    group_scores_TG = grouped_TGE.topk(best, dim=-1).values.sum(dim=-1)
    kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
    kept_TG = kept_TG.scatter(1, group_scores_TG.topk(rule.groups_kept, dim=-1).indices, True)
    outside = -torch.inf if rule.group_mask == "minus_infinity" else 0.0
    return grouped_TGE.masked_fill(~kept_TG[..., None], outside).flatten(1)

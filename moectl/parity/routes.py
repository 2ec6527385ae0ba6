"""Which experts each side chose, and whether a difference is a mistake or a tie.

Two scores that differ by less than rounding can come out in either order, and a whole model computes
something else from there on. So every token that chose otherwise is looked at: if the experts in which
the two choices differ all lie at the boundary, by the reference's own scores, it is a tie.

Shape suffixes: T tokens, E experts, K slots per token, N expert groups.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moectl.parity.case import Case
from moectl.parity.families import family_name, formula_of
from moectl.parity.formula import RouterFormula
from moectl.parity.tape import Tape
from moectl.parity.tolerance import TIE

CHOICE_BIAS = "e_score_correction_bias"


class Flip(NamedTuple):
    """A token that the two sides sent to different experts.

    Attributes:
        layer: of a whole model; None for a lone component.
        token: place in the flattened batch.
        margin: the reference's score of its last chosen expert over that of its best unchosen one, relative to
            the former (for scores that are logits: the plain difference). 0 is an exact tie.
        reference: the experts chosen by the reference.
        candidate: those chosen by the candidate.
        tie: whether rounding explains it.
    """

    layer: int | None
    token: int
    margin: float
    reference: tuple[int, ...]
    candidate: tuple[int, ...]
    tie: bool


class Scores(NamedTuple):
    """What experts are chosen by.

    Attributes:
        values: ``[T, E]``, the largest are chosen.
        scale: ``[T, E]``, what a difference of values is measured against.
        room: ``[T, 1]``, by how much a tie may exceed the tolerance: logits of size 80 are known to 80 times
            the tolerance, and a softmax makes that absolute error a relative one.
    """

    values: Tensor
    scale: Tensor
    room: Tensor


def router_of(case: Case) -> RouterFormula:
    """The reference's way to choose, read from the case's config."""
    return formula_of(family_name(case.config["model_type"]), case.config).router


def choice_scores(router: RouterFormula, logits_TE: Tensor, bias_E: Tensor | None = None) -> Scores:
    """The reference's scores, computed in the dtype of ``logits_TE`` (float32 at least): what underflows, ties."""
    logits_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    room_T1 = logits_TE.abs().amax(dim=-1, keepdim=True).clamp(min=1.0)
    if router.score == "softmax_chosen":
        return Scores(logits_TE, torch.ones_like(logits_TE), room_T1)
    if router.score == "softmax":
        probs_TE = logits_TE.softmax(dim=-1)
        return Scores(probs_TE, probs_TE, room_T1)
    probs_TE = logits_TE.sigmoid()
    if bias_E is None:
        return Scores(probs_TE, probs_TE, room_T1)
    bias_E = bias_E.to(probs_TE.dtype)
    return Scores(probs_TE + bias_E, probs_TE + bias_E.abs(), room_T1)


def margins(router: RouterFormula, scores: Scores) -> Tensor:
    """``[T]``: how far the last chosen expert is ahead of the best unchosen one; infinite where all are chosen."""
    if router.top_k >= scores.values.shape[-1]:
        return torch.full(scores.values.shape[:1], math.inf)
    values_TE = _within_groups(router, scores.values)
    top = values_TE.topk(router.top_k + 1, dim=-1)
    gap_T = top.values[:, -2] - top.values[:, -1]
    return _relative(gap_T, scores.scale.gather(1, top.indices[:, -2:]).amax(dim=-1))


def at_boundary(router: RouterFormula, scores: Scores, tolerance: float) -> Tensor:
    """``[T, E]`` bool: experts that rounding may move into the choice or out of it."""
    limit_T1 = tolerance * scores.room
    values_TE = _within_groups(router, scores.values)
    last_T1 = values_TE.topk(min(router.top_k, values_TE.shape[-1]), dim=-1)
    scale_TE = torch.maximum(scores.scale, scores.scale.gather(1, last_T1.indices[:, -1:]))
    near_TE = _relative((scores.values - last_T1.values[:, -1:]).abs(), scale_TE) <= limit_T1
    # The last chosen expert is itself at the boundary if, and only if, an unchosen one is near it.
    return near_TE & (margins(router, scores)[:, None] <= limit_T1) | _tied_groups(router, scores, limit_T1)


def flips(reference: Tape, candidate: Tape, case: Case, name: str, *, tolerance: float | None = None) -> list[Flip]:
    """Real tokens whose experts differ in the tensor ``name`` (``…mlp.chosen``), each judged.

    Args:
        tolerance: in place of the dtype's own.
    """
    theirs_TE, ours_TE = reference[name].bool(), candidate[name].bool()
    differing_T = (theirs_TE != ours_TE).any(dim=-1)
    if case.inputs.attention_mask is not None:
        differing_T &= case.inputs.attention_mask.bool().flatten()
    if not differing_T.any():
        return []
    router, layer = router_of(case), layer_of(name)
    scores = choice_scores(router, reference[name.replace("chosen", "router_logits")], choice_bias(case, layer))
    boundary_TE = at_boundary(router, scores, TIE[case.dtype] if tolerance is None else tolerance)
    # Other experts at the boundary, but as many: a dropped assignment is no tie.
    tie_T = ((theirs_TE == ours_TE) | boundary_TE).all(dim=-1) & (theirs_TE.sum(-1) == ours_TE.sum(-1))
    margin_T = margins(router, scores)
    return [
        Flip(layer, token, float(margin_T[token]), _set(theirs_TE[token]), _set(ours_TE[token]), bool(tie_T[token]))
        for token in differing_T.nonzero().flatten().tolist()
    ]


def tied_tokens(reference: Tape, case: Case) -> int:
    """How many tokens of all layers stand at a tie by the reference's scores, however they were chosen."""
    if case.dtype not in TIE:
        return 0
    router, count = router_of(case), 0
    for name in reference:
        if name.endswith("mlp.router_logits"):
            scores = choice_scores(router, reference[name], choice_bias(case, layer_of(name)))
            count += int((margins(router, scores) <= TIE[case.dtype] * scores.room[:, 0]).sum())
    return count


def choice_bias(case: Case, layer: int | None) -> Tensor | None:
    """The buffer that is added for choosing only (DeepSeek-V3), or None."""
    for name, tensor in case.weights.items():
        if name.endswith(CHOICE_BIAS) and (layer is None or f"layers.{layer}." in name):
            return tensor
    return None


def layer_of(name: str) -> int | None:
    """3 of ``layers.3.mlp.chosen``; None where no layer stands."""
    return int(name.split(".")[1]) if name.startswith("layers.") else None


def _within_groups(router: RouterFormula, values_TE: Tensor) -> Tensor:
    """Scores with the experts of dropped groups out of the running (DeepSeek-V3's group-limited choice)."""
    if router.groups_kept >= router.groups:
        return values_TE
    sums_TN = _group_sums(router, values_TE)
    kept_TN = torch.zeros_like(sums_TN, dtype=torch.bool)
    kept_TN.scatter_(1, sums_TN.topk(router.groups_kept, dim=-1).indices, True)
    dropped_TE = ~kept_TN.repeat_interleave(values_TE.shape[-1] // router.groups, dim=-1)
    return values_TE.masked_fill(dropped_TE, -math.inf)  # as the reference does: a biased score may be below 0


def _tied_groups(router: RouterFormula, scores: Scores, limit_T1: Tensor) -> Tensor:
    """``[T, 1]`` bool: tokens where rounding decides between groups, and with them about any expert."""
    if router.groups_kept >= router.groups:
        return torch.zeros_like(limit_T1, dtype=torch.bool)
    ordered_TN = _group_sums(router, scores.values).sort(dim=-1, descending=True).values
    gap_T1 = ordered_TN[:, [router.groups_kept - 1]] - ordered_TN[:, [router.groups_kept]]
    return _relative(gap_T1, scores.scale.amax(dim=-1, keepdim=True)) <= limit_T1


def _group_sums(router: RouterFormula, values_TE: Tensor) -> Tensor:
    grouped = values_TE.unflatten(1, (router.groups, -1))
    return grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)


def _relative(gap: Tensor, scale: Tensor) -> Tensor:
    """``gap / scale``, and 0 where there is no gap."""
    return torch.where(gap == 0, torch.zeros_like(gap), gap / scale.clamp(min=torch.finfo(gap.dtype).tiny))


def _set(chosen_E: Tensor) -> tuple[int, ...]:
    return tuple(chosen_E.nonzero().flatten().tolist())

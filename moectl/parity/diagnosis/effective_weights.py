"""The combine weights that a candidate effectively used, read off its output alone.

An MoE block's output on a token is a combination of the outputs of all experts on that token. With no more
experts than hidden dimensions those outputs are (in general position) linearly independent, so that least
squares gives the coefficients back: which experts a token really visited, and with which weights. What no
combination reaches, the residual, tells that the experts themselves compute something else.

Shape suffixes: T tokens, E experts, D hidden, K slots per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: Coefficients below this part of the largest reference weight are none (least squares loses digits to conditioning).
NONE = 1e-6
#: Relative agreement of two weights that were both found by least squares.
SAME = 1e-6


@dataclass(frozen=True)
class Effective:
    """What least squares found.

    Attributes:
        weights: ``[T, E]``, 0 where nothing is.
        residual: the part of the output, by its norm, that no combination of expert outputs reaches; worst token.
    """

    weights: Tensor
    residual: float

    @property
    def experts_right(self) -> bool:
        """Whether the output is made of the reference's experts at all."""
        return self.residual < SAME


def effective_weights(output: Tensor, expert_outputs: Tensor) -> Effective | None:
    """Decompose ``output [T, D]`` in the basis ``expert_outputs [T, E, D]``; None where it is no basis (E > D)."""
    tokens, experts, hidden = expert_outputs.shape
    if experts > hidden or tokens == 0 or not torch.isfinite(output).all():
        return None
    basis_TDE = expert_outputs.double().transpose(1, 2)
    output_TD1 = output.double().reshape(tokens, hidden, 1)
    weights_TE1 = torch.linalg.lstsq(basis_TDE, output_TD1).solution
    left_TD = (output_TD1 - basis_TDE @ weights_TE1).squeeze(-1)
    norm_T = output_TD1.squeeze(-1).norm(dim=-1)
    residual = float((left_TD.norm(dim=-1) / norm_T.clamp(min=1e-300))[norm_T > 0].max()) if (norm_T > 0).any() else 0.0
    weights_TE = weights_TE1.squeeze(-1)
    scale = weights_TE.abs().max().clamp(min=1e-300)
    return Effective(torch.where(weights_TE.abs() < NONE * scale, 0.0, weights_TE), residual)


@dataclass(frozen=True)
class Relation:
    """How the effective weights relate to the reference's.

    Attributes:
        kind: equal; scaled by one number; scaled by a factor per token; other weights on the same experts; some
            missing; on other experts.
        text: for people.
    """

    kind: Literal["equal", "constant", "per token", "same experts", "missing", "other experts"]
    text: str


def relation(reference: Tensor, effective: Tensor, sums: Tensor | None = None) -> Relation:
    """Compare two ``[T, E]``; ``sums [T]`` are the chosen probabilities' sums, to recognise a factor by."""
    reference, effective = reference.double(), effective.double()
    tokens = reference.shape[0]
    there_TE, used_TE = reference != 0, effective != 0
    if (used_TE & ~there_TE).any():
        others = int((used_TE & ~there_TE).any(dim=-1).sum())
        return Relation("other experts", f"{others} of {tokens} tokens get outputs of experts that were not chosen")
    missing = int((there_TE & ~used_TE).sum())
    if missing:
        return Relation("missing", f"{missing} of {int(there_TE.sum())} chosen assignments contribute nothing")
    ratios_TE = torch.where(there_TE, effective / reference, torch.nan)
    low_T, high_T = (ratios_TE.nan_to_num(fill).aminmax(dim=-1)[i] for i, fill in ((0, torch.inf), (1, -torch.inf)))
    if ((high_T - low_T).abs() > SAME * high_T.abs()).any():
        return Relation(
            "same experts", f"the chosen experts are right, their weights are not, on up to {tokens} tokens"
        )
    return _factor(high_T, sums)


def _factor(ratio_T: Tensor, sums_T: Tensor | None) -> Relation:
    tokens = len(ratio_T)

    def near(value_T: Tensor) -> bool:
        return bool(((ratio_T - value_T).abs() <= SAME * value_T.abs()).all())

    if near(torch.ones_like(ratio_T)):
        return Relation("equal", f"the effective combine weights are the reference's, all {tokens} tokens")
    if sums_T is not None and near(sums_T.double()):
        return Relation("per token", f"candidate = reference × Σ topk, all {tokens} tokens")
    if sums_T is not None and near(1 / sums_T.double()):
        return Relation("per token", f"candidate = reference × 1/Σ topk, all {tokens} tokens")
    if near(ratio_T.mean().expand_as(ratio_T)):
        return Relation("constant", f"candidate = reference × {float(ratio_T.mean()):.6g}, all {tokens} tokens")
    low, high = float(ratio_T.min()), float(ratio_T.max())
    return Relation("per token", f"candidate = reference × a factor per token, from {low:.4g} to {high:.4g}")


def find_permutation(reference: Tensor, effective: Tensor) -> tuple[int, ...] | None:
    """π such that ``effective[:, π[e]] = reference[:, e]``: expert e computed with the weights of π(e).

    Columns ``[T, E]`` are matched by their values, so nothing is enumerated. Experts that no token visits take
    what is left, in order. None where the columns do not match one to one.
    """
    experts = reference.shape[1]
    distance_EE = (reference.double().T[:, None] - effective.double().T[None]).abs().amax(dim=-1)
    scale = reference.double().abs().max().clamp(min=1e-300)
    busy = [e for e in range(experts) if (reference[:, e] != 0).any()]
    found: dict[int, int] = {}
    for e in busy:
        nearest = int(distance_EE[e].argmin())
        if distance_EE[e, nearest] > SAME * scale or nearest in found.values():
            return None
        found[e] = nearest
    left = [e for e in range(experts) if e not in found.values()]
    idle = [e for e in range(experts) if e not in found]
    found.update(zip(idle, sorted(left, key=lambda e: e not in idle), strict=True))
    # An idle expert keeps its own weights where nobody took them.
    for e in idle:
        if e in idle and found[e] != e and e in (found[o] for o in idle):
            other = next(o for o in idle if found[o] == e)
            found[e], found[other] = e, found[e]
    return tuple(found[e] for e in range(experts))


def find_capacity(reference: Tensor, effective: Tensor) -> int | None:
    """How many tokens an expert took, if some are missing and all experts that lost some took as many; or None."""
    lost_TE = (reference != 0) & (effective == 0)
    taken_E = (effective != 0).sum(dim=0)
    full = {int(taken_E[e]) for e in range(reference.shape[1]) if lost_TE[:, e].any()}
    if len(full) != 1:
        return None
    capacity = full.pop()
    return capacity if int(taken_E.max()) <= capacity else None

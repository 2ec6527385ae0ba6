"""Mistakes on the way of expert outputs back to their tokens: overwritten, or put in another order.

Shape suffixes: T tokens, K slots per token, A = T·K assignments, E experts, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moectl.parity.formula import ExpertsFormula

#: Values of ``combined`` that :func:`routed_astray` computes.
ASTRAY = ("unsorted_weights", "unsorted_outputs", "unsorted_rows", "tiled_inputs", "tiled_tokens")


def one_left(rule: ExpertsFormula, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
    """The weights with all but one of a token's at zero: the others' outputs were overwritten, or never looked at."""
    if rule.combined == "last_expert":
        kept_T1 = indices_TK.argmax(dim=-1, keepdim=True)
    else:
        slot = 0 if rule.combined == "first_choice" else indices_TK.shape[1] - 1
        kept_T1 = torch.full_like(indices_TK[:, :1], slot)
    return weights_TK * torch.zeros_like(weights_TK).scatter(1, kept_T1, 1.0)


def routed_astray(rule: ExpertsFormula, outputs_ETD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
    """Every assignment computed, weighed and added up, one of the three for the wrong token: ``[T, D]``.

    Args:
        outputs_ETD: of every expert on every token.
    """
    num_tokens, num_slots = indices_TK.shape
    places_A = torch.arange(indices_TK.numel(), device=indices_TK.device)
    experts_A, weights_A = indices_TK.flatten(), weights_TK.flatten()
    read_A = home_A = places_A // num_slots
    if rule.combined in ("unsorted_weights", "unsorted_outputs", "unsorted_rows"):
        order_A = experts_A.argsort(stable=True)
        experts_A, read_A = experts_A[order_A], read_A[order_A]
        if rule.combined == "unsorted_weights":
            home_A = read_A
        if rule.combined == "unsorted_rows":
            weights_A = weights_A[order_A]
    else:
        read_A = places_A % num_tokens
        home_A = read_A if rule.combined == "tiled_tokens" else home_A
    y_AD = outputs_ETD[experts_A, read_A]
    if rule.applied != "none":
        y_AD = y_AD * weights_A[:, None]
    return torch.zeros_like(outputs_ETD[0]).index_add(0, home_A, y_AD)

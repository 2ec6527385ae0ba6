"""Expert capacity: how many tokens an expert takes at most, and what becomes of those beyond it.

Shape suffixes: T tokens, E experts, K experts per token, A = T·K assignments.

GShard, Lepikhin et al. 2020 (arXiv:2006.16668); Switch, Fedus et al. 2021 (arXiv:2101.03961).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from moectl.errors import ConfigError, unknown
from moectl.moe.types import RouterOutput

OVERFLOWS = ("drop", "next-best")
FILLS = ("position", "probability")
DENOMINATOR = 10**6  # the finest capacity factor told apart
LARGEST = 10**5  # factors beyond count as this one: no limit for any number of experts, and no int64 overflow


@dataclass(frozen=True)
class Capacity:
    """A limit of ``ceil(k·T/E·factor)`` tokens per expert, ``T`` counting real tokens only.

    Args:
        factor: 1.0 is room for a perfectly balanced load, and no more.
        overflow: ``drop`` leaves an assignment without room to the residual path; ``next-best``
            gives it to the token's next expert with room, with that expert's own weight.
        fill: who comes first. ``position``: earlier tokens, all k slots of a token before the next
            token, so that no token depends on a later one. ``probability``: the larger router
            probability, wherever in the batch it is.
        in_eval: apply the limit outside training too.

    Raises:
        ConfigError: a factor that is not a finite number above 0, or an unknown overflow or fill.
    """

    factor: float
    overflow: Literal["drop", "next-best"] = "drop"
    fill: Literal["position", "probability"] = "position"
    in_eval: bool = False
    # Tensors, so that to a compiled layer another factor (schedules move it) is another input: it is not recompiled.
    _ratio: tuple[Tensor, Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.factor, bool) or not (math.isfinite(self.factor) and self.factor > 0):
            raise ConfigError(
                f"the capacity factor must be a finite number above 0, not {self.factor}",
                "1.25 leaves a quarter of room above a balanced load; leave capacity away for no limit.",
            )
        if self.overflow not in OVERFLOWS:
            raise unknown("capacity overflow", str(self.overflow), OVERFLOWS)
        if self.fill not in FILLS:
            raise unknown("capacity fill", str(self.fill), FILLS)
        # The float nearest to 1.1 is larger than 1.1, and ceil(50 · 1.1) would be 56: count in fractions.
        exact = Fraction(min(self.factor, LARGEST)).limit_denominator(DENOMINATOR)
        exact = max(exact, Fraction(1, DENOMINATOR))
        # On the CPU, also where a model is built on another device, or on meta, by torch.device.
        numerator, denominator = (torch.tensor(n, device="cpu") for n in (exact.numerator, exact.denominator))
        object.__setattr__(self, "_ratio", (numerator, denominator))

    @property
    def causal(self) -> bool:
        """Whether a token's experts depend on itself and earlier tokens only."""
        return self.fill == "position"

    def per_expert(self, num_tokens: Tensor | int, top_k: int, num_experts: int) -> Tensor:
        """``ceil(k·T/E·factor)`` as a 0-d int64 tensor: exact, and without waiting for the device.

        The factor is taken as the nearest fraction whose denominator is at most a million: every
        factor written with up to six decimals, as written.

        Args:
            num_tokens: real tokens.
            top_k: experts per token.
            num_experts: ``E``.
        """
        numerator, denominator = self._ratio
        return -(-(numerator * num_tokens * top_k) // (denominator * num_experts))


def apply_capacity(
    routing: RouterOutput, capacity: Capacity, token_mask: Tensor | None = None
) -> tuple[RouterOutput, Tensor]:
    """The routing decision that is left under ``capacity``, and how many assignments each expert lost.

    Args:
        routing: the router's decision; it is not changed.
        capacity: the limit.
        token_mask: ``[T]`` bool, real tokens; None for all.

    Returns:
        The decision with ``topk_indices``, ``topk_weights`` and ``keep`` of what found room, and
        ``[E]`` int64, the assignments that found none, by the expert that the router chose.
    """
    indices_TK = routing.topk_indices
    (num_tokens, top_k), num_experts = indices_TK.shape, routing.router_probs.shape[-1]
    real: Tensor | int = num_tokens if token_mask is None else token_mask.sum()
    limit = capacity.per_expert(real, top_k, num_experts)
    used_TK = torch.ones_like(indices_TK, dtype=torch.bool) if routing.keep is None else routing.keep
    if capacity.overflow == "drop":
        kept_TK = _first_come(routing, used_TK, limit, by_probability=not capacity.causal)
        limited = routing._replace(keep=kept_TK)
    else:
        limited = _next_best(routing, used_TK, limit, by_probability=not capacity.causal)
        assert limited.keep is not None
        kept_TK = limited.keep
    lost_TK = (used_TK & ~kept_TK).to(torch.int64)
    dropped_E = lost_TK.new_zeros(num_experts).index_add(0, indices_TK.reshape(-1), lost_TK.reshape(-1))
    return limited._replace(topk_weights=limited.topk_weights.masked_fill(~kept_TK, 0.0)), dropped_E


def _first_come(routing: RouterOutput, used_TK: Tensor, limit: Tensor, *, by_probability: bool) -> Tensor:
    """``[T, K]`` bool: the assignments in use that are among the first ``limit`` of their expert."""
    num_experts = routing.router_probs.shape[-1]
    expert_A = torch.where(used_TK, routing.topk_indices, num_experts).reshape(-1)
    first_A = None
    if by_probability:
        chosen_TK = routing.router_probs.detach().gather(1, routing.topk_indices)
        first_A = torch.sort(chosen_TK.reshape(-1), descending=True, stable=True).indices
        expert_A = expert_A.index_select(0, first_A)
    expert_ids, order_A = torch.sort(expert_A, stable=True)
    start_A = torch.searchsorted(expert_ids, expert_ids)  # where each one's expert begins
    fits_A = torch.arange(expert_ids.shape[0], device=expert_ids.device) - start_A < limit
    where_A = order_A if first_A is None else first_A.index_select(0, order_A)
    kept_A = torch.zeros_like(fits_A).scatter(0, where_A, fits_A)
    return used_TK & kept_A.view_as(used_TK)


def _next_best(routing: RouterOutput, used_TK: Tensor, limit: Tensor, *, by_probability: bool) -> RouterOutput:
    """Assignments without room go to the token's next expert with room, as long as there is one.

    By position this is the greedy pass over tokens: each takes all its experts among those with
    room at that moment, those that the router chose first, then the others by falling probability.
    By probability it is the greedy pass over all (token, expert) pairs: those that the router chose
    first, then the others, each by falling probability. An expert of probability 0 (as one that was
    dropped out has) is nobody's substitute, since its weight would be 0.
    """
    indices_TK, probs_TE = routing.topk_indices, routing.router_probs
    first_TK = used_TK & ~_repeats(indices_TK, used_TK)
    chosen_TE = _among(indices_TK, first_TK, probs_TE)
    scores_TE = probs_TE.detach()
    preferred_TE = torch.sort(scores_TE + 2.0 * chosen_TE, dim=1, descending=True, stable=True).indices
    order_TE = _by_probability(scores_TE, chosen_TE) if by_probability else None
    taken_TE = _settle(preferred_TE, chosen_TE | (scores_TE > 0), used_TK.sum(1), limit, order_TE)

    kept_TK = first_TK & taken_TE.gather(1, indices_TK)
    moved_TK = used_TK & ~kept_TK
    # A token's n-th displaced slot gets its n-th substitute: the column where their number reaches n.
    substitutes_TE = (taken_TE & ~chosen_TE).gather(1, preferred_TE).cumsum(1)
    column_TK = torch.searchsorted(substitutes_TE, moved_TK.cumsum(1))
    found_TK = moved_TK & (column_TK < probs_TE.shape[1])
    instead_TK = preferred_TE.gather(1, column_TK.clamp(max=probs_TE.shape[1] - 1))
    # A floor (1e-19 in float32) for what a router chose at probability 0: neither the ratio nor its gradient overflows.
    floor = torch.finfo(probs_TE.dtype).tiny ** 0.5
    scale_TK = probs_TE.gather(1, instead_TK) / probs_TE.gather(1, indices_TK).clamp(min=floor)
    return routing._replace(
        topk_indices=torch.where(found_TK, instead_TK, indices_TK),
        topk_weights=torch.where(found_TK, routing.topk_weights * scale_TK, routing.topk_weights),
        keep=kept_TK | found_TK,
    )


def _settle(
    preferred_TE: Tensor, allowed_TE: Tensor, wanted_T: Tensor, limit: Tensor, order_TE: Tensor | None
) -> Tensor:
    """Who takes whom, ``[T, E]`` bool: the greedy pass of :func:`_next_best`, all tokens at once.

    Every token asks the first ``wanted`` experts of its list that are still open to it; an expert
    that is asked by ``limit`` tokens or more closes to all after the ``limit``-th; and again. When n
    experts are full in the greedy pass, their closing is exact after n rounds, since until the
    moment at which the next one fills, every token sees the experts as the greedy pass does. So
    E + 1 rounds are exact. It is deferred acceptance (Gale & Shapley 1962) where tokens and experts
    go by one common order of the pairs.

    Args:
        preferred_TE: each token's experts, best first.
        allowed_TE: by expert, whether the token may go there at all.
        wanted_T: experts per token.
        limit: tokens per expert, 0-d.
        order_TE: each expert's tokens, first served first; None is token order.
    """
    num_tokens, num_experts = preferred_TE.shape
    place_TE = torch.arange(num_tokens, device=preferred_TE.device)[:, None]
    if order_TE is not None:
        place_TE = torch.zeros_like(order_TE).scatter(0, order_TE, place_TE.expand_as(order_TE))
    closes_E = torch.full((num_experts,), num_tokens, device=preferred_TE.device)
    taken_TE = torch.zeros_like(allowed_TE)
    for _ in range(num_experts + 1):
        open_TE = (allowed_TE & (place_TE < closes_E)).gather(1, preferred_TE)
        asked_TE = open_TE & (open_TE.cumsum(1, dtype=torch.int32) <= wanted_T[:, None])
        taken_TE = torch.zeros_like(allowed_TE).scatter(1, preferred_TE, asked_TE)
        queue_TE = taken_TE if order_TE is None else taken_TE.gather(0, order_TE)
        before_E, closes_E = closes_E, (queue_TE.cumsum(0, dtype=torch.int32) < limit).sum(0) + 1
        # Reading a value is free on a CPU, and most batches settle in a few rounds.
        if not torch.compiler.is_compiling() and closes_E.device.type == "cpu" and torch.equal(before_E, closes_E):
            break
    return taken_TE


def _by_probability(scores_TE: Tensor, chosen_TE: Tensor) -> Tensor:
    """``[T, E]``: each expert's tokens, those that chose it first, each by falling probability."""
    order_TE = torch.sort(scores_TE, dim=0, descending=True, stable=True).indices
    again_TE = torch.sort(chosen_TE.gather(0, order_TE).byte(), dim=0, descending=True, stable=True).indices
    return order_TE.gather(0, again_TE)


def _among(indices_TK: Tensor, used_TK: Tensor, like_TE: Tensor) -> Tensor:
    """``[T, E]`` bool: the experts that a token's used slots name."""
    num_tokens, num_experts = like_TE.shape
    named_TE = used_TK.new_zeros(num_tokens, num_experts + 1)
    return named_TE.scatter(1, torch.where(used_TK, indices_TK, num_experts), value=True)[:, :num_experts]


def _repeats(indices_TK: Tensor, used_TK: Tensor) -> Tensor:
    """``[T, K]`` bool: slots that name an expert which an earlier slot in use of the token names."""
    same_TKK = (indices_TK[:, :, None] == indices_TK[:, None, :]) & used_TK[:, None, :]
    return same_TKK.tril(-1).any(-1)

"""``expert-choice``: experts choose tokens (Zhou et al. 2022, arXiv:2202.09368).

Shape suffixes: T tokens, D hidden, E experts.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from moectl.config.settings import Positive
from moectl.moe.capacity import Capacity
from moectl.moe.router import Router, RouterConfig, entropy
from moectl.moe.types import RouterOutput


class ExpertChoiceRouter(Router):
    """Each expert takes the ``C`` real tokens that score highest for it, weighted by that score.

    Scores are a softmax over experts, ``C = min(T, ceil(k · T / E · capacity_factor))``, ties go to the
    earlier token. The load is even by construction; a token is taken by any number of experts, k on
    average. A later token can push an earlier one out: not causal, and not for decoding token by token.
    """

    class Config(RouterConfig):
        top_k: Annotated[int, Field(ge=1)] = Field(2, description="experts per token, on average")
        capacity_factor: Positive = 1.0

    config: Config
    causal = False
    token_choice = False
    default_lb_coef = 0.0

    def __init__(self, config: Config, *, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, hidden_size=hidden_size, num_experts=num_experts)
        self._capacity = Capacity(config.capacity_factor)

    @property
    def slots(self) -> int:
        """One slot per expert; ``keep`` marks those in use."""
        return self.num_experts

    def capacity(self, num_tokens: Tensor) -> Tensor:
        """``ceil(k · T / E · capacity_factor)`` for a 0-d int64 ``T``, exact and without a sync."""
        return self._capacity.per_expert(num_tokens, self.top_k, self.num_experts)

    def take(self, scores_TE: Tensor, real_T: Tensor) -> Tensor:
        """Which expert takes which token, ``[T, E]`` bool. Padding scores -inf."""
        order_TE = torch.sort(scores_TE, dim=0, descending=True, stable=True).indices
        place_TE = torch.arange(len(scores_TE), device=scores_TE.device)[:, None].expand_as(order_TE)
        rank_TE = torch.empty_like(order_TE).scatter(0, order_TE, place_TE)
        return rank_TE < self.capacity(real_T.sum())

    def route(self, x_TD: Tensor, mask_T: Tensor | None) -> RouterOutput:
        logits_TE = self.logits(x_TD)
        probs_TE = torch.softmax(logits_TE, dim=-1)
        real_T = torch.ones_like(x_TD[:, 0], dtype=torch.bool) if mask_T is None else mask_T
        scores_TE = probs_TE.detach().masked_fill(~real_T[:, None], -math.inf)
        return RouterOutput(
            topk_indices=torch.arange(self.num_experts, device=x_TD.device).expand(len(x_TD), -1),
            topk_weights=probs_TE,
            router_logits=logits_TE,
            router_probs=probs_TE,
            router_probs_clean=probs_TE,
            entropy=entropy(probs_TE),
            keep=self.take(scores_TE, real_T) & real_T[:, None],
        )

"""``sigmoid``: experts scored one by one, and balanced by a bias instead of a loss.

DeepSeek-V3 (DeepSeek-AI 2024, arXiv:2412.19437, sections 2.1.2 and 3.3); the bias is that of Wang et al. 2024
(arXiv:2408.15664).

Shape suffixes: T tokens, D hidden, E experts, K experts per token, G groups of M experts each.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from moectl.config.settings import NonNegative, Positive, PositiveInt
from moectl.moe.router import entropy, stable_topk
from moectl.moe.token_choice import TokenChoiceOptions, TokenChoiceRouter
from moectl.moe.types import RouterOutput


class SigmoidRouter(TokenChoiceRouter):
    """Top-k of ``σ(l) + b``; weights ``σ(l)`` of the chosen, renormalised and scaled, without ``b``.

    After every optimizer step an overloaded expert's bias falls by ``bias_update_rate`` and an underloaded
    one's rises, so that no balance loss pulls on the gate. With groups, a token chooses within the
    ``topk_group`` groups whose two best biased scores have the largest sum.

    Attributes:
        expert_bias: ``b``, ``[E]`` float32 whatever the model's dtype (in bfloat16 it stalls); saved, no gradient.
    """

    class Config(TokenChoiceOptions):
        top_k: Annotated[int, Field(ge=1)] = 2
        norm_topk_prob: bool = True
        routed_scaling_factor: Positive = Field(1.0, description="times every combine weight")
        n_group: PositiveInt = Field(1, description="groups of neighbouring experts; 1: none")
        topk_group: PositiveInt = Field(1, description="groups that a token may choose from")
        bias_update_rate: NonNegative = Field(1e-3, description="γ, the bias's move per optimizer step")

        @model_validator(mode="after")
        def _groups(self) -> SigmoidRouter.Config:
            if self.topk_group > self.n_group:
                raise ValueError(f"topk_group ({self.topk_group}) must not exceed n_group ({self.n_group})")
            if self.n_group > 1 and self.expert_dropout > 0.0:
                raise ValueError("expert_dropout and n_group > 1 do not go together: a group may be left with too few")
            return self

    config: Config
    default_lb_coef = 0.0
    expert_bias: Tensor

    def __init__(self, config: Config, *, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, hidden_size=hidden_size, num_experts=num_experts)
        self.register_buffer("expert_bias", torch.zeros(num_experts, dtype=torch.float32))

    def check_top_k(self, k: int) -> None:
        super().check_top_k(k)
        groups, size = self.config.n_group, self.num_experts // self.config.n_group
        if groups > 1 and (self.num_experts % groups or size < 2):
            raise ValueError(
                f"n_group is {groups}: {self.num_experts} experts do not divide into groups of two or more"
            )
        if k > self.config.topk_group * size:
            raise ValueError(f"top_k is {k}, but topk_group={self.config.topk_group} groups have {size} experts each")

    def route(self, x_TD: Tensor, mask_T: Tensor | None) -> RouterOutput:
        logits_TE = self.logits(x_TD)
        clamped_TE = self.clamp(logits_TE)
        # σ/Σσ as a softmax of log σ: defined where every σ underflows, and no ε in the denominator.
        log_scores_TE = F.logsigmoid(clamped_TE)
        probs_TE = torch.softmax(log_scores_TE, dim=-1)
        indices_TK = self.choose(self.hold_back(torch.sigmoid(clamped_TE) + self.expert_bias))
        chosen_TK = log_scores_TE.gather(1, indices_TK)
        weights_TK = torch.softmax(chosen_TK, dim=-1) if self.config.norm_topk_prob else chosen_TK.exp()
        return RouterOutput(
            topk_indices=indices_TK,
            topk_weights=weights_TK * self.config.routed_scaling_factor,
            router_logits=logits_TE,
            router_probs=probs_TE,
            router_probs_clean=probs_TE,
            entropy=entropy(probs_TE),
        )

    def explore(self, scores_TE: Tensor) -> Tensor:
        """The common exploration, then -inf outside of each token's best groups."""
        scores_TE = super().explore(scores_TE)
        if self.config.topk_group == self.config.n_group:
            return scores_TE
        scores_TGM = scores_TE.unflatten(1, (self.config.n_group, -1))
        best_TG = scores_TGM.topk(2, dim=-1).values.sum(-1)
        opened = stable_topk(best_TG, self.config.topk_group)
        open_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter(1, opened, True)
        return scores_TGM.masked_fill(~open_TG[:, :, None], -math.inf).flatten(1)

    @torch.no_grad()
    def after_step(self, load_E: Tensor) -> None:
        """``b_e += γ · sign(mean load - load_e)``, the load being the whole step's; never in eval."""
        if self.training:
            missing_E = load_E.sum() - self.num_experts * load_E  # in whole numbers: a balanced load moves nothing
            self.expert_bias += self.config.bias_update_rate * missing_E.sign().to(self.expert_bias)

    def training_problem(self) -> str | None:
        if self.top_k == 1 and self.config.norm_topk_prob:
            return (
                "with top_k=1 and norm_topk_prob=true the combine weight is constant, so that the gate gets no"
                " language-model gradient (use norm_topk_prob=false)"
            )
        return super().training_problem()

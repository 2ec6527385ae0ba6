"""``noisy-topk``: top-k under noise whose strength each token learns (Shazeer et al. 2017, arXiv:1701.06538).

Shape suffixes: T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moectl.moe.token_choice import SoftmaxRouter, TokenChoiceOptions


class LearnedNoise(nn.Module):
    """``ε · softplus(x · W_noise)`` with ``ε`` a standard normal, one draw per token and expert.

    Attributes:
        weight: ``W_noise``, ``[D, E]`` as in the paper, and not the gate's ``[E, D]``: whoever knows a gate
            by its shape finds only one. Zero at the start, as in the paper: noise of softplus(0) = 0.69.
    """

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x_TD: Tensor) -> Tensor:
        std_TE = F.softplus(x_TD @ self.weight.to(x_TD.dtype))
        return std_TE * torch.randn_like(std_TE)


class NoisyTopKRouter(SoftmaxRouter):
    """Noisy top-k gating: ``H = x·Wᵀ + ε·softplus(x·W_noise)``, weights ``softmax(KeepTopK(H, k))``.

    The noise is in training only, and is never annealed: where it does not help, training turns it down.
    """

    class Config(TokenChoiceOptions):
        top_k: Annotated[int, Field(ge=1)] = 2

    def __init__(self, config: Config, *, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, hidden_size=hidden_size, num_experts=num_experts)
        self.noise = LearnedNoise(hidden_size, num_experts)

    def perturb(self, logits_TE: Tensor, x_TD: Tensor) -> Tensor:
        return logits_TE + self.noise(x_TD) if self.training else logits_TE

    def combine_weights(self, noisy_TE: Tensor, probs_TE: Tensor, indices_TK: Tensor) -> Tensor:
        return torch.softmax(noisy_TE.gather(1, indices_TK), dim=-1)

    def training_problem(self) -> str | None:
        if self.top_k == 1:
            return (
                "with top_k=1 the combine weight is the constant 1, so that the gate gets no language-model gradient"
                " (use top_k=2, or the router 'top1' or 'switch')"
            )
        return super().training_problem()

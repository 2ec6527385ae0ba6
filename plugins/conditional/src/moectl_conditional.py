"""``conditional``: each token chooses the dense MLP or the experts.

A learned binary gate on top of top-k: the easy tokens take the one MLP, the others a mixture. The
idea of choosing how much to compute is that of conditional computation (Bengio et al. 2013,
arXiv:1308.3432); the equations are this package's own. Expert 0 plays the dense MLP. With logits
``l = x Wᵀ``, row 0 of ``W`` being the binary gate, and ``σ`` the logistic function:

    d = σ(l_0)                                  probability of the dense MLP
    y = d · f_0(x)                              if d >= 1/2
    y = (1 - d) · Σ_{e in top k of 1..E-1} g_e · f_e(x)   otherwise

where ``g`` is a softmax over the chosen k (``norm_topk_prob``) or the softmax over 1..E-1 as it is.
``router_probs`` is ``[d, (1 - d) · softmax(l_1..l_{E-1})]``, a distribution over all experts.

Shape suffixes: T tokens, D hidden, E experts (expert 0 is the dense MLP), K experts per token.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from moectl.moe import Router, RouterConfig, RouterOutput
from moectl.moe.router import entropy, stable_topk


class ConditionalRouter(Router):
    """Each token takes the dense MLP (expert 0, alone) or the top k of the other experts.

    The dense MLP costs one expert, the mixture k: what a token costs is its own choice. A token that
    chose the dense MLP uses its first slot only. The balance loss sees the dense MLP as one expert of
    ``E`` and pulls its share towards 1/E; ``moe.lb_coef=0`` leaves the choice to the language model.

    Attributes:
        weight: ``[E, D]``; row 0 decides dense or not, the others which experts.

    Raises:
        ValueError: fewer than ``top_k`` experts beside the dense MLP.
    """

    class Config(RouterConfig):
        top_k: Annotated[int, Field(ge=1, description="experts of a token that does not go dense")] = 2
        norm_topk_prob: Annotated[bool, Field(description="renormalise over the chosen k")] = True

    config: Config

    def check_top_k(self, k: int) -> None:
        if not 1 <= k < self.num_experts:
            raise ValueError(
                f"top_k is {k}, but there are {self.num_experts - 1} experts beside the dense MLP (expert 0):"
                f" choose 1 to {self.num_experts - 1}"
            )

    def route(self, x_TD: Tensor, mask_T: Tensor | None) -> RouterOutput:
        logits_TE = self.logits(x_TD)
        dense_T1, others_TE = logits_TE[:, :1], logits_TE[:, 1:]  # the second without the dense MLP: E - 1 wide
        probs_TE = torch.cat([dense_T1.sigmoid(), (-dense_T1).sigmoid() * others_TE.softmax(-1)], dim=-1)

        goes_dense_T1 = dense_T1.detach() >= 0
        others_TK = stable_topk(others_TE.detach(), self.top_k)
        if self.config.norm_topk_prob:
            shares_TK = others_TE.gather(1, others_TK).softmax(dim=-1)
        else:
            shares_TK = others_TE.softmax(dim=-1).gather(1, others_TK)
        first_TK = torch.zeros_like(goes_dense_T1.expand_as(others_TK))
        first_TK[:, 0] = True
        keep_TK = ~goes_dense_T1 | first_TK
        weights_TK = torch.where(goes_dense_T1, dense_T1.sigmoid(), (-dense_T1).sigmoid() * shares_TK)
        return RouterOutput(
            topk_indices=torch.where(goes_dense_T1 & first_TK, 0, others_TK + 1),
            topk_weights=weights_TK,  # 0 where keep is False: the base class sees to that
            router_logits=logits_TE,
            router_probs=probs_TE,
            router_probs_clean=probs_TE,
            entropy=entropy(probs_TE),
            keep=keep_TK,
        )

    def training_problem(self) -> str | None:
        if self.config.top_k == 1 and self.config.norm_topk_prob:
            return (
                "with top_k=1 and norm_topk_prob=true the chosen expert's share is the constant 1, so that the gate"
                " among the experts gets no language-model gradient (use norm_topk_prob=false, or a larger top_k)"
            )
        return super().training_problem()

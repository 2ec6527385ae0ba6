"""``topk`` and ``top2``: the k most probable experts per token.

Shazeer et al. 2017 (arXiv:1701.06538); Mixtral, Jiang et al. 2024 (arXiv:2401.04088); Qwen3
(arXiv:2505.09388).

Shape suffixes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from moectl.moe.token_choice import NoisySoftmaxRouter


class TopKRouter(NoisySoftmaxRouter):
    """Top-k of the (noisy) softmax; weights renormalised over the chosen by default.

    ``norm_topk_prob=True`` is the same as a softmax over the chosen k logits, and is computed so.
    ``False`` keeps the raw probabilities, which sum to less than one.
    """

    class Config(NoisySoftmaxRouter.Config):
        top_k: Annotated[int, Field(ge=1)] = 2
        norm_topk_prob: bool = True

    config: Config

    def combine_weights(self, noisy_TE: Tensor, probs_TE: Tensor, indices_TK: Tensor) -> Tensor:
        if self.config.norm_topk_prob:
            return torch.softmax(noisy_TE.gather(1, indices_TK), dim=-1)
        return probs_TE.gather(1, indices_TK)

    def training_problem(self) -> str | None:
        if self.top_k == 1 and self.config.norm_topk_prob:
            return (
                "with top_k=1 and norm_topk_prob=true the combine weight is the constant 1, so that the gate gets no"
                " language-model gradient (use the router 'top1' or 'switch', or norm_topk_prob=false)"
            )
        return super().training_problem()


class Top2Router(TopKRouter):
    """``topk`` with k = 2."""

    class Config(TopKRouter.Config):
        top_k: Literal[2] = 2

"""``top1``: one expert per token, straight-through.

Switch Transformer (Fedus et al. 2021, arXiv:2101.03961) chooses one expert; the straight-through
estimator (Bengio et al. 2013, arXiv:1308.3432) gives it weight 1 and lets the gate learn.

Shape suffixes: T tokens, E experts, K experts per token (1 here).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moectl.moe.token_choice import NoisySoftmaxRouter


class Top1Router(NoisySoftmaxRouter):
    """Argmax of the (noisy) softmax; the chosen expert's output is taken whole.

    In training the weight is ``1 + (p - p.detach())``: exactly 1.0 forward, so that an upcycled
    model starts as its dense parent, and ``∂p`` backward, so that the gate has a language-model
    gradient. In eval it is a plain 1.0.
    """

    def combine_weights(self, noisy_TE: Tensor, probs_TE: Tensor, indices_TK: Tensor) -> Tensor:
        soft_TK = probs_TE.gather(1, indices_TK)
        if not self.training:
            return torch.ones_like(soft_TK)
        return 1.0 + (soft_TK - soft_TK.detach())

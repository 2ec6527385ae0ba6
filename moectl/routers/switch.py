"""``switch``: one expert per token, weighted by its probability (Fedus et al. 2021, arXiv:2101.03961).

Shape suffixes: T tokens, E experts, K experts per token (1 here).
"""

from __future__ import annotations

from torch import Tensor

from moectl.moe.token_choice import NoisySoftmaxRouter


class SwitchRouter(NoisySoftmaxRouter):
    """Argmax of the (noisy) softmax, the output scaled by the chosen expert's probability.

    The weight is below 1 (about 1/E at the start), so that a copy of a dense MLP is shrunk:
    fine from scratch, not function-preserving for upcycling.
    """

    def combine_weights(self, noisy_TE: Tensor, probs_TE: Tensor, indices_TK: Tensor) -> Tensor:
        return probs_TE.gather(1, indices_TK)

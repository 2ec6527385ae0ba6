"""Pairs of experts that are one: always chosen together, or grown into the same weights.

Choices are counted in the one step before a check, so that every other step costs nothing.
Shape suffixes: T tokens, K slots, E experts, P parameters of an expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from moectl.config.guards import CollapseConfig
from moectl.moe.layer import MoELayer
from moectl.moe.types import RouterOutput


class Pair(NamedTuple):
    """Two experts of a layer that are one: ``why`` is ``together`` or ``alike``, ``value`` the share or the cosine."""

    first: int
    second: int
    why: str
    value: float


def chosen_together(routing: RouterOutput, num_experts: int, token_mask: Tensor | None = None) -> Tensor:
    """``[E, E]`` int64: tokens that chose both of two experts; the diagonal counts those that chose one."""
    indices_TK = routing.topk_indices
    used_TK = torch.ones_like(indices_TK, dtype=torch.bool) if routing.keep is None else routing.keep
    if token_mask is not None:
        used_TK = used_TK & token_mask[:, None]
    chosen_TE = torch.zeros(indices_TK.shape[0], num_experts, device=indices_TK.device)
    # amax: an expert in two slots of one token was chosen once.
    chosen_TE.scatter_reduce_(1, indices_TK, used_TK.float(), "amax")
    return (chosen_TE.T @ chosen_TE).round().long()  # exact in float32 below 2^24 tokens per call


def expert_cosines(layer: MoELayer) -> Tensor:
    """``[E, E]`` float64: cosines between the experts' weights, all matrices and biases as one vector."""
    products_EE: Tensor | float = 0.0
    for parameter in layer.experts.parameters():
        flat_EP = parameter.detach().flatten(1)
        flat_EP = flat_EP if flat_EP.dtype == torch.float64 else flat_EP.float()
        products_EE = products_EE + (flat_EP @ flat_EP.T).double()
    assert isinstance(products_EE, Tensor)
    norms_E = products_EE.diagonal().clamp(min=1e-30).sqrt()
    return products_EE / norms_E[:, None] / norms_E


class PairWatch:
    """Finds the worst pair of a layer.

    - *Together*: of the tokens that chose either expert more than ``max_together`` chose both. Only of experts
      that ``min_expected_count`` tokens chose, and not where the mean over all pairs is above half the bound: with
      k close to E chance alone comes near it. Where a step has too few tokens for that, those of the steps before
      earlier checks count, too: all until they are enough, then half as much at every further check.
    - *Alike*: the cosine of their weights is above ``max_cosine``, after it has been at most
      ``1 - 2·(1 - max_cosine)``. Experts that began as copies of one MLP, or one that was revived from another,
      pass the bound slowly and to and fro as they grow apart: they are alike until they have been well below it.
    """

    def __init__(self, config: CollapseConfig, layers: Mapping[int, MoELayer]) -> None:
        self.config, self.layers = config, layers
        experts = {number: layer.experts.num_experts for number, layer in layers.items()}
        #: Pairs that have been apart, ``[E, E]`` bool by layer.
        self.apart = {number: torch.zeros(count, count, dtype=torch.bool) for number, count in experts.items()}
        #: Tokens that chose both of two experts, ``[E, E]`` int64 by layer, over as many checks as it takes.
        self.chosen = {number: torch.zeros(count, count, dtype=torch.int64) for number, count in experts.items()}

    @torch.no_grad()
    def check(self, number: int, together_EE: Tensor | None) -> Pair | None:
        """The worst pair of layer ``number``: by weight, or by what the last step chose together, if it was counted."""
        cosines_EE = expert_cosines(self.layers[number]).cpu()
        apart_EE = self.apart[number]
        apart_EE |= cosines_EE <= 2 * self.config.max_cosine - 1  # a cosine that is not finite proves nothing
        both_EE = None if together_EE is None else self._gather(number, together_EE.cpu())
        alike = _largest(torch.where(apart_EE, cosines_EE, 0.0), self.config.max_cosine)
        if alike is not None:
            return Pair(*alike[:2], "alike", alike[2])
        together = None if both_EE is None else self._together(both_EE.double())
        return None if together is None else Pair(*together[:2], "together", together[2])

    def _gather(self, number: int, now_EE: Tensor) -> Tensor:
        """The layer's counts with those of this check: what is judged now."""
        enough = self.config.min_expected_count
        before_EE = self.chosen[number]
        if _even_load(now_EE) >= enough:
            before_EE.zero_()
        elif _even_load(before_EE) >= enough:
            before_EE //= 2
        before_EE += now_EE
        return before_EE

    def _together(self, both_EE: Tensor) -> tuple[int, int, float] | None:
        chosen_E = both_EE.diagonal()
        enough_E = chosen_E >= self.config.min_expected_count
        either_EE = chosen_E[:, None] + chosen_E - both_EE
        share_EE = both_EE / either_EE.clamp(min=1)
        # Where every pair is chosen together often, k is close to E, and no pair stands out.
        pairs = share_EE.numel() - len(share_EE)
        if pairs == 0 or float(share_EE.triu(1).sum()) / (pairs / 2) > self.config.max_together / 2:
            return None
        return _largest(share_EE * (enough_E[:, None] & enough_E), self.config.max_together)

    def forget(self, number: int, experts: Iterable[int]) -> None:
        """These experts begin as copies: they are alike until they have been apart again."""
        for expert in experts:
            self.apart[number][expert, :] = self.apart[number][:, expert] = False
            self.chosen[number][expert, :] = self.chosen[number][:, expert] = 0

    def tensors(self) -> dict[str, Tensor]:
        """The pairs that have been apart, and what was chosen together, by name, for a checkpoint."""
        named = {f"apart.{number}": apart_EE for number, apart_EE in self.apart.items()}
        return named | {f"together.{number}": chosen_EE for number, chosen_EE in self.chosen.items()}


def _even_load(both_EE: Tensor) -> float:
    return float(both_EE.diagonal().double().mean())


def _largest(values_EE: Tensor, bound: float) -> tuple[int, int, float] | None:
    """The largest value above the diagonal, where it is above ``bound``: row, column, value."""
    upper_EE = values_EE.nan_to_num(nan=0.0).triu(1)
    place = int(upper_EE.argmax())
    value = float(upper_EE.flatten()[place])
    return (*divmod(place, values_EE.shape[0]), value) if value > bound else None

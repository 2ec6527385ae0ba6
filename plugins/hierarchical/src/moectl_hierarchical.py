"""``hierarchical``: groups first, then experts in them (Shazeer et al. 2017, arXiv:1701.06538, appendix B).

A primary gate chooses groups of experts, and each group's own gate chooses among its experts. The
weight of expert ``j`` of group ``i`` is the product of the two (equation 12):

    y = Σ_i Σ_j  G_primary(x)_i · G_i(x)_j · f_ij(x),        G = softmax(keep the top k of the logits)

The paper's noise on both gates is left out. ``router_probs`` is the product of the two full
softmaxes, ``p(i) · p(j | i)``, which is a distribution over all experts.

Shape suffixes: T tokens, D hidden, E experts, K experts per token, G groups, M experts in a group.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moectl.moe import Router, RouterConfig, RouterOutput
from moectl.moe.router import entropy, stable_topk

GATE_STD = 0.02


class HierarchicalRouter(Router):
    """The best groups of experts, then the best experts in each; a weight is the product of both gates.

    ``normalize`` says over what weights are normalised: ``levels`` is the paper's (a softmax over the
    chosen groups times a softmax over the chosen experts of the group; sums to 1), ``chosen`` divides
    the product of the full softmaxes by its sum over all chosen (sums to 1), ``none`` takes that
    product as it is (Switch-like; sums to less than 1).

    Attributes:
        weight: ``[E, D]``, the groups' own gates; group ``i`` has the experts ``i·M`` to ``i·M + M - 1``.
        group_weight: ``[G, D]``, the primary gate.

    Raises:
        ValueError: experts, groups and top_k do not divide into one another.
    """

    class Config(RouterConfig):
        top_k: Annotated[int, Field(ge=1, description="experts per token over all groups")] = 4
        topk_group: Annotated[int, Field(ge=1, description="groups per token; divides top_k")] = 2
        n_group: Annotated[int | None, Field(ge=2, description="groups; None is about √E")] = None
        normalize: Annotated[
            Literal["levels", "chosen", "none"],
            Field(description="over what weights are normalised: see the text above"),
        ] = "levels"

    config: Config

    def __init__(self, config: Config, *, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, hidden_size=hidden_size, num_experts=num_experts)
        self.group_weight = nn.Parameter(torch.empty(self.num_groups, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=GATE_STD)

    @property
    def num_groups(self) -> int:
        return self.config.n_group or default_groups(self.num_experts)

    @property
    def per_group(self) -> int:
        """Experts chosen in each chosen group."""
        return self.top_k // self.config.topk_group

    def check_top_k(self, k: int) -> None:
        chosen, groups = self.config.topk_group, self.num_groups
        size, rest = divmod(self.num_experts, groups)
        if rest or size < 2:
            raise ValueError(
                f"{self.num_experts} experts do not make {groups} groups of one size, two or more experts each:"
                " choose another n_group or num_experts"
            )
        if chosen > groups:
            raise ValueError(f"topk_group is {chosen}, but there are {groups} groups")
        if k % chosen or not chosen <= k <= chosen * size:
            raise ValueError(
                f"top_k is {k}, but {chosen} groups of {size} experts give a multiple of {chosen},"
                f" at most {chosen * size}"
            )

    def route(self, x_TD: Tensor, mask_T: Tensor | None) -> RouterOutput:
        group_TG = F.linear(x_TD, self.group_weight.to(x_TD.dtype))
        within_TGM = self.logits(x_TD).unflatten(1, (self.num_groups, -1))
        log_TE = log_product(group_TG, within_TGM)
        probs_TE = log_TE.exp()

        chosen_TG = top_mask(group_TG, self.config.topk_group)
        chosen_TGM = top_mask(within_TGM, self.per_group)
        # Best first; an expert that was not chosen comes after a chosen one whose probability is 0.
        allowed_TE = (chosen_TG[..., None] & chosen_TGM).flatten(1)
        indices_TK = stable_topk(probs_TE.detach().masked_fill(~allowed_TE, -1.0), self.top_k)

        if self.config.normalize == "levels":
            kept_TG = group_TG.masked_fill(~chosen_TG, -math.inf)
            kept_TGM = within_TGM.masked_fill(~chosen_TGM, -math.inf)
            weights_TK = log_product(kept_TG, kept_TGM).gather(1, indices_TK).exp()
        elif self.config.normalize == "chosen":
            weights_TK = log_TE.gather(1, indices_TK).softmax(dim=-1)
        else:
            weights_TK = probs_TE.gather(1, indices_TK)
        return RouterOutput(
            topk_indices=indices_TK,
            topk_weights=weights_TK,
            # Raw logits of both gates: the z-loss holds both.
            router_logits=(group_TG[..., None] + within_TGM).flatten(1),
            router_probs=probs_TE,
            router_probs_clean=probs_TE,
            entropy=entropy(probs_TE),
        )

    def training_problem(self) -> str | None:
        options, constant = self.config, "is the constant 1, so that its gate gets no language-model gradient"
        if options.topk_group == 1 and options.normalize != "none":
            return f"with one group per token the group's weight {constant} (use topk_group=2, or normalize=none)"
        if options.top_k == options.topk_group and options.normalize == "levels":
            return f"with one expert per group its weight {constant} (use normalize=chosen, or a larger top_k)"
        if not bool(self.group_weight.detach().any()):
            return "its primary gate is all zeros, which ties every token to the same groups"
        return super().training_problem()


def default_groups(num_experts: int) -> int:
    """The smallest divisor of ``E`` that is at least √E: 4 groups of 2 experts, 4 of 4, 8 of 8."""
    return next(
        groups for groups in range(1, num_experts + 1) if num_experts % groups == 0 and groups**2 >= num_experts
    )


def log_product(group_TG: Tensor, within_TGM: Tensor) -> Tensor:
    """Logarithm ``[T, E]`` of the product of the softmax over groups and those within each group."""
    return (group_TG.log_softmax(-1)[..., None] + within_TGM.log_softmax(-1)).flatten(1)


def top_mask(logits: Tensor, k: int) -> Tensor:
    """Where the k largest of the last dimension are; ties go to the lowest index."""
    flat = logits.detach().flatten(0, -2)
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    return chosen.scatter(1, stable_topk(flat, k), True).view_as(logits)

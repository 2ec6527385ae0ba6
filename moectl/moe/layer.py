"""The Mixture-of-Experts layer: router, dispatch, experts, combine. A drop-in for an MLP."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moectl.moe.dispatch import combine, dispatch
from moectl.moe.experts import Experts
from moectl.moe.router import Router, flatten_mask
from moectl.moe.types import RouterOutput


class MoELayer(nn.Module):
    """``layer(x, token_mask=None)``: ``[*, D] -> [*, D]``.

    Args:
        router: decides.
        experts: compute.
        shared_experts: an always-on module whose output is added to the routed sum, or None.

    Attributes:
        routing: the last call's :class:`RouterOutput`, with its graph, for losses and probes.
        token_mask: the last call's ``[T]`` mask of real tokens, or None.

    Raises:
        ValueError: router and experts disagree about the hidden size or the number of experts.
    """

    def __init__(self, router: Router, experts: Experts, shared_experts: nn.Module | None = None) -> None:
        super().__init__()
        ours, theirs = (router.num_experts, router.hidden_size), (experts.num_experts, experts.hidden_size)
        if ours != theirs:
            raise ValueError(f"router has (experts, hidden) {ours}, the experts have {theirs}")
        self.router = router
        self.experts = experts
        self.shared_experts = shared_experts
        self.routing: RouterOutput | None = None
        self.token_mask: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the last call's graph behind (torch refuses to copy one)."""
        return {**self.__dict__, "routing": None, "token_mask": None}

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        self.token_mask = flatten_mask(token_mask, x)
        self.routing = self.router(x_TD, self.token_mask)
        plan = dispatch(self.routing)
        out = combine(plan, self.experts(x_TD, plan), x_TD.shape[0]).reshape(x.shape)
        return out if self.shared_experts is None else out + self.shared_experts(x)

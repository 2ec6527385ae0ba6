"""The Mixture-of-Experts layer: router, dispatch, experts. A drop-in for an MLP."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from moectl.errors import ConfigError
from moectl.moe.capacity import Capacity
from moectl.moe.dispatch import dispatch
from moectl.moe.experts import Experts
from moectl.moe.router import Router, flatten_mask
from moectl.moe.types import RouterOutput


class MoELayer(nn.Module):
    """``layer(x, token_mask=None)``: ``[*, D] -> [*, D]``.

    Args:
        router: decides.
        experts: compute.
        shared_experts: an always-on module whose output is added to the routed sum, or None.
        capacity: how many tokens an expert takes, in training only unless it says otherwise; None
            for no limit.
        dropout: of the whole output, after the experts are combined, as the MLP in this place had it.

    Attributes:
        capacity: as given; may be replaced between calls.
        routing: the last call's :class:`RouterOutput`, with its graph, for losses and probes. It is
            what the router decided, before capacity.
        token_mask: the last call's ``[T]`` mask of real tokens, or None.
        dropped: the last call's assignments lost to capacity, ``[E]`` int64; None without a limit.

    Raises:
        ValueError: router and experts disagree about the hidden size or the number of experts.
        ConfigError: a capacity for a router whose tokens do not choose.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared_experts: nn.Module | None = None,
        capacity: Capacity | None = None,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        ours, theirs = (router.num_experts, router.hidden_size), (experts.num_experts, experts.hidden_size)
        if ours != theirs:
            raise ValueError(f"router has (experts, hidden) {ours}, the experts have {theirs}")
        self.router = router
        self.experts = experts
        self.shared_experts = shared_experts
        self.capacity = capacity
        self.dropout = dropout
        self.routing: RouterOutput | None = None
        self.token_mask: Tensor | None = None
        self.dropped: Tensor | None = None

    @property
    def capacity(self) -> Capacity | None:
        return self._capacity

    @capacity.setter
    def capacity(self, capacity: Capacity | None) -> None:
        if capacity is not None and not self.router.token_choice:
            raise ConfigError(
                f"{self.router.label} takes no capacity: its tokens do not choose their experts",
                "Leave capacity away; how many tokens an expert takes is one of the router's own options, if any.",
            )
        self._capacity = capacity

    @property
    def causal(self) -> bool:
        """Whether a token's output depends on itself and earlier tokens only, by what router and capacity declare."""
        return self.router.causal and (self.capacity is None or self.capacity.causal)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the last call's graph behind (torch refuses to copy one)."""
        return {**self.__dict__, "routing": None, "token_mask": None, "dropped": None}

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        self.token_mask = flatten_mask(token_mask, x)
        self.routing = self.router(x_TD, self.token_mask)
        limited = self.capacity is not None and (self.training or self.capacity.in_eval)
        plan = dispatch(self.routing, self.capacity if limited else None, token_mask=self.token_mask)
        self.dropped = plan.dropped
        out = self.experts(x_TD, plan).reshape(x.shape)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return F.dropout(out, self.dropout, self.training) if self.dropout > 0.0 else out

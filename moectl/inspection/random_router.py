"""The random-router null: freshly drawn gates of the same shape on the same hidden states.

Domains differ in vocabulary, so any gate at all, trained or not, sends them to different experts.
What training added is only what stands above gates that were never trained.

Shape suffixes: T tokens, D hidden, E experts, K experts per token, R random gates, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moectl.moe.router import Router, at_least_float32, stable_topk
from moectl.moe.types import RouterOutput

_CHUNK = 4_000_000  # logits of one piece: 16 MB in float32
UNUSED = -1


class RandomGates:
    """Routes the same hidden states through ``R`` gates as the router's own class draws them.

    Where the router's choice is the plain top-k of ``x · Wᵀ`` (checked on the first tokens, not
    assumed), all gates go through one matrix product; any other router, one with a plug-in's own
    rule, say, is built anew for every gate and called as itself. Running statistics that training
    would have set (thresholds, say) are set from the first tokens.

    Args:
        router: the trained router; its class, options and shape are used, its weights are not.
        draws: ``R``.
        num_groups: ``G``.
        seed: of the gates.

    Attributes:
        counts: ``[R, G, E]`` int64, kept assignments so far.
    """

    def __init__(self, router: Router, *, draws: int, num_groups: int, seed: int) -> None:
        if draws < 1:
            raise ValueError(f"at least one random gate is needed, not {draws}")
        device = router.weight.device
        with torch.random.fork_rng(devices=[]):  # new parameters are drawn on the CPU, like any model's
            torch.manual_seed(seed)
            self.routers = [_fresh(router).to(device).eval() for _ in range(draws)]
        self.num_experts, self.top_k = router.num_experts, router.top_k
        self.weight_RED = torch.stack([fresh.weight.detach() for fresh in self.routers])
        self.counts = torch.zeros(draws, num_groups, router.num_experts, dtype=torch.int64, device=device)
        self._plain: bool | None = None

    @torch.no_grad()
    def update(self, x_TD: Tensor, group_T: Tensor, mask_T: Tensor | None = None) -> None:
        """Count the choices of all gates on the router's own input, one call of the layer at a time.

        Scored in float32 at the least and without autocast, as a router does.
        """
        if self._plain is None:
            for router in self.routers:
                router.calibrate(x_TD, mask_T)
            self._plain = self._is_plain_topk(x_TD, mask_T)
        if not self._plain:
            for draw, router in enumerate(self.routers):
                self._count(draw, chosen_experts(router(x_TD, mask_T)), group_T)
            return
        if mask_T is not None:
            x_TD, group_T = x_TD[mask_T], group_T[mask_T]
        draws, piece = len(self.routers), max(1, _CHUNK // (len(self.routers) * self.num_experts))
        for x_tD, group_t in zip(x_TD.split(piece), group_T.split(piece), strict=True):
            scores = _scores(x_tD, self.weight_RED.flatten(0, 1)).reshape(-1, draws, self.num_experts)
            experts = scores.argmax(-1, keepdim=True) if self.top_k == 1 else scores.topk(self.top_k, dim=-1).indices
            self._count(None, experts, group_t)

    def _count(self, draw: int | None, experts: Tensor, group_T: Tensor) -> None:
        """Add ``[T, K]`` choices of one gate, or ``[T, R, K]`` of all, to the counts."""
        counts = self.counts if draw is None else self.counts[draw : draw + 1]
        choices_TRK = experts if draw is None else experts[:, None]
        gate_R1 = torch.arange(counts.shape[0], device=experts.device)[:, None]
        slots = (gate_R1 * counts.shape[1] + group_T[:, None, None]) * self.num_experts + choices_TRK
        counts += torch.bincount(slots[choices_TRK >= 0], minlength=counts.numel()).reshape(counts.shape)

    def _is_plain_topk(self, x_TD: Tensor, mask_T: Tensor | None) -> bool:
        router = self.routers[0]
        out = router(x_TD, mask_T)
        plain = stable_topk(_scores(x_TD, self.weight_RED[0]), self.top_k)
        expected = plain if mask_T is None else plain.masked_fill(~mask_T[:, None], UNUSED)
        actual = chosen_experts(out)
        return actual.shape == expected.shape and torch.equal(actual.sort(-1).values, expected.sort(-1).values)


def _scores(x_TD: Tensor, weight: Tensor) -> Tensor:
    x_TD = at_least_float32(x_TD)
    with torch.autocast(device_type=x_TD.device.type, enabled=False):
        return x_TD @ weight.to(x_TD.dtype).T


def chosen_experts(out: RouterOutput) -> Tensor:
    """``[T, K]`` chosen experts with -1 where the slot is unused."""
    return out.topk_indices if out.keep is None else out.topk_indices.masked_fill(~out.keep, UNUSED)


def _fresh(router: Router) -> Router:
    return type(router)(router.config, hidden_size=router.hidden_size, num_experts=router.num_experts)

"""``soft-moe``: experts work on mixtures of tokens (Puigcerver et al. 2023, arXiv:2308.00951).

Nothing is chosen and nothing is dropped. Each expert has ``P`` slots; a slot is a weighted average
of all tokens of a sequence, and a token's output a weighted average of all slots' outputs. With
``X [S, D]`` and ``Φ [D, E·P]``:

    logits = XΦ
    X̃ = softmax(logits, over tokens)ᵀ · X        the slots' inputs, expert by expert
    Ỹ = f_e(X̃)                                   each expert on its own slots
    Y = softmax(logits, over slots) · Ỹ

and, with ``normalize`` (the paper's form for wide models), ``logits = l2(X) · (scale · l2(Φ))``. A
slot holds later tokens too, so the layer is not causal: for encoders, not for a causal language model.

Shape suffixes: B batch, S sequence, T tokens, D hidden, E experts, K experts per token (= E),
P slots per expert, N slots of one expert over the batch.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moectl.moe import GatedExperts, Router, RouterConfig, RouterOutput
from moectl.moe.router import entropy

GATE_STD = 0.02


class SoftMoERouter(Router):
    """The gate of Soft MoE; its layer is `moectl_soft_moe.SoftMoELayer`, not the usual MoE layer.

    As a router it gives the dense view: every token to all ``E`` experts, weighted by what its output
    takes from each expert's slots. A ``MoELayer`` makes ``y_t = Σ_e combine_te · f_e(x_t)`` of that: a
    dense mixture on the token itself, without slots. That is not Soft MoE, so that training it under
    this name is refused.

    Attributes:
        weight: ``[E, D]``, the first slot of each expert: with one slot per expert, ``Φᵀ``.
        extra_slots: ``[E, P - 1, D]``, the other slots, or None.
        scale: the scalar of the normalised form, or None.
    """

    class Config(RouterConfig):
        slots_per_expert: Annotated[int, Field(ge=1, description="slots that each expert works on")] = 1
        normalize: Annotated[bool, Field(description="L2-normalise tokens and slots, and learn a scale")] = True

    config: Config
    causal = False
    token_choice = False
    default_lb_coef = 0.0  # every expert gets every token: there is nothing to balance

    def __init__(self, config: Config, *, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, hidden_size=hidden_size, num_experts=num_experts)
        extra = config.slots_per_expert - 1
        self.extra_slots = nn.Parameter(torch.empty(num_experts, extra, hidden_size)) if extra else None
        self.scale = nn.Parameter(torch.ones(())) if config.normalize else None
        self.reset_parameters()

    @property
    def slots(self) -> int:
        """``K`` of the dense view: all experts."""
        return self.num_experts

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=GATE_STD) if parameter.dim() else nn.init.ones_(parameter)

    def slot_logits(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., E, P]``: how much each token and each slot are alike."""
        slots_EPD = self.weight[:, None]
        if self.extra_slots is not None:
            slots_EPD = torch.cat([slots_EPD, self.extra_slots], dim=1)
        slots_EPD = slots_EPD.to(x.dtype)
        if self.scale is not None:
            x, slots_EPD = l2_normalize(x), self.scale.to(x.dtype) * l2_normalize(slots_EPD)
        return torch.einsum("...d,epd->...ep", x, slots_EPD)

    def route(self, x_TD: Tensor, mask_T: Tensor | None) -> RouterOutput:
        # The softmax of this sum in logarithms is the combine softmax, summed over each expert's slots.
        logits_TE = self.slot_logits(x_TD).logsumexp(dim=-1)
        probs_TE = torch.softmax(logits_TE, dim=-1)
        indices_TK = torch.arange(self.num_experts, device=x_TD.device).expand(len(x_TD), -1)
        return RouterOutput(
            topk_indices=indices_TK.contiguous(),
            topk_weights=probs_TE,
            router_logits=logits_TE,
            router_probs=probs_TE,
            router_probs_clean=probs_TE,
            entropy=entropy(probs_TE),
        )

    def training_problem(self) -> str | None:
        return (
            "in a MoELayer it is a dense mixture of all experts on each token, not Soft MoE, which mixes the tokens of"
            " a sequence into slots and is not causal (put moectl_soft_moe.SoftMoELayer into a model of your own;"
            " for the dense mixture there is the router 'topk' with top_k = the number of experts)"
        )


class SoftMoELayer(nn.Module):
    """``layer(x, token_mask=None)``: ``[B, S, D] -> [B, S, D]``, the equations of the paper.

    Mixing runs in float32 (float64 for float64 input), the experts in their own dtype. Tokens never mix
    across the sequences of a batch.

    Args:
        router: a :class:`SoftMoERouter`; it holds ``Φ``.
        experts: their weights are used, ``E·P`` slots at a time and without any dispatch.

    Raises:
        ValueError: router and experts disagree about the hidden size or the number of experts.
    """

    causal = False

    def __init__(self, router: SoftMoERouter, experts: GatedExperts) -> None:
        super().__init__()
        ours, theirs = (router.num_experts, router.hidden_size), (experts.num_experts, experts.hidden_size)
        if ours != theirs:
            raise ValueError(f"router has (experts, hidden) {ours}, the experts have {theirs}")
        self.router, self.experts = router, experts

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Padding (False in ``token_mask [B, S]``) enters no slot, and gets zeros."""
        if x.dim() != 3:
            raise ValueError(f"Soft MoE mixes the tokens of a sequence: x must be [B, S, D], got {tuple(x.shape)}")
        exact_BSD = x if x.dtype == torch.float64 else x.float()
        with torch.autocast(device_type=x.device.type, enabled=False):
            if token_mask is not None:
                exact_BSD = exact_BSD.masked_fill(~token_mask[..., None], 0.0)
            logits_BSEP = self.router.slot_logits(exact_BSD)
            combine_BSEP = torch.softmax(logits_BSEP.flatten(2), dim=-1).view_as(logits_BSEP)
            if token_mask is not None:
                lowest = torch.finfo(logits_BSEP.dtype).min  # not -inf: a sequence of padding alone stays finite
                logits_BSEP = logits_BSEP.masked_fill(~token_mask[..., None, None], lowest)
            slots_EBPD = torch.einsum("bsep,bsd->ebpd", torch.softmax(logits_BSEP, dim=1), exact_BSD)
        dtype = self.experts.down_proj.dtype
        outputs_EBPD = run_experts(self.experts, slots_EBPD.flatten(1, 2).to(dtype)).view_as(slots_EBPD)
        with torch.autocast(device_type=x.device.type, enabled=False):
            y_BSD = torch.einsum("bsep,ebpd->bsd", combine_BSEP, outputs_EBPD.to(combine_BSEP.dtype))
            return (y_BSD if token_mask is None else y_BSD * token_mask[..., None]).to(x.dtype)


def run_experts(experts: GatedExperts, x_END: Tensor) -> Tensor:
    """Each expert on its own ``N`` rows; all have as many, so that one batched product does."""
    gate_ENF, up_ENF = torch.bmm(x_END, experts.gate_up_proj.mT).chunk(2, dim=-1)
    return torch.bmm(F.silu(gate_ENF) * up_ENF, experts.down_proj.mT)


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / √(Σ x² + eps)`` over the last dimension: finite at zero."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + eps)

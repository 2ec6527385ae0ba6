"""The expert computation on a GPU in bfloat16: torch's grouped matrix product, no host sync.

Ordinary tensor operations, so that autograd and the compiler see all of it. Shape suffixes: T tokens,
D hidden, E experts, H pre-activation columns, F expert intermediate, A assignments sorted by expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moectl.moe.activations import ACTIVATIONS
from moectl.moe.expert_ops import Plan, Weights


def grouped_mm_takes(x_TD: Tensor, weights: Weights) -> bool:
    """CUDA and bfloat16, with rows of whole 16 bytes everywhere: what the kernel asks for."""
    return (
        x_TD.is_cuda
        and x_TD.dtype == torch.bfloat16
        and all(tensor.is_contiguous() for tensor in (weights.up, weights.down))
        and all(size % 8 == 0 for size in (*weights.up.shape[1:], weights.down.shape[2]))
    )


def compute_grouped_mm(x_TD: Tensor, weights: Weights, plan: Plan, activation: str) -> Tensor:
    """``[T, D] -> [T, D]``: gather, two grouped products, weighted scatter-add in float32."""
    used_A1 = (torch.arange(plan.token_ids.shape[0], device=x_TD.device) < plan.tokens_per_expert.sum())[:, None]
    # Rows of unused slots belong to no group: the kernel leaves theirs unwritten, forward and backward.
    x_AD = x_TD.index_select(0, plan.token_ids).where(used_A1, 0)
    pre_AH = _linear(x_AD, weights.up, weights.up_bias, plan)
    hidden_AF = _WeightedActivation.apply(pre_AH, plan.weights, used_A1, activation)
    out_AD = GroupedMM.apply(hidden_AF, weights.down, plan.tokens_per_expert).float()
    if weights.down_bias is not None:
        out_AD = out_AD + plan.weights[:, None] * _by_row(weights.down_bias, plan).float()
    combined_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    return combined_TD.index_add(0, plan.token_ids, out_AD.where(used_A1, 0)).to(x_TD.dtype)


def _linear(x_AI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, plan: Plan) -> Tensor:
    y_AO = GroupedMM.apply(x_AI, weight_EOI, plan.tokens_per_expert)
    return y_AO if bias_EO is None else y_AO + _by_row(bias_EO, plan)


def _by_row(stacked_EO: Tensor, plan: Plan) -> Tensor:
    """Each row's own expert's vector: ``[A, O]``; the last expert's for unused rows."""
    ends_E = plan.tokens_per_expert.cumsum(0)
    rows_A = torch.arange(plan.token_ids.shape[0], device=ends_E.device)
    expert_A = torch.searchsorted(ends_E, rows_A, right=True).clamp(max=ends_E.shape[0] - 1)
    return stacked_EO.index_select(0, expert_A)


class GroupedMM(torch.autograd.Function):
    """``y[a] = W[e(a)] · x[a]`` for rows sorted by expert: ``[A, I]``, ``[E, O, I]``, ``[E]`` to ``[A, O]``.

    Its own backward: gradients may arrive with stride 0, which the kernel refuses, and some releases
    leave the weight gradient of a group without rows unwritten.
    """

    @staticmethod
    def forward(ctx: Any, x_AI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        ends_E = counts_E.cumsum(0).to(torch.int32)
        ctx.save_for_backward(x_AI, weight_EOI, ends_E, counts_E)
        return F.grouped_mm(x_AI, weight_EOI.transpose(1, 2), offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_AI, weight_EOI, ends_E, counts_E = ctx.saved_tensors
        grad_AO = grad_AO.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = F.grouped_mm(grad_AO, weight_EOI, offs=ends_E)
        if ctx.needs_input_grad[1]:
            grad_weight = F.grouped_mm(grad_AO.t(), x_AI, offs=ends_E)
            grad_weight = grad_weight.masked_fill((counts_E == 0)[:, None, None], 0)
        return grad_x, grad_weight, None


class _WeightedActivation(torch.autograd.Function):
    """``weight · activation(pre)`` in float32, rounded once; 0 in unused rows. Keeps ``pre`` alone."""

    @staticmethod
    def forward(ctx: Any, pre_AH: Tensor, weights_A: Tensor, used_A1: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(pre_AH, weights_A, used_A1)
        ctx.activation = activation
        hidden_AF = ACTIVATIONS[activation].forward(pre_AH.float())
        return (hidden_AF * weights_A[:, None]).where(used_A1, 0).to(pre_AH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AF: Tensor) -> tuple[Tensor, Tensor, None, None]:
        pre_AH, weights_A, used_A1 = ctx.saved_tensors
        pre_AH, grad_AF = pre_AH.where(used_A1, 0), grad_AF.where(used_A1, 0).float()
        hidden_AF, grad_pre_AH = ACTIVATIONS[ctx.activation].backward(pre_AH.float(), grad_AF * weights_A[:, None])
        grad_weights_A = torch.linalg.vecdot(grad_AF, hidden_AF)
        return grad_pre_AH.to(pre_AH.dtype), grad_weights_A.to(weights_A.dtype), None, None

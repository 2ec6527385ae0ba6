"""The expert computation on a GPU in bfloat16: torch's grouped matrix product, no host sync.

(Before Hopper, torch itself reads the counts and multiplies group by group.) Ordinary tensor operations,
so that autograd and the compiler see all of it. Shape suffixes: T tokens, D hidden, E experts, H
pre-activation columns, F expert intermediate, A assignments sorted by expert, I and O features in and out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moectl.moe.activations import ACTIVATIONS
from moectl.moe.expert_ops import Plan, Weights

MAX_GROUPS = 1023  # of the kernel


def grouped_mm_takes(x_TD: Tensor, weights: Weights) -> bool:
    """CUDA and bfloat16, whole 16 bytes from the start of the memory to every row: what the kernel asks for.

    And some token: a product over no rows at all has strides that no release takes for granted.
    """
    matrices = (weights.up, weights.down)
    return (
        x_TD.is_cuda
        and x_TD.dtype == torch.bfloat16
        and x_TD.shape[0] > 0
        and weights.up.shape[0] <= MAX_GROUPS
        and all(matrix.is_contiguous() and matrix.storage_offset() % 8 == 0 for matrix in matrices)
        and all(size % 8 == 0 for size in (*weights.up.shape[1:], weights.down.shape[2]))
    )


def compute_grouped_mm(x_TD: Tensor, weights: Weights, plan: Plan, activation: str) -> Tensor:
    """``[T, D] -> [T, D]``: gather, two grouped products, weighted scatter-add in float32."""
    weights = weights.to(x_TD.dtype)
    used_A = torch.arange(plan.token_ids.shape[0], device=x_TD.device) < plan.tokens_per_expert.sum()
    # Rows of unused slots belong to no group: the kernel leaves theirs unwritten, forward and backward.
    used_A1, weight_A1 = used_A[:, None], plan.weights[:, None].float()
    x_AD = x_TD.index_select(0, plan.token_ids).where(used_A1, 0)
    pre_AH = GroupedMM.apply(x_AD, weights.up, plan.tokens_per_expert)
    if weights.up_bias is not None:
        pre_AH = pre_AH + ByRow.apply(weights.up_bias, plan.tokens_per_expert, x_AD.shape[0])
    hidden_AF = _WeightedActivation.apply(pre_AH, weight_A1, used_A1, activation)
    out_AD = GroupedMM.apply(hidden_AF, weights.down, plan.tokens_per_expert).float()
    if weights.down_bias is not None:
        out_AD = out_AD + weight_A1 * ByRow.apply(weights.down_bias, plan.tokens_per_expert, x_AD.shape[0])
    combined_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    return combined_TD.index_add(0, plan.token_ids, out_AD.where(used_A1, 0)).to(x_TD.dtype)


def _outer_products(grad_AO: Tensor, x_AI: Tensor, counts_E: Tensor) -> Tensor:
    """``gradᵀ · x`` of each group: ``[E, O, I]``, summed in float32; 0 for a group without rows."""
    products_EOI = F.grouped_mm(grad_AO.contiguous().t(), x_AI, offs=_ends(counts_E))
    return products_EOI.masked_fill((counts_E == 0)[:, None, None], 0)


def _ends(counts_E: Tensor) -> Tensor:
    """Where each group ends, in the dtype that the kernel wants."""
    return counts_E.cumsum(0).to(torch.int32)


class ByRow(torch.autograd.Function):
    """Each row's own group's vector: ``[E, O]``, ``[E]``, ``A`` to ``[A, O]``; the last group's for unused rows.

    Its own backward, a grouped product with ones: that of a gather adds up thousands of rows in
    bfloat16, where a sum stops growing after some hundreds.
    """

    @staticmethod
    def forward(ctx: Any, stacked_EO: Tensor, counts_E: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(counts_E)
        row_A = torch.arange(rows, device=counts_E.device)
        group_A = torch.searchsorted(counts_E.cumsum(0), row_A, right=True)
        return stacked_EO.index_select(0, group_A.clamp(max=counts_E.shape[0] - 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AO: Tensor) -> tuple[Tensor, None, None]:
        (counts_E,) = ctx.saved_tensors
        ones_A8 = grad_AO.new_ones(grad_AO.shape[0], 8)  # 16 bytes: the shortest row that the kernel takes
        return _outer_products(grad_AO, ones_A8, counts_E)[:, :, 0], None, None


class GroupedMM(torch.autograd.Function):
    """``y[a] = W[e(a)] · x[a]`` for rows sorted by expert: ``[A, I]``, ``[E, O, I]``, ``[E]`` to ``[A, O]``.

    Its own backward: gradients may arrive with stride 0, which the kernel refuses, and some releases
    leave the weight gradient of a group without rows unwritten.
    """

    @staticmethod
    def forward(ctx: Any, x_AI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_AI, weight_EOI, counts_E)
        return F.grouped_mm(x_AI, weight_EOI.transpose(1, 2), offs=_ends(counts_E))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_AI, weight_EOI, counts_E = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = F.grouped_mm(grad_AO.contiguous(), weight_EOI, offs=_ends(counts_E))
        if ctx.needs_input_grad[1]:
            grad_weight = _outer_products(grad_AO, x_AI, counts_E)
        return grad_x, grad_weight, None


class _WeightedActivation(torch.autograd.Function):
    """``weight · activation(pre)`` in float32, rounded once; 0 in unused rows. Keeps ``pre`` alone."""

    @staticmethod
    def forward(ctx: Any, pre_AH: Tensor, weight_A1: Tensor, used_A1: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(pre_AH, weight_A1, used_A1)
        ctx.activation = activation
        hidden_AF = ACTIVATIONS[activation].forward(pre_AH.float())
        return (hidden_AF * weight_A1).where(used_A1, 0).to(pre_AH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AF: Tensor) -> tuple[Tensor, Tensor, None, None]:
        pre_AH, weight_A1, used_A1 = ctx.saved_tensors
        pre_AH, grad_AF = pre_AH.where(used_A1, 0), grad_AF.where(used_A1, 0).float()
        hidden_AF, grad_pre_AH = ACTIVATIONS[ctx.activation].backward(pre_AH.float(), grad_AF * weight_A1)
        grad_weight_A1 = torch.linalg.vecdot(grad_AF, hidden_AF)[:, None]
        return grad_pre_AH.to(pre_AH.dtype), grad_weight_A1, None, None

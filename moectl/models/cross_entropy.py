"""Language-model loss without the logits: projection, softmax and gradient a few rows at a time.

The logits of a step are its largest tensor; made whole, they cost more time in memory traffic than in
arithmetic. Here each chunk of rows is projected, scored and differentiated while it is in cache.
Source of the idea: Hsu et al. 2024 (Liger kernels), arXiv:2410.10989.

Shape suffixes: N rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORED = -100
_CHUNK_ELEMENTS = 1 << 19  # logits at a time on a CPU: 2 MiB in float32, so that they stay in cache


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Summed cross-entropy of ``x · Wᵀ`` against ``labels``: a 0-d tensor, in nats.

    Equal to ``F.cross_entropy(x @ W.T, labels, ignore_index=-100, reduction="sum")``. The softmax runs
    in float32 (float64 for float64 input); under autocast the products run in the autocast dtype.

    Args:
        x_ND: final hidden states.
        weight_VD: output embedding.
        labels_N: int64; rows with -100 are not scored.
    """
    if not torch.is_grad_enabled():
        x_ND, weight_VD = x_ND.detach(), weight_VD.detach()  # else their gradients would be made for nothing
    if torch.is_autocast_enabled(x_ND.device.type) and x_ND.dtype != torch.float64:  # autocast spares float64
        dtype = torch.get_autocast_dtype(x_ND.device.type)
        x_ND, weight_VD = x_ND.to(dtype), weight_VD.to(dtype)
    return _LinearCrossEntropy.apply(x_ND, weight_VD, labels_N)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, where the softmax is at hand, and scaled in the backward."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        need_x, need_weight, _ = ctx.needs_input_grad
        exact = x_ND.dtype if x_ND.dtype == torch.float64 else torch.float32
        grad_x = torch.empty_like(x_ND) if need_x else None
        grad_weight = torch.zeros_like(weight_VD, dtype=exact) if need_weight else None
        total = x_ND.new_zeros((), dtype=exact)
        for rows in _chunks(x_ND, weight_VD.shape[0]):
            x, labels = x_ND[rows], labels_N[rows]
            log_probs = torch.log_softmax((x @ weight_VD.t()).to(exact), dim=-1)
            total += F.nll_loss(log_probs, labels, ignore_index=IGNORED, reduction="sum")
            if not (need_x or need_weight):
                continue
            scored = labels != IGNORED
            grad = log_probs.exp_()
            grad[torch.arange(len(labels), device=grad.device), labels.clamp(min=0)] -= 1.0
            grad.mul_(scored[:, None])
            if grad_x is not None:
                torch.mm(grad.to(weight_VD.dtype), weight_VD, out=grad_x[rows])
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), x.to(exact))
        ctx.save_for_backward(*(grad for grad in (grad_x, grad_weight) if grad is not None))
        ctx.needs = (need_x, need_weight)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        saved = iter(ctx.saved_tensors)
        need_x, need_weight = ctx.needs
        grad_x = next(saved) * grad_total if need_x else None
        grad_weight = (next(saved) * grad_total).to(ctx.weight_dtype) if need_weight else None
        return grad_x, grad_weight, None


def _chunks(x_ND: Tensor, vocabulary: int) -> list[slice]:
    """Row ranges: small enough for the cache on a CPU, larger on a device that wants big products."""
    elements = _CHUNK_ELEMENTS if x_ND.device.type == "cpu" else _CHUNK_ELEMENTS * 256
    rows = max(16, elements // vocabulary)
    return [slice(start, min(start + rows, x_ND.shape[0])) for start in range(0, x_ND.shape[0], rows)]

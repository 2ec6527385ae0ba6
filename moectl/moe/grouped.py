"""Grouped matrix multiplication: one linear layer per expert over contiguous segments of rows.

Shape suffixes: A assignments sorted by expert, E experts, N output features, M input features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def grouped_linear(x_AM: Tensor, weight_ENM: Tensor, counts_E: Tensor, bias_EN: Tensor | None = None) -> Tensor:
    """``y[a] = weight[e(a)] · x[a] + bias[e(a)]`` for rows sorted by expert: ``[A, M] -> [A, N]``.

    On CUDA in bfloat16 this is torch's grouped kernel, without a host sync. Elsewhere each segment
    is one product into a slice of the output, with a backward of our own: indexing a stacked
    parameter under autograd makes its gradient dense once per expert, which costs tens of times more.

    Args:
        x_AM: rows sorted by expert.
        weight_ENM: stacked weights.
        counts_E: rows per expert, int64; sums to A. An expert with none costs nothing.
        bias_EN: stacked biases, or None.
    """
    if torch.is_autocast_enabled(x_AM.device.type) and x_AM.dtype != torch.float64:  # autocast spares float64
        dtype = torch.get_autocast_dtype(x_AM.device.type)
        x_AM, weight_ENM = x_AM.to(dtype), weight_ENM.to(dtype)
        bias_EN = None if bias_EN is None else bias_EN.to(dtype)
    if x_AM.is_cuda and x_AM.dtype == torch.bfloat16 and _strides_fit(x_AM, weight_ENM):
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        y_AN = F.grouped_mm(x_AM, weight_ENM.transpose(1, 2), offs=offsets_E)
        if bias_EN is not None:
            y_AN = y_AN + bias_EN.repeat_interleave(counts_E, dim=0, output_size=x_AM.shape[0])
        return y_AN
    counts = counts_E.tolist()
    assert sum(counts) == x_AM.shape[0], "rows without an expert would be left uninitialised"
    return _GroupedLinear.apply(x_AM, weight_ENM, bias_EN, counts)


def _strides_fit(x_AM: Tensor, weight_ENM: Tensor) -> bool:
    """The CUDA kernel wants 16-byte strides, of the output's rows too: 8 bfloat16 values."""
    return x_AM.is_contiguous() and weight_ENM.is_contiguous() and all(n % 8 == 0 for n in weight_ENM.shape[1:])


class _GroupedLinear(torch.autograd.Function):
    """Per-segment products into preallocated outputs and gradients."""

    @staticmethod
    def forward(ctx: Any, x_AM: Tensor, weight_ENM: Tensor, bias_EN: Tensor | None, counts: list[int]) -> Tensor:
        y_AN = x_AM.new_empty(x_AM.shape[0], weight_ENM.shape[1])
        for expert, rows in _segments(counts):
            if bias_EN is None:
                torch.mm(x_AM[rows], weight_ENM[expert].t(), out=y_AN[rows])
            else:
                torch.addmm(bias_EN[expert], x_AM[rows], weight_ENM[expert].t(), out=y_AN[rows])
        ctx.save_for_backward(x_AM, weight_ENM)
        ctx.counts = counts
        return y_AN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AN: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x_AM, weight_ENM = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        grad_AN = grad_AN.contiguous()
        grad_x = torch.empty_like(x_AM) if need_x else None
        grad_weight = torch.empty_like(weight_ENM) if need_weight else None
        grad_bias = grad_AN.new_zeros(weight_ENM.shape[:2]) if need_bias else None
        for expert, rows in _segments(ctx.counts):
            if grad_x is not None:
                torch.mm(grad_AN[rows], weight_ENM[expert], out=grad_x[rows])
            if grad_weight is not None:
                torch.mm(grad_AN[rows].t(), x_AM[rows], out=grad_weight[expert])
            if grad_bias is not None:
                torch.sum(grad_AN[rows], dim=0, out=grad_bias[expert])
        if grad_weight is not None:
            for expert, count in enumerate(ctx.counts):
                if count == 0:
                    grad_weight[expert].zero_()
        return grad_x, grad_weight, grad_bias, None


def swiglu(gate_up_AG: Tensor) -> Tensor:
    """``silu(gate) · up`` of ``[A, 2F]``, gate columns first: ``[A, F]``.

    Keeps its input alone for the backward, which recomputes ``silu`` and writes both halves into one
    gradient: autograd's own keeps F more columns and makes three large tensors more, whose fresh
    memory costs a CPU as much as the arithmetic. The same operations, so the same bits.
    """
    return _SwiGLU.apply(gate_up_AG)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_AG: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_AG)
        gate_AF, up_AF = gate_up_AG.chunk(2, dim=-1)
        return F.silu(gate_AF).mul_(up_AF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AF: Tensor) -> Tensor:
        (gate_up_AG,) = ctx.saved_tensors
        gate_AF, up_AF = gate_up_AG.chunk(2, dim=-1)
        grad_AG = torch.empty_like(gate_up_AG)
        grad_gate_AF, grad_up_AF = grad_AG.chunk(2, dim=-1)
        torch.mul(grad_AF, F.silu(gate_AF), out=grad_up_AF)
        torch.mul(grad_AF, up_AF, out=grad_gate_AF)
        torch.ops.aten.silu_backward.grad_input(grad_gate_AF, gate_AF, grad_input=grad_gate_AF)
        return grad_AG


def _segments(counts: list[int]) -> list[tuple[int, slice]]:
    """The experts that have rows, each with its slice."""
    segments, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            segments.append((expert, slice(start, start + count)))
        start += count
    return segments

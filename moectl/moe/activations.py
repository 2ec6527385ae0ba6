"""What experts do between their two products, each with its own backward.

A backward here keeps the pre-activation alone and recomputes the rest: autograd's own would keep F
more columns and make three large tensors more, whose fresh memory costs a CPU as much as the
arithmetic. Shape suffixes: N rows, F expert intermediate, H pre-activation columns (F, or 2F when gated).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Activation(NamedTuple):
    """One activation.

    Attributes:
        forward: pre-activation ``[N, H]`` to activation ``[N, F]``, a new tensor.
        backward: ``(pre-activation [N, H], gradient of the activation [N, F])`` to ``(activation,
            gradient of the pre-activation)``; the gradient that it is given stays as it is.
        gated: whether ``H`` is ``2F``, gate columns first.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    gated: bool


def _swiglu(pre_NH: Tensor) -> Tensor:
    gate_NF, up_NF = pre_NH.chunk(2, dim=-1)
    return F.silu(gate_NF).mul_(up_NF)


def _swiglu_backward(pre_NH: Tensor, grad_NF: Tensor) -> tuple[Tensor, Tensor]:
    gate_NF, up_NF = pre_NH.chunk(2, dim=-1)
    if torch.compiler.is_compiling():  # the compiler refuses to write into parts, and needs no help
        silu_NF = F.silu(gate_NF)
        grad_gate_NF = torch.ops.aten.silu_backward(grad_NF * up_NF, gate_NF)
        return silu_NF * up_NF, torch.cat([grad_gate_NF, grad_NF * silu_NF], dim=-1)
    grad_NH = torch.empty_like(pre_NH)
    grad_gate_NF, grad_up_NF = grad_NH.chunk(2, dim=-1)
    silu_NF = F.silu(gate_NF)
    torch.mul(grad_NF, silu_NF, out=grad_up_NF)
    torch.ops.aten.silu_backward.grad_input(grad_NF * up_NF, gate_NF, grad_input=grad_gate_NF)
    return silu_NF.mul_(up_NF), grad_NH


def _gelu(pre_NH: Tensor) -> Tensor:
    return F.gelu(pre_NH, approximate="tanh")


def _gelu_backward(pre_NH: Tensor, grad_NF: Tensor) -> tuple[Tensor, Tensor]:
    return _gelu(pre_NH), torch.ops.aten.gelu_backward(grad_NF, pre_NH, approximate="tanh")


def gelu_new(pre_NH: Tensor) -> Tensor:
    """Tanh-GELU step by step, as GPT-2's own code has it: the same function, which rounds differently."""
    return 0.5 * pre_NH * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (pre_NH + 0.044715 * torch.pow(pre_NH, 3.0))))


#: ``swiglu``: ``silu(gate) · up`` (Shazeer 2020, arXiv:2002.05202); ``gelu_tanh``: GPT-2's; ``gelu_new``: the same,
#: where :meth:`moectl.moe.experts.MLPExperts.one` is to round as GPT-2 does.
ACTIVATIONS: dict[str, Activation] = {
    "swiglu": Activation(_swiglu, _swiglu_backward, gated=True),
    "gelu_tanh": Activation(_gelu, _gelu_backward, gated=False),
    "gelu_new": Activation(_gelu, _gelu_backward, gated=False),
}

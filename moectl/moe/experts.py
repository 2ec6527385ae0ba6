"""Experts as stacked parameters, in the layout of Hugging Face's own MoE models.

Experts hold weights and say what one expert computes; a backend decides how all of them are run.
Shape suffixes: T tokens, N rows of one expert, D hidden, E experts, F expert intermediate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moectl.errors import unknown
from moectl.moe.activations import gelu_new
from moectl.moe.backends import BACKENDS, register_backend
from moectl.moe.dispatch import Dispatch
from moectl.moe.expert_ops import Weights
from moectl.moe.grad_buffers import GradBuffers

__all__ = ["BACKENDS", "Experts", "GatedExperts", "MLPExperts", "register_backend"]


class Experts(nn.Module, ABC):
    """``E`` feed-forward networks of one shape.

    Args:
        num_experts: ``E``.
        hidden_size: ``D``.
        intermediate_size: ``F``.
        backend: name of a registered backend.

    Raises:
        MoectlError: an unknown backend (exit code 2).
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, backend: str = "grouped") -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise unknown("expert backend", backend, BACKENDS)
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.backend = backend
        self.grad_buffers: GradBuffers | None = None

    #: Name of what happens between the two products, in :data:`moectl.moe.activations.ACTIVATIONS`.
    activation: str

    @abstractmethod
    def one(self, expert: int, x_ND: Tensor) -> Tensor:
        """What expert ``expert`` makes of ``[N, D]``: the definition that every backend must match."""

    @abstractmethod
    def stacked(self) -> Weights:
        """The parameters, as the ``grouped`` backend takes them."""

    def forward(self, x_TD: Tensor, plan: Dispatch) -> Tensor:
        """Each token's experts, weighted and summed: ``[T, D] -> [T, D]``."""
        return BACKENDS[self.backend](self, x_TD, plan)

    def accumulate_gradients_in_place(self, enabled: bool = True) -> None:
        """Let the ``grouped`` backend write weight gradients straight into buffers that outlive the step.

        Faster on a CPU (see :mod:`moectl.moe.grad_buffers`), and right for a loop of ``backward`` and
        an optimizer. Off by default: ``torch.autograd.grad`` and wrappers such as FSDP and DDP need
        gradients to come through autograd.
        """
        self.grad_buffers = GradBuffers() if enabled else None

    def reset_parameters(self, std: float = 0.02, down_std: float | None = None) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if "bias" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=down_std if down_std and name == "down_proj" else std)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size},"
            f" intermediate_size={self.intermediate_size}, backend={self.backend!r}"
        )


class GatedExperts(Experts):
    """SwiGLU experts: ``down(silu(gate(x)) · up(x))``, no biases (Llama, Qwen, Mixtral).

    Attributes:
        gate_up_proj: ``[E, 2F, D]``, gate rows first.
        down_proj: ``[E, D, F]``.
    """

    activation = "swiglu"

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, backend: str = "grouped") -> None:
        super().__init__(num_experts, hidden_size, intermediate_size, backend)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.reset_parameters()

    def one(self, expert: int, x_ND: Tensor) -> Tensor:
        # Two products, as a dense MLP does them: one fused product rounds differently.
        gate_FD, up_FD = self.gate_up_proj[expert].chunk(2)
        return F.linear(F.silu(F.linear(x_ND, gate_FD)) * F.linear(x_ND, up_FD), self.down_proj[expert])

    def stacked(self) -> Weights:
        return Weights(self.gate_up_proj, self.down_proj)


class MLPExperts(Experts):
    """Plain experts with biases: ``down(act(up(x)))`` (GPT-2, whose activation is tanh-GELU).

    Attributes:
        up_proj: ``[E, F, D]``; up_proj_bias: ``[E, F]``.
        down_proj: ``[E, D, F]``; down_proj_bias: ``[E, D]``.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        backend: str = "grouped",
        *,
        activation: Literal["gelu_tanh", "gelu_new"] = "gelu_tanh",
    ) -> None:
        super().__init__(num_experts, hidden_size, intermediate_size, backend)
        self.activation = activation
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.up_proj_bias = nn.Parameter(torch.empty(num_experts, intermediate_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def one(self, expert: int, x_ND: Tensor) -> Tensor:
        # GPT-2's Conv1D keeps its matrices the other way round, and a transposed product rounds differently.
        up_DF, down_FD = (matrix.t().contiguous() for matrix in (self.up_proj[expert], self.down_proj[expert]))
        up_NF = torch.addmm(self.up_proj_bias[expert], x_ND, up_DF)
        hidden_NF = gelu_new(up_NF) if self.activation == "gelu_new" else F.gelu(up_NF, approximate="tanh")
        return torch.addmm(self.down_proj_bias[expert], hidden_NF, down_FD)

    def stacked(self) -> Weights:
        return Weights(self.up_proj, self.down_proj, self.up_proj_bias, self.down_proj_bias)

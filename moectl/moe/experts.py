"""Experts as stacked parameters, in the layout of Hugging Face's own MoE models.

Experts hold weights and say what one expert computes; a backend decides how all of them are run:
``loop`` is the readable reference, ``grouped`` the fast one, ``full`` runs every expert on all
tokens (for exactness tests). They agree forward and backward; tests/moe/test_experts.py says how
closely. Shape suffixes: T tokens, A assignments, D hidden, E experts, F expert intermediate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moectl.errors import unknown
from moectl.moe.dispatch import Dispatch
from moectl.moe.grouped import grouped_linear, swiglu

Backend = Callable[["Experts", Tensor, Dispatch], Tensor]


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

    @abstractmethod
    def one(self, expert: int, x_ND: Tensor) -> Tensor:
        """What expert ``expert`` makes of ``[N, D]``: the definition that every backend must match."""

    @abstractmethod
    def grouped(self, x_AD: Tensor, counts_E: Tensor) -> Tensor:
        """All experts on ``[A, D]`` sorted by expert, ``counts_E[e]`` rows each."""

    def forward(self, x_TD: Tensor, plan: Dispatch) -> Tensor:
        """Unweighted expert outputs ``[A, D]`` in the order of the dispatch plan."""
        return BACKENDS[self.backend](self, x_TD, plan)

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

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, backend: str = "grouped") -> None:
        super().__init__(num_experts, hidden_size, intermediate_size, backend)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.reset_parameters()

    def one(self, expert: int, x_ND: Tensor) -> Tensor:
        # Two products, as a dense MLP does them: one fused product rounds differently.
        gate_FD, up_FD = self.gate_up_proj[expert].chunk(2)
        return F.linear(F.silu(F.linear(x_ND, gate_FD)) * F.linear(x_ND, up_FD), self.down_proj[expert])

    def grouped(self, x_AD: Tensor, counts_E: Tensor) -> Tensor:
        hidden_AF = swiglu(grouped_linear(x_AD, self.gate_up_proj, counts_E))
        return grouped_linear(hidden_AF, self.down_proj, counts_E)


class MLPExperts(Experts):
    """Plain experts with biases: ``down(act(up(x)))`` (GPT-2, whose activation is tanh-GELU).

    Attributes:
        up_proj: ``[E, F, D]``; up_proj_bias: ``[E, F]``.
        down_proj: ``[E, D, F]``; down_proj_bias: ``[E, D]``.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, backend: str = "grouped") -> None:
        super().__init__(num_experts, hidden_size, intermediate_size, backend)
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.up_proj_bias = nn.Parameter(torch.empty(num_experts, intermediate_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def one(self, expert: int, x_ND: Tensor) -> Tensor:
        up_NF = F.linear(x_ND, self.up_proj[expert], self.up_proj_bias[expert])
        return F.linear(F.gelu(up_NF, approximate="tanh"), self.down_proj[expert], self.down_proj_bias[expert])

    def grouped(self, x_AD: Tensor, counts_E: Tensor) -> Tensor:
        up_AF = grouped_linear(x_AD, self.up_proj, counts_E, self.up_proj_bias)
        return grouped_linear(F.gelu(up_AF, approximate="tanh"), self.down_proj, counts_E, self.down_proj_bias)


def run_loop(experts: Experts, x_TD: Tensor, plan: Dispatch) -> Tensor:
    """One expert after the other on its own tokens: the reference."""
    outputs, start = [], 0
    for expert, count in enumerate(plan.tokens_per_expert.tolist()):
        if count:
            outputs.append(experts.one(expert, x_TD[plan.token_ids[start : start + count]]))
        start += count
    # No tokens at all: still through an expert, so that gradients are zeros (as in the other backends), not None.
    return torch.cat(outputs) if outputs else experts.one(0, x_TD[:0])


def run_grouped(experts: Experts, x_TD: Tensor, plan: Dispatch) -> Tensor:
    """Gather once, then one grouped product per projection.

    ``index_select``, because its backward is one ``index_add``; that of ``x[ids]`` is far slower on a CPU.
    """
    return experts.grouped(x_TD.index_select(0, plan.token_ids), plan.tokens_per_expert)


def run_full(experts: Experts, x_TD: Tensor, plan: Dispatch) -> Tensor:
    """Every expert on all tokens, then select: rounds exactly as the dense MLP it was copied from."""
    all_ETD = torch.stack([experts.one(expert, x_TD) for expert in range(experts.num_experts)])
    return all_ETD[plan.expert_ids, plan.token_ids]


BACKENDS: dict[str, Backend] = {"loop": run_loop, "grouped": run_grouped, "full": run_full}


def register_backend(name: str, backend: Backend) -> None:
    """Make ``backend`` available as ``Experts(..., backend=name)``.

    Raises:
        ValueError: the name is taken.
    """
    if name in BACKENDS:
        raise ValueError(f"an expert backend named {name!r} is registered already")
    BACKENDS[name] = backend

"""How all experts of a layer are run: backends, by name.

``loop`` is the readable reference, ``grouped`` the fast one, ``full`` runs every expert on all tokens
(for exactness tests). They agree forward and backward. Shape suffixes: T tokens, D hidden, E experts,
A assignments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moectl.moe.dispatch import Dispatch, combine
from moectl.moe.expert_ops import Plan, experts_op
from moectl.moe.grad_buffers import ComputeIntoBuffers, takes_buffers
from moectl.moe.grouped_mm import compute_grouped_mm, grouped_mm_takes
from moectl.moe.products import cast_for_autocast

if TYPE_CHECKING:
    from moectl.moe.experts import Experts

#: Takes the experts, ``x [T, D]`` and a dispatch plan; returns the weighted sum per token, ``[T, D]``.
Backend = Callable[["Experts", Tensor, Dispatch], Tensor]


def run_loop(experts: Experts, x_TD: Tensor, plan: Dispatch) -> Tensor:
    """One expert after the other on its own tokens: the reference."""
    outputs, start = [], 0
    for expert, count in enumerate(plan.tokens_per_expert.tolist()):
        if count:
            outputs.append(experts.one(expert, x_TD[plan.token_ids[start : start + count]]))
        start += count
    # No tokens at all: still through an expert, so that gradients are zeros (as in the other backends), not None.
    outputs_AD = torch.cat(outputs) if outputs else experts.one(0, x_TD[:0])
    used = Dispatch(plan.token_ids[:start], plan.expert_ids[:start], plan.weights[:start], plan.tokens_per_expert)
    return combine(used, outputs_AD, x_TD.shape[0])


def run_full(experts: Experts, x_TD: Tensor, plan: Dispatch) -> Tensor:
    """Every expert on all tokens, then select: rounds exactly as the dense MLP it was copied from."""
    all_ETD = torch.stack([experts.one(expert, x_TD) for expert in range(experts.num_experts)])
    chosen_A = plan.expert_ids.clamp(max=experts.num_experts - 1)  # unused slots: any, combine leaves them out
    return combine(plan, all_ETD[chosen_A, plan.token_ids], x_TD.shape[0])


def run_grouped(experts: Experts, x_TD: Tensor, plan: Dispatch) -> Tensor:
    """Contiguous segments, one product each: torch's grouped kernel on CUDA in bfloat16, else our own operator."""
    # The operator casts an expert's weights when their turn comes: those of idle experts are not touched.
    x_TD, weights = cast_for_autocast(x_TD), experts.stacked()
    routes = Plan(plan.token_ids, plan.weights, plan.tokens_per_expert)
    if grouped_mm_takes(x_TD, weights):
        return compute_grouped_mm(x_TD, weights, routes, experts.activation)
    keep = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x_TD, plan.weights, *weights)
    )
    if keep and experts.grad_buffers is not None and takes_buffers(weights):
        return ComputeIntoBuffers.apply(x_TD, routes, experts.activation, experts.grad_buffers, plan.weights, *weights)
    return experts_op(
        x_TD, weights.up, weights.down, weights.up_bias, weights.down_bias, *routes, experts.activation, keep
    )[0]


BACKENDS: dict[str, Backend] = {"loop": run_loop, "grouped": run_grouped, "full": run_full}


def register_backend(name: str, backend: Backend) -> None:
    """Make ``backend`` available as ``Experts(..., backend=name)``.

    Raises:
        ValueError: the name is taken.
    """
    if name in BACKENDS:
        raise ValueError(f"an expert backend named {name!r} is registered already")
    BACKENDS[name] = backend

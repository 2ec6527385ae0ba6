"""Slow, obvious definitions: one token, one expert at a time, in plain Python. No code of moectl's runs here.

Also the strategies that draw shapes, and helpers that build a routing decision by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from moectl.moe import Experts, GatedExperts, MLPExperts, RouterOutput

HIDDEN, INTERMEDIATE = 6, 5

EXPERTS: dict[str, type[Experts]] = {"gated": GatedExperts, "mlp": MLPExperts}


@dataclass(frozen=True)
class Case:
    """A routing decision as Python lists: who goes where, and which slots are in use."""

    num_experts: int
    top_k: int
    chosen: list[list[int]]
    keep: list[list[bool]] | None
    seed: int

    @property
    def num_tokens(self) -> int:
        return len(self.chosen)

    def assignments(self) -> list[tuple[int, int, int]]:
        """``(expert, token, slot)`` of every slot in use, ordered by expert, then token, then slot."""
        used = [
            (expert, token, slot)
            for token, row in enumerate(self.chosen)
            for slot, expert in enumerate(row)
            if self.keep is None or self.keep[token][slot]
        ]
        return sorted(used)

    def routing(self, dtype: torch.dtype = torch.float64) -> RouterOutput:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.num_tokens, self.top_k)
        weights = torch.rand(shape, generator=generator, dtype=dtype)
        indices = torch.tensor(self.chosen, dtype=torch.int64).reshape(shape)
        keep = None if self.keep is None else torch.tensor(self.keep, dtype=torch.bool).reshape(shape)
        return by_hand(indices, weights, self.num_experts, keep)


@st.composite
def cases(draw: st.DrawFn, max_tokens: int = 20, max_experts: int = 6) -> Case:
    """T 0-20, E 1-6, k 1-E; experts drawn from a subset, so that some stay empty or one takes all."""
    num_experts = draw(st.integers(1, max_experts))
    top_k = draw(st.integers(1, num_experts))
    num_tokens = draw(st.integers(0, max_tokens))
    popular = draw(st.integers(top_k, num_experts))  # experts from here on never get a token
    offset = draw(st.integers(0, num_experts - 1))
    row = st.permutations(range(popular)).map(lambda order: [(e + offset) % num_experts for e in order[:top_k]])
    chosen = draw(st.lists(row, min_size=num_tokens, max_size=num_tokens))
    slots = st.lists(st.booleans(), min_size=top_k, max_size=top_k)
    keep = draw(st.none() | st.lists(slots, min_size=num_tokens, max_size=num_tokens))
    return Case(num_experts, top_k, chosen, keep, draw(st.integers(0, 2**31)))


def by_hand(indices: Tensor, weights: Tensor, num_experts: int, keep: Tensor | None = None) -> RouterOutput:
    """A routing decision; its distribution is uniform, since dispatch does not look at it."""
    if keep is not None:
        weights = weights.masked_fill(~keep, 0.0)
    probs = torch.full((indices.shape[0], num_experts), 1 / num_experts, dtype=weights.dtype)
    entropy = torch.full((indices.shape[0],), math.log(num_experts), dtype=weights.dtype)
    return RouterOutput(indices, weights, torch.zeros_like(probs), probs, probs, entropy, keep)


def expert_on_token(experts: Experts, expert: int, x_D: Tensor) -> Tensor:
    """One expert on one token, from its matrices alone."""
    if isinstance(experts, GatedExperts):
        half = experts.gate_up_proj.shape[1] // 2
        gate = experts.gate_up_proj[expert, :half] @ x_D
        up = experts.gate_up_proj[expert, half:] @ x_D
        return experts.down_proj[expert] @ (gate / (1 + torch.exp(-gate)) * up)
    assert isinstance(experts, MLPExperts)
    up = experts.up_proj[expert] @ x_D + experts.up_proj_bias[expert]
    gelu = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    return experts.down_proj[expert] @ gelu + experts.down_proj_bias[expert]


def mixture_by_token(x_TD: Tensor, routing: RouterOutput, experts: Experts) -> Tensor:
    """The routed sum, token by token: ``y_t = Σ_k w_tk · expert_k(x_t)`` over the slots in use."""
    rows = []
    for token in range(x_TD.shape[0]):
        total = x_TD[token] * 0.0
        for slot in range(routing.topk_indices.shape[1]):
            if routing.keep is None or routing.keep[token, slot]:
                expert = int(routing.topk_indices[token, slot])
                total = total + routing.topk_weights[token, slot] * expert_on_token(experts, expert, x_TD[token])
        rows.append(total)
    return torch.stack(rows) if rows else x_TD * 0.0


def make_experts(kind: str, num_experts: int, seed: int = 0, backend: str = "grouped", std: float = 0.5) -> Experts:
    """Small float64 experts whose biases are not zero, so that a forgotten bias shows."""
    torch.manual_seed(seed)
    experts = EXPERTS[kind](num_experts, HIDDEN, INTERMEDIATE, backend=backend).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return experts


def gradients(build: Callable[[], Tensor], *leaves: Tensor) -> list[Tensor]:
    """Gradients of a fixed, uneven functional of ``build()``: every output entry gets a weight of its own.

    A leaf that the output does not reach counts as zeros.
    """
    output = build()
    weights = torch.linspace(-1.0, 2.0, output.numel(), dtype=output.dtype).reshape(output.shape)
    found = torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]

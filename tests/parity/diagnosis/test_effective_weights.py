"""Combine weights, permutations and capacities are read off outputs exactly, and only where they are there."""

from __future__ import annotations

import torch
from torch import Tensor

from moectl.parity.diagnosis.effective_weights import (
    effective_weights,
    find_capacity,
    find_permutation,
    relation,
)


def drawn(tokens: int = 12, experts: int = 8, hidden: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Weights ``[T, E]`` of two experts a token that sum to one, expert outputs ``[T, E, D]``, their combination."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    top = logits.softmax(-1).topk(2)
    weights = torch.zeros(tokens, experts, dtype=torch.float64).scatter(1, top.indices, top.values)
    weights = weights / weights.sum(-1, keepdim=True)
    outputs = torch.randn(tokens, experts, hidden, generator=generator, dtype=torch.float64)
    return weights, outputs, torch.einsum("te,ted->td", weights, outputs)


def test_the_weights_that_were_used_come_back() -> None:
    weights, outputs, output = drawn()
    found = effective_weights(output, outputs)
    assert found is not None and found.experts_right
    # Least squares on well-conditioned random bases loses two digits of 1e-16.
    torch.testing.assert_close(found.weights, weights, rtol=0, atol=1e-12)
    assert torch.equal(found.weights != 0, weights != 0)


def test_other_experts_leave_a_residual() -> None:
    weights, outputs, _ = drawn()
    found = effective_weights(torch.einsum("te,ted->td", weights, outputs.tanh()), outputs)
    assert found is not None and not found.experts_right and found.residual > 0.1


def test_more_experts_than_dimensions_are_no_basis() -> None:
    _, outputs, output = drawn(experts=8, hidden=6)
    assert effective_weights(output, outputs) is None


def test_relations_are_told_apart() -> None:
    weights, _, _ = drawn()
    sums = torch.linspace(0.3, 0.9, len(weights), dtype=torch.float64)
    assert relation(weights, weights).kind == "equal"
    assert relation(weights, 2.5 * weights).text == "candidate = reference × 2.5, all 12 tokens"
    assert relation(weights, weights * sums[:, None], sums).text == "candidate = reference × Σ topk, all 12 tokens"
    assert relation(weights, weights / sums[:, None], sums).text == "candidate = reference × 1/Σ topk, all 12 tokens"
    assert "from 0.3 to 0.9" in relation(weights, weights * sums[:, None]).text
    assert relation(weights, weights**2).kind == "same experts"
    assert relation(weights, weights.roll(1, dims=1)).kind == "other experts"
    dropped = weights.clone()
    dropped[3, weights[3].argmax()] = 0
    assert relation(weights, dropped).text == "1 of 24 chosen assignments contribute nothing"


def test_a_permutation_is_found_and_nothing_else_is_one() -> None:
    weights, _, _ = drawn(tokens=40)
    order = [3, 1, 0, 2, 4, 7, 5, 6]
    moved = torch.empty_like(weights)
    moved[:, order] = weights
    assert find_permutation(weights, moved) == tuple(order)
    assert find_permutation(weights, weights) == tuple(range(8))
    assert find_permutation(weights, weights**2) is None
    moved[0, order[0]] += 0.1
    assert find_permutation(weights, moved) is None


def test_experts_that_nobody_visits_keep_their_place() -> None:
    weights = torch.zeros(3, 5, dtype=torch.float64)
    weights[:, 0] = torch.tensor([0.1, 0.2, 0.3])
    weights[:, 1] = torch.tensor([0.9, 0.8, 0.7])
    assert find_permutation(weights, weights[:, [1, 0, 2, 3, 4]]) == (1, 0, 2, 3, 4)


def test_a_capacity_is_what_all_full_experts_took() -> None:
    weights = torch.ones(6, 3, dtype=torch.float64)
    weights[4:, 2] = 0  # four tokens
    kept = weights.clone()
    kept[3:, :] = 0
    assert find_capacity(weights, kept) == 3
    assert find_capacity(weights, weights) is None
    kept[2, 0] = 0  # one expert lost more than the others
    assert find_capacity(weights, kept) is None

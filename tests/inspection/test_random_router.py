"""The random-router null: the fast path equals calling real routers, and any router can be drawn."""

from __future__ import annotations

from typing import Annotated

import pytest
import torch
from pydantic import Field
from torch import Tensor

from moectl.inspection.random_router import UNUSED, RandomGates
from moectl.moe.router import Router, RouterConfig, entropy, stable_topk
from moectl.moe.stats import expert_counts
from moectl.moe.types import RouterOutput
from moectl.routers import build_router


class BoundedRouter(Router):
    """Not a plain top-k: logits are folded by a cosine, and every third token uses one slot only."""

    class Config(RouterConfig):
        top_k: Annotated[int, Field(ge=1)] = 2

    def route(self, x_TD: Tensor, mask_T: Tensor | None) -> RouterOutput:
        logits_TE = torch.cos(40 * self.logits(x_TD))
        probs_TE = torch.softmax(logits_TE, dim=-1)
        indices_TK = stable_topk(logits_TE, self.top_k)
        keep_TK = torch.ones_like(indices_TK, dtype=torch.bool)
        keep_TK[::3, 1] = False
        weights_TK = probs_TE.gather(1, indices_TK) * keep_TK
        return RouterOutput(indices_TK, weights_TK, logits_TE, probs_TE, probs_TE, entropy(probs_TE), keep_TK)


def bounded() -> Router:
    return BoundedRouter(BoundedRouter.Config(), hidden_size=12, num_experts=6)


def named(name: str, **options: object) -> Router:
    return build_router(name, hidden_size=12, num_experts=6, **options)


def counts_one_by_one(gates: RandomGates, batches: list[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor:
    """Every gate called as itself, every group counted by ``expert_counts``."""
    counts = torch.zeros_like(gates.counts)
    for x, groups, mask in batches:
        for draw, router in enumerate(gates.routers):
            out = router(x, mask)
            for group in range(counts.shape[1]):
                member = groups == group if mask is None else (groups == group) & mask
                counts[draw, group] += expert_counts(out.topk_indices, 6, out.keep, member)
    return counts


@pytest.mark.parametrize(
    ("router", "plain"),
    [
        (named("top1"), True),
        (named("switch"), True),
        (named("topk", top_k=3), True),
        (bounded(), False),
    ],
    ids=["top1", "switch", "top3", "other-rule"],
)
@pytest.mark.parametrize("masked", [False, True], ids=["all-tokens", "padding"])
def test_counts_equal_calling_every_gate(router: Router, plain: bool, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for size in (50, 7):
        mask = torch.rand(size, generator=generator) < 0.7 if masked else None
        x = torch.randn(size, 12, generator=generator)
        batches.append((x, torch.randint(0, 4, (size,), generator=generator), mask))
    gates = RandomGates(router, draws=9, num_groups=4, seed=1)
    for x, groups, mask in batches:
        gates.update(x, groups, mask)

    assert gates._plain is plain
    assert torch.equal(gates.counts, counts_one_by_one(gates, batches))
    assert gates.counts.sum() > 0


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_gates_score_in_float32_as_routers_do(dtype: torch.dtype, autocast: bool) -> None:
    """Scores rounded to bfloat16 would change the choice of a few tokens in a hundred."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 12, generator=generator).to(dtype)
    groups = torch.randint(0, 4, (3000,), generator=generator)
    gates = RandomGates(named("top2"), draws=5, num_groups=4, seed=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        gates.update(x, groups)
    assert gates._plain is True
    assert torch.equal(gates.counts, counts_one_by_one(gates, [(x, groups, None)]))


def test_many_tokens_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x, groups = torch.randn(100, 12), torch.arange(100) % 5
    whole, pieces = (RandomGates(named("top1"), draws=3, num_groups=5, seed=0) for _ in range(2))
    whole.update(x, groups)
    monkeypatch.setattr("moectl.inspection.random_router._CHUNK", 1)
    pieces.update(x, groups)
    assert torch.equal(whole.counts, pieces.counts)


def test_gates_are_fresh_different_and_seeded() -> None:
    router = named("top1")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again, other = (RandomGates(router, draws=5, num_groups=1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected), "the caller's generator was moved"
    assert torch.equal(first.weight_RED, again.weight_RED)
    assert not torch.equal(first.weight_RED, other.weight_RED)
    assert len({tuple(weight.flatten().tolist()) for weight in first.weight_RED}) == 5
    assert not any(torch.equal(weight, router.weight) for weight in first.weight_RED)


def test_trained_noise_does_not_reach_the_null() -> None:
    """Fresh gates are in eval mode: the same hidden states give the same counts twice."""
    x, groups = torch.randn(200, 12), torch.zeros(200, dtype=torch.int64)
    gates = RandomGates(named("top1", noise_std=5.0).train(), draws=4, num_groups=1, seed=0)
    gates.update(x, groups)
    once = gates.counts.clone()
    gates.update(x, groups)
    assert torch.equal(gates.counts, 2 * once)


def test_unused_is_no_expert() -> None:
    assert UNUSED < 0


def test_no_gates_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        RandomGates(named("top1"), draws=0, num_groups=1, seed=0)


def test_thresholds_of_fresh_gates_are_those_of_the_hidden_states() -> None:
    """An untrained threshold takes tokens by its starting value; the null asks what a gate alone would do."""
    torch.manual_seed(0)
    router = named("expert-choice-threshold", top_k=2)
    x_TD, groups_T = 4 * torch.randn(600, 12), torch.arange(600) % 3
    gates = RandomGates(router, draws=5, num_groups=3, seed=0)
    gates.update(x_TD, groups_T)
    for fresh, counts_GE in zip(gates.routers, gates.counts, strict=True):
        # Calibrated on these very tokens: each expert takes ceil(2·600/6) = 200 of them.
        assert counts_GE.sum(0).tolist() == [200] * 6
        assert not fresh.training
    gates.update(x_TD, groups_T)
    assert gates.counts.sum() == 2 * 5 * 1200

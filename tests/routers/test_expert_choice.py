"""``expert-choice``: every expert takes its best tokens."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moectl.errors import ConfigError
from moectl.moe import GatedExperts, MoELayer
from moectl.moe.capacity import Capacity
from moectl.routers import build_router
from moectl.routers.expert_choice import ExpertChoiceRouter

D, E = 6, 4


def router(**options: float) -> ExpertChoiceRouter:
    torch.manual_seed(0)
    made = build_router("expert-choice", hidden_size=D, num_experts=E, **options)
    assert isinstance(made, ExpertChoiceRouter)
    torch.nn.init.normal_(made.weight)
    return made.double()


def tokens(number: int) -> Tensor:
    return torch.randn(number, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@given(st.lists(st.booleans(), max_size=20), st.integers(1, E), st.sampled_from(["0.1", "0.5", "1.0", "1.1", "3.0"]))
def test_takes_the_best_real_tokens_and_no_more_than_its_capacity(real: list[bool], k: int, factor: str) -> None:
    made, x = router(top_k=k, capacity_factor=float(factor)), tokens(len(real))
    out = made(x, torch.tensor(real, dtype=torch.bool))
    assert out.keep is not None
    number = sum(real)
    capacity = min(number, math.ceil(Fraction(factor) * k * number / E))
    probs = (x @ made.weight.t()).softmax(1).detach()
    for expert in range(E):
        order = sorted((token for token in range(len(real)) if real[token]), key=lambda t: -float(probs[t, expert]))
        taken = {token for token in range(len(real)) if out.keep[token, expert]}
        assert taken == set(order[:capacity])
    assert torch.equal(out.topk_indices, torch.arange(E).expand(len(real), E))
    torch.testing.assert_close(out.topk_weights, probs * out.keep, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("k", "factor", "number", "capacity"), [(4, 1.1, 10, 11), (2, 1.0, 5, 3), (1, 0.01, 3, 1)])
def test_capacity_is_counted_exactly(k: int, factor: float, number: int, capacity: int) -> None:
    """10 · 1.1 is 11.000000000000002 in floats."""
    assert router(top_k=k, capacity_factor=factor).capacity(torch.tensor(number)).item() == capacity


def test_ties_go_to_the_earlier_token() -> None:
    made = router(top_k=2)
    with torch.no_grad():
        made.weight.zero_()
    out = made(tokens(6))
    assert out.keep is not None
    assert out.keep.tolist() == [[True] * E] * 3 + [[False] * E] * 3
    many = made(tokens(1000)).keep  # where an unstable sort shows
    assert many is not None
    assert many[:500].all()
    assert not many[500:].any()


def test_ties_pass_over_padding() -> None:
    made = router(top_k=2)
    with torch.no_grad():
        made.weight.zero_()
    out = made(tokens(6), torch.tensor([False, True, False, True, True, True]))
    assert out.keep is not None
    assert out.keep[:, 0].tolist() == [False, True, False, True, False, False]


def test_gradient_reaches_the_gate_through_the_tokens_taken_only() -> None:
    made, x = router(top_k=1), tokens(12).requires_grad_()
    out = made(x)
    assert out.keep is not None
    upstream = torch.randn(12, E, dtype=torch.float64)
    probs = (x @ made.weight.t()).softmax(1)
    mine = torch.autograd.grad((out.topk_weights * upstream).sum(), (x, made.weight))
    theirs = torch.autograd.grad((probs * out.keep * upstream).sum(), (x, made.weight))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
    untouched = ~out.keep.any(1)
    assert untouched.any()
    assert not mine[0][untouched].any()


def test_a_later_token_pushes_an_earlier_one_out() -> None:
    """Why it is not for language models."""
    made, x = router(top_k=1), tokens(8)
    assert not made.causal
    first = made(x).keep
    assert first is not None
    expert = int(first[:4].any(0).nonzero()[0])
    winner = 50 * made.weight[expert].detach()
    changed = made(torch.cat([x[:4], winner.expand(4, D)])).keep
    assert changed is not None
    assert not torch.equal(first[:4], changed[:4])


def test_load_is_even_by_construction_and_no_loss_is_needed() -> None:
    out = router(top_k=2)(tokens(64))
    assert out.keep is not None
    assert out.keep.sum(0).tolist() == [32] * E
    assert ExpertChoiceRouter.default_lb_coef == 0.0


def test_a_scheduled_k_is_how_many_experts_a_token_gets_on_average() -> None:
    made, x = router(top_k=1), tokens(16)
    made.set_top_k(3)
    keep = made(x).keep
    assert keep is not None
    assert keep.sum(0).tolist() == [12] * E
    keep = made.eval()(x).keep
    assert keep is not None
    assert keep.sum(0).tolist() == [4] * E


def test_expert_capacity_is_not_for_experts_that_choose() -> None:
    with pytest.raises(ConfigError, match="router 'expert-choice' takes no capacity"):
        MoELayer(router().float(), GatedExperts(E, D, 5), capacity=Capacity(1.0))


@pytest.mark.parametrize("wrong", [{"capacity_factor": 0.0}, {"capacity_factor": -1.0}, {"top_k": 5}, {"top_k": 0}])
def test_options_that_do_not_fit(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        router(**wrong)

"""``topk`` and ``top2``: the k most probable experts, renormalised or raw."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moectl.routers import build_router
from moectl.routers.topk import Top2Router, TopKRouter

D, E = 6, 5


def router(k: int, norm: bool = True, noise_std: float = 0.0) -> TopKRouter:
    torch.manual_seed(0)
    made = build_router("topk", hidden_size=D, num_experts=E, top_k=k, norm_topk_prob=norm, noise_std=noise_std)
    assert isinstance(made, TopKRouter)
    torch.nn.init.normal_(made.weight)
    return made.double()


def tokens(number: int = 100) -> Tensor:
    return torch.randn(number, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@given(st.integers(1, E), st.booleans(), st.sampled_from([0.0, 1.0]))
def test_indices_and_weights_equal_the_definition(k: int, norm: bool, noise_std: float) -> None:
    """From the distribution the router reports: its k largest, best first, divided by their sum or not."""
    out = router(k, norm, noise_std)(tokens())
    for token in range(100):
        probs = out.router_probs[token].tolist()
        best = sorted(range(E), key=lambda expert: -probs[expert])[:k]
        total = sum(probs[expert] for expert in best) if norm else 1.0
        assert out.topk_indices[token].tolist() == best
        assert out.topk_weights[token].tolist() == pytest.approx([probs[e] / total for e in best], abs=1e-14)


@pytest.mark.parametrize("k", range(1, E + 1))
def test_renormalised_weights_sum_to_one_and_raw_ones_to_less(k: int) -> None:
    normalised = router(k)(tokens()).topk_weights.sum(1)
    torch.testing.assert_close(normalised, torch.ones_like(normalised), rtol=0, atol=1e-15)
    raw = router(k, norm=False)(tokens()).topk_weights.sum(1)
    if k < E:
        assert bool((raw < 1).all())
    else:
        torch.testing.assert_close(raw, torch.ones_like(raw), rtol=0, atol=1e-15)


@pytest.mark.parametrize("k", [2, 3, E])
def test_renormalising_has_the_gradient_of_the_quotient(k: int) -> None:
    """Computed as a softmax over the chosen logits, compared with p_i / Σp differentiated as written."""
    made, x = router(k, noise_std=1.0), tokens().requires_grad_()
    upstream = torch.randn(100, k, dtype=torch.float64)
    out = made(x)
    chosen = out.router_probs.gather(1, out.topk_indices)
    quotient = chosen / chosen.sum(1, keepdim=True)
    mine = torch.autograd.grad((out.topk_weights * upstream).sum(), (x, made.weight), retain_graph=True)
    theirs = torch.autograd.grad((quotient * upstream).sum(), (x, made.weight))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        assert one.any()


def test_a_runner_up_whose_probability_underflows_is_still_found() -> None:
    """At logits 0, -200, -300 two probabilities are 0 in float32: a tie to the softmax, not to the logits."""
    made = build_router("topk", hidden_size=3, num_experts=3, top_k=2, noise_std=0.0)
    with torch.no_grad():
        made.weight.copy_(torch.eye(3))
    out = made(torch.tensor([[0.0, -300.0, -200.0]]))
    assert out.topk_indices.tolist() == [[0, 2]]
    assert out.topk_weights.tolist() == [[1.0, 0.0]]


def test_k_equal_e_uses_every_expert() -> None:
    out = router(E)(tokens())
    assert torch.equal(out.topk_indices.sort(1).values, torch.arange(E).expand(100, E))
    torch.testing.assert_close(out.topk_weights, out.router_probs.gather(1, out.topk_indices), rtol=0, atol=1e-15)


def test_gate_without_a_gradient_is_refused_for_training_but_runs() -> None:
    constant = router(1)
    assert "constant 1" in (constant.training_problem() or "")
    x = tokens()
    out = constant(x)
    assert torch.equal(out.topk_weights, torch.ones_like(out.topk_weights))
    (grad,) = torch.autograd.grad(out.topk_weights.sum(), constant.weight)
    assert not grad.any(), "the reason for the refusal"
    assert router(1, norm=False).training_problem() is None
    assert router(2).training_problem() is None


def test_top2_is_topk_with_two() -> None:
    torch.manual_seed(0)
    top2 = build_router("top2", hidden_size=D, num_experts=E, noise_std=0.0)
    assert isinstance(top2, Top2Router)
    torch.manual_seed(0)
    topk = build_router("topk", hidden_size=D, num_experts=E, top_k=2, noise_std=0.0)
    for one, other in zip(top2(tokens())[:-1], topk(tokens())[:-1], strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="top_k"):
        build_router("top2", hidden_size=D, num_experts=E, top_k=3)
    raw = build_router("top2", hidden_size=D, num_experts=E, norm_topk_prob=False)
    assert bool((raw.eval()(tokens()).topk_weights.sum(1) < 1).all())


@pytest.mark.parametrize("k", [0, -1, E + 1])
def test_k_must_lie_between_one_and_e(k: int) -> None:
    with pytest.raises(ValueError, match="top_k"):
        router(k)

"""``noisy-topk``: Shazeer's noise, whose strength each token learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moectl.errors import ConfigError
from moectl.routers import build_router
from moectl.routers.noisy_topk import NoisyTopKRouter

D, E = 6, 4


def router(k: int = 2) -> NoisyTopKRouter:
    torch.manual_seed(0)
    made = build_router("noisy-topk", hidden_size=D, num_experts=E, top_k=k)
    assert isinstance(made, NoisyTopKRouter)
    torch.nn.init.normal_(made.weight)
    return made.double()


def tokens(number: int = 100) -> Tensor:
    return torch.randn(number, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_noise_is_a_normal_times_softplus_of_the_noise_gate() -> None:
    """One token 40,000 times: mean and deviation per expert, within 5 and 7 standard errors, the tails a normal's."""
    made = router()
    torch.nn.init.normal_(made.noise.weight)
    x = tokens(1)
    torch.manual_seed(2)
    noise = made.noise(x.expand(40_000, D))
    std = F.softplus(x @ made.noise.weight)[0].detach()
    assert std.max() > 2 * std.min(), "each token and expert has its own"
    assert ((noise.mean(0) / std).abs() < 5 / math.sqrt(40_000)).all()
    torch.testing.assert_close(noise.std(0), std, rtol=0.025, atol=0)
    assert ((noise.abs() > 2 * std).double().mean(0) - 0.0455).abs().max() < 0.006


def test_starts_with_the_noise_of_softplus_zero() -> None:
    made = router()
    assert not made.noise.weight.any()
    torch.manual_seed(2)
    assert made.noise(tokens(20_000)).std().item() == pytest.approx(math.log(2), rel=0.02)


def test_the_gate_is_the_only_parameter_of_its_shape() -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in router().named_parameters()}
    assert shapes == {"weight": (E, D), "noise.weight": (D, E)}


def test_weights_are_a_softmax_over_the_chosen_noisy_logits_and_both_gates_learn() -> None:
    made, x = router(), tokens()
    torch.manual_seed(3)
    out = made(x)
    torch.manual_seed(3)
    noisy = x @ made.weight.t() + torch.randn(100, E, dtype=torch.float64) * F.softplus(x @ made.noise.weight)
    torch.testing.assert_close(out.router_probs, noisy.softmax(1))
    assert torch.equal(out.topk_indices, noisy.sort(1, descending=True).indices[:, :2])
    kept = torch.full_like(noisy, -math.inf).scatter(1, out.topk_indices, noisy.gather(1, out.topk_indices))
    expected = kept.softmax(1).gather(1, out.topk_indices)
    torch.testing.assert_close(out.topk_weights, expected)
    upstream = torch.randn(100, 2, dtype=torch.float64)
    mine = torch.autograd.grad((out.topk_weights * upstream).sum(), (made.weight, made.noise.weight))
    theirs = torch.autograd.grad((expected * upstream).sum(), (made.weight, made.noise.weight))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        assert one.any()


def test_eval_is_without_noise() -> None:
    made, x = router().eval(), tokens()
    out = made(x)
    logits = x @ made.weight.t()
    torch.testing.assert_close(out.router_probs, logits.softmax(1))
    assert torch.equal(out.topk_indices, logits.sort(1, descending=True).indices[:, :2])


def test_every_call_draws_anew() -> None:
    made, x = router(), tokens()
    assert not torch.equal(made(x).topk_indices, made(x).topk_indices)


def test_learned_noise_cannot_be_scheduled() -> None:
    with pytest.raises(ConfigError, match="router 'noisy-topk' has no noise to schedule"):
        router().set_noise_std(0.1)


def test_k_of_one_gives_the_gate_no_gradient_and_is_refused() -> None:
    constant = router(1)
    assert "constant 1" in (constant.training_problem() or "")
    (grad,) = torch.autograd.grad(constant(tokens()).topk_weights.sum(), constant.weight)
    assert not grad.any(), "the reason for the refusal"
    assert router(2).training_problem() is None

"""``switch``: one expert per token, weighted by its probability."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moectl.routers import build_router
from moectl.routers.switch import SwitchRouter

D, E = 6, 4


def router(**options: float) -> SwitchRouter:
    torch.manual_seed(0)
    made = build_router("switch", hidden_size=D, num_experts=E, **options)
    assert isinstance(made, SwitchRouter)
    torch.nn.init.normal_(made.weight)
    return made.double()


def tokens() -> Tensor:
    return torch.randn(200, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [True, False])
def test_weight_is_the_probability_of_the_chosen(training: bool) -> None:
    """After noise, where there is noise: the same distribution that chose."""
    made, x = router(noise_std=1.0).train(training), tokens()
    out = made(x)
    assert torch.equal(out.topk_indices[:, 0], out.router_probs.argmax(1))
    assert torch.equal(out.topk_weights[:, 0], out.router_probs.max(1).values)
    assert bool((out.topk_weights < 1).all())
    if not training:
        torch.testing.assert_close(out.topk_weights[:, 0], (x @ made.weight.t()).softmax(1).max(1).values)


def test_a_small_gate_weighs_about_one_over_e() -> None:
    """Why a copy of a dense MLP shrinks under it."""
    made = build_router("switch", hidden_size=D, num_experts=8, noise_std=0.0)
    torch.nn.init.normal_(made.weight, std=1e-4)
    torch.testing.assert_close(made(tokens().float()).topk_weights, torch.full((200, 1), 1 / 8), rtol=0, atol=1e-3)


def test_gradient_reaches_every_gate_row_through_the_softmax() -> None:
    made = router(noise_std=0.0)
    out = made(tokens()[:1])
    (grad,) = torch.autograd.grad(out.topk_weights.sum(), made.weight)
    probs, chosen = out.router_probs[0].detach(), int(out.topk_indices)
    slope = probs[chosen] * (torch.eye(E, dtype=torch.float64)[chosen] - probs)  # ∂p_c/∂l_e = p_c (δ_ce - p_e)
    torch.testing.assert_close(grad, slope[:, None] * tokens()[:1], rtol=0, atol=1e-15)
    assert grad.any(1).all()


def test_may_be_trained() -> None:
    assert router().training_problem() is None
    assert router().top_k == 1

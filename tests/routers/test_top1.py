"""``top1``: exactly one forward, the soft probability's gradient backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moectl.routers import build_router
from moectl.routers.top1 import Top1Router

D, E = 6, 4


def router(**options: float) -> Top1Router:
    torch.manual_seed(0)
    made = build_router("top1", hidden_size=D, num_experts=E, **options)
    assert isinstance(made, Top1Router)
    torch.nn.init.normal_(made.weight)
    return made.double()


def tokens(number: int = 200) -> Tensor:
    return torch.randn(number, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("noise_std", [0.0, 0.1, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_weight_is_exactly_one(training: bool, noise_std: float, dtype: torch.dtype) -> None:
    """Bit for bit, on 5,000 tokens: ``hard + soft - soft`` from left to right would miss by an ulp here and there."""
    made = router(noise_std=noise_std).to(dtype).train(training)
    out = made(tokens(5000).to(dtype))
    assert torch.equal(out.topk_weights, torch.ones_like(out.topk_weights))


def test_eval_weight_is_a_plain_constant() -> None:
    assert not router().eval()(tokens()).topk_weights.requires_grad


@pytest.mark.parametrize("noise_std", [0.0, 1.0])
def test_backward_is_that_of_the_chosen_probability_after_noise(noise_std: float) -> None:
    made, x = router(noise_std=noise_std), tokens().requires_grad_()
    upstream = torch.randn(len(x), 1, dtype=torch.float64)
    out = made(x)
    soft = out.router_probs.gather(1, out.topk_indices)
    mine = torch.autograd.grad((out.topk_weights * upstream).sum(), (x, made.weight), retain_graph=True)
    theirs = torch.autograd.grad((soft * upstream).sum(), (x, made.weight))
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, other)
        assert other.any()


def test_gradient_by_hand() -> None:
    """Two experts, p = σ(l₀ - l₁): the gradient of the chosen weight in the logits is ±p(1 - p)."""
    made = build_router("top1", hidden_size=2, num_experts=2, noise_std=0.0).double()
    with torch.no_grad():
        made.weight.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    p = 1 / (1 + torch.exp(torch.tensor(-1.0, dtype=torch.float64)))
    (grad,) = torch.autograd.grad(made(x).topk_weights.sum(), x)
    torch.testing.assert_close(grad, torch.stack([p * (1 - p), -p * (1 - p)])[None], rtol=0, atol=1e-15)


def test_the_choice_is_the_argmax_of_the_noisy_probabilities() -> None:
    made, x = router(noise_std=2.0), tokens()
    out = made(x)
    assert torch.equal(out.topk_indices[:, 0], out.router_probs.argmax(1))
    assert not torch.equal(out.topk_indices[:, 0], out.router_probs_clean.argmax(1)), "noise never changed a choice"
    still = made.eval()(x)
    assert torch.equal(still.topk_indices[:, 0], still.router_logits.argmax(1))


def test_padding_takes_the_weight_and_its_gradient_away() -> None:
    made, x = router(), tokens(4).requires_grad_()
    mask = torch.tensor([True, False, True, False])
    out = made(x, mask)
    assert out.topk_weights[:, 0].tolist() == [1.0, 0.0, 1.0, 0.0]
    (grad,) = torch.autograd.grad(out.topk_weights.sum(), x)
    assert grad.any(1).tolist() == mask.tolist()


def test_one_expert_per_token_and_no_other() -> None:
    made = router()
    assert made.top_k == 1
    assert made.training_problem() is None
    with pytest.raises(ValueError, match="top_k"):
        build_router("top1", hidden_size=D, num_experts=E, top_k=2)

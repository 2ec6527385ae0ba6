"""``sigmoid``: DeepSeek-V3's scores, groups and bias."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from moectl.routers import RouterOptionError, build_router
from moectl.routers.sigmoid import SigmoidRouter

D, E = 8, 12


def router(**options: float) -> SigmoidRouter:
    torch.manual_seed(0)
    made = build_router("sigmoid", hidden_size=D, num_experts=E, **options)
    assert isinstance(made, SigmoidRouter)
    torch.nn.init.normal_(made.weight)
    return made


def tokens(number: int = 200, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(number, D, generator=torch.Generator().manual_seed(1)).to(dtype)


def bias(scale: float) -> Tensor:
    return scale * torch.randn(E, generator=torch.Generator().manual_seed(7))


# --- what is chosen, and what it weighs


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("n_group", "topk_group", "k"), [(1, 1, 4), (4, 2, 3), (3, 1, 4), (6, 3, 6), (2, 2, 5)])
def test_equals_hugging_faces_deepseek_v3(n_group: int, topk_group: int, k: int, norm: bool) -> None:
    """Theirs leaves the order among the chosen open: compared expert by expert. 1e-6: a few float32 roundings."""
    options = {"n_group": n_group, "topk_group": topk_group, "norm_topk_prob": norm, "routed_scaling_factor": 2.5}
    made = router(top_k=k, **options)
    config = SimpleNamespace(num_experts_per_tok=k, num_local_experts=E, hidden_size=D, **options)
    theirs = DeepseekV3TopkRouter(config)
    with torch.no_grad():
        made.expert_bias.copy_(bias(0.2))
        theirs.weight.copy_(made.weight)
        theirs.e_score_correction_bias.copy_(made.expert_bias)
    x = tokens()
    out = made(x)
    logits, weights, indices = theirs(x)
    torch.testing.assert_close(out.router_logits, logits, rtol=0, atol=1e-6)
    dense = torch.zeros(200, E)
    torch.testing.assert_close(
        dense.scatter(1, out.topk_indices, out.topk_weights), dense.scatter(1, indices, weights), rtol=0, atol=1e-6
    )


def test_the_bias_chooses_and_never_weighs() -> None:
    made, x = router(top_k=2), tokens()
    before = made(x)
    with torch.no_grad():
        made.expert_bias[5] = 10.0
    after = made(x)
    assert bool((after.topk_indices[:, 0] == 5).all())
    scores = torch.sigmoid(x @ made.weight.detach().t())
    chosen = scores.gather(1, after.topk_indices)
    torch.testing.assert_close(after.topk_weights, chosen / chosen.sum(1, keepdim=True))
    for field in ("router_probs", "router_probs_clean", "entropy", "router_logits"):
        assert torch.equal(getattr(after, field), getattr(before, field)), field
    torch.testing.assert_close(after.router_probs, scores / scores.sum(1, keepdim=True))


def test_groups_are_ranked_by_their_two_best_biased_scores_and_not_by_their_best() -> None:
    """Group 0 holds the best expert and two bad ones, group 1 two good ones; one group is open."""
    made = build_router("sigmoid", hidden_size=6, num_experts=6, top_k=2, n_group=2, topk_group=1)
    with torch.no_grad():
        made.weight.copy_(torch.eye(6))
    x = torch.tensor([[3.0, -4.0, -4.0, 2.0, -5.0, 1.0]])
    assert made(x).topk_indices.tolist() == [[3, 5]]
    with torch.no_grad():
        made.expert_bias[1] = 1.0  # σ(-4) + 1 = 1.02 beside σ(3) = 0.95: more than σ(2) + σ(1) = 1.61
    assert made(x).topk_indices.tolist() == [[1, 0]]


def test_groups_of_equal_scores_open_from_the_lowest() -> None:
    made = router(top_k=3, n_group=4, topk_group=2)
    with torch.no_grad():
        made.weight.zero_()
    assert made(tokens(2)).topk_indices.tolist() == [[0, 1, 2]] * 2


def test_random_routing_stays_within_groups() -> None:
    made = router(top_k=2, n_group=4, topk_group=1, random_routing=1.0)
    groups = made(tokens()).topk_indices // 3
    assert torch.equal(groups[:, 0], groups[:, 1])
    assert set(groups.flatten().tolist()) == {0, 1, 2, 3}


# --- the bias


def test_bias_falls_where_the_load_is_above_the_mean_and_rises_below() -> None:
    made = router(bias_update_rate=0.01)
    load = torch.tensor([10, 0, 4, 5, 6, 5, 5, 5, 5, 5, 5, 5])  # mean 5
    made.after_step(load)
    expected = [-1, 1, 1, 0, -1, *[0] * 7]
    torch.testing.assert_close(made.expert_bias, 0.01 * torch.tensor(expected).float(), rtol=0, atol=0)
    made.after_step(load)
    torch.testing.assert_close(made.expert_bias, 0.02 * torch.tensor(expected).float(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("load", [[0] * E, [7] * E, [2**40 + 1] * E])
def test_a_balanced_load_moves_nothing(load: list[int]) -> None:
    made = router()
    made.after_step(torch.tensor(load))
    assert not made.expert_bias.any()


def test_one_token_too_many_is_seen_at_any_scale() -> None:
    """In float32 a mean of 2^40 and a load of 2^40 + 1 are the same."""
    made = router(bias_update_rate=0.5)
    made.after_step(torch.tensor([2**40] * (E - 2) + [2**40 + 1, 2**40 - 1]))
    assert made.expert_bias.tolist() == [0.0] * (E - 2) + [-0.5, 0.5]


def test_bias_does_not_move_in_eval_nor_without_a_rate() -> None:
    load = torch.arange(E)
    made = router().eval()
    made.after_step(load)
    assert not made.expert_bias.any()
    made.train().after_step(load)
    assert made.expert_bias.any()
    still = router(bias_update_rate=0.0)
    still.after_step(load)
    assert not still.expert_bias.any()


def test_bias_balances_a_lopsided_gate_without_a_loss() -> None:
    """Every token prefers the first expert; 400 steps of 0.01 leave no expert far above the mean."""
    made, x = router(top_k=2, bias_update_rate=0.01), tokens(600)
    x[:, 0] = 2.0
    with torch.no_grad():
        made.weight[:, 0] = torch.linspace(1.0, -1.0, E)

    def load() -> Tensor:
        return torch.bincount(made(x).topk_indices.flatten(), minlength=E)

    assert load().max() > 2.5 * load().double().mean()
    gate = made.weight.detach().clone()
    for _ in range(400):
        made.after_step(load())
    assert load().max() < 1.25 * load().double().mean()
    assert torch.equal(made.weight, gate)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bias_is_float32_in_a_model_of_any_dtype_and_goes_on_moving(dtype: torch.dtype) -> None:
    """At 1.0 a bfloat16 bias would stand still: the next number is 1.0078."""
    made = router()
    with torch.no_grad():
        made.expert_bias.fill_(1.0)
    made.to(dtype)
    assert made.expert_bias.dtype == torch.float32
    assert made.weight.dtype == dtype
    for _ in range(3):
        made.after_step(torch.arange(E))
    torch.testing.assert_close(made.expert_bias[[0, -1]], torch.tensor([1.003, 0.997]), rtol=0, atol=1e-6)
    assert made(tokens(5, dtype)).topk_weights.isfinite().all()
    restored = router().to(dtype)
    restored.load_state_dict(made.state_dict())
    assert torch.equal(restored.expert_bias, made.expert_bias)
    assert restored.expert_bias.dtype == torch.float32


def test_bias_is_state_without_a_gradient() -> None:
    made = router()
    assert "expert_bias" in made.state_dict()
    assert {name for name, _ in made.named_parameters()} == {"weight"}
    assert not made.expert_bias.requires_grad
    assert torch.equal(copy.deepcopy(made).expert_bias, made.expert_bias)


def test_float32_although_the_default_is_another() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = build_router("sigmoid", hidden_size=D, num_experts=E)
    finally:
        torch.set_default_dtype(torch.float32)
    assert made.weight.dtype == torch.bfloat16
    assert made.expert_bias.dtype == torch.float32


# --- options


def test_balanced_without_a_loss_by_default() -> None:
    assert SigmoidRouter.default_lb_coef == 0.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_group": 5}, "12 experts do not divide into groups"),
        ({"n_group": 12, "topk_group": 6}, "groups of two or more"),
        ({"n_group": 2, "topk_group": 3}, r"topk_group \(3\) must not exceed n_group \(2\)"),
        ({"n_group": 4, "topk_group": 1, "top_k": 4}, "topk_group=1 groups have 3 experts each"),
        ({"n_group": 4, "expert_dropout": 0.1}, "do not go together"),
        ({"top_k": 13}, "12 experts"),
        ({"top_k": 0}, "top_k = 0"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor"),
        ({"bias_update_rate": -1e-3}, "bias_update_rate"),
        ({"bias_update_rate": math.nan}, "bias_update_rate"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options: dict[str, float], says: str) -> None:
    with pytest.raises(RouterOptionError, match=says) as caught:
        router(**options)
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_a_scheduled_top_k_must_fit_into_the_open_groups() -> None:
    made = router(top_k=2, n_group=4, topk_group=1)
    made.set_top_k(3)
    with pytest.raises(ValueError, match="topk_group=1"):
        made.set_top_k(4)


def test_constant_weight_is_refused_for_training() -> None:
    constant = router(top_k=1, routed_scaling_factor=2.5)
    assert "constant" in (constant.training_problem() or "")
    (grad,) = torch.autograd.grad(constant(tokens()).topk_weights.sum(), constant.weight)
    assert not grad.any(), "the reason for the refusal"
    assert router(top_k=1, norm_topk_prob=False).training_problem() is None
    assert router(top_k=2).training_problem() is None

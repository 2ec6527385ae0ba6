"""More experts and the same function, proven in float64 for every router that can, and refused for the others."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch

from moectl.config.schema import MoEConfig
from moectl.errors import ConfigError
from moectl.models.growth import append, multiply
from moectl.moe import GatedExperts, MLPExperts, MoELayer
from moectl.routers import build_router

FLOAT64 = 1e-12  # two products deep, values of order one, another order of addition
GROWING = [
    {"name": "top1"},
    {"name": "top2"},
    {"name": "topk", "top_k": 3},
    {"name": "topk", "top_k": 2, "norm_topk_prob": False},
    {"name": "topk", "top_k": 1},
    {"name": "switch"},
    {"name": "noisy-topk"},
    {"name": "sigmoid", "routed_scaling_factor": 1.5},
    {"name": "sigmoid", "norm_topk_prob": False},
    {"name": "topk", "top_k": 2, "logit_clamp": 0.5},
]


def layer_of(router: dict[str, object], kind: type = GatedExperts, *, experts: int = 5) -> tuple[MoELayer, MoEConfig]:
    moe = MoEConfig(router=router, num_experts=experts, init="random", expert_intermediate_size=12)
    torch.manual_seed(0)
    gate = build_router(moe.router_name, hidden_size=6, num_experts=experts, **moe.router_options)
    layer = MoELayer(gate, kind(experts, 6, 12, backend="loop")).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        for name, buffer in layer.router.named_buffers():
            if name == "expert_bias":
                buffer.copy_(torch.linspace(-1.5, -0.9, experts))  # below what a new expert starts with
    return layer, moe


def tokens() -> torch.Tensor:
    return torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("router", GROWING, ids=str)
@pytest.mark.parametrize("kind", [GatedExperts, MLPExperts])
@pytest.mark.parametrize("times", [2, 3])
def test_multiplied_experts_keep_the_function(router: dict[str, object], kind: type, times: int) -> None:
    layer, moe = layer_of(router, kind)
    before, chosen = layer(tokens()), layer.router(tokens()).topk_indices
    weight = layer.router.weight.clone()
    grown = multiply({0: layer}, moe, times)
    torch.testing.assert_close(layer(tokens()), before, rtol=0, atol=FLOAT64)
    assert layer.experts.num_experts == layer.router.num_experts == grown.num_experts == 5 * times
    assert torch.equal(layer.router.weight, weight.repeat_interleave(times, 0))
    again = layer.router(tokens()).topk_indices // times
    assert torch.equal(again.sort(1).values[:, :: again.shape[1] // chosen.shape[1]], chosen.sort(1).values)


def test_each_copy_weighs_its_share() -> None:
    layer, moe = layer_of({"name": "topk", "top_k": 2})
    old = layer.router(tokens())
    multiply({0: layer}, moe, 3)
    new = layer.router(tokens())
    assert new.topk_weights.shape == (50, 6)
    torch.testing.assert_close(new.topk_weights, old.topk_weights.repeat_interleave(3, 1) / 3, rtol=0, atol=1e-14)


@pytest.mark.parametrize("router", [{"name": "top2"}, {"name": "topk", "top_k": 1}, {"name": "sigmoid"}], ids=str)
@pytest.mark.parametrize("kind", [GatedExperts, MLPExperts])
def test_parts_keep_the_function_and_the_cost(router: dict[str, object], kind: type) -> None:
    layer, moe = layer_of(router, kind)
    before, per_token = layer(tokens()), layer.router.top_k * 12
    numbers = sum(
        parameter.numel() for name, parameter in layer.experts.named_parameters() if "down_proj_bias" not in name
    )
    grown = multiply({0: layer}, moe, 4, parts=True)
    torch.testing.assert_close(layer(tokens()), before, rtol=0, atol=FLOAT64)
    assert layer.router.top_k * layer.experts.intermediate_size == per_token
    assert grown.expert_intermediate_size == layer.experts.intermediate_size == 3
    assert numbers == sum(p.numel() for name, p in layer.experts.named_parameters() if "down_proj_bias" not in name)


@pytest.mark.parametrize("router", GROWING, ids=str)
@pytest.mark.parametrize("kind", [GatedExperts, MLPExperts])
def test_added_experts_are_never_chosen_at_first(router: dict[str, object], kind: type) -> None:
    """Not one bit of the output changes, in training mode neither (without noise), and no weight of the old ones."""
    quiet = {"noise_std": 0.0} if router["name"] not in ("sigmoid", "noisy-topk") else {}
    layer, moe = layer_of({**router, **quiet}, kind)
    huge = 1e3 * tokens()  # logits of some thousands: no offset would do
    for x in (tokens(), huge):
        grown_layer = copy.deepcopy(layer)
        before, old = layer(x), layer.router(x)
        grown = append({0: grown_layer}, moe, 7, generator=torch.Generator().manual_seed(0))
        assert torch.equal(grown_layer(x), before)
        new = grown_layer.router(x)
        assert int(new.topk_indices.max()) < 5
        assert torch.equal(new.topk_weights, old.topk_weights)
        assert not new.router_probs_clean[:, 5:].any()
        assert new.router_logits.isfinite().all()
        assert grown.num_experts == 12
        if quiet:
            grown_layer.train()
            torch.testing.assert_close(grown_layer(x), before, rtol=0, atol=1e-9)


def test_added_experts_are_noisy_copies_that_open_step_by_step() -> None:
    layer, moe = layer_of({"name": "top1", "noise_std": 0.0})
    old = layer.experts.down_proj.clone()
    append({0: layer}, moe, 7, noise=0.01, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer.experts.down_proj[:5], old)
    added = layer.experts.down_proj[5:] - old[torch.arange(7) % 5]
    assert added.std().item() == pytest.approx(0.01 * old.std().item(), rel=0.2)
    rows = layer.router.weight[5:] - layer.router.weight[torch.arange(7) % 5]
    assert rows.std().item() == pytest.approx(0.01 * layer.router.weight[:5].std().item(), rel=0.4)
    layer.train().requires_grad_(False)
    shares = []
    for _ in range(201):
        out = layer.router(tokens())
        shares.append(out.router_probs[:, 5:].sum().item())
        layer.router.end_step(torch.ones(12), tokens=50)
    assert shares[0] == 0.0
    assert all(later > earlier for earlier, later in pairwise(shares))
    assert shares[200] == pytest.approx(float(torch.softmax(out.router_logits, -1)[:, 5:].sum()), rel=1e-9)
    assert (out.topk_indices >= 5).any()


def test_growth_after_growth() -> None:
    layer, moe = layer_of({"name": "top2"})
    before = layer(tokens())
    moe = append({0: layer}, moe, 3)
    torch.testing.assert_close(layer(tokens()), before, rtol=0, atol=FLOAT64)
    with pytest.raises(ConfigError, match="still opening its last 3 new experts"):
        append({0: copy.deepcopy(layer)}, moe, 2)
    moe = multiply({0: layer}, moe, 2)
    torch.testing.assert_close(layer(tokens()), before, rtol=0, atol=FLOAT64)
    for _ in range(200):
        layer.router.train().end_step(torch.ones(16), tokens=50)
    opened = layer.eval()(tokens())
    moe = append({0: layer}, moe, 1)
    torch.testing.assert_close(layer(tokens()), opened, rtol=0, atol=FLOAT64)
    assert (moe.num_experts, moe.router["new_experts"], layer.experts.num_experts) == (17, 1, 17)


def test_a_grown_layer_learns() -> None:
    layer, moe = layer_of({"name": "topk", "top_k": 2})
    multiply({0: layer}, moe, 2)
    layer.train()(tokens()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_what_cannot_be_grown_is_said() -> None:
    grouped, moe = layer_of({"name": "sigmoid", "n_group": 2, "topk_group": 1}, experts=4)
    with pytest.raises(ConfigError, match="chooses groups"):
        multiply({0: grouped}, moe, 2)
    with pytest.raises(ConfigError, match="cannot keep new experts closed"):
        append({0: grouped}, moe, 2)
    threshold, moe = layer_of({"name": "expert-choice-threshold"})
    before = copy.deepcopy(threshold.state_dict())
    with pytest.raises(ConfigError, match="do not divide among 2 copies"):
        multiply({0: threshold}, moe, 2)
    with pytest.raises(ConfigError, match="cannot keep new experts closed"):
        append({0: threshold}, moe, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in threshold.state_dict().items())
    single, moe = layer_of({"name": "top1"})
    with pytest.raises(ConfigError, match="do not divide among 2 copies") as error:
        multiply({0: single}, moe, 2, parts=True)
    assert "parts need all copies to be chosen" in str(error.value.hint)
    pair, moe = layer_of({"name": "top2"})
    with pytest.raises(ConfigError, match="12 neurons do not divide into 5 parts"):
        multiply({0: pair}, moe, 5, parts=True)
    with pytest.raises(ConfigError, match="Give 2|multiplied by 1"):
        multiply({0: pair}, moe, 1)
    with pytest.raises(ConfigError, match="0 experts cannot be added"):
        append({0: pair}, moe, 0)
    with pytest.raises(ConfigError, match="no experts to grow"):
        multiply({}, moe, 2)


def test_options_of_new_experts_are_checked() -> None:
    with pytest.raises(ValueError, match="opening_steps = 5 has no effect"):
        build_router("top1", hidden_size=6, num_experts=4, opening_steps=5)
    with pytest.raises(ValueError, match="expert_dropout and new_experts"):
        build_router("top1", hidden_size=6, num_experts=4, new_experts=1, expert_dropout=0.1)
    with pytest.raises(ValueError, match="top_k is 3, but 2 of 4 experts are new"):
        build_router("topk", hidden_size=6, num_experts=4, top_k=3, new_experts=2)

"""The names that others build on, with the keywords that they use."""

from __future__ import annotations

import inspect

import torch

import moectl


def parameters(function: object) -> list[str]:
    assert callable(function)
    return list(inspect.signature(function).parameters)


def test_load() -> None:
    assert parameters(moectl.load)[0] == "run"
    assert moectl.__version__.count(".") == 2


def test_build_router_and_its_output() -> None:
    from moectl.routers import build_router

    router = build_router("topk", hidden_size=16, num_experts=4, top_k=2, norm_topk_prob=True, noise_std=0.1)
    assert router.weight.shape == (4, 16)
    out = router(torch.randn(5, 16))
    fields = {"topk_weights", "topk_indices", "router_probs", "router_probs_clean", "router_logits", "entropy", "keep"}
    assert set(out._fields) == fields


def test_moe_layer_and_experts() -> None:
    from moectl.moe import GatedExperts, MLPExperts, MoELayer, Router, RouterOutput
    from moectl.routers import build_router

    experts = GatedExperts(num_experts=4, hidden_size=16, intermediate_size=8, backend="grouped")
    assert experts.gate_up_proj.shape == (4, 16, 16)
    assert experts.down_proj.shape == (4, 16, 8)
    router = build_router("top1", hidden_size=16, num_experts=4)
    assert isinstance(router, Router)
    layer = MoELayer(router, experts, shared_experts=None)
    assert layer(torch.randn(2, 3, 16), token_mask=None).shape == (2, 3, 16)
    assert isinstance(layer.routing, RouterOutput)
    assert layer.router is router
    assert layer.experts is experts
    assert parameters(MLPExperts)[:3] == ["num_experts", "hidden_size", "intermediate_size"]


def test_losses() -> None:
    from moectl.moe.losses import load_balancing_loss, router_z_loss

    expected = ["router_probs", "topk_indices", "num_experts", "token_mask", "keep"]
    assert parameters(load_balancing_loss)[: len(expected)] == expected
    assert parameters(router_z_loss) == ["router_logits", "token_mask"]


def test_moe_config() -> None:
    from moectl.config import MoEConfig

    config = MoEConfig(
        router={"name": "top1", "noise_std": 0.1}, num_experts=8, layers="last:4", init="copy", init_noise=1e-3
    )
    assert config.router_name == "top1"
    assert config.router_options == {"noise_std": 0.1}


def test_specialization() -> None:
    from moectl.inspection.specialization import normalized_mutual_information, permutation_test

    assert parameters(normalized_mutual_information)[0] == "counts"
    expected = ["experts", "domains", "groups", "num_experts", "draws", "seed"]
    assert parameters(permutation_test) == expected


def test_check_router() -> None:
    from moectl.testing import check_router

    assert parameters(check_router) == ["router", "hidden_size", "num_experts", "options"]
    assert check_router("topk", hidden_size=16, num_experts=4, top_k=2).ok

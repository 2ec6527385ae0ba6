"""Sizes read on the meta device are those of the real model, and FLOPs those that torch counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moectl.config.schema import MoEConfig
from moectl.models.config import SIZES, DecoderConfig
from moectl.models.decoder import Decoder
from moectl.planning.anatomy import Anatomy, anatomy
from tests.planning.conftest import model, shape

ROUTERS: list[dict[str, Any]] = [
    {"router": "top1"},
    {"router": "top2", "n_shared_experts": 2},
    {"router": {"name": "topk", "top_k": 3}, "expert_intermediate_size": 7},
    {"router": "noisy-topk"},  # two matrices
    {"router": {"name": "sigmoid", "top_k": 2}, "layers": "all"},
    {"router": "expert-choice", "num_experts": 3},
    {"router": "switch", "layers": "0", "num_experts": 1},
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("moe", [None, *ROUTERS], ids=lambda moe: str(moe and moe["router"]))
def test_parameters_are_those_of_the_real_model(moe: dict[str, Any] | None, tied: bool) -> None:
    config = shape(moe, tie_word_embeddings=tied)
    planned, real = anatomy(config, 17), Decoder(config)
    assert planned.parameters.total == sum(parameter.numel() for parameter in real.parameters())
    assert sum(planned.parts.values()) == planned.parameters.total
    assert ("head" in planned.parts) is not tied
    # Zero the experts that no token needs to visit, and count what is left.
    idle = sum(
        layer.experts.gate_up_proj[layer.router.top_k :].numel() + layer.experts.down_proj[layer.router.top_k :].numel()
        for layer in real.moe_layers().values()
    )
    assert planned.parameters.inactive == idle
    assert planned.parameters.active == planned.parameters.total - idle
    for (rest, experts), layer in zip(planned.layers, real.layers, strict=True):
        assert rest + experts == sum(parameter.numel() for parameter in layer.parameters())
    assert sum(experts for _, experts in planned.layers) == planned.parts.get("experts", 0)


def test_parts_of_a_model_counted_by_hand() -> None:
    parts = model({"router": "top1", "n_shared_experts": 1, "expert_intermediate_size": 8}).parts
    assert parts == {
        "embedding": 301 * 40,
        "attention": 3 * (2 * 40 * 60 + 2 * 40 * 20 + 2 * 10),
        "mlp": 1 * 3 * 40 * 72,
        "experts": 2 * 5 * 3 * 40 * 8,
        "shared experts": 2 * 3 * 40 * 8,
        "router": 2 * 5 * 40,
        "norms": 40 + 3 * 2 * 40,
    }


def test_thirty_billion_parameters_take_no_memory() -> None:
    """Qwen3-30B-A3B's shape: its parameters as published."""
    moe = MoEConfig(router={"name": "topk", "top_k": 8}, num_experts=128, expert_intermediate_size=768, layers="all")
    big = DecoderConfig(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=6144,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        tie_word_embeddings=False,
    )
    assert anatomy(big.with_moe(moe), 4095).parameters.total == 30_532_122_624


@pytest.mark.parametrize("length", [16, 96])
@pytest.mark.parametrize("moe", [None, *ROUTERS[:5]], ids=lambda moe: str(moe and moe["router"]))
def test_flops_are_what_torch_counts(moe: dict[str, Any] | None, length: int) -> None:
    """2 %: the router's own arithmetic beyond its products is not counted by either side. The math backend of
    attention and the expert backend ``loop``, because the counter does not see into the fused ones."""
    config = shape(None if moe is None else {**moe, "backend": "loop"})
    real, planned = Decoder(config), anatomy(config, length)
    ids = torch.randint(config.vocab_size, (2, length))
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            real(ids, torch.zeros_like(ids))
        with FlopCounterMode(display=False) as both:
            real(ids, torch.zeros_like(ids)).sum().backward()
    assert planned.flops.total == pytest.approx(forward.get_total_flops() / ids.numel(), rel=0.02)
    assert planned.training_flops == pytest.approx(both.get_total_flops() / ids.numel(), rel=0.02)


def test_a_schedule_is_planned_by_its_mean_and_by_its_most() -> None:
    router = {"name": "topk", "top_k": 1}
    plain = model({"router": router})
    falling = model({"router": router, "schedule": {"top_k": [[0, 5], [0.25, 1]]}})
    assert plain.moe is not None and falling.moe is not None
    assert (falling.moe.per_token, falling.moe.per_token_max, falling.moe.top_k) == (pytest.approx(2.0), 5, 1)
    assert falling.flops.experts == pytest.approx(2 * plain.flops.experts)
    assert falling.parameters == plain.parameters


def test_a_schedule_leaves_shared_experts_alone() -> None:
    moe = {"router": {"name": "topk", "top_k": 1}, "n_shared_experts": 1, "expert_intermediate_size": 8}
    falling = model({**moe, "schedule": {"top_k": [[0, 3], [0.5, 1]]}})
    assert falling.flops.experts == pytest.approx(2 * 6 * 40 * 8 * (2 + 1))


def test_expert_choice_takes_its_share_of_all_tokens() -> None:
    half = model({"router": {"name": "expert-choice", "top_k": 2, "capacity_factor": 0.5}})
    assert half.moe is not None and half.moe.per_token == 1.0
    most = model({"router": {"name": "expert-choice", "top_k": 2, "capacity_factor": 9.0}})
    assert most.moe is not None and most.moe.per_token == 5.0


def test_a_tight_capacity_drops_and_a_loose_one_does_not() -> None:
    tight, loose = (model({"router": "top2", "capacity": factor}).moe for factor in (0.75, 2.0))
    assert tight is not None and tight.per_token == 1.5
    assert loose is not None and loose.per_token == 2.0


def test_backend_full_computes_every_expert() -> None:
    one, full = (model({"router": "top1", "backend": backend}) for backend in ("grouped", "full"))
    assert full.flops.experts == 5 * one.flops.experts


@pytest.mark.parametrize("base", SIZES)
def test_every_size(base: str) -> None:
    planned: Anatomy = anatomy(DecoderConfig(vocab_size=8192, **SIZES[base]), 511)
    assert planned.training_flops == 3 * planned.flops.total
    # Twice the parameters that multiply, and the scores; the embedding does, as the head.
    products = planned.parameters.total - planned.parts["norms"]
    config = planned.config
    products -= config.num_layers * 2 * config.head_dim  # norms within attention
    scores = 4 * 511 * planned.query_size * config.num_layers
    assert planned.flops.total == 2 * products + scores

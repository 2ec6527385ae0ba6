"""FLOPs by formula against PyTorch's own counter, and parameters against a count by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moectl.config.schema import MoEConfig
from moectl.hf import upcycle
from moectl.hf.language_model import HFLanguageModel
from moectl.models.accounting import BACKWARD, count, experts_per_token, forward_flops, weight_bytes
from tests.hf.tiny_models import KINDS, some_ids, tiny

ROWS, LENGTH = 3, 17
MIXTURES: list[dict[str, object] | None] = [
    None,
    {"router": {"name": "top1"}},
    {"router": {"name": "topk", "top_k": 2}, "n_shared_experts": 1},
    {"router": {"name": "topk", "top_k": 4}, "init": "split", "granularity": 4, "num_experts": 8},
]


def model_of(kind: str, moe: dict[str, object] | None) -> HFLanguageModel:
    model = tiny(kind, torch.float32, attn_implementation="eager")  # the counter does not see a CPU's fused attention
    if moe is not None:
        values = {"num_experts": 4, "layers": "last:2", "init": "copy", "backend": "loop", **moe}
        upcycle(model, MoEConfig.model_validate(values))
    return HFLanguageModel(model)


def counted(counter: FlopCounterMode) -> int:
    """All but the table of rotary angles, which some releases of transformers make by a matrix product."""
    by_module = counter.get_flop_counts().items()
    return counter.get_total_flops() - sum(
        sum(flops.values()) for name, flops in by_module if name.endswith(".rotary_emb")
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moe", MIXTURES, ids=str)
def test_formula_equals_the_counter(kind: str, moe: dict[str, object] | None) -> None:
    model = model_of(kind, moe)
    shape: Any = model.family.shape_of(model.config)
    expected = forward_flops(shape, model.moe_layers().values(), length=LENGTH)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(some_ids(ROWS, LENGTH))
    assert counted(forward) == ROWS * LENGTH * expected.total
    with FlopCounterMode(display=False) as training:
        model.train()(some_ids(ROWS, LENGTH)).sum().backward()
    assert counted(training) == ROWS * LENGTH * expected.total * (1 + BACKWARD)


def test_parts_of_a_known_shape() -> None:
    """GPT-2 small, by hand."""
    from moectl.models.accounting import TransformerShape

    shape = TransformerShape(12, 768, 768, 768, 3072, 2, 50257)
    flops = forward_flops(shape, (), length=1024)
    assert flops.attention == 12 * (2 * 4 * 768 * 768 + 4 * 1024 * 768)
    assert flops.mlp == 12 * 2 * 2 * 768 * 3072
    assert flops.head == 2 * 768 * 50257
    assert flops.experts == flops.router == 0
    assert flops.total == flops.attention + flops.mlp + flops.head
    assert flops.to_json()["total"] == flops.total


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_split_layers_cost_what_the_dense_ones_do(kind: str) -> None:
    dense, split = (model_of(kind, moe) for moe in (None, MIXTURES[3]))
    shape: Any = dense.family.shape_of(dense.config)
    before = forward_flops(shape, (), length=64)
    after = forward_flops(shape, split.moe_layers().values(), length=64)
    assert after.total - after.router == before.total
    assert after.router == 2 * 2 * 8 * 32


def test_full_backend_computes_every_expert() -> None:
    model = model_of("llama", {"router": {"name": "top1"}, "backend": "full"})
    shape: Any = model.family.shape_of(model.config)
    assert forward_flops(shape, model.moe_layers().values(), length=1).experts == 2 * 4 * 6 * 32 * 48


@pytest.mark.parametrize(("top_k", "factor", "per_token"), [(2, 1.0, 2.0), (1, 1.5, 1.5), (2, 1.5, 3.0), (2, 9.0, 4.0)])
def test_experts_that_choose_compute_as_many_tokens_as_they_take(top_k: int, factor: float, per_token: float) -> None:
    """Four experts of 51 tokens: against the counter, but for the tokens that rounding up adds."""
    router = {"name": "expert-choice", "top_k": top_k, "capacity_factor": factor}
    model = model_of("llama", {"router": router, "init": "random"})
    (layer, _) = model.moe_layers().values()
    assert experts_per_token(layer) == per_token
    shape: Any = model.family.shape_of(model.config)
    expected = forward_flops(shape, model.moe_layers().values(), length=LENGTH)
    assert expected.experts == 2 * per_token * 6 * 32 * 48
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(some_ids(ROWS, LENGTH))
    rounded = 2 * 4 * 6 * 32 * 48  # a token per expert and layer at most
    assert 0 <= counted(forward) - ROWS * LENGTH * expected.total <= rounded
    assert count(model).inactive == (4 - per_token) * 2 * 3 * 32 * 48


def test_parameters_and_memory() -> None:
    model = model_of("llama", {"router": {"name": "topk", "top_k": 3}, "n_shared_experts": 1})
    counted = count(model)
    assert counted.total == sum(p.numel() for p in model.model.parameters())
    assert counted.inactive == 2 * 1 * 3 * 32 * 48
    assert counted.active == counted.total - counted.inactive
    assert count(model_of("llama", None)).inactive == 0
    parameters = 4 * counted.total
    assert parameters < weight_bytes(model) < parameters + 1000  # buffers: rotary frequencies, counters
    tied = HFLanguageModel(tiny("gpt2"))
    assert count(tied).total == sum(p.numel() for p in tied.model.parameters())
    assert weight_bytes(tied) >= 8 * count(tied).total

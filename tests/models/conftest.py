"""Tiny real decoders, in float64 unless a test is about rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moectl.config.schema import MoEConfig
from moectl.models.config import DecoderConfig
from moectl.models.decoder import Decoder

VOCABULARY = 29
MakeDecoder = Callable[..., Decoder]

#: name -> the router, for every kind of combine weight that a decoder can carry.
ROUTERS: dict[str, dict[str, object] | None] = {
    "dense": None,
    "top1": {"name": "top1"},
    "top2": {"name": "top2"},
    "topk-raw": {"name": "topk", "top_k": 3, "norm_topk_prob": False},
    "switch": {"name": "switch"},
    "noisy-topk": {"name": "noisy-topk"},
    "sigmoid": {"name": "sigmoid", "routed_scaling_factor": 1.5},
    "threshold": {"name": "expert-choice-threshold"},
}
#: Not causal, so not among those.
NONCAUSAL: dict[str, dict[str, object] | None] = {"expert-choice": {"name": "expert-choice"}}


def build(
    kind: str = "dense",
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    capacity: object = None,
    **shape: object,
) -> Decoder:
    """Two or three layers of width 16, weights large enough that attention and gates are decided. In eval."""
    values: dict[str, object] = {
        "hidden_size": 16, "intermediate_size": 20, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6,
    }  # fmt: skip
    config = DecoderConfig(vocab_size=VOCABULARY, **{**values, **shape})  # type: ignore[arg-type]
    router = {**ROUTERS, **NONCAUSAL}[kind]
    if router is not None:
        moe = MoEConfig(router=router, num_experts=4, layers="last:2", n_shared_experts=1, capacity=capacity)
        config = config.with_moe(moe)
    torch.manual_seed(seed)
    model = Decoder(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # norms too: scales of exactly one would hide a forgotten scale
            parameter.add_(0.3 * torch.randn_like(parameter))
    for layer in model.moe_layers().values():  # thresholds and biases as training leaves them: not all alike
        for name, buffer in layer.router.named_buffers():
            if name in ("expert_bias", "threshold"):
                buffer.add_(torch.linspace(-0.1, 0.1, buffer.numel()))
    return model.eval()


@pytest.fixture
def make_decoder() -> MakeDecoder:
    return build


@pytest.fixture(params=ROUTERS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """Each kind in turn."""
    return build(request.param)

"""Models with experts for the tests of export: every base, any router, weights large enough that routing matters."""

from __future__ import annotations

from typing import Any

import torch

from moectl.config.schema import MoEConfig
from moectl.hf.language_model import HFLanguageModel
from moectl.hf.upcycle import upcycle
from moectl.models.decoder import Decoder
from moectl.models.language_model import LanguageModel
from tests.hf.tiny_models import VOCABULARY, tiny
from tests.support import tiny_shape

BASES = ("decoder", "llama", "mistral", "qwen2", "qwen3", "gpt2")


def model_of(
    base: str, router: dict[str, Any] | str = "top1", layers: str = "all", *, moe: dict[str, Any] | None = None,
    seed: int = 0, **changes: Any,
) -> LanguageModel:  # fmt: skip
    """Four experts per layer, unlike each other, and gates that choose decidedly. In float32, in eval mode."""
    options = {"name": router} if isinstance(router, str) else router
    config = MoEConfig(router=options, num_experts=4, layers=layers, init="random", **(moe or {}))
    torch.manual_seed(seed)
    model: LanguageModel
    if base == "decoder":
        model = Decoder(tiny_shape(VOCABULARY, config))
    else:
        model = HFLanguageModel(upcycle(tiny(base, torch.float32, seed=seed, **changes), config))
    with torch.no_grad():
        for layer in model.moe_layers().values():
            layer.router.weight.normal_()
            for parameter in (*layer.experts.parameters(), *_shared(layer)):
                parameter.normal_(std=0.2)
            if hasattr(layer.router, "expert_bias"):
                layer.router.expert_bias.normal_(std=0.2)
    return model.eval()


def _shared(layer: Any) -> list[torch.nn.Parameter]:
    return [] if layer.shared_experts is None else list(layer.shared_experts.parameters())

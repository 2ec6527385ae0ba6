"""The model families that moectl compares itself with: where transformers keeps their parts.

Data only; transformers is imported when a class is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from moectl.errors import unknown


@dataclass(frozen=True)
class Family:
    """One family of transformers.

    Attributes:
        name: moectl's; ``model_type`` is transformers'.
        prefix: of its class names.
        moe_class, router_class: what the two are called after the prefix.
        gate: attribute of the router in an MoE block.
        shared, shared_gate: attributes of the always-on expert and of its sigmoid gate; None where it has none.
        qk_norm: whether its attention norms queries and keys, by modules ``q_norm`` and ``k_norm``.
        buffers: names (their last parts) of what the checkpoint holds and no optimizer moves.
        without: components that moectl does not compare, and why.
    """

    name: str
    model_type: str
    prefix: str
    moe_class: str = "SparseMoeBlock"
    router_class: str = "TopKRouter"
    gate: str = "gate"
    shared: str | None = None
    shared_gate: str | None = None
    qk_norm: bool = False
    buffers: tuple[str, ...] = ()
    without: Mapping[str, str] = field(default_factory=dict)

    def module(self) -> ModuleType:
        """transformers' ``modeling_*.py`` of this family.

        Raises:
            ImportError: transformers is missing, broken or has no such family.
        """
        return importlib.import_module(f"transformers.models.{self.model_type}.modeling_{self.model_type}")

    def class_of(self, level: str) -> type[Any]:
        """The class that computes ``level``: model, layer, moe, attention, router or rotary."""
        names = {
            "model": "ForCausalLM",
            "layer": "DecoderLayer",
            "attention": "Attention",
            "moe": self.moe_class,
            "router": self.router_class,
            "rotary": "RotaryEmbedding",
        }
        found: type[Any] = getattr(self.module(), self.prefix + names[level])
        return found


_LATENT = "its attention compresses keys and values into latents, which moectl's formula does not describe"
_SINKS = "its attention has sinks and alternating sliding windows, which moectl's formula does not describe"

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("qwen3", "qwen3_moe", "Qwen3Moe", qk_norm=True),
        Family("mixtral", "mixtral", "Mixtral"),
        Family("olmoe", "olmoe", "Olmoe", qk_norm=True),
        Family("qwen2_moe", "qwen2_moe", "Qwen2Moe", shared="shared_expert", shared_gate="shared_expert_gate"),
        Family(
            "deepseek_v3",
            "deepseek_v3",
            "DeepseekV3",
            moe_class="MoE",
            router_class="TopkRouter",
            shared="shared_experts",
            buffers=("e_score_correction_bias",),
            without=dict.fromkeys(("attention", "layer", "model"), _LATENT),
        ),
        Family(
            "gpt_oss",
            "gpt_oss",
            "GptOss",
            moe_class="MLP",
            gate="router",
            without=dict.fromkeys(("attention", "layer", "model"), _SINKS),
        ),
    )
}


def family(name: str) -> Family:
    """The family of moectl's or transformers' name.

    Raises:
        ConfigError: there is none of that name; the nearest is named.
    """
    for known in FAMILIES.values():
        if name in (known.name, known.model_type):
            return known
    raise unknown("model family", name, FAMILIES)

"""What sets the six families apart, one entry each: where the formula's fields come from, and which are fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moectl.parity.case import Level

_ALL: tuple[Level, ...] = ("model", "layer", "moe", "attention", "router")
_SPARSE: tuple[Level, ...] = ("moe", "router")


@dataclass(frozen=True)
class FamilyArithmetic:
    """How a config of this family is read as a :class:`~moectl.parity.formula.Formula`.

    Fields of the formula's parts are written ``attention.bias``, the formula's own stand bare.

    Attributes:
        name: as users type it.
        model_type: in ``config.json``.
        source: the paper or model card that defines it; the code is transformers' ``modeling_<model_type>.py``.
        levels: components that the reference computes. Attention that it does not model (latent attention,
            attention sinks) leaves the router and the MoE block.
        fields: of the formula, and the config key that holds each.
        fixed: fields that every model of the family shares, where they are not the formula's default.
        defaults: what transformers takes an absent key to mean. A key in ``fields`` that is not here is required.
        aliases: other spellings of a key, and the spelling used here.
        dense_layers: which layers have a dense MLP: as ``mlp_only_layers`` and ``decoder_sparse_step`` say, the
            first ``first_k_dense_replace``, or none.
    """

    name: str
    model_type: str
    source: str
    levels: tuple[Level, ...]
    fields: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    dense_layers: Literal["sparse_step", "first_k", "none"] = "none"


_DECODER = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "tie_embeddings": "tie_word_embeddings",
    "norm.eps": "rms_norm_eps",
    "attention.num_heads": "num_attention_heads",
    "attention.num_kv_heads": "num_key_value_heads",
    "attention.head_dim": "head_dim",
    "attention.rope_theta": "rope_theta",
    "router.num_experts": "num_experts",
    "router.top_k": "num_experts_per_tok",
    "experts.hidden_size": "hidden_size",
    "experts.activation": "hidden_act",
    "balance_coef": "router_aux_loss_coef",
    "balance_in_objective": "output_router_logits",
}
_DECODER_DEFAULTS = {
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "head_dim": None,  # hidden_size // num_attention_heads
    "num_key_value_heads": None,  # num_attention_heads
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
}
_QWEN_DENSE = {"dense_intermediate_size": "intermediate_size", "experts.intermediate_size": "moe_intermediate_size"}

FAMILIES: Mapping[str, FamilyArithmetic] = {
    "qwen3": FamilyArithmetic(
        name="qwen3",
        model_type="qwen3_moe",
        source="Qwen3, arXiv:2505.09388",
        levels=_ALL,
        fields=_DECODER
        | _QWEN_DENSE
        | {
            "router.norm_topk": "norm_topk_prob",
            "attention.bias": "attention_bias",
            "attention.out_bias": "attention_bias",
        },
        fixed={"attention.qk_norm": "head"},
        defaults=_DECODER_DEFAULTS | {"norm_topk_prob": False, "attention_bias": False},
        aliases={"num_local_experts": "num_experts"},
        dense_layers="sparse_step",
    ),
    "mixtral": FamilyArithmetic(
        name="mixtral",
        model_type="mixtral",
        source="Mixtral of Experts, arXiv:2401.04088",
        levels=_ALL,
        fields=_DECODER | {"experts.intermediate_size": "intermediate_size"},
        fixed={"attention.qk_norm": "none", "router.norm_topk": True},
        defaults=_DECODER_DEFAULTS | {"rope_theta": 1_000_000.0, "rms_norm_eps": 1e-5, "num_key_value_heads": 8},
        aliases={"num_local_experts": "num_experts"},
    ),
    "olmoe": FamilyArithmetic(
        name="olmoe",
        model_type="olmoe",
        source="OLMoE, arXiv:2409.02060",
        levels=_ALL,
        fields=_DECODER
        | {
            "experts.intermediate_size": "intermediate_size",
            "router.norm_topk": "norm_topk_prob",
            "attention.bias": "attention_bias",
            "attention.out_bias": "attention_bias",
            "attention.clip_qkv": "clip_qkv",
        },
        fixed={"attention.qk_norm": "flat"},
        defaults=_DECODER_DEFAULTS
        | {
            "norm_topk_prob": False,
            "attention_bias": False,
            "clip_qkv": None,
            "rms_norm_eps": 1e-5,
            "router_aux_loss_coef": 0.01,
        },
        aliases={"num_local_experts": "num_experts"},
    ),
    "qwen2_moe": FamilyArithmetic(
        name="qwen2_moe",
        model_type="qwen2_moe",
        source="Qwen1.5-MoE and Qwen2, arXiv:2407.10671",
        levels=_ALL,
        fields=_DECODER
        | _QWEN_DENSE
        | {
            "router.norm_topk": "norm_topk_prob",
            "attention.bias": "qkv_bias",
            "experts.shared_intermediate_size": "shared_expert_intermediate_size",
        },
        fixed={"attention.qk_norm": "none", "experts.shared": "sigmoid_gated"},
        defaults=_DECODER_DEFAULTS | {"norm_topk_prob": False, "qkv_bias": True, "num_key_value_heads": 16},
        dense_layers="sparse_step",
    ),
    "deepseek_v3": FamilyArithmetic(
        name="deepseek_v3",
        model_type="deepseek_v3",
        source="DeepSeek-V3, arXiv:2412.19437",
        levels=_SPARSE,
        fields={key: value for key, value in _DECODER.items() if not key.startswith(("attention.rope", "balance"))}
        | _QWEN_DENSE
        | {
            "router.norm_topk": "norm_topk_prob",
            "router.groups": "n_group",
            "router.groups_kept": "topk_group",
            "router.scaling": "routed_scaling_factor",
        },
        fixed={
            "attention.qk_norm": "none",
            "router.score": "sigmoid",
            "router.choice_bias": True,
            "router.norm_epsilon": 1e-20,
            "router.dtype": "float32",
            "experts.shared": "added",
            "balance_coef": 0.0,
        },
        defaults=_DECODER_DEFAULTS | {"norm_topk_prob": True},
        aliases={"n_routed_experts": "num_experts", "num_local_experts": "num_experts"},
        dense_layers="first_k",
    ),
    "gpt_oss": FamilyArithmetic(
        name="gpt_oss",
        model_type="gpt_oss",
        source="gpt-oss model card, arXiv:2508.10925",
        levels=_SPARSE,
        fields={key: value for key, value in _DECODER.items() if key != "experts.activation"}
        | {
            "experts.intermediate_size": "intermediate_size",
            "experts.alpha": "swiglu_alpha",
            "experts.limit": "swiglu_limit",
        },
        fixed={
            "attention.qk_norm": "none",
            "router.score": "softmax_chosen",
            "router.norm_topk": False,
            "router.bias": True,
            "experts.layout": "in_out",
            "experts.gate_up": "interleaved",
            "experts.glu": "clamped",
            "experts.bias": True,
            "router_name": "router",
        },
        defaults=_DECODER_DEFAULTS
        | {"rope_theta": 150_000.0, "rms_norm_eps": 1e-5, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        aliases={"num_local_experts": "num_experts"},
    ),
}

#: A ``model_type`` that users may type in place of the name.
ALIASES: Mapping[str, str] = {family.model_type: name for name, family in FAMILIES.items() if family.model_type != name}

"""``config.json`` of an exported checkpoint: of a plain family of transformers, or of the folder with its own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from moectl.hf.export_facts import Facts
from moectl.hf.targets import EMPTY_SHARED, Target

#: The modelling file of the folder with its own code, and what is imported from it.
MODELING = "modeling_experts"
OWN = "own"
_CLASSES = {"gpt2": "GPT2", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_COMMON = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings",
    "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
_NOT_OURS = ("_name_or_path", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version")


def own_class(base: str) -> str:
    """The class of :mod:`moectl.hf.modeling_experts` for a dense ``model_type``."""
    return f"{_CLASSES[base]}ExpertsForCausalLM"


def own_config(facts: Facts, dtype: torch.dtype) -> dict[str, Any]:
    """The dense model's own config, with ``moe`` and where its code is."""
    router, made = facts.router, own_class(facts.base)
    return {
        **{key: value for key, value in facts.config.items() if key not in _NOT_OURS},
        "model_type": f"{facts.base}_experts",
        "architectures": [made],
        "auto_map": {
            "AutoConfig": f"{MODELING}.{_CLASSES[facts.base]}ExpertsConfig",
            "AutoModelForCausalLM": f"{MODELING}.{made}",
        },
        "moe": {
            "layers": list(facts.moe_layers),
            "num_experts": facts.num_experts,
            "top_k": router.top_k,
            "intermediate_size": facts.expert_size,
            "shared_size": facts.shared_size,
            "score": router.score,
            "weights": router.weights,
            "scaling": router.scaling,
            "clamp": router.clamp,
            "groups": list(router.groups),
            "biased": router.biased,
            "router": router.name,
        },
        "num_experts_per_tok": router.top_k,
        **_written_by(dtype),
    }


def plain_config(target: Target, facts: Facts, dtype: torch.dtype) -> dict[str, Any]:
    """The config of one of :data:`moectl.hf.targets.TARGETS`, every option that it has a say in written out."""
    config, router = facts.config, facts.router
    rope = dict(config.get("rope_parameters") or {"rope_type": "default", "rope_theta": 10_000.0})
    heads = int(config["num_attention_heads"])
    plain = {
        **{key: config[key] for key in _COMMON if key in config},
        "model_type": target.name,
        "architectures": [target.architecture],
        "num_key_value_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or facts.hidden_size // heads),
        "rope_parameters": rope,
        **_older_rope(rope),
        "num_experts_per_tok": router.top_k,
        target.keys["experts"]: facts.num_experts,
        "output_router_logits": False,
        **_OF[target.name](facts),
        **_written_by(dtype),
    }
    if "intermediate_size" not in plain:
        plain["intermediate_size"] = facts.dense_size
    plain[target.keys["expert_size"]] = facts.expert_size
    return plain


def _mixtral(facts: Facts) -> dict[str, Any]:
    return {"sliding_window": facts.window, "router_jitter_noise": 0.0}


def _qwen3(facts: Facts) -> dict[str, Any]:
    return {
        **_chosen_layers(facts),
        "norm_topk_prob": facts.router.weights == "renormalised",
        "attention_bias": facts.qkv_bias,
        "use_sliding_window": facts.window is not None,
        "sliding_window": facts.window,
    }


def _qwen2(facts: Facts) -> dict[str, Any]:
    sliding = set(facts.sliding)
    kinds = ["sliding_attention" if number in sliding else "full_attention" for number in range(facts.layers)]
    return {
        **_chosen_layers(facts),
        "norm_topk_prob": facts.router.weights == "renormalised",
        "qkv_bias": facts.qkv_bias,
        "shared_expert_intermediate_size": facts.shared_size or EMPTY_SHARED,
        "use_sliding_window": facts.window is not None,
        "sliding_window": facts.window,
        "max_window_layers": facts.layers,
        "layer_types": kinds,
    }


def _glm4(facts: Facts) -> dict[str, Any]:
    rope = dict(facts.config.get("rope_parameters") or {"rope_type": "default", "rope_theta": 10_000.0})
    return {
        "norm_topk_prob": facts.router.weights == "renormalised",
        "routed_scaling_factor": facts.router.scaling,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": facts.shared_size // facts.expert_size,
        "first_k_dense_replace": facts.moe_layers[0],
        "attention_bias": facts.qkv_bias,
        "use_qk_norm": facts.qk_norm,
        "num_nextn_predict_layers": 0,
        "rope_parameters": {**rope, "partial_rotary_factor": 1.0},
        "partial_rotary_factor": 1.0,
    }


_OF = {"mixtral": _mixtral, "qwen3_moe": _qwen3, "qwen2_moe": _qwen2, "glm4_moe": _glm4}


def _chosen_layers(facts: Facts) -> dict[str, Any]:
    dense = sorted(set(range(facts.layers)) - set(facts.moe_layers))
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


def _older_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The same for releases before 5, which read these keys, and would take a default where they are missing."""
    older: dict[str, Any] = {"rope_theta": rope.get("rope_theta", 10_000.0)}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return older


def _written_by(dtype: torch.dtype) -> dict[str, Any]:
    return {"dtype": str(dtype).removeprefix("torch."), "transformers_version": transformers.__version__}

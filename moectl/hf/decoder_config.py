"""Qwen3-MoE's config and weight names as those of our own decoder, and back.

The decoder computes what Qwen3-MoE does with the options that published models use; the others are
refused here by the key that asks for them, so that nothing is compared, trained or exported as what it is not.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from moectl.config.schema import MoEConfig
from moectl.errors import ConfigError
from moectl.hf.build import config_object
from moectl.hf.family import FAMILIES
from moectl.models.config import DecoderConfig

MODEL_TYPE = "qwen3_moe"

#: Keys that must have one value: what the decoder does, where it has no choice.
_FIXED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "hidden_act": (lambda value: value == "silu", "its experts and MLPs are SwiGLU ('silu')"),
    "attention_bias": (lambda value: not value, "its projections have no biases"),
    "attention_dropout": (lambda value: not value, "it has no dropout"),
    "use_sliding_window": (lambda value: not value, "its attention reaches back to the first token"),
    "quantization_config": (lambda value: value is None, "its weights are floating-point numbers"),
}


_SIZES = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads"
    " num_key_value_heads num_experts_per_tok decoder_sparse_step"
).split()


def decoder_config(config: Mapping[str, Any], *, backend: str = "grouped") -> DecoderConfig:
    """The shape of a decoder that computes what ``config``, a Qwen3-MoE's ``config.json``, describes.

    Keys that are not there have transformers' defaults. The router is ``topk`` without noise, the layer
    dropless; ``router_aux_loss_coef`` and the other keys about training are not the decoder's.

    Raises:
        ConfigError: another family; an option that the decoder has not, named by its key; sizes that do not fit.
    """
    full = complete(config)
    layers = moe_layers(full)
    moe = None
    if layers:
        moe = MoEConfig(
            router={
                "name": "topk",
                "top_k": full.num_experts_per_tok,
                "norm_topk_prob": full.norm_topk_prob,
                "noise_std": 0.0,
            },
            num_experts=full.num_experts,
            expert_intermediate_size=full.moe_intermediate_size,
            layers=",".join(map(str, layers)),
            backend=backend,
        )
    return DecoderConfig(
        vocab_size=full.vocab_size,
        hidden_size=full.hidden_size,
        intermediate_size=full.intermediate_size,
        num_layers=full.num_hidden_layers,
        num_heads=full.num_attention_heads,
        num_kv_heads=full.num_key_value_heads,
        head_dim=getattr(full, "head_dim", None) or full.hidden_size // full.num_attention_heads,
        rope_theta=_rope_theta(full),
        rms_norm_eps=full.rms_norm_eps,
        tie_word_embeddings=full.tie_word_embeddings,
        eos_token_id=_eos(config),
        moe_layers=layers,
        moe=moe,
    )


def complete(config: Mapping[str, Any]) -> Any:
    """``config`` as transformers' own object, with its defaults, checked for what the decoder cannot express.

    But for its special tokens, which the object is made without.

    Raises:
        ConfigError: as :func:`decoder_config`.
    """
    given = config.get("model_type")
    if given != MODEL_TYPE:
        raise ConfigError(
            f"model_type is {given!r}: the decoder is a {MODEL_TYPE}", "Other families are compared part by part."
        )
    for key, (holds, why) in _FIXED.items():
        if key in config and not holds(config[key]):
            raise _cannot(key, config[key], why)
    full = config_object(FAMILIES["qwen3"], copy.deepcopy(dict(config)))  # transformers writes into what it is given
    for key in _SIZES:
        if getattr(full, key) < 1:
            raise ConfigError(f"{key} is {getattr(full, key)}, but must be at least 1")
    if full.num_experts and full.num_experts_per_tok > full.num_experts:
        raise ConfigError(f"num_experts_per_tok is {full.num_experts_per_tok} of {full.num_experts} experts")
    return full


def moe_layers(config: Any) -> tuple[int, ...]:
    """Which layers have experts: every ``decoder_sparse_step``-th, the last of each, but those of ``mlp_only_layers``.

    Source: ``Qwen3MoeDecoderLayer`` in transformers.
    """
    if not config.num_experts:
        return ()
    dense, step = set(config.mlp_only_layers or ()), config.decoder_sparse_step
    return tuple(n for n in range(config.num_hidden_layers) if n not in dense and (n + 1) % step == 0)


def decoder_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under Hugging Face's names, of the whole model or of a part, under the decoder's own."""
    return {decoder_name(name): tensor for name, tensor in weights.items()}


def decoder_name(name: str) -> str:
    """``model.layers.3.mlp.gate.weight`` is the decoder's ``layers.3.mlp.router.weight``; the rest is alike."""
    return _GATE.sub(r"\1router.weight", name.removeprefix("model."))


def canonical_name(name: str) -> str:
    """The decoder's name of a parameter as Hugging Face's causal language model has it."""
    name = _ROUTER.sub(r"\1gate.weight", name)
    return f"model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name


# A whole model's, a layer's or an MoE block's own; `mlp.gate_proj` is another.
_GATE = re.compile(r"(^|\bmlp\.)gate\.weight$")
_ROUTER = re.compile(r"(^|\bmlp\.)router\.weight$")


def _rope_theta(full: Any) -> float:
    rope = full.rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        raise _cannot("rope_parameters.rope_type", rope["rope_type"], "its rotary frequencies are not rescaled")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _cannot("rope_parameters.partial_rotary_factor", rope["partial_rotary_factor"], "it rotates whole heads")
    return float(rope.get("rope_theta", 10_000.0))


def _eos(config: Mapping[str, Any]) -> int:
    """The token that ends generation; -1, which no token is, where the config has none."""
    eos = config.get("eos_token_id")
    if isinstance(eos, (list, tuple)):
        if len(eos) > 1:
            raise _cannot("eos_token_id", list(eos), "its generation ends at one token")
        eos = eos[0] if eos else None
    return -1 if eos is None else int(eos)


def _cannot(key: str, value: object, why: str) -> ConfigError:
    return ConfigError(f"{key} is {value!r}, which the decoder cannot express: {why}")

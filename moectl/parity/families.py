"""The six families as data: their configs, the formula that a config means, and the weights it asks for.

Read :class:`FamilyArithmetic` and one entry of :data:`FAMILIES` to see what sets a family apart. Configs are
dictionaries in the form of ``config.json``; keys that are absent mean what transformers takes them to mean.

Shape legend of weights: D hidden, H heads, G key/value heads, P head dimension, E experts, F expert
intermediate, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor

from moectl.errors import unknown
from moectl.parity.case import Level, Unsupported
from moectl.parity.family_configs import PUBLISHED, TINY
from moectl.parity.family_data import ALIASES, FAMILIES, FamilyArithmetic
from moectl.parity.formula import Formula
from moectl.parity.from_config import formula_from

__all__ = [
    "FAMILIES",
    "FamilyArithmetic",
    "config_of",
    "family_name",
    "formula_of",
    "levels_of",
    "random_weights",
    "weight_shapes",
]


def family_name(text: str) -> str:
    """The family's name for a name or a ``model_type`` (``qwen3`` and ``qwen3_moe`` are one), in any case.

    Raises:
        ConfigError: there is no such family; the nearest is named.
    """
    name = text.lower().replace("-", "_")
    name = ALIASES.get(name, name)
    if name not in FAMILIES:
        raise unknown("family", text, [*FAMILIES, *ALIASES])
    return name


def levels_of(family: str) -> tuple[Level, ...]:
    """The components of this family that the reference computes, the largest first."""
    return FAMILIES[family_name(family)].levels


def config_of(family: str, size: Literal["tiny", "published"]) -> dict[str, Any]:
    """A config in the form of ``config.json``: small enough for every test, or the published model's own.

    Raises:
        ConfigError: an unknown family or size.
    """
    sizes: Mapping[str, Mapping[str, Mapping[str, Any]]] = {"tiny": TINY, "published": PUBLISHED}
    if size not in sizes:
        raise unknown("size", size, sizes)
    name = family_name(family)
    return {"model_type": FAMILIES[name].model_type, **deepcopy(dict(sizes[size][name]))}


def formula_of(family: str, config: Mapping[str, Any]) -> Formula:
    """What a model of this family with this config computes.

    Raises:
        ConfigError: a key is missing, impossible, or changes the arithmetic in a way that is not modelled
            (sliding windows in use, scaled rotary frequencies, dropout, ...). The key is named.
    """
    return formula_from(FAMILIES[family_name(family)], config)


def require_level(formula: Formula, level: Level) -> None:
    """Raise :class:`Unsupported` where the reference does not compute this component of the family."""
    if level not in FAMILIES[formula.family].levels:
        levels = " and ".join(FAMILIES[formula.family].levels)
        raise Unsupported(f"the attention of {formula.family} is not modelled: {levels} are compared")


def weight_shapes(formula: Formula, level: Level, layer: int = 0) -> dict[str, tuple[int, ...]]:
    """Canonical name to shape, in the model's order, of a component's parameters and persistent buffers.

    Args:
        layer: which one, at level ``layer``: with experts or dense.

    Raises:
        Unsupported: the family's attention is not modelled, and this component has it.
    """
    require_level(formula, level)
    if level == "attention":
        return _attention_shapes(formula)
    if level == "router":
        return _router_shapes(formula)
    if level == "moe":
        return _moe_shapes(formula)
    if level == "layer":
        return _layer_shapes(formula, layer)
    size = formula.experts.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (formula.vocab_size, size)}
    for number in range(formula.num_layers):
        shapes |= _under(f"model.layers.{number}", _layer_shapes(formula, number))
    shapes["model.norm.weight"] = (size,)
    if not formula.tie_embeddings:
        shapes["lm_head.weight"] = (formula.vocab_size, size)
    if formula.head_bias:
        shapes["lm_head.bias"] = (formula.vocab_size,)
    return shapes


def _layer_shapes(formula: Formula, layer: int) -> dict[str, tuple[int, ...]]:
    size = formula.experts.hidden_size
    dense = _gated_shapes(formula.dense_intermediate_size, size)
    return (
        _under("self_attn", _attention_shapes(formula))
        | _under("mlp", _moe_shapes(formula) if layer in formula.moe_layers else dense)
        | {"input_layernorm.weight": (size,), "post_attention_layernorm.weight": (size,)}
    )


def _attention_shapes(formula: Formula) -> dict[str, tuple[int, ...]]:
    attention, size = formula.attention, formula.experts.hidden_size
    queries, keys = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    for role, width in (("q", queries), ("k", keys), ("v", keys)):
        shapes[f"{role}_proj.weight"] = (width, size)
        if attention.bias:
            shapes[f"{role}_proj.bias"] = (width,)
    shapes["o_proj.weight"] = (size, queries)
    if attention.out_bias:
        shapes["o_proj.bias"] = (size,)
    if attention.qk_norm != "none":
        flat = attention.qk_norm == "flat"
        shapes["q_norm.weight"] = (queries if flat else attention.head_dim,)
        shapes["k_norm.weight"] = (keys if flat else attention.head_dim,)
    return shapes


def _router_shapes(formula: Formula) -> dict[str, tuple[int, ...]]:
    router = formula.router
    shapes: dict[str, tuple[int, ...]] = {"weight": (router.num_experts, formula.experts.hidden_size)}
    if router.bias:
        shapes["bias"] = (router.num_experts,)
    if router.choice_bias:
        shapes["e_score_correction_bias"] = (router.num_experts,)
    return shapes


def _moe_shapes(formula: Formula) -> dict[str, tuple[int, ...]]:
    experts, num_experts = formula.experts, formula.router.num_experts
    size, inner = experts.hidden_size, experts.intermediate_size
    turned = experts.layout == "in_out"
    shapes = _under(formula.router_name, _router_shapes(formula))
    shapes["experts.gate_up_proj"] = (num_experts, size, 2 * inner) if turned else (num_experts, 2 * inner, size)
    shapes["experts.down_proj"] = (num_experts, inner, size) if turned else (num_experts, size, inner)
    if experts.bias:
        shapes["experts.gate_up_proj_bias"] = (num_experts, 2 * inner)
        shapes["experts.down_proj_bias"] = (num_experts, size)
    if experts.shared == "added":
        shapes |= _under("shared_experts", _gated_shapes(experts.shared_intermediate_size, size))
    if experts.shared == "sigmoid_gated":
        shapes |= _under("shared_expert", _gated_shapes(experts.shared_intermediate_size, size))
        shapes["shared_expert_gate.weight"] = (1, size)
    return shapes


def _gated_shapes(inner: int, size: int) -> dict[str, tuple[int, ...]]:
    return {"gate_proj.weight": (inner, size), "up_proj.weight": (inner, size), "down_proj.weight": (size, inner)}


def _under(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def random_weights(
    formula: Formula, level: Level, *, seed: int, dtype: torch.dtype, layer: int = 0
) -> dict[str, Tensor]:
    """Weights in which every part matters, for :func:`weight_shapes`; equal for equal arguments.

    Linear maps keep the scale of what they are given (std 1/√fan-in), embeddings have std 1, norm weights are
    1 + 0.2·normal, biases 0.2·normal: a weight that is not applied, or applied to the wrong thing, shows.
    Router logits have a standard deviation of about 1.5 on normed input: neither flat nor saturated.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.float64 if dtype == torch.float64 else torch.float32
    weights: dict[str, Tensor] = {}
    for name, shape in weight_shapes(formula, level, layer).items():
        values = torch.empty(shape, dtype=drawn).normal_(generator=generator)
        weights[name] = _scaled_(values, name, formula, level).to(dtype)
    return weights


def _scaled_(values: Tensor, name: str, formula: Formula, level: Level) -> Tensor:
    if name.endswith("norm.weight"):
        return values.mul_(0.2).add_(1.0)
    if name.endswith("bias"):
        return values.mul_(0.2)
    if name == "model.embed_tokens.weight":
        return values
    if name.endswith(f"{formula.router_name}.weight") or level == "router":
        return values.mul_(1.5 / math.sqrt(formula.experts.hidden_size))
    turned = values.dim() == 3 and formula.experts.layout == "in_out"
    values.div_(math.sqrt(values.shape[1] if turned else values.shape[-1]))
    if formula.experts.glu == "clamped" and name.endswith("gate_up_proj"):
        values.mul_(formula.experts.limit / 2)  # so that some pre-activations reach the clamp
    return values

"""A ``config.json`` read as a formula, and refused where it asks for arithmetic that is not modelled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields as fields_of
from typing import Any

from moectl.errors import ConfigError
from moectl.parity.family_data import FamilyArithmetic
from moectl.parity.formula import AttentionFormula, ExpertsFormula, Formula, NormFormula, RouterFormula

_PARTS = {"attention": AttentionFormula, "router": RouterFormula, "experts": ExpertsFormula, "norm": NormFormula}
#: transformers' names of the gate's activation, and ours.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "sigmoid": "sigmoid",
}
#: Keys that must have one of these values, whatever the level: another one changes the arithmetic, or makes it random.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None, {}),
    "router_jitter_noise": (None, 0, 0.0),
    "scoring_func": (None, "sigmoid"),
    "topk_method": (None, "noaux_tc"),
    "moe_layer_freq": (None, 1),
    "mlp_bias": (None, False),
}
#: The same for what only attention reads.
_ONLY_ATTENTION: Mapping[str, tuple[Any, ...]] = {
    "attention_dropout": (None, 0, 0.0),
    "partial_rotary_factor": (None, 1, 1.0),
}
_COUNTS = {
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_experts_per_tok",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "n_group",
    "topk_group",
}
_NUMBERS = {
    "rms_norm_eps",
    "rope_theta",
    "router_aux_loss_coef",
    "routed_scaling_factor",
    "swiglu_alpha",
    "swiglu_limit",
}
_SWITCHES = {"tie_word_embeddings", "norm_topk_prob", "attention_bias", "qkv_bias", "output_router_logits"}


def formula_from(family: FamilyArithmetic, config: Mapping[str, Any]) -> Formula:
    """The formula of a config; see :func:`moectl.parity.families.formula_of`."""
    given = _canonical(family, config)
    _refuse(family, given)
    values = {field: _value(family, given, key) for field, key in family.fields.items()} | dict(family.fixed)
    if family.name == "deepseek_v3":
        values["experts.shared_intermediate_size"] = _shared_size(given)
    if "experts.activation" in values:
        values["experts.activation"] = _ACTIVATIONS[values["experts.activation"]]
    values["moe_layers"] = _moe_layers(family, given, int(values["num_layers"]))
    parts = {name: part(**_of_part(values, name)) for name, part in _PARTS.items()}
    own = {field.name for field in fields_of(Formula)} & values.keys()
    formula = Formula(family=family.name, **parts, **{name: values[name] for name in own})
    _check_shape(family, formula)
    return formula


def _of_part(values: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {field.split(".")[1]: value for field, value in values.items() if field.startswith(f"{part}.")}


def _canonical(family: FamilyArithmetic, config: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults filled in, aliases replaced, rotary settings of both forms in ``rope_theta`` and ``rope_type``.

    Since transformers 5 they are in ``rope_parameters``; before, in ``rope_theta`` and ``rope_scaling``.
    """
    model_type = config.get("model_type", family.model_type)
    if model_type != family.model_type:
        raise ConfigError(
            f"the config's model_type is '{model_type}', not '{family.model_type}'",
            f"Compare it as its own family, or give a config of {family.name}.",
        )
    given = dict(config)
    for alias, key in family.aliases.items():
        if alias in given:
            value = given.pop(alias)
            if given.setdefault(key, value) != value:
                raise ConfigError(
                    f"config keys '{alias}' and '{key}' disagree: {value!r} and {given[key]!r}", "Keep one."
                )
    rope = given.pop("rope_parameters", None) or {}
    scaling = given.pop("rope_scaling", None) or {}
    if not isinstance(rope, Mapping) or not isinstance(scaling, Mapping):
        raise ConfigError("config keys 'rope_parameters' and 'rope_scaling' hold a mapping or null", "Mend the config.")
    given |= {key: value for key, value in rope.items() if key in ("rope_theta", "partial_rotary_factor")}
    given["rope_type"] = {**scaling, **rope}.get("rope_type", {**scaling, **rope}.get("type", "default"))
    return {**family.defaults, **given}


def _refuse(family: FamilyArithmetic, given: Mapping[str, Any]) -> None:
    attention = "attention" in family.levels
    for key, allowed in {**_ONLY, **(_ONLY_ATTENTION if attention else {})}.items():
        if given.get(key) not in allowed:
            raise _unsupported(family, key, given[key], f"Only {allowed[-1]!r} is.")
    if "experts.activation" in family.fields and given["hidden_act"] not in _ACTIVATIONS:
        raise _unsupported(family, "hidden_act", given["hidden_act"], f"Known: {', '.join(_ACTIVATIONS)}.")
    if not attention:
        return
    if given["rope_type"] != "default":
        raise _unsupported(family, "rope_type", given["rope_type"], "Only unscaled rotary frequencies ('default') are.")
    if "sliding_attention" in (given.get("layer_types") or ()):
        raise _unsupported(family, "layer_types", "sliding_attention", "Only 'full_attention' is.")
    window, longest = given.get("sliding_window"), given.get("max_position_embeddings")
    used = given.get("use_sliding_window", "use_sliding_window" not in given and family.name == "mixtral")
    if used and window is not None and (longest is None or window < longest):
        raise _unsupported(family, "sliding_window", window, "Give null, or at least max_position_embeddings.")


def _unsupported(family: FamilyArithmetic, key: str, value: Any, hint: str) -> ConfigError:
    return ConfigError(f"config key '{key}': {value!r} is not supported for {family.name}", hint)


def _value(family: FamilyArithmetic, given: Mapping[str, Any], key: str) -> Any:
    value = given.get(key)
    if value is None and key == "head_dim":
        return _value(family, given, "hidden_size") // _value(family, given, "num_attention_heads")
    if value is None and key == "num_key_value_heads":
        return _value(family, given, "num_attention_heads")
    if key not in given or (value is None and key != "clip_qkv"):
        raise ConfigError(f"config key '{key}' is missing for {family.name}", "Add it: it has no default.")
    if key in _COUNTS and not (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        raise ConfigError(f"config key '{key}' is a whole number above 0, not {value!r}", "Mend the config.")
    if key in _NUMBERS and not (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0):
        raise ConfigError(f"config key '{key}' is a number of at least 0, not {value!r}", "Mend the config.")
    if key in _SWITCHES and not isinstance(value, bool):
        raise ConfigError(f"config key '{key}' is true or false, not {value!r}", "Mend the config.")
    return float(value) if isinstance(value, int) and key in _NUMBERS else value


def _moe_layers(family: FamilyArithmetic, given: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    every = range(num_layers)
    if family.dense_layers == "first_k":
        first = given.get("first_k_dense_replace", 3) or 0
        return tuple(layer for layer in every if layer >= first)
    if family.dense_layers == "none":
        return tuple(every)
    dense, step = given.get("mlp_only_layers") or (), given.get("decoder_sparse_step", 1)
    if not isinstance(step, int) or step < 1:
        raise ConfigError(
            f"config key 'decoder_sparse_step' is a whole number above 0, not {step!r}", "Mend the config."
        )
    return tuple(layer for layer in every if layer not in dense and (layer + 1) % step == 0)


def _shared_size(given: Mapping[str, Any]) -> int:
    shared = given.get("n_shared_experts", 1)
    if not isinstance(shared, int) or shared < 1:
        raise ConfigError(
            f"config key 'n_shared_experts' is a whole number above 0, not {shared!r}", "Mend the config."
        )
    return int(shared * given["moe_intermediate_size"])


def _check_shape(family: FamilyArithmetic, formula: Formula) -> None:
    router, attention = formula.router, formula.attention
    problem = None
    if router.top_k > router.num_experts:
        problem = f"'num_experts_per_tok' ({router.top_k}) exceeds the number of experts ({router.num_experts})"
    elif attention.num_heads % attention.num_kv_heads:
        problem = f"'num_attention_heads' ({attention.num_heads}) is no multiple of 'num_key_value_heads'"
    elif router.num_experts % router.groups or router.groups_kept > router.groups:
        problem = f"'n_group' ({router.groups}) does not divide the experts, or 'topk_group' exceeds it"
    elif router.top_k > router.groups_kept * (router.num_experts // router.groups):
        problem = f"'num_experts_per_tok' ({router.top_k}) exceeds the experts of 'topk_group' groups"
    elif "attention" in family.levels and attention.head_dim % 2:
        problem = f"'head_dim' ({attention.head_dim}) is odd, which rotary positions cannot split"
    if problem:
        raise ConfigError(f"config key {problem}", "Mend the config.")

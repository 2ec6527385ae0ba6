"""A family's config under all the names that people give its settings.

A candidate's constructor reads ``config.n_embd``, ``cfg["emb_dim"]`` or takes ``d_model=``: all are ``hidden_size``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from moectl.parity.case import Level
from moectl.parity.formula import Formula

#: Setting -> its other names, in their plain form: lower case.
SYNONYMS: Mapping[str, str] = {
    "hidden_size": "dim d_model embed_dim n_embd emb_dim model_dim n_embed embedding_dim width d input_dim in_dim "
    "d_in embd_dim model_size hidden_dimension embed_size n_dim embedding_size hidden_states_size dmodel in_features",
    "moe_intermediate_size": "ffn_dim d_ff hidden_dim ffn_hidden_size moe_ffn_hidden_size inter_dim moe_inter_dim "
    "expert_dim expert_hidden ff_dim mlp_dim d_ffn dff d_expert expert_hidden_size inner_dim f d_hidden ffn_size "
    "expert_size expert_intermediate_size ffn_hidden_dim moe_hidden_dim expert_hidden_dim ffn_intermediate_size "
    "intermediate_dim moe_intermediate_dim expert_dim_hidden moe_dim expert_inter_dim n_inner feedforward_dim",
    "num_experts": "n_experts e num_local_experts n_expert n_routed_experts experts moe_num_experts "
    "num_routed_experts n_exp num_moe_experts expert_count nexperts n_moe_experts",
    "num_experts_per_tok": "top_k k topk n_activated_experts num_experts_per_token experts_per_token "
    "n_expert_per_token num_active_experts num_activated_experts n_experts_per_tok num_selected moe_top_k "
    "active_experts experts_per_tok n_active_experts expert_top_k num_selected_experts n_expert_active "
    "router_top_k moe_k n_experts_per_token num_experts_per_topk",
    "num_attention_heads": "num_heads n_heads n_head heads nhead num_q_heads n_q_heads h num_query_heads nheads",
    "num_key_value_heads": "num_kv_heads n_kv_heads n_kv_head n_kv_groups num_kv_groups n_query_groups kv_heads g "
    "n_local_heads num_key_value_groups_heads nkv n_kv",
    "head_dim": "d_head head_size dim_head head_width d_k head_dimension dhead",
    "vocab_size": "n_vocab num_tokens vocab num_embeddings vocabulary_size padded_vocab_size v vocab_len",
    "num_hidden_layers": "num_layers n_layers n_layer depth num_blocks n_blocks l layers_count nlayers",
    "rope_theta": "theta rope_base base rotary_base rope_freq_base rotary_theta freq_base",
    "rms_norm_eps": "eps norm_eps layer_norm_eps epsilon layernorm_epsilon rms_eps rmsnorm_eps norm_epsilon",
    "max_position_embeddings": "max_seq_len block_size context_length max_len n_ctx seq_len max_seq_length "
    "max_context_length sequence_len context_len max_position max_seq max_sequence_length seq_length",
    "norm_topk_prob": "norm_topk normalize_topk renormalize normalize norm_weights renorm normalize_weights "
    "normalize_expert_weights norm_topk_weights renormalise normalise norm_topk_probs normalize_topk_prob "
    "normalize_router_weights moe_renormalize",
    "layer_idx": "layer_id layer_index layer layer_num layer_no idx i block_idx block_id layer_number",
    "attention_bias": "bias qkv_bias use_bias attn_bias use_qkv_bias linear_bias",
    "qk_norm": "use_qk_norm qknorm norm_qk use_qknorm",
    "tie_word_embeddings": "tie_weights tied tie_embeddings weight_tying tied_embeddings share_embeddings",
    "attention_dropout": "dropout attn_dropout dropout_p p_dropout resid_dropout resid_pdrop attn_pdrop embd_pdrop "
    "residual_dropout hidden_dropout router_jitter_noise jitter_noise noise_std jitter",
    "hidden_act": "activation act act_fn activation_function act_name",
    "n_shared_experts": "num_shared_experts n_shared shared_experts",
    "score_func": "scoring_func score_function gating_function router_score_function",
    "routed_scaling_factor": "route_scale routing_scale router_scale scaling_factor",
    "n_group": "n_expert_groups num_expert_group num_groups_of_experts n_groups",
    "topk_group": "n_limited_groups num_limited_groups topk_groups",
    "shared_expert_intermediate_size": "shared_dim shared_hidden_dim shared_intermediate_size",
}
_ALIASES = {alias: setting for setting, text in SYNONYMS.items() for alias in text.split()}


class UnknownSetting(AttributeError, KeyError):
    """A candidate reads a setting that the family's config has not; ``getattr`` with a default still works."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"the config has no '{self.name}'"


class Settings(Mapping[str, Any]):
    """Every key of config.json and every synonym, as attributes and as items.

    Attributes:
        used: names that were read, in order.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__["_values"] = dict(values)
        self.__dict__["used"] = []

    def lookup(self, name: str) -> Any:
        """The value under any of its names.

        Raises:
            UnknownSetting: none is known.
        """
        values: dict[str, Any] = self.__dict__["_values"]
        for key in (name, name.lower(), _ALIASES.get(name.lower(), name)):
            if key in values:
                self.__dict__["used"].append(name)
                return values[key]
        raise UnknownSetting(name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.lookup(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["_values"][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        self.__dict__["_values"][name] = value

    def __getitem__(self, name: str) -> Any:
        return self.lookup(name)

    def __contains__(self, name: object) -> bool:
        try:
            self.lookup(str(name))
        except UnknownSetting:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__["_values"])

    def __len__(self) -> int:
        return len(self.__dict__["_values"])

    def to_dict(self) -> dict[str, Any]:
        """The values by config.json's own names."""
        return dict(self.__dict__["_values"])


def settings_of(config: Mapping[str, Any], formula: Formula, level: Level, dtype: torch.dtype) -> Settings:
    """The family's config with what it only implies written out.

    ``moe_intermediate_size`` is the experts' size also in families that call it ``intermediate_size``.
    """
    attention, router, experts = formula.attention, formula.router, formula.experts
    implied: dict[str, Any] = {
        "hidden_size": experts.hidden_size,
        "moe_intermediate_size": experts.intermediate_size,
        "num_experts": router.num_experts,
        "num_experts_per_tok": router.top_k,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "vocab_size": formula.vocab_size,
        "num_hidden_layers": formula.num_layers,
        "rope_theta": attention.rope_theta,
        "rms_norm_eps": formula.norm.eps,
        "norm_topk_prob": router.norm_topk,
        "attention_bias": attention.bias,
        "qk_norm": attention.qk_norm != "none",
        "tie_word_embeddings": formula.tie_embeddings,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "n_shared_experts": 0 if experts.shared == "none" else config.get("n_shared_experts", 1),
        "score_func": "sigmoid" if router.score == "sigmoid" else "softmax",
        "routed_scaling_factor": router.scaling,
        "n_group": router.groups,
        "topk_group": router.groups_kept,
        "shared_expert_intermediate_size": experts.shared_intermediate_size,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "layer_idx": 0,
        "max_position_embeddings": 64,
        "dtype": dtype,
        "device": "cpu",
        "max_batch_size": 16,
        "initializer_range": 0.02,
        "pad_token_id": None,
        "_attn_implementation": "eager",  # asked for by classes of transformers
        "_experts_implementation": "eager",
    }
    values = {**implied, **config}
    for key in ("rms_norm_eps", "hidden_act", "dtype", "rope_theta"):
        values[key] = implied[key] if values.get(key) is None or key == "dtype" else values[key]
    values.setdefault("intermediate_size", experts.intermediate_size)
    if level in ("moe", "router") or "moe_intermediate_size" not in config:
        values["moe_intermediate_size"] = experts.intermediate_size
    return Settings(values)


def setting_of(name: str) -> str:
    """The setting that a parameter's name stands for: its own, where none is known."""
    lowered = name.lower()
    return _ALIASES.get(lowered, lowered)

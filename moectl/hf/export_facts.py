"""What an exported checkpoint has to say of a model: its attention, its layers, and how its router weighs.

Read from the model itself, ours or one of transformers, so that a target is chosen by what is computed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moectl.errors import ConfigError
from moectl.hf.language_model import HFLanguageModel
from moectl.models.config import DecoderConfig
from moectl.models.decoder import Decoder
from moectl.models.language_model import LanguageModel
from moectl.moe.layer import MoELayer
from moectl.moe.router import Router
from moectl.moe.token_choice import TokenChoiceOptions
from moectl.routers.noisy_topk import NoisyTopKRouter
from moectl.routers.sigmoid import SigmoidRouter
from moectl.routers.switch import SwitchRouter
from moectl.routers.top1 import Top1Router
from moectl.routers.topk import Top2Router, TopKRouter

Weights = Literal["renormalised", "probability"]
DEFAULT_POSITIONS = 2048  # of a decoder that nothing is known of: its rotary positions have no end


@dataclass(frozen=True)
class RouterFacts:
    """How a token chooses and weighs its experts outside of training.

    Attributes:
        name: moectl's.
        score: of an expert: a softmax over all, or each one's sigmoid.
        weights: of the chosen: their scores, or those divided by their sum. With one expert per token the latter
            is exactly 1, which is what ``top1`` means.
        clamp: logits stay within ± this; None for no bound.
        scaling: times every weight.
        groups: of neighbouring experts, and how many of them a token may choose from.
        biased: whether a bias takes part in the choice (and not in the weights).
    """

    name: str
    score: Literal["softmax", "sigmoid"]
    top_k: int
    weights: Weights
    clamp: float | None = None
    scaling: float = 1.0
    groups: tuple[int, int] = (1, 1)
    biased: bool = False


@dataclass(frozen=True)
class Facts:
    """A model with experts.

    Attributes:
        base: transformers' dense ``model_type`` of the same attention, norms and dense MLPs.
        config: that model's config, as JSON.
        layers: how many; ``moe_layers`` are those with experts.
        dense_size, expert_size: neurons of a dense MLP and of one expert; ``shared_size`` of all shared ones, 0: none.
        gated: SwiGLU MLPs without biases; else GPT-2's.
        qk_norm, qkv_bias, o_bias, mlp_bias: whether the model has these.
        window: how far back the layers of ``sliding`` look; None: all of them to the first token.
    """

    base: str
    config: Mapping[str, Any]
    layers: int
    moe_layers: tuple[int, ...]
    hidden_size: int
    dense_size: int
    expert_size: int
    shared_size: int
    num_experts: int
    router: RouterFacts
    gated: bool
    qk_norm: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    window: int | None
    sliding: tuple[int, ...]

    @property
    def all_moe(self) -> bool:
        return len(self.moe_layers) == self.layers

    @property
    def first_dense(self) -> int | None:
        """How many layers come before the first with experts, where all after it have them; else None."""
        first = self.moe_layers[0]
        return first if self.moe_layers == tuple(range(first, self.layers)) else None


def facts_of(model: LanguageModel, *, positions: int | None = None) -> Facts:
    """What of ``model`` an export has to say.

    Args:
        positions: that our own decoder was trained on; its rotary positions have no end.

    Raises:
        ConfigError: a dense model, or routing that depends on more than the token itself and the router's weights,
            or on code that is not moectl's: no checkpoint of transformers can say that.
    """
    layers = model.moe_layers()
    if not layers:
        raise ConfigError(
            "the model is dense: it has no experts to export",
            "A Hugging Face base without experts is exported by its own save_pretrained.",
        )
    first = next(iter(layers.values()))
    for number, layer in layers.items():
        _refuse_unsayable(layer, number)
    config = config_of(model, positions=positions)
    sliding, window = _windows(config, model.num_layers)
    kind = str(config["model_type"])
    gpt2 = kind == "gpt2"
    return Facts(
        base=kind,
        config=config,
        layers=model.num_layers,
        moe_layers=tuple(layers),
        hidden_size=first.experts.hidden_size,
        dense_size=int((config.get("n_inner") or 4 * config["n_embd"]) if gpt2 else config["intermediate_size"]),
        expert_size=first.experts.intermediate_size,
        shared_size=_shared_size(first),
        num_experts=first.experts.num_experts,
        router=router_facts(first.router),
        gated=not gpt2,
        qk_norm=kind == "qwen3",
        qkv_bias=gpt2 or kind == "qwen2" or bool(config.get("attention_bias")),
        o_bias=gpt2 or bool(config.get("attention_bias")),
        mlp_bias=gpt2 or bool(config.get("mlp_bias")),
        window=window,
        sliding=sliding,
    )


def config_of(model: LanguageModel, *, positions: int | None = None) -> dict[str, Any]:
    """The config of transformers' dense model of the same attention, as JSON: our decoder is a Qwen3."""
    if isinstance(model, HFLanguageModel):
        found: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
        return found
    if isinstance(model, Decoder):
        return _qwen3(model.config, positions or DEFAULT_POSITIONS)
    raise ConfigError(f"a {type(model).__name__} cannot be exported", "Only moectl's own models can.")


def _qwen3(config: DecoderConfig, positions: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": config.eos_token_id if config.eos_token_id >= 0 else None,
        "pad_token_id": None,
    }


def router_facts(router: Router) -> RouterFacts:
    """How ``router`` chooses and weighs outside of training.

    Raises:
        ConfigError: a router of another kind, or code that is not moectl's.
    """
    kind, config = type(router), router.config
    name = next((known for known, made in _NAMES.items() if made is kind), None)
    if name is None or not isinstance(config, TokenChoiceOptions):
        raise ConfigError(
            f"{router.label} ({kind.__name__}) cannot be said in a checkpoint of transformers: {_why(router)}",
            "Export it as moectl's own folder (--format moectl), which moectl loads with all that it is.",
        )
    weights: Weights = "renormalised"
    if kind is SwitchRouter or not getattr(config, "norm_topk_prob", True):
        weights = "probability"
    plain = RouterFacts(name, "softmax", router.top_k, weights, config.logit_clamp)
    if not isinstance(config, SigmoidRouter.Config):
        return plain
    return RouterFacts(
        name,
        "sigmoid",
        router.top_k,
        weights,
        config.logit_clamp,
        scaling=config.routed_scaling_factor,
        groups=(1, 1) if config.topk_group == config.n_group else (config.n_group, config.topk_group),
        biased=True,
    )


_NAMES: Mapping[str, type[Router]] = {
    "top1": Top1Router,
    "switch": SwitchRouter,
    "topk": TopKRouter,
    "top2": Top2Router,
    "noisy-topk": NoisyTopKRouter,
    "sigmoid": SigmoidRouter,
}


def _why(router: Router) -> str:
    if not router.token_choice:
        return "its tokens do not choose their experts, as those of every model of transformers do"
    return "how it chooses is code that is not moectl's"


def _refuse_unsayable(layer: MoELayer, number: int) -> None:
    router_facts(layer.router)
    if layer.capacity is not None and layer.capacity.in_eval:
        raise ConfigError(
            f"layer {number} limits its experts' capacity outside of training too: what a token gets then depends on"
            " the others in its batch, which no model of transformers does",
            "Export it as moectl's own folder (--format moectl), or train with moe.capacity.in_eval false.",
        )
    config = layer.router.config
    if isinstance(config, TokenChoiceOptions) and config.new_experts:
        opened = int(layer.router.opened_steps)  # type: ignore[arg-type]
        if opened < config.opening_steps:
            raise ConfigError(
                f"layer {number}'s last {config.new_experts} experts are still being opened (step {opened} of"
                f" {config.opening_steps}), which no model of transformers can say",
                "Train on until they are open, or export moectl's own folder (--format moectl).",
            )


def _shared_size(layer: MoELayer) -> int:
    shared = layer.shared_experts
    return 0 if shared is None else int(shared.up_proj.weight.shape[0])  # type: ignore[union-attr,index]


def _windows(config: Mapping[str, Any], layers: int) -> tuple[tuple[int, ...], int | None]:
    """Which layers look back only so far, and how far."""
    window, positions = config.get("sliding_window"), config.get("max_position_embeddings")
    if not window or (positions and window >= positions):  # as far back as there are positions
        return (), None
    if config["model_type"] == "mistral":
        return tuple(range(layers)), int(window)
    kinds = config.get("layer_types") or []
    sliding = tuple(number for number, kind in enumerate(kinds) if kind == "sliding_attention")
    return (sliding, int(window)) if sliding else ((), None)

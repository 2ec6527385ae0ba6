"""Our own modules in the shape and with the weights of a case.

Weights are assigned, not copied: a layer of the published size is built in no memory of its own.
Shape suffixes: B batch, S sequence, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moectl.errors import ConfigError
from moectl.hf.decoder_config import decoder_config, decoder_name
from moectl.models.config import DecoderConfig
from moectl.models.decoder import Attention, Decoder, DecoderLayer, GatedMLP
from moectl.moe.experts import GatedExperts
from moectl.moe.layer import MoELayer
from moectl.moe.router import Router
from moectl.parity.case import Case, Unsupported
from moectl.parity.families import formula_of
from moectl.parity.formula import ExpertsFormula, Formula, RouterFormula
from moectl.routers import build_router


class SharedExpert(nn.Module):
    """An always-on MLP whose output is scaled by a sigmoid gate of its own (Qwen2-MoE): ``σ(x · gᵀ) · mlp(x)``."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.mlp = GatedMLP(hidden_size, intermediate_size)
        self.gate = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(x)) * self.mlp(x)


class Built(NamedTuple):
    """A component of ours.

    Attributes:
        module: the Decoder, DecoderLayer, MoELayer, Attention or Router, with the case's weights.
        parameters: by canonical name; a tied pair once, under the embedding's name.
        config: the decoder's, where the component is one's.
        formula: the family's.
    """

    module: nn.Module
    parameters: dict[str, nn.Parameter]
    config: DecoderConfig | None
    formula: Formula


def build(family: str, case: Case, backend: str) -> Built:
    """The component of ``case.level``, in the case's mode; a layer with experts where the weights have some.

    Raises:
        Unsupported: moectl has no such component, and why.
        ConfigError: weights that do not fit, or a config that makes no sense.
    """
    formula = formula_of(family, case.config)
    reason = why_not(formula, case)
    if reason is not None:
        raise Unsupported(reason)
    config = None
    if case.level in ("router", "moe"):
        with torch.device("meta"):
            module: nn.Module = _router(formula.router, formula) if case.level == "router" else _moe(formula, backend)
    else:
        # Where generation ends is no part of a comparison, and several ends are common.
        config = decoder_config({**case.config, "eos_token_id": None}, backend=backend)
        with torch.device("meta"):
            module = _of_decoder(config, case)
    _make_routers_real(module, formula, config)
    names = {name: own_name(name) for name in case.weights if not _is_tied_copy(name, config)}
    _assign(module, {own: case.weights[name] for name, own in names.items()})
    if isinstance(module, Decoder) and module.config.tie_word_embeddings:
        module.lm_head.weight = module.embed_tokens.weight
    parameters = dict(module.named_parameters())
    return Built(
        module.train(case.training),
        {name: parameters[own] for name, own in names.items() if own in parameters},
        config,
        formula,
    )


def own_name(name: str) -> str:
    """Where a weight of Hugging Face's name is in our modules."""
    name = decoder_name(name)
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name


_RENAMED = (
    (re.compile(r"(^|\bmlp\.)gate\.e_score_correction_bias$"), r"\1router.expert_bias"),
    (re.compile(r"^e_score_correction_bias$"), "expert_bias"),
    (re.compile(r"\bshared_expert\."), "shared_experts.mlp."),
    (re.compile(r"\bshared_expert_gate\."), "shared_experts.gate."),
)


def why_not(formula: Formula, case: Case) -> str | None:
    """What of the family moectl's own modules have not, or None."""
    if case.level in ("model", "layer", "attention"):
        if formula.family != "qwen3":
            return f"moectl's decoder is a Qwen3-MoE, no {formula.family}: its MoE layers are compared alone"
        return None
    router, experts = formula.router, formula.experts
    if router.bias:
        return f"the router of {formula.family} adds a bias to its logits, and moectl's gates have none"
    if router.score not in ("softmax", "sigmoid"):
        return f"moectl has no router that scores by '{router.score}'"
    if router.groups > 1 and router.score != "sigmoid":
        return "moectl chooses by groups of experts only with the sigmoid router"
    if router.score == "softmax" and router.scaling != 1.0:
        return "moectl's softmax routers do not scale the weights"
    if case.level == "router":
        return None
    if experts.layout != "out_in" or experts.gate_up != "gate_first" or experts.bias:
        return f"the experts of {formula.family} are laid out otherwise, or have biases, and moectl's have not"
    if experts.glu != "swiglu" or experts.activation != "silu":
        return f"moectl's gated experts are SwiGLU, not '{experts.glu}' with '{experts.activation}'"
    return None


def _of_decoder(config: DecoderConfig, case: Case) -> nn.Module:
    if case.level == "model":
        return Decoder(config)
    if case.level == "attention":
        return Attention(config, 0)
    wants_experts = any(name.startswith("mlp.experts.") for name in case.weights)
    numbers = [n for n in range(config.num_layers) if (n in config.moe_layers) == wants_experts]
    if not numbers:
        kind = "experts" if wants_experts else "a dense MLP"
        raise ConfigError(f"no layer of this config has {kind}, but the weights do")
    layer = DecoderLayer(config, numbers[0])
    layer.self_attn.layer = 0
    return layer


def _router(router: RouterFormula, formula: Formula) -> Router:
    size = {"hidden_size": formula.experts.hidden_size, "num_experts": router.num_experts, "top_k": router.top_k}
    if router.score == "softmax":
        return build_router("topk", **size, norm_topk_prob=router.norm_topk, noise_std=0.0)
    return build_router(
        "sigmoid",
        **size,
        norm_topk_prob=router.norm_topk,
        routed_scaling_factor=router.scaling,
        n_group=router.groups,
        topk_group=router.groups_kept,
    )


def _moe(formula: Formula, backend: str) -> MoELayer:
    shape = formula.experts
    experts = GatedExperts(formula.router.num_experts, shape.hidden_size, shape.intermediate_size, backend=backend)
    return MoELayer(_router(formula.router, formula), experts, _shared(shape))


def _shared(shape: ExpertsFormula) -> nn.Module | None:
    if shape.shared == "none":
        return None
    kind = SharedExpert if shape.shared == "sigmoid_gated" else GatedMLP
    return kind(shape.hidden_size, shape.shared_intermediate_size)


def _make_routers_real(module: nn.Module, formula: Formula, config: DecoderConfig | None) -> None:
    """Routers have buffers of their own, which no checkpoint has: their start is made outside of ``meta``."""
    if isinstance(module, Router):
        module.to_empty(device="cpu")
        module.load_state_dict(_router(formula.router, formula).state_dict())
    for layer in module.modules():
        if isinstance(layer, MoELayer):
            layer.router = _router(formula.router, formula) if config is None else _router_of(config)


def _router_of(config: DecoderConfig) -> Router:
    """As the decoder itself builds it: what its config says is what is compared."""
    assert config.moe is not None
    sizes = {"hidden_size": config.hidden_size, "num_experts": config.moe.num_experts}
    return build_router(config.moe.router_name, **sizes, **config.moe.router_options)


def _is_tied_copy(name: str, config: DecoderConfig | None) -> bool:
    return name == "lm_head.weight" and config is not None and config.tie_word_embeddings


def _assign(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Every parameter and the buffers that the weights name; what else a router keeps stays as it starts.

    Raises:
        ConfigError: missing, unknown or wrongly shaped weights, all of them.
    """
    own = module.state_dict()
    missing = [name for name, _ in module.named_parameters() if name not in weights and name != "lm_head.weight"]
    unknown = [name for name in weights if name not in own]
    shapes = [
        f"{name} {list(weights[name].shape)} for {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    untied = isinstance(module, Decoder) and not module.config.tie_word_embeddings
    missing += ["lm_head.weight"] if untied and "lm_head.weight" not in weights else []
    found = {"missing": missing, "unknown": unknown, "of another shape": shapes}
    if any(found.values()):
        listing = "; ".join(f"{what}: {', '.join(names)}" for what, names in found.items() if names)
        raise ConfigError(f"the weights do not fit our {type(module).__name__}: {listing}")
    module.load_state_dict(dict(weights), strict=False, assign=True)

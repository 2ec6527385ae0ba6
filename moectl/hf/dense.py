"""Dense decoders of transformers that can be upcycled: where their MLPs are, and what experts those become.

Shape suffixes: D hidden, F intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moectl.errors import ConfigError
from moectl.hf.refusals import refuse_config
from moectl.models.accounting import TransformerShape
from moectl.moe.upcycle import Layout

Activation = Literal["swiglu", "gelu_tanh", "gelu_new"]
_PLAIN: dict[str, Activation] = {"gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_tanh"}
_GATED: dict[str, Activation] = {"silu": "swiglu", "swish": "swiglu"}


@dataclass(frozen=True)
class DenseFamily:
    """One family of dense decoders.

    Attributes:
        name: moectl's.
        model_types: transformers' names of what is built the same way.
        backbone: attribute of the causal language model that holds everything but the head.
        layers: attribute of the backbone; ``mlp`` and ``attention`` are attributes of a layer.
        gated: three matrices ``gate_proj``, ``up_proj``, ``down_proj`` without biases; else GPT-2's two Conv1D with.
        exports_to: transformers' MoE model of the same attention; None where there is none.
    """

    name: str
    model_types: tuple[str, ...]
    backbone: str
    layers: str
    attention: str
    gated: bool
    exports_to: str | None
    mlp: str = "mlp"

    def backbone_of(self, model: Any) -> nn.Module:
        """Raises ConfigError where ``model`` has no such part, or no head."""
        backbone: Any = getattr(model, self.backbone, None)
        head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if not hasattr(backbone, self.layers):
            raise ConfigError(
                f"{type(model).__name__} has no '{self.backbone}.{self.layers}', where a {self.name} keeps its layers",
                "Give the causal language model, as AutoModelForCausalLM makes it.",
            )
        if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
            raise ConfigError(
                f"{type(model).__name__} has no language-model head without a bias",
                "Give the causal language model, as AutoModelForCausalLM makes it.",
            )
        found: nn.Module = backbone
        return found

    def layers_of(self, model: Any) -> nn.ModuleList:
        found: nn.ModuleList = getattr(self.backbone_of(model), self.layers)
        return found

    def activation_of(self, config: Any) -> Activation:
        """moectl's name of the MLP's activation.

        Raises:
            ConfigError: experts have no such activation.
        """
        given = config.hidden_act if self.gated else config.activation_function
        known = _GATED if self.gated else _PLAIN
        if given not in known:
            key = "hidden_act" if self.gated else "activation_function"
            raise ConfigError(
                f"the activation '{given}' ({key}) of this {self.name} cannot be expressed: its experts compute"
                f" {' or '.join(sorted(known))}",
                "Upcycle a model with one of these.",
            )
        return known[given]

    def dropout_of(self, config: Any) -> float:
        """Of the MLP's output, in training."""
        return 0.0 if self.gated else float(config.resid_pdrop)

    def mlp_of(self, layer: nn.Module, where: str) -> nn.Module:
        """The dense MLP of one layer, found to be what the family says.

        Raises:
            ConfigError: it is replaced already, its matrices are wrapped or quantised, or have a bias.
        """
        mlp = getattr(layer, self.mlp, None)
        names = ("gate_proj", "up_proj", "down_proj") if self.gated else ("c_fc", "c_proj")
        wanted = "Linear" if self.gated else "Conv1D"
        if not isinstance(mlp, nn.Module):
            raise ConfigError(f"{where} has no '{self.mlp}'", "Only a plain decoder can be upcycled.")
        for name in names:
            matrix = getattr(mlp, name, None)
            if type(matrix).__name__ != wanted:
                raise ConfigError(
                    f"{where}.{self.mlp}.{name} is {type(matrix).__name__ if matrix is not None else 'missing'}, not a"
                    f" {wanted}: only a plain, dense MLP can be upcycled",
                    "Merge adapters, dequantise, and upcycle a dense model.",
                )
            if self.gated and getattr(matrix, "bias", None) is not None:
                raise ConfigError(
                    f"{where}.{self.mlp}.{name} has a bias (mlp_bias), and gated experts have none",
                    "Upcycle a model without biases in its MLPs.",
                )
        return mlp

    def layout_of(self, mlp: nn.Module) -> Layout:
        """A dense MLP as one expert; GPT-2's Conv1D keeps ``[in, out]`` and is transposed."""
        weight = {name: parameter.detach() for name, parameter in mlp.named_parameters()}
        if self.gated:
            return {
                "gate_up_proj": torch.cat([weight["gate_proj.weight"], weight["up_proj.weight"]]),
                "down_proj": weight["down_proj.weight"],
            }
        return {
            "up_proj": _transposed(weight["c_fc.weight"]),
            "up_proj_bias": weight["c_fc.bias"],
            "down_proj": _transposed(weight["c_proj.weight"]),
            "down_proj_bias": weight["c_proj.bias"],
        }

    def shape_of(self, config: Any) -> TransformerShape:
        heads, hidden = config.num_attention_heads, config.hidden_size
        keys = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        return TransformerShape(
            num_layers=config.num_hidden_layers,
            hidden_size=hidden,
            query_size=heads * head_dim,
            key_size=keys * head_dim,
            mlp_size=self.mlp_size(config),
            mlp_matrices=3 if self.gated else 2,
            vocab_size=config.vocab_size,
        )

    def mlp_size(self, config: Any) -> int:
        """Neurons of a dense MLP, from the config."""
        return int(config.intermediate_size if self.gated else (config.n_inner or 4 * config.hidden_size))


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous()


_ROTARY = {"backbone": "model", "layers": "layers", "attention": "self_attn", "gated": True}

#: SmolLM2 and TinyLlama are of the type ``llama``.
FAMILIES: dict[str, DenseFamily] = {
    family.name: family
    for family in (
        DenseFamily("gpt2", ("gpt2",), "transformer", "h", "attn", gated=False, exports_to=None),
        DenseFamily("llama", ("llama", "mistral"), exports_to="mixtral", **_ROTARY),  # type: ignore[arg-type]
        DenseFamily("qwen2", ("qwen2",), exports_to="qwen2_moe", **_ROTARY),  # type: ignore[arg-type]
        DenseFamily("qwen3", ("qwen3",), exports_to="qwen3_moe", **_ROTARY),  # type: ignore[arg-type]
    )
}
MODEL_TYPES: dict[str, DenseFamily] = {kind: family for family in FAMILIES.values() for kind in family.model_types}


def family_of(model: Any) -> DenseFamily:
    """The family of a model of transformers, or of its config.

    Raises:
        ConfigError: it cannot be upcycled, and why: an encoder, quantised, with experts already, or of an
            architecture whose parts moectl does not know, the first of which is named.
    """
    config = getattr(model, "config", model)
    refuse_config(config, MODEL_TYPES)
    return MODEL_TYPES[config.model_type]

"""A model of transformers by its config alone: sizes to plan with, and the model itself on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from moectl.config.schema import MoEConfig
from moectl.hf.dense import DenseFamily, family_of
from moectl.hf.folder import build_described
from moectl.hf.language_model import HFLanguageModel
from moectl.models.accounting import TransformerShape
from moectl.models.config import resolve_layers
from moectl.moe.layer import MoELayer


@dataclass(frozen=True)
class HFShape:
    """The counterpart of :class:`moectl.models.config.DecoderConfig` for a model of transformers.

    Attributes:
        description: what :meth:`HFLanguageModel.describe` says of the dense model, or of one with experts.
        moe: its experts; ``moe_layers`` are the numbers of the layers that have them.
    """

    description: Mapping[str, Any]
    moe: MoEConfig | None = None
    moe_layers: tuple[int, ...] = ()
    _config: list[Any] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> HFShape:
        """Raises ConfigError for a family that cannot be upcycled."""
        moe = None if description["moe"] is None else MoEConfig.model_validate(description["moe"])
        return cls(description, moe, tuple(description["moe_layers"]))

    def with_moe(self, moe: MoEConfig | None) -> HFShape:
        """The same model with experts in the layers that ``moe.layers`` names, or with none."""
        layers = () if moe is None else resolve_layers(moe.layers, self.num_layers)
        return replace(self, moe=moe, moe_layers=layers)

    def build(self) -> HFLanguageModel:
        """The model on the meta device: nothing is allocated."""
        described = {
            **self.description,
            "moe": None if self.moe is None else self.moe.model_dump(mode="json"),
            "moe_layers": list(self.moe_layers),
        }
        with torch.device("meta"):
            model = build_described(described)
        assert isinstance(model, HFLanguageModel)
        return model

    @property
    def config(self) -> Any:
        """transformers' own."""
        if not self._config:
            from transformers import CONFIG_MAPPING

            plain = dict(self.description["config"])
            self._config.append(CONFIG_MAPPING[plain["model_type"]].from_dict(plain))
        return self._config[0]

    @property
    def family(self) -> DenseFamily:
        return family_of(self.config)

    @property
    def transformer(self) -> TransformerShape:
        """The sizes that FLOPs follow from."""
        return self.family.shape_of(self.config)

    @property
    def vocab_size(self) -> int:
        return self.transformer.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.transformer.hidden_size

    @property
    def intermediate_size(self) -> int:
        return self.transformer.mlp_size

    @property
    def num_layers(self) -> int:
        return self.transformer.num_layers

    @property
    def num_heads(self) -> int:
        return int(self.config.num_attention_heads)

    @property
    def num_kv_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.num_heads)

    @property
    def head_dim(self) -> int:
        return self.transformer.query_size // self.num_heads


def parts_of(model: HFLanguageModel) -> dict[str, int]:
    """Every parameter once, by what it belongs to: embedding (positions too), attention, mlp, experts, shared
    experts, router, norms, head; a tied head is embedding."""
    family, inner = model.family, model.model
    backbone, embedding = family.backbone_of(inner), inner.get_input_embeddings()
    head = inner.get_output_embeddings().weight
    parts = {
        "embedding": sum(_size(child) for child in backbone.children() if isinstance(child, nn.Embedding)),
        "head": 0 if head is embedding.weight else head.numel(),
        "attention": 0, "mlp": 0, "experts": 0, "shared experts": 0, "router": 0,
    }  # fmt: skip
    for layer in family.layers_of(inner):
        parts["attention"] += _size(getattr(layer, family.attention))
        mlp = getattr(layer, family.mlp)
        if not isinstance(mlp, MoELayer):
            parts["mlp"] += _size(mlp)
            continue
        parts["router"] += _size(mlp.router)
        parts["experts"] += _size(mlp.experts)
        parts["shared experts"] += 0 if mlp.shared_experts is None else _size(mlp.shared_experts)
    parts["norms"] = sum(p.numel() for p in model.parameters()) - sum(parts.values())  # what is left
    return parts


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

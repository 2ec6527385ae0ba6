"""The decoder's shape and its named sizes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from moectl.config.schema import ModelConfig, MoEConfig
from moectl.errors import ConfigError, unknown


@dataclass(frozen=True)
class DecoderConfig:
    """A Qwen3-style decoder; ``moe_layers`` says which layers carry experts.

    Raises:
        ConfigError: heads that do not group, an odd head dimension, a layer that is not there.
    """

    vocab_size: int
    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    eos_token_id: int = 0
    moe_layers: tuple[int, ...] = ()
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly",
                "Choose model.num_kv_heads so that it divides model.num_heads.",
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}, but rotary embeddings need an even number")
        if self.moe_layers and self.moe is None:
            raise ConfigError("moe_layers without an moe section")
        if not set(self.moe_layers) <= set(range(self.num_layers)):
            raise ConfigError(f"moe_layers {list(self.moe_layers)} are not all layers 0 to {self.num_layers - 1}")

    @property
    def expert_intermediate_size(self) -> int:
        return self.intermediate_size if self.moe is None else self.moe.expert_size(self.intermediate_size)

    def with_moe(self, moe: MoEConfig | None) -> DecoderConfig:
        """The same shape with experts in the layers that ``moe.layers`` names."""
        layers = () if moe is None else resolve_layers(moe.layers, self.num_layers)
        return replace(self, moe=moe, moe_layers=layers)

    def to_dict(self) -> dict[str, Any]:
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        moe = None if self.moe is None else self.moe.model_dump(mode="json")
        return {**plain, "moe_layers": list(self.moe_layers), "moe": moe}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> DecoderConfig:
        moe = None if plain.get("moe") is None else MoEConfig.model_validate(plain["moe"])
        return cls(**{**plain, "moe": moe, "moe_layers": tuple(plain["moe_layers"])})


#: From scratch; ``tiny`` trains to something in minutes on two cores.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "mini": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_layers": 6,
        "num_heads": 6,
        "num_kv_heads": 2,
    },
    "small": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 64,
    },
    "base": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_layers": 12,
        "num_heads": 12,
        "num_kv_heads": 4,
        "head_dim": 64,
    },
}


def decoder_config(model: ModelConfig, *, vocab_size: int, eos_token_id: int) -> DecoderConfig:
    """A dense decoder's shape from a named size and the config's overrides.

    Raises:
        ConfigError: an unknown size (exit code 2).
    """
    if model.base not in SIZES:
        raise unknown("base model", model.base, SIZES)
    overrides = model.model_dump(exclude={"base"}, exclude_none=True)
    return DecoderConfig(vocab_size=vocab_size, eos_token_id=eos_token_id, **{**SIZES[model.base], **overrides})


def resolve_layers(spec: str, num_layers: int) -> tuple[int, ...]:
    """Layer numbers of ``all``, ``last:N``, ``every:N`` (the last of each N) or ``2,3``.

    Raises:
        ConfigError: more or other layers than the model has.
    """
    if num_layers < 1:
        raise ConfigError("the model has no layers to give experts to", "Take a model with layers.")
    kind, _, number = spec.partition(":")
    if spec == "all":
        return tuple(range(num_layers))
    if kind == "every":
        layers = tuple(range(int(number) - 1, num_layers, int(number)))
    elif kind == "last":
        layers = tuple(range(num_layers - int(number), num_layers))
    else:
        layers = tuple(sorted({int(layer) for layer in spec.split(",")}))
    if not layers or layers[0] < 0 or layers[-1] >= num_layers:
        raise ConfigError(
            f"moe.layers '{spec}' does not fit a model of {num_layers} layers",
            f"Layers are numbered 0 to {num_layers - 1}; last:N and every:N take N up to {num_layers}.",
        )
    return layers

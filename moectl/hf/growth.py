"""More experts in a whole model, ours or one of transformers, with the description that goes with it."""

from __future__ import annotations

import torch

from moectl.config.schema import MoEConfig
from moectl.errors import ConfigError
from moectl.hf.language_model import HFLanguageModel
from moectl.hf.upcycle import upcycled_with
from moectl.models.decoder import Decoder
from moectl.models.growth import append, multiply
from moectl.models.language_model import LanguageModel


def multiply_model(
    model: LanguageModel,
    times: int,
    *,
    parts: bool = False,
    noise: float = 1e-3,
    generator: torch.Generator | None = None,
) -> LanguageModel:
    """Every expert becomes ``times``, in place, and the function stays; see :mod:`moectl.moe.growth`.

    Args:
        parts: each of them keeps a part of the neurons, so that a token costs what it did.
        noise: of whole copies that a token visits together, in standard deviations of ``down_proj``; it cancels.
        generator: a CPU generator.

    Raises:
        ConfigError: no experts, or a router that cannot be grown.
    """
    layers, moe = model.moe_layers(), mixture_of(model)
    return _described(model, multiply(layers, moe, times, parts=parts, noise=noise, generator=generator))


def extend_model(
    model: LanguageModel, extra: int, *, noise: float = 1e-3, generator: torch.Generator | None = None
) -> LanguageModel:
    """``extra`` experts more in every MoE layer, in place, closed at first: the function stays.

    Args:
        noise: of the new experts, which are copies of the old ones, in standard deviations of each matrix.
        generator: a CPU generator.

    Raises:
        ConfigError: no experts, or a router that cannot keep new ones closed.
    """
    return _described(model, append(model.moe_layers(), mixture_of(model), extra, noise=noise, generator=generator))


def mixture_of(model: LanguageModel) -> MoEConfig:
    """What describes a model's experts.

    Raises:
        ConfigError: it has none.
    """
    moe = upcycled_with(model.model) if isinstance(model, HFLanguageModel) else None
    if isinstance(model, Decoder):
        moe = model.config.moe
    if moe is None:
        raise ConfigError("the model has no experts to grow", "Upcycle it first.")
    return moe


def _described(model: LanguageModel, moe: MoEConfig) -> LanguageModel:
    if isinstance(model, HFLanguageModel):
        model.model.moectl_moe = moe
    else:
        assert isinstance(model, Decoder)
        model.config = model.config.with_moe(moe)
    return model

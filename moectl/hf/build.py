"""Hugging Face's own modules from a config and tensors, without a hub and without a second copy of the weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from moectl.errors import ConfigError
from moectl.hf.family import Family

#: Token ids mean nothing to a comparison, but transformers warns of those beyond a small vocabulary, and stops the
#: gradient of the padding token's embedding, which no formula describes.
_NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def build(
    family: Family,
    level: str,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    training: bool = False,
) -> nn.Module:
    """The module of transformers that computes ``level``, with ``weights`` as its parameters.

    It is made on the meta device and then given the tensors themselves: parameters share their storage.
    Attention and experts are ``eager``. Under :func:`moectl.parity.lift.lifted` rotary frequencies come out in
    float64.

    Args:
        family: see :data:`moectl.hf.family.FAMILIES`.
        level: model, layer, moe, attention or router.
        config: in the form of config.json.
        weights: by the names of the module's ``state_dict``; a tied ``lm_head.weight`` may be left out.
        dtype: what parameters must be in.
        training: the mode it is left in.

    Raises:
        ConfigError: transformers refuses the config, or weights are missing, unknown, of another shape or dtype
            (all of them are listed).
    """
    settings = config_object(family, config)
    settings.dtype = dtype
    with torch.device("meta"):
        module = _construct(family, level, settings, weights)
    tensors = {name: tensor.detach() for name, tensor in weights.items()}
    tied = level == "model" and bool(settings.tie_word_embeddings)
    if tied:
        tensors.setdefault(HEAD, tensors.get(EMBEDDINGS, torch.empty(0)))
    _check(module, tensors, dtype=dtype, tied=tied)
    module.load_state_dict(tensors, strict=True, assign=True)
    if tied:  # assigning gives each name a parameter of its own
        module.lm_head.weight = module.model.embed_tokens.weight
    if level == "model":
        module.model.rotary_emb = rotary(family, settings)
    trained: nn.Module = module.train(training)
    return trained


def config_object(family: Family, config: Mapping[str, Any]) -> Any:
    """transformers' config of ``family``, everything eager.

    Raises:
        ConfigError: it refuses, or the config is another family's.
    """
    said = config.get("model_type", family.model_type)
    if said != family.model_type:
        raise ConfigError(
            f"the config is one of {said!r}, not of {family.model_type!r}",
            f"Name the family that the config belongs to, or give a config of {family.name}.",
        )
    try:
        settings = transformers.CONFIG_MAPPING[family.model_type].from_dict({**config, **_NO_TOKENS})
    except Exception as error:  # strict dataclasses raise what they like: the config is the user's
        raise _refused(family, error) from error
    settings._attn_implementation = "eager"
    settings._experts_implementation = "eager"
    return settings


def rotary(family: Family, settings: Any) -> nn.Module:
    """Positions to cos and sin. Its frequencies are in no checkpoint: they are computed here, off the meta device."""
    with torch.device("cpu"):
        module: nn.Module = family.class_of("rotary")(config=settings)
    return module


def _construct(family: Family, level: str, settings: Any, weights: Mapping[str, Tensor]) -> Any:
    made = family.class_of(level)
    by_layer = "layer_idx" in inspect.signature(made.__init__).parameters
    try:
        if level != "layer":
            return made(settings, layer_idx=0) if by_layer else made(settings)
        layers = [made(settings, layer_idx=layer) for layer in range(settings.num_hidden_layers)]
    except Exception as error:  # an unknown activation is a KeyError, a head too many an AssertionError
        raise _refused(family, error) from error
    wants_experts = any(name.startswith("mlp.experts.") for name in weights)
    for layer in layers:
        if hasattr(layer.mlp, "experts") == wants_experts:
            return layer
    kind = "experts" if wants_experts else "a dense MLP"
    raise ConfigError(
        f"no layer of this {family.name} config has {kind}, but the weights do",
        "Give a layer's weights of the kind that the config has (mlp_only_layers, decoder_sparse_step).",
    )


def _refused(family: Family, error: Exception) -> ConfigError:
    return ConfigError(
        f"transformers {transformers.__version__} refuses the {family.name} config: {type(error).__name__}: {error}",
        "Mend the config: its keys are those of a config.json.",
    )


def _check(module: nn.Module, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, tied: bool) -> None:
    wanted = module.state_dict()
    buffers = dict(module.named_buffers())
    faults = [f"missing: {name} {list(wanted[name].shape)}" for name in wanted if name not in tensors]
    faults += [f"unknown: {name} {list(tensors[name].shape)}" for name in tensors if name not in wanted]
    for name in wanted.keys() & tensors.keys():
        given = tensors[name]
        if given.shape != wanted[name].shape:
            faults.append(f"wrong shape: {name} is {list(given.shape)}, must be {list(wanted[name].shape)}")
        elif given.dtype != dtype and name not in buffers:
            faults.append(f"wrong dtype: {name} is {_short(given.dtype)}, must be {_short(dtype)}")
    if tied and not faults and not _same(tensors[HEAD], tensors[EMBEDDINGS]):
        faults.append(f"tied: {HEAD} and {EMBEDDINGS} differ, but the config ties them")
    if faults:
        raise ConfigError(
            f"the weights do not fit {type(module).__name__}: {'; '.join(sorted(faults))}",
            "Names are those of transformers' state_dict with fused experts; shapes follow from the config.",
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

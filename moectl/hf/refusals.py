"""What cannot be upcycled, and which part of it is in the way."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moectl.errors import ConfigError, MoectlError

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def refuse_config(config: Any, known: Collection[str]) -> None:
    """Raise unless ``config`` is one of a dense, plain decoder whose ``model_type`` is among ``known``.

    Raises:
        ConfigError: which of these it is not, naming the part.
    """
    kind = getattr(config, "model_type", None)
    if getattr(config, "quantization_config", None) is not None:
        method = _quantisation(config.quantization_config)
        raise ConfigError(
            f"the base is quantised ({method}): copies of its MLPs could not be trained",
            "Give the checkpoint that it was made from, or dequantise it and save it in bfloat16 or wider.",
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"the base is an encoder-decoder (model_type '{kind}'): it has no decoder-only language model",
            _families(known),
        )
    if kind in known:
        if getattr(config, "add_cross_attention", False):
            raise ConfigError("the base has cross-attention (add_cross_attention)", _families(known))
        return
    if any(getattr(config, key, None) for key in _EXPERTS):
        raise ConfigError(
            f"the base (model_type '{kind}') has experts already", "Upcycling makes experts out of a dense model."
        )
    if _is_encoder(str(kind)):
        raise ConfigError(
            f"the base is an encoder (model_type '{kind}'): its attention sees later tokens, and it predicts none",
            _families(known),
        )
    raise ConfigError(
        f"the family '{kind}' is not supported: {_missing_part(config)}",
        _families(known),
    )


def _families(known: Collection[str]) -> str:
    return f"Bases that can be upcycled have the model_type {', '.join(sorted(known))}."


def _quantisation(settings: Any) -> str:
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method) or "quantization_config")


def _is_encoder(kind: str) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _missing_part(config: Any) -> str:
    """What of such a model moectl would have to know: found on the meta device, without weights."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, ImportError, RuntimeError, AttributeError) as error:
        first = str(error).strip().splitlines()
        return (
            f"transformers makes no causal language model of it ({first[0][:120] if first else type(error).__name__})"
        )
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return "it has no list of layers"
    name, layers = max(lists, key=lambda pair: len(pair[1]))
    mlp = getattr(layers[0], "mlp", None)
    if not isinstance(mlp, nn.Module):
        parts = ", ".join(part for part, _ in layers[0].named_children())
        return f"its layers ({name}) have no part 'mlp' that could be replaced, but {parts}"
    matrices = [part for part, child in mlp.named_children() if any(p.dim() == 2 for p in child.parameters())]
    if sorted(matrices) != ["down_proj", "gate_proj", "up_proj"]:
        return f"there is no mapping for the matrices of its MLP ({name}.0.mlp has {', '.join(matrices) or 'none'})"
    given = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if given not in ("silu", "swish"):
        return f"there are no gated experts with its MLP's activation '{given}'"
    return f"its MLPs look like Llama's, but its layers ({type(layers[0]).__name__}) were never checked against moectl"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers and no talk but errors; both as they were afterwards."""
    from transformers.utils import logging as talk

    level, bars = talk.get_verbosity(), talk.is_progress_bar_enabled()
    talk.set_verbosity(logging.ERROR)
    talk.disable_progress_bar()
    try:
        yield
    finally:
        talk.set_verbosity(level)
        if bars:
            talk.enable_progress_bar()


def unreadable(where: str, error: BaseException) -> MoectlError:
    """transformers' own words, the first line of them."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return MoectlError(f"transformers cannot load {where}: {first[:300]}", "Look at its config.json and files.")

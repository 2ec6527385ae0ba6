"""LoRA: low-rank adapters on attention and MLPs through peft, and on the stacked experts.

peft serves the linear layers (and GPT-2's Conv1D). It can adapt a stacked parameter too (``target_parameters``), and
computes the same numbers as :mod:`moectl.moe.low_rank` (a test holds the two side by side), but not in a way that a
training run can be built on: it puts a wrapper in the experts' place, so that ``layer.experts`` is no longer experts
to whoever reads them; it swaps the module's class in every forward pass, which breaks a compiled graph; and which of
the two dimensions its factors call input depends on the release, so that a checkpoint's shapes would too.

The only module that imports peft.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from moectl.config.finetuning import LoraConfig
from moectl.errors import ConfigError, MissingDependencyError
from moectl.models.language_model import LanguageModel
from moectl.moe import low_rank
from moectl.moe.experts import Experts
from moectl.moe.router import Router

ADAPTER = "default"
_ATTENTION = ("self_attn", "attn")


def add_adapters(model: LanguageModel, lora: LoraConfig) -> None:
    """Freeze ``model`` and give it adapters, in place; with ``train_router`` its routers stay trainable.

    The function is unchanged: each adapter's second factor is zero. The first is drawn from torch's generator.

    Raises:
        MissingDependencyError: peft is not installed, and linear layers are among the targets.
        ConfigError: the model has nothing of what is targeted, or has adapters already.
    """
    if has_adapters(model):
        raise ConfigError("the model has adapters already", "Merge them first: a run with adapters is a base merged.")
    linears = linear_targets(model, lora)
    wanted = [target for target in lora.targets if target != "experts"]
    for target in wanted:
        if not any(kind == target for kind in linears.values()):
            raise ConfigError(f"finetune.lora.targets = {target} has no effect: the model has no such layers")
    if "experts" in lora.targets and not model.moe_layers():
        raise ConfigError(
            "finetune.lora.targets = experts has no effect: the model is dense", "Target attention and mlp instead."
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if linears:
        _inject(model, list(linears), lora)
    for layer in model.moe_layers().values():
        if "experts" in lora.targets:
            low_rank.adapt(layer.experts, lora.rank, lora.scale)
        if lora.train_router:
            layer.router.requires_grad_(True)
        else:
            layer.router.freeze()
    model.train(model.training)  # peft's new modules, of dropout too, start in training mode


def linear_targets(model: LanguageModel, lora: LoraConfig) -> dict[str, str]:
    """The linear layers that adapters go to: their full name, and which target they belong to."""
    apart = {
        id(part) for module in model.modules() if isinstance(module, (Router, Experts)) for part in module.modules()
    }
    found = {}
    for name, module in model.named_modules():
        if id(module) in apart or not _is_linear(module):
            continue
        parents = name.split(".")[:-1]
        kind = "attention" if any(part in _ATTENTION for part in parents) else "mlp" if "mlp" in parents else None
        if kind in lora.targets:
            found[name] = str(kind)
    return found


def linear_size(module: Any) -> tuple[int, int]:
    """Input and output columns of a linear layer or a Conv1D (whose weight lies the other way round)."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    inputs, outputs = module.weight.shape
    return int(inputs), int(outputs)


def has_adapters(model: LanguageModel | nn.Module) -> bool:
    """Whether any layer of ``model`` has a low-rank adapter."""
    return any(low_rank.adapters_of(module) for module in model.modules() if isinstance(module, Experts)) or any(
        True for _ in _adapted_linears(model)
    )


@torch.no_grad()
def merge(model: LanguageModel) -> LanguageModel:
    """Put all adapters into the weights they belong to, in place: a plain model of the same function remains.

    Equal to the adapted one up to the rounding of ``W + scale · B·A`` in the weights' dtype: logits to 1e-10 in
    float64. Everything is trainable again, and routers are no longer frozen. Returns ``model``.
    """
    for module in list(model.modules()):
        if isinstance(module, Experts):
            low_rank.merge(module)
        if isinstance(module, Router):
            module.frozen = False
    for name, wrapper in list(_adapted_linears(model)):
        wrapper.merge()
        parent, _, own = name.rpartition(".")
        assert isinstance(model, nn.Module)
        setattr(model.get_submodule(parent), own, wrapper.get_base_layer())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.train(model.training)
    return model


def merged(model: LanguageModel) -> LanguageModel:
    """``model`` without adapters, for whoever writes or goes on from plain weights: see :func:`merge`.

    A copy where there are adapters (``model`` stays as it is), else ``model`` itself.
    """
    if not has_adapters(model):
        return model
    return merge(copy.deepcopy(model))


def _inject(model: LanguageModel, names: list[str], lora: LoraConfig) -> None:
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise MissingDependencyError(
            "adapters on linear layers need peft, which is not installed",
            "pip install 'moectl[lora]', or adapt the experts alone: finetune.lora.targets=experts",
        ) from error
    assert isinstance(model, nn.Module)
    conv1d = not isinstance(model.get_submodule(names[0]), nn.Linear)
    config = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.scale * lora.rank,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=names,
        fan_in_fan_out=conv1d,
        bias="none",
    )
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def _adapted_linears(model: LanguageModel | nn.Module) -> Iterator[tuple[str, Any]]:
    """What peft put in the place of a linear layer, by name; without importing peft where nothing of it is there."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft.") and hasattr(module, "get_base_layer"):
            yield name, module


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"

"""AdamW in four groups, and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from moectl.config.schema import OptimConfig
from moectl.models.language_model import LanguageModel
from moectl.moe.experts import Experts
from moectl.moe.router import Router


def parameter_groups(model: nn.Module | LanguageModel, optim: OptimConfig) -> list[dict[str, object]]:
    """Groups ``router``, ``experts``, ``dense`` and ``no_decay``, each with its own base learning rate.

    Routers, norms, embeddings and biases take no weight decay: decay on the router pulls its logits
    together, which is a balance loss nobody asked for. Every trainable parameter is in one group.
    """
    members: dict[str, list[nn.Parameter]] = {"router": [], "experts": [], "dense": [], "no_decay": []}
    seen: set[int] = set()
    routers = {id(module) for router in model.modules() if isinstance(router, Router) for module in router.modules()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            group = "router" if id(module) in routers else _group_of(module, name, parameter)
            members[group].append(parameter)
    rates = {"router": optim.router_lr or optim.lr, "experts": optim.expert_lr or optim.lr}
    decays = {"experts": optim.weight_decay, "dense": optim.weight_decay}
    return [
        {
            "name": name,
            "params": parameters,
            "lr": rates.get(name, optim.lr),
            "base_lr": rates.get(name, optim.lr),
            "weight_decay": decays.get(name, 0.0),
        }
        for name, parameters in members.items()
        if parameters
    ]


def _group_of(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    if isinstance(module, Experts):
        return "no_decay" if "bias" in name else "experts"
    return "dense" if parameter.dim() >= 2 and not isinstance(module, nn.Embedding) else "no_decay"


def build_optimizer(model: nn.Module | LanguageModel, optim: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over :func:`parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, optim), betas=optim.betas, eps=optim.eps, fused=True)


def learning_rate_scale(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Share of the base rate for optimizer step ``step`` (0-based): linear warm-up, then the schedule.

    The cosine ends at ``min_lr_ratio`` on the last step.
    """
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    progress = (step - optim.warmup_steps) / max(total_steps - 1 - optim.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine


def set_learning_rate(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Every group at ``scale`` times its base rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * scale

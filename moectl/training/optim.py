"""The optimizer over groups of parameters, each with a learning rate of its own, and the schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from moectl.config.schema import OptimConfig
from moectl.models.language_model import LanguageModel
from moectl.moe.experts import Experts, GatedExperts
from moectl.moe.low_rank import LowRank
from moectl.moe.router import Router
from moectl.training.muon import MuonAdamW

HEAD = "lm_head"
"""The module of the output embedding, in our decoder and in every family of transformers that moectl knows."""


def parameter_groups(model: nn.Module | LanguageModel, optim: OptimConfig) -> list[dict[str, Any]]:
    """Groups ``router``, ``experts``, ``dense`` and ``no_decay``, each with its own base learning rate; apart from
    them the biases and the adapters of experts (at the experts' rate), and adapters of linear layers.

    Routers, norms, embeddings and biases take no weight decay: decay on the router pulls its logits
    together, which is a balance loss nobody asked for. Every trainable parameter is in one group.
    With Muon the matrices of ``experts`` and ``dense`` are its own (``muon``, ``pieces``:
    :class:`moectl.training.muon.MuonAdamW`), and an output embedding that is not tied is the group ``head``.
    """
    muon = optim.optimizer == "muon"
    names = ("router", "experts", "expert_adapters", "expert_biases", "dense", "adapters", "head", "no_decay")
    members: dict[str, list[nn.Parameter]] = {name: [] for name in names}
    pieces: dict[str, list[list[int]]] = {name: [] for name in members}
    seen: set[int] = set()
    routers = {id(module) for router in model.modules() if isinstance(router, Router) for module in router.modules()}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            group = "router" if id(module) in routers else _group_of(path, module, name, parameter)
            if muon and group == "dense" and path.rpartition(".")[2] == HEAD:
                group = "head"
            members[group].append(parameter)
            pieces[group].append(_pieces_of(path, module, name))
    rates = dict.fromkeys(names, optim.dense_lr or optim.lr) | {"router": optim.router_lr or optim.lr}
    rates |= dict.fromkeys(("experts", "expert_adapters", "expert_biases"), optim.expert_lr or optim.lr)
    decays = dict.fromkeys(("experts", "dense", "head", "adapters", "expert_adapters"), optim.weight_decay)
    groups: list[dict[str, Any]] = [
        {
            "name": name,
            "params": parameters,
            "lr": rates[name],
            "base_lr": rates[name],
            "weight_decay": decays.get(name, 0.0),
        }
        for name, parameters in members.items()
        if parameters
    ]
    for each in groups:
        if muon and each["name"] in ("experts", "dense"):
            each |= {"muon": True, "pieces": pieces[each["name"]]}
    return groups


def _group_of(path: str, module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    if isinstance(module, LowRank):
        return "expert_adapters"
    if ".lora_" in path:  # peft's, on a linear layer
        return "adapters"
    if isinstance(module, Experts):
        return "expert_biases" if "bias" in name else "experts"
    return "dense" if parameter.dim() >= 2 and not isinstance(module, nn.Embedding) else "no_decay"


def _pieces_of(path: str, module: nn.Module, name: str) -> list[int]:
    """Along which dimension a stored parameter is several matrices, and how many."""
    if isinstance(module, GatedExperts) and name == "gate_up_proj":
        return [1, 2]
    if path.rpartition(".")[2] == "c_attn" and name == "weight":
        return [1, 3]  # GPT-2's query, key and value, side by side in columns
    return [0, 1]


def build_optimizer(model: nn.Module | LanguageModel, optim: OptimConfig) -> torch.optim.Optimizer:
    """Over :func:`parameter_groups`: torch's fused AdamW where that is all that is asked for, else our own."""
    groups = parameter_groups(model, optim)
    low = any(parameter.dtype in (torch.bfloat16, torch.float16) for group in groups for parameter in group["params"])
    if optim.optimizer == "adamw" and not low:
        return torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps, fused=True)
    return MuonAdamW(groups, betas=optim.betas, eps=optim.eps, momentum=optim.muon_momentum)


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

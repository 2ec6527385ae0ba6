"""Every built-in router by its definition: one token at a time, in float64, without a line of moectl's code.

Also the table of configurations that the tests of all routers run over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moectl.moe import Router
from moectl.routers import build_router

E = 6

#: Key -> (name, options). Noise is off unless the key says otherwise.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "top1": ("top1", {"noise_std": 0.0}),
    "top1-noise": ("top1", {"noise_std": 0.5}),
    "switch": ("switch", {"noise_std": 0.0}),
    "top2": ("top2", {"noise_std": 0.0}),
    "topk-3": ("topk", {"noise_std": 0.0, "top_k": 3}),
    "topk-raw": ("topk", {"noise_std": 0.0, "top_k": 3, "norm_topk_prob": False}),
    "topk-all": ("topk", {"noise_std": 0.0, "top_k": E}),
    "topk-noise": ("topk", {"noise_std": 0.5, "top_k": 3}),
    "topk-clamp": ("topk", {"noise_std": 0.0, "top_k": 2, "logit_clamp": 1.5}),
    "noisy-topk": ("noisy-topk", {"top_k": 2}),
    "sigmoid": ("sigmoid", {"top_k": 2}),
    "sigmoid-raw": ("sigmoid", {"top_k": 1, "norm_topk_prob": False}),
    "sigmoid-groups": ("sigmoid", {"top_k": 3, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5}),
    "expert-choice": ("expert-choice", {"top_k": 2, "capacity_factor": 1.25}),
    "expert-choice-threshold": ("expert-choice-threshold", {"top_k": 2}),
}
NOISY = [key for key in CASES if "nois" in key]
TOKENS_CHOOSE = [key for key in CASES if not key.startswith("expert-choice")]

#: A token's experts, best first, with their weights.
Chosen = dict[int, Tensor]


def make(key: str, hidden_size: int, *, gate_std: float = 1.0, seed: int = 0) -> Router:
    """A fresh float32 router of a case, in training mode; its gate decided, its other state not at its start."""
    name, options = CASES[key]
    torch.manual_seed(seed)
    router = build_router(name, hidden_size=hidden_size, num_experts=E, **options)
    with torch.no_grad():
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter, std=gate_std)
        if name == "sigmoid":
            router.expert_bias.copy_(torch.linspace(-0.3, 0.3, E))
        if name == "expert-choice-threshold":
            router.threshold.copy_(torch.linspace(0.05, 0.4, E))
    return router


def route_by_token(router: Router, key: str, x_TD: Tensor, real: list[bool], normal_TE: Tensor) -> list[Chosen]:
    """What each token should do, differentiable in ``x_TD`` and in the router's float64 parameters.

    Args:
        router: a float64 copy, for its parameters, buffers and mode.
        normal_TE: the standard normal draws that stand behind this call's noise.
    """
    name, options = CASES[key]
    state = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    logits = [[(row * gate).sum() for gate in state["weight"]] for row in x_TD]
    bound = options.get("logit_clamp", math.inf)
    logits = [[logit.clamp(-bound, bound) for logit in row] for row in logits]
    if router.training and options.get("noise_std"):
        logits = [
            [logit + options["noise_std"] * normal for logit, normal in zip(row, normals, strict=True)]
            for row, normals in zip(logits, normal_TE, strict=True)
        ]
    if router.training and name == "noisy-topk":
        noise_DE = state["noise.weight"]
        std = [[softplus((row * noise_DE[:, e]).sum()) for e in range(E)] for row in x_TD]
        logits = [[logits[t][e] + normal_TE[t, e] * std[t][e] for e in range(E)] for t in range(len(logits))]
    if name == "expert-choice":
        return _expert_choice(logits, options, real)
    token = _TOKEN[name]
    return [token(row, options, state, router.training) if use else {} for row, use in zip(logits, real, strict=True)]


def softplus(value: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(value))


def softmax(logits: list[Tensor]) -> list[Tensor]:
    powers = [torch.exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


def sigmoid(logit: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-logit))


def best(scores: list[Any], k: int) -> list[int]:
    """The k largest, best first, ties to the lowest index."""
    values = [float(torch.as_tensor(score).detach()) for score in scores]
    return sorted(range(len(scores)), key=lambda index: (-values[index], index))[:k]


def _top1(logits: list[Tensor], options: Mapping[str, Any], state: Mapping[str, Tensor], training: bool) -> Chosen:
    (expert,) = best(logits, 1)
    soft = softmax(logits)[expert]
    return {expert: 1 + soft - soft.detach() if training else torch.ones_like(soft)}


def _topk(logits: list[Tensor], options: Mapping[str, Any], state: Mapping[str, Tensor], training: bool) -> Chosen:
    probs = softmax(logits)
    chosen = best(logits, options.get("top_k", 2))
    total = sum(probs[e] for e in chosen) if options.get("norm_topk_prob", True) else 1.0
    return {expert: probs[expert] / total for expert in chosen}


def _switch(logits: list[Tensor], options: Mapping[str, Any], state: Mapping[str, Tensor], training: bool) -> Chosen:
    return _topk(logits, {"top_k": 1, "norm_topk_prob": False}, state, training)


def _sigmoid(logits: list[Tensor], options: Mapping[str, Any], state: Mapping[str, Tensor], training: bool) -> Chosen:
    scores = [sigmoid(logit) for logit in logits]
    biased = [float((score + bias).detach()) for score, bias in zip(scores, state["expert_bias"], strict=True)]
    groups = options.get("n_group", 1)
    size = E // groups
    if groups > 1:
        of_group = [biased[g * size : (g + 1) * size] for g in range(groups)]
        opened = best([sum(sorted(group)[-2:]) for group in of_group], options["topk_group"])
        biased = [score if e // size in opened else -math.inf for e, score in enumerate(biased)]
    chosen = best(biased, options["top_k"])
    total = sum(scores[e] for e in chosen) if options.get("norm_topk_prob", True) else 1.0
    return {expert: options.get("routed_scaling_factor", 1.0) * scores[expert] / total for expert in chosen}


def _threshold(logits: list[Tensor], options: Mapping[str, Any], state: Mapping[str, Tensor], training: bool) -> Chosen:
    return {e: p for e, p in enumerate(softmax(logits)) if bool(p >= state["threshold"][e])}


def _expert_choice(logits: list[list[Tensor]], options: Mapping[str, Any], real: list[bool]) -> list[Chosen]:
    probs = [softmax(row) for row in logits]
    tokens = [token for token, use in enumerate(real) if use]
    capacity = math.ceil(options["top_k"] * len(tokens) / E * options["capacity_factor"])
    chosen: list[Chosen] = [{} for _ in logits]
    for expert in range(E):
        for place in best([probs[token][expert] for token in tokens], capacity):
            chosen[tokens[place]][expert] = probs[tokens[place]][expert]
    return chosen


_TOKEN: dict[str, Callable[[list[Tensor], Mapping[str, Any], Mapping[str, Tensor], bool], Chosen]] = {
    "top1": _top1,
    "switch": _switch,
    "topk": _topk,
    "top2": _topk,
    "noisy-topk": _topk,
    "sigmoid": _sigmoid,
    "expert-choice-threshold": _threshold,
}

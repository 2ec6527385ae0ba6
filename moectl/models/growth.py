"""More experts for a whole model, whoever computes it: every MoE layer grown, and what describes the model with it."""

from __future__ import annotations

from typing import Any

import torch

from moectl.config.schema import MoEConfig
from moectl.errors import ConfigError, MoectlError
from moectl.moe.growth import append_experts, multiply_experts
from moectl.moe.layer import MoELayer
from moectl.moe.router import Router
from moectl.routers import build_router

_INIT_KEYS = ("init", "init_noise", "allow_shrinking", "granularity", "drop_ratio", "experts_from", "router_prompts")


def multiplied(moe: MoEConfig, layer: MoELayer, times: int, *, parts: bool = False) -> MoEConfig:
    """What describes ``times`` as many experts: a router that visits ``times`` as many, unless one is all it takes.

    Raises:
        ConfigError: fewer than twice as many; a router with ``top_k`` above one that cannot be raised, or groups.
    """
    if times < 2:
        raise ConfigError(f"experts cannot be multiplied by {times}", "Give 2 or more.")
    router, size = dict(moe.router), layer.experts.intermediate_size
    top_k = layer.router.top_k
    if getattr(layer.router.config, "n_group", 1) > 1:
        raise ConfigError(
            f"{layer.router.label} chooses groups by their two best experts, which copies would change",
            "Grow a router without groups (n_group: 1).",
        )
    if top_k > 1 or (parts and "top_k" in type(layer.router.config).model_fields):
        router = {**router, "name": "topk" if moe.router_name == "top2" else moe.router_name, "top_k": times * top_k}
    if router.get("new_experts"):
        router["new_experts"] *= times
    grown = described(moe, router, times * layer.experts.num_experts, size // times if parts else size)
    if parts:  # the shared experts stay as wide as they are, in units of the smaller size
        grown = grown.model_copy(update={"n_shared_experts": times * moe.n_shared_experts})
    return grown


def appended(moe: MoEConfig, layer: MoELayer, extra: int) -> MoEConfig:
    """What describes ``extra`` experts more, closed at first.

    Raises:
        ConfigError: none; a router whose tokens do not choose, or with groups.
    """
    if extra < 1:
        raise ConfigError(f"{extra} experts cannot be added", "Give 1 or more.")
    options = type(layer.router.config).model_fields
    if "new_experts" not in options or getattr(layer.router.config, "n_group", 1) > 1:
        raise ConfigError(
            f"{layer.router.label} cannot keep new experts closed",
            "Use a router whose tokens choose (top1, topk, sigmoid without groups), or multiply the experts instead.",
        )
    router = {**moe.router, "new_experts": extra}
    return described(moe, router, layer.experts.num_experts + extra, layer.experts.intermediate_size)


def described(moe: MoEConfig, router: dict[str, Any], num_experts: int, size: int) -> MoEConfig:
    """``moe`` with other numbers; how its experts first came to be is no longer in it."""
    plain = {key: value for key, value in moe.model_dump().items() if key not in _INIT_KEYS}
    plain |= {"init": "random", "router": router, "num_experts": num_experts, "expert_intermediate_size": size}
    return MoEConfig.model_validate(plain)


def multiply(layers: dict[int, MoELayer], moe: MoEConfig, times: int, *, parts: bool = False) -> MoEConfig:
    """Grow every layer by the factor ``times``, in place; returns what describes them now."""
    first = _first(layers)
    grown = multiplied(moe, first, times, parts=parts)
    for layer, router in _routers(layers, grown):
        multiply_experts(layer, router, times, parts=parts)
    return grown


def append(
    layers: dict[int, MoELayer],
    moe: MoEConfig,
    extra: int,
    *,
    noise: float = 1e-3,
    generator: torch.Generator | None = None,
) -> MoEConfig:
    """Add ``extra`` experts to every layer, in place; returns what describes them now."""
    first = _first(layers)
    grown = appended(moe, first, extra)
    for layer, router in _routers(layers, grown):
        append_experts(layer, router, noise=noise, generator=generator)
    return grown


def _first(layers: dict[int, MoELayer]) -> MoELayer:
    if not layers:
        raise ConfigError("the model has no experts to grow", "Upcycle it first.")
    return next(iter(layers.values()))


def _routers(layers: dict[int, MoELayer], moe: MoEConfig) -> list[tuple[MoELayer, Router]]:
    """All of them, before the first layer is changed."""
    made = []
    for layer in layers.values():
        try:
            router = build_router(
                moe.router_name, hidden_size=layer.router.hidden_size, num_experts=moe.num_experts, **moe.router_options
            )
        except MoectlError as error:
            raise ConfigError(f"{layer.router.label} cannot be grown: {error.message}", error.hint) from error
        made.append((layer, router))
    return made

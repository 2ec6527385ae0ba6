"""More experts for a whole model, whoever computes it: every MoE layer grown, and what describes the model with it."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch

from moectl.config.schema import MoEConfig
from moectl.errors import ConfigError, MoectlError
from moectl.moe.capacity import DENOMINATOR
from moectl.moe.growth import append_experts, multiply_experts
from moectl.moe.layer import MoELayer
from moectl.moe.router import Router
from moectl.routers import build_router

_INIT_KEYS = ("init", "init_noise", "allow_shrinking", "granularity", "drop_ratio", "experts_from", "router_prompts")


def multiplied(moe: MoEConfig, layer: MoELayer, times: int, *, parts: bool = False) -> MoEConfig:
    """What describes ``times`` as many experts: a router that visits ``times`` as many, unless one is all it takes.

    Raises:
        ConfigError: fewer than twice as many; a router with ``top_k`` above one that cannot be raised, or groups;
            a capacity under which copies would compute something else.
    """
    if times < 2:
        raise ConfigError(f"experts cannot be multiplied by {times}", "Give 2 or more.")
    router, size = dict(moe.router), layer.experts.intermediate_size
    options, top_k = type(layer.router.config).model_fields, own_top_k(layer.router)
    if getattr(layer.router.config, "n_group", 1) > 1:
        raise ConfigError(
            f"{layer.router.label} chooses groups by their two best experts, which copies would change",
            "Grow a router without groups (n_group: 1).",
        )
    raised = "top_k" in options and (top_k > 1 or parts or not layer.router.token_choice)
    if raised:
        router = {**router, "name": "topk" if moe.router_name == "top2" else moe.router_name, "top_k": times * top_k}
    if router.get("new_experts"):
        router["new_experts"] *= times
    plain = _plain(moe, router, times * layer.experts.num_experts, size // times if parts else size)
    if parts:  # the shared experts stay as wide as they are, in units of the smaller size
        plain["n_shared_experts"] = times * moe.n_shared_experts
    schedule = plain["schedule"]["top_k"]
    if schedule is not None and raised:
        schedule["points"] = [(share, times * value) for share, value in schedule["points"]]
    elif schedule is not None:  # it would end at another number than the one expert that a token keeps
        plain["schedule"]["top_k"] = None
    # Where a token visits one of the copies: all of them wait for the same tokens, unless those go on to the next.
    if not raised and (moe.capacity is None or moe.capacity.overflow == "drop"):
        _keep_room(plain, Fraction(times))
    elif not raised and moe.capacity is not None and moe.capacity.in_eval:
        raise ConfigError(
            "copies of an expert would take the tokens for which it has no room: the function would change",
            "Grow without moe.capacity.in_eval, or with overflow: drop, or give the router a top_k above 1.",
        )
    return MoEConfig.model_validate(plain)


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
    router, before = {**moe.router, "new_experts": extra}, layer.experts.num_experts
    plain = _plain(moe, router, before + extra, layer.experts.intermediate_size)
    _keep_room(plain, Fraction(before + extra, before))
    return MoEConfig.model_validate(plain)


def changes(before: MoEConfig, after: MoEConfig) -> tuple[str, ...]:
    """What growing changed beside the experts and their router, in sentences."""
    said = []
    if before.capacity is not None and after.capacity is not None and before.capacity != after.capacity:
        said.append(
            f"moe.capacity.factor is {after.capacity.factor:g} now, not {before.capacity.factor:g}: the same room for"
            " the tokens of an expert"
        )
    old, new = before.schedule.top_k, after.schedule.top_k
    if old is not None and new is None:
        said.append("moe.schedule.top_k is gone: a token keeps one expert")
    elif old is not None and new is not None and old != new:
        said.append(f"moe.schedule.top_k ends at {new.final:g} now, not {old.final:g}")
    return tuple(said)


def own_top_k(router: Router) -> int:
    """The config's, whatever a schedule has made of it in training."""
    return int(getattr(router.config, "top_k", 1))


def _plain(moe: MoEConfig, router: dict[str, Any], num_experts: int, size: int) -> dict[str, Any]:
    """``moe`` with other numbers, as containers; how its experts first came to be is no longer in it."""
    plain = {key: value for key, value in moe.model_dump().items() if key not in _INIT_KEYS}
    return plain | {
        "init": "random",
        "router": router,
        "num_experts": num_experts,
        "expert_intermediate_size": size,
    }


def _keep_room(plain: dict[str, Any], ratio: Fraction) -> None:
    """Every capacity factor times ``ratio``: as much room per expert where there are so many more for as many ``k``."""
    capacity, schedule = plain["capacity"], plain["schedule"]["capacity_factor"]
    if capacity is not None:
        keys = ("factor", "min_factor", "max_factor") if capacity["dynamic"] else ("factor",)
        capacity.update({key: _times(capacity[key], ratio) for key in keys})
    if schedule is not None:
        schedule["points"] = [(share, _times(value, ratio)) for share, value in schedule["points"]]


def _times(factor: float, ratio: Fraction) -> float:
    return float(Fraction(factor).limit_denominator(DENOMINATOR) * ratio)


def multiply(
    layers: dict[int, MoELayer],
    moe: MoEConfig,
    times: int,
    *,
    parts: bool = False,
    noise: float = 1e-3,
    generator: torch.Generator | None = None,
) -> MoEConfig:
    """Grow every layer by the factor ``times``, in place; returns what describes them now."""
    first = _first(layers)
    grown = multiplied(moe, first, times, parts=parts)
    for layer, router in _routers(layers, grown):
        multiply_experts(layer, router, times, parts=parts, noise=noise, generator=generator)
        if grown.capacity != moe.capacity:
            _widen(layer, Fraction(times))
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
        rooms = Fraction(router.num_experts, layer.router.num_experts)
        append_experts(layer, router, noise=noise, generator=generator)
        _widen(layer, rooms)
    return grown


def _widen(layer: MoELayer, ratio: Fraction) -> None:
    """The layer's own capacity factor, which training may have moved, times ``ratio``."""
    if layer.capacity is not None:
        layer.capacity = replace(layer.capacity, factor=_times(layer.capacity.factor, ratio))


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

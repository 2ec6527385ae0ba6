"""The variants of an ablation: what differs between its runs, and what must not.

Two runs can be held against each other only at equal tokens, learning-rate horizon, warm-up in steps, data order,
evaluation and seed: variants that would not be equal in these are refused before anything is trained.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moectl.config.loading import find_config, load_config, parse_set, read_yaml
from moectl.config.presets import PRESETS, kind_of
from moectl.config.schema import ExperimentConfig
from moectl.errors import ConfigError, unknown
from moectl.paths import NAME_RULE, check_name

_OWN = ("name", "train.seed")  # an ablation gives every run a name and a seed of its own


@dataclass(frozen=True)
class Variant:
    """One configuration of an ablation: a name, and what it changes in the config that all share."""

    name: str
    preset: str | None = None
    router: str | None = None
    sets: tuple[str, ...] = ()


def variants_of(presets: str | None, routers: str | None = None, own: Sequence[str] = ()) -> tuple[Variant, ...]:
    """The variants that were asked for, in this order; the first is what the others are compared with.

    Args:
        presets: names with commas; None: all presets, where nothing else is asked for.
        routers: names or ``path.py:Class``, with commas: the preset ``moe`` with each of them.
        own: ``NAME:KEY=VALUE,KEY=VALUE`` each: the config as it is with these changes.

    Raises:
        ConfigError: an unknown preset, a name twice or not fit for a folder, a change that is no ``KEY=VALUE``.
    """
    if presets is None and routers is None and not own:
        presets = ",".join(PRESETS)
    found = [_preset(name) for name in _names(presets, "--presets")]
    found += [Variant(_safe(kind_of("moe", name)), "moe", name) for name in _names(routers, "--routers")]
    found += [_own_variant(text) for text in own]
    names = [variant.name for variant in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"the variant '{name}' is named twice", "Give each its own name: --variant NAME:KEY=VALUE"
            )
    return tuple(found)


def seeds_of(text: str) -> tuple[int, ...]:
    """``3`` is the seeds 0, 1 and 2; ``0,7,9`` are these (and ``7,`` is one alone).

    Raises:
        ConfigError: no number, a negative one, none at all, or one twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,18}", part) for part in parts if part) or not any(parts):
        raise ConfigError(f"--seeds {text!r} is neither a count nor a list", "Examples: --seeds 3 · --seeds 0,1,2")
    numbers = [int(part) for part in parts if part]
    if len(parts) == 1:
        if not 1 <= numbers[0] <= 1000:
            raise ConfigError(f"--seeds {text}: a count is between 1 and 1000", "For one seed: --seeds 7,")
        return tuple(range(numbers[0]))
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"--seeds {text}: a seed is named twice", "One seed gives one run.")
    return tuple(numbers)


def configs_of(
    path: str | None,
    variants: Sequence[Variant],
    *,
    sets: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, ExperimentConfig]:
    """The config of every variant by its name, in order; without name, and with the config's own seed.

    ``moe.…`` among ``sets`` and ``overrides`` passes a dense variant by, where another one takes it.

    Raises:
        ConfigError: a config that does not hold, two variants that are the same, or that differ in what must be
            equal (naming the keys); a name or seed given.
    """
    given = dict(overrides or {})
    for key in (*given, *(parse_set(text)[0] for text in sets)):
        if key in _OWN:
            raise ConfigError(
                f"{key} is not for an ablation to be given", "Its runs are named by --name, seeded by --seeds."
            )
    mixed = any(not _dense(variant) for variant in variants)
    configs: dict[str, ExperimentConfig] = {}
    for variant in variants:
        drop = mixed and _dense(variant)
        kept = [text for text in sets if not (drop and text.strip().startswith("moe."))]
        flags = {key: value for key, value in given.items() if not (drop and key.startswith("moe."))}
        if variant.router is not None:
            flags["moe.router.name"] = variant.router
        config = load_config(path, sets=[*kept, *variant.sets], overrides=flags, preset=variant.preset)
        configs[variant.name] = config.model_copy(update={"name": None})
    _refuse_twins(configs)
    differing = unequal(configs)
    if differing:
        key, values = next(iter(differing.items()))
        listing = ", ".join(f"{value} in {name}" for name, value in values.items())
        raise ConfigError(
            f"the variants are not equal in {', '.join(differing)} ({key}: {listing}): they could not be compared",
            "Give such a change to all of them, with --set.",
        )
    return configs


def unequal(configs: Mapping[str, ExperimentConfig]) -> dict[str, dict[str, Any]]:
    """What must be equal and is not: key → value by variant."""
    held = {name: _held(config) for name, config in configs.items()}
    keys = list(next(iter(held.values()), {}))
    table = {key: {name: values[key] for name, values in held.items()} for key in keys}
    return {key: row for key, row in table.items() if len({json.dumps(value) for value in row.values()}) > 1}


def group_name(path: str | None, sets: Sequence[str], overrides: Mapping[str, Any], data: str | None) -> str:
    """A name for the ablation of a config: the same whenever the same is asked for, whatever its variants and seeds."""
    values = {} if path is None else read_yaml(find_config(path))[0]
    asked = json.dumps([values, sorted(sets), dict(overrides), data], sort_keys=True, default=str)
    stem = "ablation" if path is None else _safe(find_config(path).stem)
    return f"{stem}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"


def _held(config: ExperimentConfig) -> dict[str, Any]:
    train, optim = config.train, config.optim
    return {
        "data": config.data.model_dump(mode="json"),
        "train.steps": train.steps,
        "train.batch_size · train.grad_accum": train.batch_size * train.grad_accum,
        "train.seed": train.seed,
        "train.eval_every": train.eval_every,
        "optim.warmup_steps": optim.warmup_steps,
        "optim.schedule": optim.schedule,
        "optim.min_lr_ratio": optim.min_lr_ratio,
        "eval.max_blocks": config.eval.max_blocks,
        "eval.batch_size": config.eval.batch_size,
    }


def _refuse_twins(configs: Mapping[str, ExperimentConfig]) -> None:
    seen: dict[str, str] = {}
    for name, config in configs.items():
        content = config.model_copy(update={"preset": None}).content_hash()
        if content in seen:
            raise ConfigError(
                f"the variants '{seen[content]}' and '{name}' are the same configuration", "Leave one of them out."
            )
        seen[content] = name


def _names(text: str | None, option: str) -> list[str]:
    if text is None:
        return []
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ConfigError(f"{option} {text!r} holds an empty name", f"Example: {option} a,b")
    return names


def _preset(name: str) -> Variant:
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return Variant(name, name)


def _own_variant(text: str) -> Variant:
    name, colon, changes = text.partition(":")
    if not colon or "=" in name:
        raise ConfigError(
            f"--variant {text!r} is not of the form NAME:KEY=VALUE", "Example: --variant low:optim.lr=1e-3"
        )
    # A comma begins a new change only where a key and its = follow: lists have commas, too.
    sets = tuple(part for part in re.split(r",(?=\s*[\w.-]+=)", changes) if part.strip())
    for part in sets:
        key = parse_set(part)[0]
        if key in _OWN:
            raise ConfigError(f"--variant {name}: {key} is not for a variant to change", "Seeds are given by --seeds.")
    try:
        return Variant(check_name(name), sets=sets)
    except ValueError:
        raise ConfigError(
            f"'{name}' is not a usable name of a variant", f"{NAME_RULE[0].upper()}{NAME_RULE[1:]}."
        ) from None


def _dense(variant: Variant) -> bool:
    return variant.preset == "dense" or any(text.replace(" ", "") == "preset=dense" for text in variant.sets)


def _safe(text: str) -> str:
    """Fit for a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "variant"

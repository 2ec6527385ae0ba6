"""Named starting points. A preset says only what makes it what it is.

Tokens, learning-rate schedule and warm-up, data order, evaluation and seed are the same in all of them, so that
runs of two presets over one config file can be compared.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from moectl.errors import unknown

PRESETS: dict[str, dict[str, Any]] = {
    # The baseline: no experts.
    "dense": {"moe": None},
    # Eight experts, top-1, in the last four layers.
    "moe": {"moe": {"num_experts": 8, "router": {"name": "top1"}, "layers": "last:4"}},
    # What happens without balancing: no balance loss, no exploration noise, neither by a schedule; stop once it has
    # collapsed.
    "no-lb": {
        "moe": {
            "lb_coef": 0.0,
            "balance_loss": ["switch"],
            "router": {"noise_std": 0.0},
            "schedule": {"lb_coef": None, "noise_std": None},
        },
        "train": {"early_stop": True},
    },
    # Two experts per token from the first step to the last.
    "top2": {"moe": {"router": {"name": "top2"}, "schedule": {"top_k": None}}},
}


def preset_values(name: str) -> dict[str, Any]:
    """A copy of a preset's values; an unknown name is a ConfigError that names the nearest."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return deepcopy(PRESETS[name])


def kind_of(preset: str | None, router: str | None) -> str:
    """What to call a run: its preset, with the router where that is not the preset's own; without one its router.

    >>> kind_of("moe", "top1"), kind_of("moe", "sigmoid"), kind_of(None, "path.py:Mine"), kind_of("dense", None)
    ('moe', 'moe-sigmoid', 'Mine', 'dense')
    """
    plain = None if router is None else router.rsplit(":", 1)[-1]
    if preset is None or plain is None:
        return preset or plain or "dense"
    moe = PRESETS.get(preset, {}).get("moe")
    own = None if moe is None else moe.get("router", {}).get("name", "top1")
    return preset if router == own else f"{preset}-{plain}"

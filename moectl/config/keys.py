"""Dotted config keys: which exist, which is nearest to a misspelt one, where a value came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel


class Origin(NamedTuple):
    """Where the values of a config came from, for error messages.

    ``lines`` maps the file's dotted keys to their lines; ``flags`` and ``sets`` list dotted keys.
    """

    file: Path | None = None
    lines: Mapping[str, int] = {}
    flags: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()


def all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a model, sections included, in the schema's order."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(f"{prefix}{name}")
        for option in (field.annotation, *get_args(field.annotation)):
            if isinstance(option, type) and issubclass(option, BaseModel):
                keys += all_keys(option, f"{prefix}{name}.")
    return keys


def dotted(loc: Sequence[int | str], below: Any = None) -> str:
    """pydantic's location as a dotted key; ``below`` leads to the first key under an unknown section."""
    parts = [str(part) for part in loc]
    while isinstance(below, Mapping) and below:
        name = next(iter(below))
        parts.append(str(name))
        below = below[name]
    return ".".join(parts)


def nearest_key(key: str, model: type[BaseModel] | None, prefix: str = "") -> str | None:
    """``"Did you mean 'train.steps'?"``: the same leaf elsewhere first, then the nearest spelling."""
    if model is None:
        return None
    known = all_keys(model)
    section, _, leaf = key.rpartition(".")
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    siblings = [name for name in known if name.rpartition(".")[0] == section]
    matches = (
        get_close_matches(key, same_leaf, n=1, cutoff=0.0)
        or get_close_matches(key, siblings, n=1, cutoff=0.7)
        or get_close_matches(key, known, n=1, cutoff=0.55)
        or [name for name in known if get_close_matches(leaf, [name.rpartition(".")[2]], n=1, cutoff=0.75)][:1]
    )
    return f"Did you mean '{prefix}{matches[0]}'?" if matches else None


def source_of(key: str, origin: Origin | None) -> str:
    """`` (configs/moe.yaml, line 3)``, `` (--set)``, `` (a flag)`` or nothing, with a leading space."""
    if origin is None or not key:
        return ""
    if any(_covers(name, key) for name in origin.sets):
        return " (--set)"
    if any(_covers(name, key) for name in origin.flags):
        return " (a flag)"
    while key:
        if key in origin.lines:
            return f" ({origin.file}, line {origin.lines[key]})"
        key = key.rpartition(".")[0]
    return ""


def _covers(given: str, key: str) -> bool:
    return given == key or key.startswith(f"{given}.") or given.startswith(f"{key}.")

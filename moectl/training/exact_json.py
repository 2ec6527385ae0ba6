"""JSON that reads back as exactly what was written: floats to the last bit, NaN, infinities, tuples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FLOAT, _TUPLE = "$float", "$tuple"


def encode(value: Any, where: str = "state") -> Any:
    """``value`` as plain JSON that :func:`decode` turns back exactly.

    Python's JSON writes the shortest text that reads back as the same float; NaN and infinities, which JSON
    has not, become ``{"$float": "NaN"}``, and tuples ``{"$tuple": [...]}``.

    Raises:
        TypeError: a value that JSON cannot hold, or a key that is no string, with its place.
        ValueError: one of the two reserved keys.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if value != value:
            return {_FLOAT: "NaN"}
        if value in (float("inf"), float("-inf")):
            return {_FLOAT: "Infinity" if value > 0 else "-Infinity"}
        return float(value)
    if isinstance(value, list | tuple):
        items = [encode(item, f"{where}[{position}]") for position, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where}: key {key!r} is no string, and JSON would make it one")
            if key in (_FLOAT, _TUPLE):
                raise ValueError(f"{where}: the key '{key}' is reserved")
        return {key: encode(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(f"{where}: a {type(value).__name__} is no JSON; tensors belong into a part of their own")


def decode(value: Any) -> Any:
    """The value that :func:`encode` was given."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_FLOAT}:
            return float(value[_FLOAT])
        if value.keys() == {_TUPLE}:
            return tuple(decode(item) for item in value[_TUPLE])
        return {key: decode(item) for key, item in value.items()}
    return value

"""Rotary helpers, as far as they can be recognised by their names."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_NAME = re.compile(r"rope|rotary|rotat", re.IGNORECASE)
_NOT = re.compile(r"half|pair|every", re.IGNORECASE)


def rotary_modules(module: nn.Module) -> list[str]:
    """Paths of submodules that are called like rotary embeddings."""
    return [path for path, _ in module.named_modules() if _NAME.search(path.rpartition(".")[2])]


@contextmanager
def rotary_functions(module: nn.Module, look: Callable[[Any], None]) -> Iterator[None]:
    """While it lasts, ``look`` is given what functions like ``apply_rotary`` of the classes' own modules return."""
    spaces = {cls.__module__ for part in module.modules() for cls in type(part).__mro__}
    replaced: list[tuple[Any, str, Any]] = []
    for space in spaces:
        home = sys.modules.get(space)
        if home is None or space.partition(".")[0] in ("torch", "builtins", "moectl"):
            continue
        for name, value in list(vars(home).items()):
            if inspect.isfunction(value) and _NAME.search(name) and not _NOT.search(name):
                setattr(home, name, _looked_at(value, look))
                replaced.append((home, name, value))
    try:
        yield
    finally:
        for home, name, value in replaced:
            setattr(home, name, value)


def _looked_at(function: Callable[..., Any], look: Callable[[Any], None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if len(args) + len(kwargs) > 1 or not isinstance(result, Tensor):  # of one tensor alone: only a half turn
            look(result)
        return result

    return inner

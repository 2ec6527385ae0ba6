"""Word problems with worked solutions: about a hundred templates, each drawn several times from a recorded seed.

A template is a function from a ``Draw`` to a ``Problem``. Every number in it is computed, exactly, with integers
and fractions. A text is ``{problem}\n\n{rationale}`` with nothing in front of either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

from ..common import Row, normalised, size
from . import algebra, counting, data, everyday, numbers, proportion, rates, shapes, time
from .draw import Draw, Problem

SEED = 20_240
BYTES_PER_TEMPLATE = 1_850
SOURCE = "moectl word problems"
_MODULES: tuple[ModuleType, ...] = (everyday, proportion, rates, shapes, counting, numbers, data, algebra, time)


def templates() -> dict[str, Callable[[Draw], Problem]]:
    """Template name to function, in order of modules and definitions."""
    found: dict[str, Callable[[Draw], Problem]] = {}
    for module in _MODULES:
        for function in module.TEMPLATES:
            if function.__name__ in found:
                raise ValueError(f"two templates are called {function.__name__}")
            found[function.__name__] = function
    return found


def problems(seed: int = SEED) -> Iterator[tuple[str, str, Problem]]:
    """(template, text, problem) for every shipped problem, in the shipped order."""
    seen: set[str] = set()
    for name, template in templates().items():
        used, attempt = 0, 0
        while used < BYTES_PER_TEMPLATE and attempt < 60:
            draw = Draw(f"{seed}/{name}/{attempt}")
            attempt += 1
            problem = template(draw)
            text = styled(f"{problem.problem}\n\n{problem.rationale}", draw)
            if normalised(text) not in seen:
                seen.add(normalised(text))
                used += size(text)
                yield name, text, problem


def styled(text: str, draw: Draw) -> str:
    """The same text with one of the usual pairs of signs for times and divided by."""
    times, over = draw.pick(("*", "/"), ("×", "÷"), ("×", "/"))
    return text.replace(" * ", f" {times} ").replace(" / ", f" {over} ")


def build(seed: int = SEED) -> list[Row]:
    """Rows of the word problems, one group per template."""
    return [Row(text, f"problems/{name}", SOURCE) for name, text, _ in problems(seed)]

"""Drawing names, things and numbers for word problems, and writing numbers down.

Only ``random.Random.random()`` is used: it is the one method whose sequence Python promises to keep for a seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeVar

T = TypeVar("T")
Number = int | Fraction

NAMES = (
    "Amara Bao Chiara Dmitri Elif Farid Greta Hana Ivo Joao Kavya Lena Mateo Nadia Oskar Priya Quentin Rosa Samir "
    "Tove Umar Vera Wen Ximena Yusuf Zofia Anders Bella Cem Dana Emeka Fiona Goran Hilda Ines Jonas Kofi Lucia "
    "Marek Noor Olga Pedro Rania Sven Tariq Una Viktor Wanda Yara Zeno Astrid Bruno Celine Diego Esther Femi "
    "Gwen Hugo Iris Jamal Keiko Leo Mina Nils Odile Pavel Ruth Selma Theo Ursula"
).split()
TOWNS = (
    "Ashford Brackwater Calder Dunmore Eastvale Fernhill Glenport Harrow Inverlea Jarrow Kelso Larkfield Millbrook "
    "Norwick Oakhurst Penrith Quarley Redcliff Stonebridge Thornby Upwell Westmere Yarrow"
).split()


class Problem(NamedTuple):
    """A word problem, its worked solution, the answer and the numbers it was made from."""

    problem: str
    rationale: str
    answer: Number | str
    facts: dict[str, int | Fraction | str | list[int]]


class Draw:
    """One reproducible stream of choices, seeded by a string."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def whole(self, low: int, high: int, step: int = 1) -> int:
        """A whole number from ``low`` to ``high`` (both included) in steps of ``step``."""
        return low + step * int(self._random() * ((high - low) // step + 1))

    def pick(self, *options: T) -> T:
        """One of the options."""
        return options[int(self._random() * len(options))]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """``count`` different options in random order."""
        left = list(options)
        return [left.pop(int(self._random() * len(left))) for _ in range(count)]

    def names(self, count: int) -> list[str]:
        """``count`` different first names."""
        return self.sample(NAMES, count)

    def name(self) -> str:
        """One first name."""
        return self.pick(*NAMES)

    def towns(self, count: int) -> list[str]:
        """``count`` different place names."""
        return self.sample(TOWNS, count)

    def until(self, make: Callable[[], T], accept: Callable[[T], bool]) -> T:
        """Draw again until ``accept`` holds."""
        while not accept(value := make()):
            pass
        return value


def num(value: Number) -> str:
    """A number as people write it: 1,250, 2.75 where the decimals end, otherwise 7/12."""
    value = Fraction(value)
    if value.denominator == 1:
        return f"{value.numerator:,}"
    scaled, places = value, 0
    while scaled.denominator != 1 and places < 4:
        scaled, places = scaled * 10, places + 1
    if scaled.denominator != 1:
        return frac(value)
    text = f"{abs(scaled.numerator):0{places + 1}d}"
    whole, tail = text[:-places], text[-places:]
    return f"{'-' if value < 0 else ''}{int(whole):,}.{tail}"


def frac(value: Number) -> str:
    """A number as a fraction in lowest terms, 7/12, or a whole number."""
    value = Fraction(value)
    return f"{value.numerator:,}" if value.denominator == 1 else f"{value.numerator}/{value.denominator}"


def money(value: Number) -> str:
    """Dollars and cents; whole dollars without cents. Raises ValueError for part of a cent."""
    cents = Fraction(value) * 100
    if cents.denominator != 1:
        raise ValueError(f"{value} dollars is not a whole number of cents")
    whole, rest = divmod(cents.numerator, 100)
    return f"${whole:,}" if rest == 0 else f"${whole:,}.{rest:02d}"


def listed(items: Sequence[object], last: str = "and") -> str:
    """``a, b and c``."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def plural(count: Number, word: str, many: str = "") -> str:
    """``1 day``, ``3 days``."""
    return f"{num(count)} {word if count == 1 else many or word + 's'}"


def ordinal(n: int) -> str:
    """``21st``."""
    suffix = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"


def a(n: int) -> str:
    """``a 7`` but ``an 8``, ``an 11``, ``an 18``: the article a number takes."""
    return f"{'an' if n in (8, 11, 18) or 80 <= n < 90 or 800 <= n < 900 else 'a'} {n}"

"""What a probe is: a named question, with the cases that ask it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from moectl.parity.case import Case, Level, Weights
from moectl.parity.probes.bench import Bench

EVERY_LEVEL: tuple[Level, ...] = ("model", "layer", "moe", "attention", "router")
EXACT = (torch.float64, torch.float32)


@dataclass(frozen=True)
class Probe:
    """A case that hurts.

    Attributes:
        name: lower-case, with hyphens.
        summary: what it asks, in a few words.
        build: makes its cases; raises :class:`Unsupported` where the question does not arise.
        levels: the components that it says something about.
        dtypes: those that it runs in.
        sides: the candidate against Hugging Face; or our formula, with Hugging Face's casts, against Hugging
            Face as it is: the anchor of all the others.
        of_code: it asks about how something is run: a formula has no mode, no cache and no compiler.
        largest_only: it takes long, and of several components only the largest is asked.
    """

    name: str
    summary: str
    build: Callable[[Bench], Iterator[Case]]
    levels: tuple[Level, ...] = EVERY_LEVEL
    dtypes: tuple[torch.dtype, ...] = EXACT
    sides: Literal["candidate", "formula"] = "candidate"
    largest_only: bool = False
    of_code: bool = False

    def cases(
        self,
        family: str,
        level: Level,
        *,
        config: Mapping[str, Any],
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        weights: Weights | None = None,
    ) -> Iterator[Case]:
        """The probe's cases.

        Args:
            weights: of a checkpoint, in ``dtype``; random ones from ``seed`` otherwise.

        Raises:
            Unsupported: the question does not arise for this family, component, dtype or checkpoint; why is said.
        """
        yield from self.build(Bench(family, level, dict(config), seed, dtype, weights))

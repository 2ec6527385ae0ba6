"""What holds for which family and component: measured, on a tiny model of each, when it is asked for."""

from __future__ import annotations

from typing import NamedTuple

import torch

from moectl.parity.case import Level, Subject, Unsupported
from moectl.parity.contest import contest
from moectl.parity.families import FAMILIES, config_of, levels_of
from moectl.parity.own import Own
from moectl.parity.probes import Bench
from moectl.parity.reference import FormulaSubject
from moectl.parity.standard import Standards


class Cell(NamedTuple):
    """One family, component and side.

    Attributes:
        family, level: compared.
        candidate: ``moectl`` for its own layers, ``formula`` for the plain one that diagnosis uses.
        holds: to 1e-10 in float64, every tensor and gradient; None where there is no such side.
        tensors: that were compared.
        ratio: the worst error over its tolerance.
        says: why not, where it does not hold or there is none.
    """

    family: str
    level: Level
    candidate: str
    holds: bool | None
    tensors: int
    ratio: float
    says: str


def overview(seed: int = 0) -> list[Cell]:
    """Every family at every level: Hugging Face against moectl's own layers and against the formula, in float64."""
    cells = []
    for family in FAMILIES:
        standards = Standards(family)
        sides: dict[str, Subject] = {"moectl": Own(family), "formula": FormulaSubject(family)}
        for level in levels_of(family):
            cells += [_cell(family, level, name, side, standards, seed) for name, side in sides.items()]
    return cells


def _cell(family: str, level: Level, name: str, side: Subject, standards: Standards, seed: int) -> Cell:
    case = Bench(family, level, config_of(family, "tiny"), seed, torch.float64).case("float64")
    try:
        outcome = contest(case, side, standards.standard(case))
    except Unsupported as reason:
        return Cell(family, level, name, None, 0, 0.0, str(reason))
    if outcome.comparison is None:
        failed = outcome.failure is not None
        says = outcome.failure.message if outcome.failure is not None else outcome.unsupported
        return Cell(family, level, name, False if failed else None, 0, 0.0, says)
    comparison = outcome.comparison
    says = "" if comparison.first is None else f"{comparison.first.name} differs"
    worst = max((row.ratio for row in comparison.rows), default=0.0)
    return Cell(family, level, name, comparison.ok, comparison.compared, worst, says)

"""A candidate that is the formula with a mistake made, showing as much or as little of itself as asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from moectl.parity.case import Case, Inputs, Level, Reroute
from moectl.parity.diagnosis.separating import separating_cases
from moectl.parity.families import config_of, formula_of, random_weights
from moectl.parity.hypotheses import Variant
from moectl.parity.reference import FormulaSubject
from moectl.parity.tape import Tape

#: What a candidate that can hardly be looked into shows: its result.
OUTPUTS = ("attn.output", "mlp.output", "mlp.residual", "logits")


class Planted:
    """A :class:`Subject <moectl.parity.case.Subject>` that makes ``mistake``.

    Args:
        shows: endings of the tensors on its tape; None for all.
    """

    name = "planted"

    def __init__(self, family: str, mistake: Variant, shows: Sequence[str] | None = None) -> None:
        self.family, self.mistake, self.shows = family, mistake, shows

    def run(self, case: Case, reroute: Reroute | None = None) -> Tape:
        change = self.mistake.formula
        subject = FormulaSubject(
            self.family,
            change=None if change is None else lambda formula: change(formula, case),
            change_weights=self.mistake.weights,
        )
        if self.mistake.inputs is not None:
            case = replace(case, inputs=self.mistake.inputs(case.inputs))
        whole, shown = subject.run(case), Tape()
        for name, tensor in whole.items():
            if self.shows is None or f".{name}".endswith(tuple(f".{ending}" for ending in self.shows)):
                shown.record(name, tensor)
        return shown


def cases_of(level: Level, family: str = "qwen3", **changed: object) -> list[Case]:
    """The separating cases of a tiny component with random weights."""
    config = config_of(family, "tiny") | changed
    weights = random_weights(formula_of(family, config), level, seed=0, dtype=torch.float64)
    inputs = Inputs(input_ids=torch.zeros(1, 1, dtype=torch.long)) if level == "model" else Inputs()
    return list(separating_cases(Case("planted", level, config, weights, inputs, gradients=False)))

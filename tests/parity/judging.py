"""What compare-hf makes of a mutant: whether it is caught, at which tensor, and what it is called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moectl.parity.candidate.side import load_candidate
from moectl.parity.case import Case, Inputs, Level
from moectl.parity.compare import compare
from moectl.parity.diagnosis.diagnose import Diagnosis, diagnose
from moectl.parity.diagnosis.finding import Finding
from moectl.parity.diagnosis.low_precision import missing_casts
from moectl.parity.diagnosis.separating import separating_cases
from moectl.parity.families import config_of, formula_of, random_weights
from moectl.parity.hugging_face import HuggingFace
from moectl.parity.tape import Tape
from tests.parity.cases import case
from tests.parity.mutants import Mutant


class Judgement(NamedTuple):
    """What came of a mutant.

    Attributes:
        first: the first tensor that differs from Hugging Face's, or "".
        diagnosis: of the difference, if there is one.
    """

    first: str
    diagnosis: Diagnosis | None

    @property
    def named(self) -> frozenset[str]:
        """All hypotheses that were named; one finding is one class."""
        findings = self.diagnosis.findings if self.diagnosis is not None else ()
        return frozenset(name for finding in findings for name in finding.hypotheses)


_answers: dict[tuple[Level, str], tuple[list[Case], list[Tape]]] = {}


def cases_and_answers(level: Level, config: Mapping[str, Any]) -> tuple[list[Case], list[Tape]]:
    """Cases in float64, and Hugging Face's tapes; computed once for each level and config."""
    key = (level, str(sorted(config.items())))
    if key not in _answers:
        whole = config_of("qwen3", "tiny") | dict(config)
        weights = random_weights(formula_of("qwen3", whole), level, seed=0, dtype=torch.float64)
        inputs = Inputs(input_ids=torch.zeros(1, 1, dtype=torch.long)) if level == "model" else Inputs()
        cases = list(separating_cases(Case("mutants", level, whole, weights, inputs, gradients=False)))
        _answers[key] = cases, [HuggingFace("qwen3").run(case) for case in cases]
    return _answers[key]


def with_gradients(level: Level, config: Mapping[str, Any]) -> tuple[list[Case], list[Tape]]:
    """One case that has an objective, and Hugging Face's tape with its gradients."""
    key = (level, f"gradients {sorted(config.items())}")
    if key not in _answers:
        asked = case("qwen3", level, config)
        _answers[key] = [asked], [HuggingFace("qwen3").run(asked)]
    return _answers[key]


def judge(mutant: Mutant, folder: Path) -> Judgement:
    """Load the mutant as a user's candidate is loaded, compare it with Hugging Face, and diagnose."""
    candidate = load_candidate(mutant.write(folder), family="qwen3", level=mutant.level)
    cases, answers = (with_gradients if mutant.backward else cases_and_answers)(mutant.level, mutant.config)
    tapes = [candidate.run(case) for case in cases]
    compared = zip(answers, tapes, cases, strict=True)
    first = next((c.first.name for a, t, each in compared if (c := compare(a, t, each)).first is not None), "")
    return Judgement(first, diagnose(candidate, "qwen3", cases[:1], tapes[:1]) if first else None)


def judge_in_bfloat16(mutant: Mutant, folder: Path) -> tuple[Finding, ...]:
    """What its bits say, on a case of many tokens."""
    candidate = load_candidate(mutant.write(folder), family="qwen3", level=mutant.level)
    return missing_casts(candidate, "qwen3", bfloat16_case(mutant.level))


def bfloat16_case(level: Level) -> Case:
    config = config_of("qwen3", "tiny")
    weights = random_weights(formula_of("qwen3", config), level, seed=0, dtype=torch.bfloat16)
    hidden = torch.randn(4, 32, config["hidden_size"], generator=torch.Generator().manual_seed(0)).bfloat16()
    return Case("bfloat16", level, config, weights, Inputs(hidden=hidden), torch.bfloat16, gradients=False)

"""Casts that are missing: what changes nothing where everything is exact, and little even in bfloat16.

The reference computes RMSNorm's statistic and the router's softmax in float32 even in a bfloat16 model. A candidate
that does not is off by one rounding more, which is within any bound that the reference's own error gives. Bits tell:
given the same input, a norm and a softmax are the same few operations on every side, so that the candidate's bits are
those of one way or of the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from moectl.parity.case import Case, Subject
from moectl.parity.diagnosis.finding import Finding
from moectl.parity.families import family_name
from moectl.parity.formula import Formula
from moectl.parity.hypotheses import HYPOTHESES
from moectl.parity.reference import FormulaSubject
from moectl.parity.tape import Tape

#: Tensors that nothing but a norm, or nothing but a router's softmax, makes of the input.
_MADE_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "norm-precision": {"model": ("layers.0.attn.input",), "layer": ("attn.input",), "attention": ("attn.q", "attn.k")},
    "router-precision": {"router": ("mlp.weights",), "moe": ("mlp.weights",)},
}


def missing_casts(candidate: Subject, family: str, case: Case, shown: Tape | None = None) -> tuple[Finding, ...]:
    """Low precision where the reference takes care, in a component that agrees within the bound for bfloat16.

    Args:
        case: in bfloat16; of a whole model the first norm alone can be judged.
        shown: what the candidate gave, where it has been run on ``case`` already.

    Raises:
        Unsupported: the candidate has no such component.
        MoectlError: it fails.
    """
    assert case.dtype == torch.bfloat16
    case = replace(case, gradients=False)
    shown, family = candidate.run(case) if shown is None else shown, family_name(family)
    right = _computed(family, case, {})
    findings = []
    for name, by_level in _MADE_BY.items():
        tensors = [t for t in by_level.get(case.level, ()) if t in shown and t in right]
        other = [t for t in tensors if not torch.equal(shown[t], right[t])]
        if not other:
            continue
        for label, change in _ways(name):
            wrong = _computed(family, case, change)
            if all(torch.equal(shown[t], wrong[t]) for t in tensors):
                hypothesis = next(h for h in HYPOTHESES if h.name == name)
                differing = float((shown[other[0]] != right[other[0]]).float().mean())
                evidence = (
                    f"in bfloat16 {' and '.join(tensors)} are, bit for bit, what the reference gives with {label}; "
                    f"{differing:.0%} of {other[0]} are other numbers than its own"
                )
                findings.append(Finding(hypothesis.codes, hypothesis.title, evidence, other[0], (name,)))
                break
    return tuple(findings)


def _ways(name: str) -> Iterator[tuple[str, dict[str, object]]]:
    if name == "norm-precision":
        yield "the whole norm in bfloat16", {"dtype": "bfloat16"}
        yield "the statistic in bfloat16", {"dtype": "bfloat16", "statistic_alone": True}
    else:
        yield "a softmax in bfloat16", {"softmax_dtype": "bfloat16", "probs_stay": True}
        yield "probabilities rounded to bfloat16", {"probs_dtype": "bfloat16"}
        yield "probabilities normalised in bfloat16", {"probs_dtype": "bfloat16", "probs_stay": True}


def _computed(family: str, case: Case, change: dict[str, object]) -> Tape:
    """With the reference's casts, in bfloat16, and ``change``."""

    def changed(formula: Formula) -> Formula:
        formula = replace(formula, casts="reference")
        if "dtype" in change:
            return replace(formula, norm=replace(formula.norm, **change))  # type: ignore[arg-type]
        return replace(formula, router=replace(formula.router, **change))  # type: ignore[arg-type]

    return FormulaSubject(family, changed).run(case)

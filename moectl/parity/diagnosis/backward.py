"""Diagnosis of gradients, for a candidate whose forward tensors all agree.

A mistake here is a place where no gradient passes: a `detach`, a `no_grad`, a `.data`, a part that is frozen. Each
place is tried in the reference, and explains if all gradients of all cases come out. Weights whose gradient is exactly
zero are facts, and told as such.

Shape suffixes: E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from moectl.parity.case import Case
from moectl.parity.compare import Row, compare_tensor
from moectl.parity.diagnosis.finding import Finding
from moectl.parity.diagnosis.trials import IMPOSSIBLE
from moectl.parity.families import formula_of
from moectl.parity.hypotheses import LEVELS, Look, Variant
from moectl.parity.hypotheses.detached import BACKWARD
from moectl.parity.reference import FormulaSubject
from moectl.parity.tape import Tape, model_order

#: Cases whose gradients are computed for each hypothesis.
CASES = 2
FROZEN = ("MOE095", "MOE059")
#: The code of a router without a gradient, and how its weight is called at any level.
NO_GRADIENT, ROUTERS = "MOE032", ("weight", "gate.weight", "router.weight", "mlp.gate.weight", "mlp.router.weight")


class Backward(NamedTuple):
    """What the gradients say: see :class:`~moectl.parity.diagnosis.diagnose.Diagnosis`."""

    findings: tuple[Finding, ...]
    unexplained: str | None
    tried: int


def diagnose_gradients(family: str, cases: Sequence[Case], tapes: Sequence[Tape]) -> Backward:
    """Explain gradients that differ; nothing where none do, or none are shown.

    Args:
        family: by its name in :data:`~moectl.parity.families.FAMILIES`.
        cases: on which every forward tensor agrees.
        tapes: the candidate's.
    """
    asked = [(case, tape) for case, tape in zip(cases, tapes, strict=True) if case.gradients and _shown(tape)]
    search = _Search(family, asked[:CASES])
    if search.differing is None:
        return Backward((), None, 0)
    frozen = search.frozen()
    if frozen is not None:
        return Backward((frozen,), None, 1)
    found, tried = search.cut()
    return Backward(found, None if found else search.facts(tried), tried)


def _shown(tape: Tape) -> list[str]:
    return sorted((name for name in tape if name.startswith("grad.")), key=model_order)


class _Search:
    """The reference's gradients beside the candidate's, case by case."""

    def __init__(self, family: str, asked: Sequence[tuple[Case, Tape]]) -> None:
        self.family = family
        self.cases = [replace(case, compiled=False) for case, _ in asked]
        self.shown = [tape for _, tape in asked]
        self.right = [FormulaSubject(family).run(case) for case in self.cases]
        self.differing = next((row for i in range(len(self.cases)) for row in self._wrong(self.right[i], i)), None)

    def _rows(self, tape: Tape, i: int) -> Iterator[Row]:
        for name in _shown(self.shown[i]):
            if name in tape:
                yield compare_tensor(name, tape[name], self.shown[i][name], self.cases[i])

    def _wrong(self, tape: Tape, i: int) -> list[Row]:
        return [row for row in self._rows(tape, i) if row.ok is False]

    def frozen(self) -> Finding | None:
        """Parameters without a gradient, if everything else agrees."""
        missing: dict[str, list[str]] = {}
        for i, tape in enumerate(self.right):
            for row in self._wrong(tape, i):
                parts = _silent_parts(tape[row.name], self.shown[i][row.name])
                mended = None if parts is None else _silenced(tape[row.name], self.shown[i][row.name])
                if row.name == "grad.input" or mended is None or parts is None:
                    return None
                if compare_tensor(row.name, mended, self.shown[i][row.name], self.cases[i]).ok is False:
                    return None
                missing.setdefault(row.name, parts)
        if not missing:
            return None
        names = sorted(missing, key=model_order)
        told = ", ".join(name.removeprefix("grad.") + _of(missing[name]) for name in names[:4])
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        bare = [name.removeprefix("grad.").removeprefix("model.layers.").lstrip("0123456789.") for name in names]
        code = (NO_GRADIENT,) if set(bare) <= set(ROUTERS) else ()
        return Finding(
            (*code, *FROZEN),
            "weights that get no gradient",
            f"every forward tensor agrees; the gradient of {told}{more} is exactly zero, and every other gradient, "
            f"the input's too, is the reference's: a weight used as .data or detached, under no_grad, or frozen",
            names[0],
            ("frozen",),
        )

    def cut(self) -> tuple[tuple[Finding, ...], int]:
        """All places, of all hypotheses, whose cut gives all gradients; they are one finding."""
        assert self.differing is not None
        level, tried = self.cases[0].level, 0
        formula = formula_of(self.family, self.cases[0].config)
        look = Look(formula, tuple(self.cases), tuple(self.right), tuple(self.shown), self.differing.name)
        found = []
        for hypothesis in BACKWARD:
            if level not in LEVELS[hypothesis.component]:
                continue
            for variant in hypothesis.variants(look):
                tried += 1
                if self._gives_all(variant):
                    found.append((hypothesis, variant))
        if not found:
            return (), tried
        hypotheses = list(dict.fromkeys(hypothesis for hypothesis, _ in found))
        labels = " or ".join(dict.fromkeys(variant.label for _, variant in found))
        count = sum(1 for i in range(len(self.cases)) for _ in self._rows(self.right[i], i))
        silent = [row.name.removeprefix("grad.") for row in self._wrong(self.right[0], 0) if self._is_silent(row, 0)]
        zero = f"the gradient of {', '.join(silent[:3])} is exactly zero; " if silent else ""
        return (
            Finding(
                tuple(dict.fromkeys(code for hypothesis in hypotheses for code in hypothesis.codes)),
                ", or with the same effect here: ".join(dict.fromkeys(hypothesis.title for hypothesis in hypotheses)),
                f"every forward tensor agrees; {zero}the reference with {labels} gives all {count} gradients"
                + (f" of {len(self.cases)} cases" if len(self.cases) > 1 else ""),
                self.differing.name,
                tuple(hypothesis.name for hypothesis in hypotheses),
            ),
        ), tried

    def _gives_all(self, variant: Variant) -> bool:
        for i, case in enumerate(self.cases):
            change = variant.formula
            assert change is not None
            try:
                tape = FormulaSubject(self.family, lambda formula, c=case, f=change: f(formula, c)).run(case)  # type: ignore[misc]
            except IMPOSSIBLE:
                return False
            if self._wrong(tape, i):
                return False
        return True

    def _is_silent(self, row: Row, i: int) -> bool:
        return bool((self.shown[i][row.name] == 0).all())

    def facts(self, tried: int) -> str:
        """What can be said where nothing explains."""
        rows = list(self._rows(self.right[0], 0))
        wrong, agreeing = [row for row in rows if row.ok is False], [row.name for row in rows if row.ok]
        told = []
        for row in wrong:
            right, theirs = self.right[0][row.name].double(), self.shown[0][row.name].double()
            scale = (theirs * right).sum() / right.square().sum().clamp(min=1e-300)
            if not theirs.any():
                told.append(f"{row.name} is exactly zero")
            elif bool(((theirs - scale * right).abs() <= 1e-6 * theirs.abs().max()).all()):
                told.append(f"{row.name} is {float(scale):.6g} times the reference's")
            else:
                told.append(f"{row.name} differs")
        agree = f"; {', '.join(agreeing[:4])} agree{'' if len(agreeing) <= 4 else ' and more'}" if agreeing else ""
        more = f" and {len(told) - 5} more differ" if len(told) > 5 else ""
        return (
            f"every forward tensor agrees, gradients do not: {', '.join(told[:5])}{more}{agree}. none of {tried} "
            "places at which a gradient may be cut gives them: look for detach(), .data, .item(), no_grad(), "
            "changes in place, and for a backward() of your own"
        )


def _silent_parts(right: Tensor, theirs: Tensor) -> list[str] | None:
    """Which rows along the first dimension have no gradient where they should; all (none named), or None for none."""
    if not theirs.any():
        return []
    rows = [e for e in range(len(theirs)) if not theirs[e].any() and right[e].any()]
    if not rows:
        return None if theirs.dim() < 3 else ["some rows"]
    return [str(row) for row in rows]


def _silenced(right: Tensor, theirs: Tensor) -> Tensor:
    """The reference's gradient, zero wherever a row of a weight has none in the candidate."""
    if theirs.dim() < 2:
        return right * bool(theirs.any())
    return right * (theirs != 0).any(dim=-1, keepdim=True)


def _of(parts: list[str]) -> str:
    if not parts:
        return ""
    return f" ({parts[0]})" if parts[0] == "some rows" else f"[{', '.join(parts[:6])}{', …' if len(parts) > 6 else ''}]"

"""Running what-ifs: the reference with a mistake made, on the candidate's own cases, held against what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moectl.errors import MoectlError
from moectl.parity.case import Case, Unsupported
from moectl.parity.compare import Row, compare_tensor
from moectl.parity.families import formula_of
from moectl.parity.hypotheses import NOTHING, Hypothesis, Look, Variant
from moectl.parity.reference import FormulaSubject
from moectl.parity.tape import Tape, model_order

#: A variant that does not fit a case (a permutation of eight experts where there are four) cannot be computed.
IMPOSSIBLE = (MoectlError, Unsupported, RuntimeError, ValueError, IndexError, KeyError)


@dataclass(frozen=True)
class Trial:
    """What came of one variant.

    Attributes:
        variant: that was computed.
        hypothesis: that it is of; None for the plain reference.
        depths: by case, how many of the shown tensors it gives, in model order, before the first that it does not.
        explains: whether it gives all of them, on all cases.
        changes: whether it gives anything else than what it was built on.
        worst: the largest error over its tolerance, of all rows that were compared.
        left: error over tolerance in the first tensor that differed before.
    """

    variant: Variant
    hypothesis: Hypothesis | None
    depths: tuple[int, ...]
    explains: bool
    changes: bool
    worst: float
    left: float


class Bench:
    """Cases, what the candidate shows on them, and what each variant gives instead.

    Args:
        family: of the reference.
        cases: to compute; gradients are left away.
        shown: the candidate's tapes, in the order of ``cases``.
    """

    def __init__(self, family: str, cases: Sequence[Case], shown: Sequence[Tape]) -> None:
        self.family = family
        self.cases = tuple(replace(case, gradients=False, compiled=False) for case in cases)
        self.shown = tuple(shown)
        self.formula = formula_of(family, self.cases[0].config)
        self.plain = tuple(self._compute(NOTHING, i) for i in range(len(self.cases)))
        self.names = tuple(
            [name for name in sorted(tape, key=model_order) if name in shown and not name.startswith("grad.")]
            for tape, shown in zip(self.plain, self.shown, strict=True)
        )

    def look(self, base: Variant) -> Look:
        """What hypotheses may look at, with ``base`` explained already."""
        tapes = tuple(self.tapes(base))
        return Look(self.formula, self.cases, tapes, self.shown, self.first(tapes))

    def tapes(self, variant: Variant) -> list[Tape]:
        """Of all cases; raises what the reference raises."""
        return [self.plain[i] if variant is NOTHING else self._compute(variant, i) for i in range(len(self.cases))]

    def first(self, tapes: Sequence[Tape]) -> str | None:
        """The first tensor that ``tapes`` do not give, in the earliest place over all cases."""
        found = [row.name for i, tape in enumerate(tapes) if (row := self.first_row(tape, i)) is not None]
        return min(found, key=model_order, default=None)

    def first_row(self, tape: Tape, case: int) -> Row | None:
        """The first row of a case that differs from what the candidate shows."""
        for name in self.names[case]:
            row = self._row(name, tape, self.plain[case], case)
            if row.ok is False:
                return row
        return None

    def trial(
        self,
        variant: Variant,
        base: Look,
        hypothesis: Hypothesis | None = None,
        *,
        start: Trial | None = None,
    ) -> Trial:
        """Compute ``variant`` case by case; with ``start``, only as long as it gets further than that on the first."""
        depths, worst, left, changes = [], 0.0, 0.0, False
        for i in range(len(self.cases)):
            try:
                tape = self._compute(variant, i)
            except IMPOSSIBLE:
                return Trial(variant, hypothesis, (), False, False, float("inf"), float("inf"))
            changes = changes or self._differs(tape, base.reference[i], i)
            depth, error = self._depth(tape, base.reference[i], i, variant)
            depths.append(depth)
            worst = max(worst, error)
            if base.first in self.names[i]:
                row = self._row(base.first, tape, base.reference[i], i)
                left = max(left, row.ratio if row.max_abs is not None else float("inf"))
            if start is not None and changes and i == 0 and depth <= start.depths[0] < len(self.names[0]):
                return Trial(variant, hypothesis, start.depths, False, True, worst, left)
        explains = all(depth == len(names) for depth, names in zip(depths, self.names, strict=True))
        return Trial(variant, hypothesis, tuple(depths), explains, changes, worst, left)

    def _depth(self, tape: Tape, before: Tape, i: int, variant: Variant) -> tuple[int, float]:
        worst = 0.0
        for depth, name in enumerate(self.names[i]):
            row = self._row(name, tape, before, i)
            if row.ok is False and variant.either and name.endswith(variant.either):
                row = self._row(name, before, before, i)
            if row.ok is False:
                row = self._elsewhere(name, tape, variant, i) or row
            if row.ok is False:
                return depth, row.ratio
            worst = max(worst, row.ratio)
        return len(self.names[i]), worst

    def _row(self, name: str, tape: Tape, before: Tape, i: int) -> Row:
        """What a variant does not compute at all (tables without a rotation) may be as it was."""
        expected = tape[name] if name in tape else before[name]
        return compare_tensor(name, expected, self.shown[i][name], self.cases[i])

    def _elsewhere(self, name: str, tape: Tape, variant: Variant, i: int) -> Row | None:
        for plain, other in variant.shown_as.items():
            there = name.removesuffix(plain) + other
            if name.endswith(plain) and not other:
                return compare_tensor(name, self.shown[i][name], self.shown[i][name], self.cases[i])
            if name.endswith(plain) and there in tape:
                return compare_tensor(name, tape[there], self.shown[i][name], self.cases[i])
        return None

    def _differs(self, tape: Tape, before: Tape, i: int) -> bool:
        case, names = self.cases[i], self.names[i]
        return any(compare_tensor(n, before[n], tape[n], case).ok is False for n in names if n in tape and n in before)

    def _compute(self, variant: Variant, i: int) -> Tape:
        case, change = self.cases[i], variant.formula
        subject = FormulaSubject(
            self.family,
            change=None if change is None else lambda formula: change(formula, case),
            change_weights=variant.weights,
        )
        if variant.inputs is not None:
            return subject.run(replace(case, inputs=variant.inputs(case.inputs)))
        return subject.run(case)

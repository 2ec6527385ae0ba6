"""What may be wrong with somebody's model, as data: each mistake is the reference with something changed.

Add a mistake by adding a :class:`Hypothesis` to one of the modules: attention, routing, expert_mistakes, whole; one
that only gradients show, to detached.
"""

from __future__ import annotations

from moectl.parity.case import Level
from moectl.parity.hypotheses import attention, expert_mistakes, routing, whole
from moectl.parity.hypotheses.kinds import LEVELS, NOTHING, Hypothesis, Look, Variant

__all__ = ["HYPOTHESES", "LEVELS", "NOTHING", "Hypothesis", "Look", "Variant", "hypotheses_at"]

HYPOTHESES: tuple[Hypothesis, ...] = (
    *attention.HYPOTHESES,
    *routing.HYPOTHESES,
    *expert_mistakes.HYPOTHESES,
    *whole.HYPOTHESES,
)


def hypotheses_at(level: Level) -> tuple[Hypothesis, ...]:
    """Those whose component is in the part that is compared."""
    return tuple(hypothesis for hypothesis in HYPOTHESES if level in LEVELS[hypothesis.component])

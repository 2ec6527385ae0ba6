"""One candidate on one case: run freely, and where rounding decided a choice, again with the reference's routes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from moectl.errors import MissingDependencyError, MoectlError
from moectl.parity.case import Case, Subject, Unsupported
from moectl.parity.compare import Comparison, after_injection, compare
from moectl.parity.routes import Flip, flips, tied_tokens
from moectl.parity.standard import Standard
from moectl.parity.tape import Tape, model_order

REFUSES_STRIDES = "it takes contiguous input only, as Hugging Face's own MoE blocks do: all of them call view()"


@dataclass(frozen=True)
class Contest:
    """What came of a case.

    Attributes:
        case: what was asked.
        candidate: whose answer it is.
        comparison: tensor by tensor; None where there was no answer.
        tape: the candidate's own, as it ran freely; None where there was no answer.
        standard: what it was held against.
        flips: in bfloat16, every token that a freely running candidate sent elsewhere, in any layer.
        tied: tokens that stand at a tie by the reference's scores, however they were chosen.
        unsupported: why the question does not arise for this candidate.
        failure: the candidate's error.
        seconds: that the candidate took.
    """

    case: Case
    candidate: str
    comparison: Comparison | None = None
    tape: Tape | None = None
    standard: Standard | None = None
    flips: tuple[Flip, ...] = ()
    tied: int = 0
    unsupported: str = ""
    failure: MoectlError | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether it was compared, and everything held. By the rows alone."""
        return self.comparison is not None and self.comparison.ok


def contest(case: Case, candidate: Subject, standard: Standard) -> Contest:
    """Ask ``candidate``, and hold what it says against ``standard``."""
    started = time.perf_counter()
    try:
        tape = candidate.run(case)
        comparison = compare(standard.tape, tape, case, bounds=standard.bounds)
        if comparison.ties and standard.reroute is not None:
            comparison = _injected(case, candidate, standard, comparison)
    except (Unsupported, MissingDependencyError) as reason:
        return Contest(case, candidate.name, standard=standard, unsupported=str(reason))
    except MoectlError as error:
        if _refuses_strides(case, error):
            return Contest(case, candidate.name, standard=standard, unsupported=REFUSES_STRIDES)
        return Contest(case, candidate.name, standard=standard, failure=error)
    return Contest(
        case,
        candidate.name,
        comparison,
        tape,
        standard,
        flips=_flips(case, tape, standard) if case.dtype == torch.bfloat16 else (),
        tied=tied_tokens(standard.tape, case),
        seconds=time.perf_counter() - started,
    )


def _refuses_strides(case: Case, error: MoectlError) -> bool:
    """Whether a ``view`` refused an input that is not contiguous: loudly, and nothing came out wrong."""
    given = (case.inputs.input_ids, case.inputs.hidden)
    strided = any(tensor is not None and not tensor.is_contiguous() for tensor in given)
    return strided and "view size is not compatible" in error.message


def _injected(case: Case, candidate: Subject, standard: Standard, free: Comparison) -> Comparison:
    """What follows from a tie, with the reference's routes given; a candidate that takes none is left as it is."""
    try:
        tape = candidate.run(case, standard.reroute)
    except Unsupported:
        return free
    return after_injection(free, compare(standard.tape, tape, case, bounds=standard.bounds))


def _flips(case: Case, tape: Tape, standard: Standard) -> tuple[Flip, ...]:
    """Of all layers: those after the first are partly its consequences."""
    found: list[Flip] = []
    for name in sorted(standard.tape, key=model_order):
        if name.endswith("mlp.chosen") and name in tape and tape[name].shape == standard.tape[name].shape:
            found += flips(standard.tape, tape, case, name, tolerance=0.0)
    return tuple(found)

"""Parameters that the family has not: biases, shared experts. What a candidate computes with them at zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from moectl.errors import MoectlError
from moectl.parity.case import Case, Subject, Unsupported
from moectl.parity.diagnosis.finding import Finding
from moectl.parity.diagnosis.trials import Bench
from moectl.parity.hypotheses import NOTHING
from moectl.parity.tape import Tape, model_order

_KINDS: tuple[tuple[tuple[str, ...], str, str, Callable[[str], bool]], ...] = (
    (("MOE005",), "biases where the family has none", "biases", lambda name: name.rpartition(".")[2].endswith("bias")),
    (("MOE029",), "a shared expert that this family has not", "shared-expert", lambda name: "shar" in name.lower()),
    ((), "parameters that this family has not", "extra-parameters", lambda name: True),
)


def findings_in_extras(
    candidate: Subject, family: str, cases: Sequence[Case], shown: Sequence[Tape], *, behind: bool = False
) -> tuple[list[Finding], list[Tape]]:
    """What extra parameters do, and the tapes without it: each kind is set to zero, and kept if it changes anything.

    A kind is believed only if zeroes bring the candidate nearer: to agreement, or to a later first tensor; with
    ``behind``, if they change anything: it is then for the caller to see that all is explained in the end.
    """
    left: list[str] = list(getattr(candidate, "extra_parameters", ()))
    zeroed: Callable[[Sequence[str]], AbstractContextManager[Any]] | None = getattr(candidate, "zeroed", None)
    findings: list[Finding] = []
    tapes, off = list(shown), list[str]()
    if zeroed is None:
        return findings, tapes
    for codes, title, name, belongs in _KINDS:
        mine = [parameter for parameter in left if belongs(parameter)]
        left = [parameter for parameter in left if parameter not in mine]
        if not mine:
            continue
        try:
            with zeroed([*off, *mine]):
                without = [candidate.run(case) for case in cases]
        except (Unsupported, MoectlError):
            continue
        first, after = _first(family, cases, tapes), _first(family, cases, without)
        nearer = first is not None and (after is None or model_order(after) > model_order(first))
        changed = _changed(tapes, without) if behind and not nearer else first
        if changed is None or not (nearer or behind):
            continue
        agreement = "everything agrees" if after is None else f"{changed} agrees" if nearer else f"{changed} changes"
        named = ", ".join(mine[:4]) + (f" and {len(mine) - 4} more" if len(mine) > 4 else "")
        findings.append(Finding(codes, title, f"with {named} at zero {agreement}", changed, (name,)))
        tapes, off = without, [*off, *mine]
    return findings, tapes


def _first(family: str, cases: Sequence[Case], shown: Sequence[Tape]) -> str | None:
    return Bench(family, cases, shown).look(NOTHING).first


def _changed(tapes: Sequence[Tape], without: Sequence[Tape]) -> str | None:
    """The first tensor that is another one without them."""
    pairs = zip(tapes, without, strict=True)
    found = {n for one, other in pairs for n in one if n in other and not torch.equal(one[n], other[n])}
    return min((name for name in found if not name.startswith("grad.")), key=model_order, default=None)

"""Which mistake is it? Every hypothesis is made by the reference, and those that give the candidate's tensors are told.

A hypothesis explains when the reference with that mistake gives every tensor that the candidate shows, on every
case, to tolerance. All that explain are one finding: on these cases they are the same. Where none does, they
are stacked: what reaches furthest first, then the rest, up to three. What explains nothing is never named.
Where every forward tensor agrees, the gradients are asked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from moectl.errors import MoectlError
from moectl.parity.case import Case, Subject, Unsupported
from moectl.parity.diagnosis.backward import diagnose_gradients
from moectl.parity.diagnosis.extras import findings_in_extras
from moectl.parity.diagnosis.finding import Finding
from moectl.parity.diagnosis.separating import separating_cases
from moectl.parity.diagnosis.trials import Bench, Trial
from moectl.parity.families import family_name
from moectl.parity.hypotheses import NOTHING, Look, Variant, hypotheses_at
from moectl.parity.hypotheses.routes import picture
from moectl.parity.reference import FormulaSubject
from moectl.parity.tape import Tape

#: Mistakes that are looked for at once in one candidate.
MOST = 3
#: Seconds after which no further combination is begun.
PATIENCE = 5.0
#: A hypothesis that leaves more of the error than this is not near.
NEAR = 0.5


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        findings: each a mistake, or a class of mistakes with one effect; together they explain the difference.
        unexplained: what is known about what they do not explain; None where nothing is left.
        tried: how many ways of going wrong were computed.
        equivalent: hypotheses that change nothing on these cases, so that nothing can be said about them.
    """

    findings: tuple[Finding, ...]
    unexplained: str | None
    tried: int
    equivalent: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "findings": [finding.to_json() for finding in self.findings],
            "unexplained": self.unexplained,
            "tried": self.tried,
            "equivalent": list(self.equivalent),
        }


def diagnose(candidate: Subject, family: str, cases: Sequence[Case], tapes: Sequence[Tape] | None = None) -> Diagnosis:
    """Find out what is wrong with ``candidate``.

    Besides ``cases`` it is asked for some that tell mistakes apart, as far as it takes them.

    Args:
        candidate: whose ``extra_parameters``, if it has any, are tried at zero.
        family: of the reference.
        cases: where it differs, all of one component.
        tapes: the candidate's, where it has been run on ``cases`` already.

    Raises:
        MoectlError: the candidate fails.
    """
    asked = list(cases)
    shown = list(tapes) if tapes is not None else [candidate.run(case) for case in cases]
    for case in separating_cases(cases[0]):
        try:
            shown.append(candidate.run(case))
            asked.append(case)
        except (Unsupported, MoectlError):
            continue  # a candidate without padding, say
    family = family_name(family)
    diagnosis = _without_extras(candidate, family, asked, shown)
    if not diagnosis.findings and diagnosis.unexplained is None:
        backward = diagnose_gradients(family, asked, shown)
        return replace(diagnosis, **backward._asdict())
    if diagnosis.unexplained is not None and getattr(candidate, "extra_parameters", None):
        # They may sit behind another mistake, where taking them away does not yet show.
        behind = _without_extras(candidate, family, asked, shown, behind=True)
        return behind if behind.unexplained is None else diagnosis
    return diagnosis


def _without_extras(
    candidate: Subject, family: str, cases: Sequence[Case], shown: Sequence[Tape], *, behind: bool = False
) -> Diagnosis:
    extra, tapes = findings_in_extras(candidate, family, cases, shown, behind=behind)
    rest = _Search(Bench(family, cases, tapes)).diagnosis()
    return replace(rest, findings=(*extra, *rest.findings))


def equivalent_here(family: str, cases: Sequence[Case]) -> tuple[str, ...]:
    """Hypotheses that change no tensor of ``cases``: mistakes that cannot be seen in this configuration."""
    reference = FormulaSubject(family)
    tapes = [reference.run(replace(case, gradients=False)) for case in cases]
    search = _Search(Bench(family_name(family), cases, tapes))
    look = search.bench.look(NOTHING)
    search.singles(NOTHING, look, search.bench.trial(NOTHING, look))
    return search.equivalent


class _Search:
    """Stacks hypotheses until everything is explained, or nothing helps."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.tried = 0
        self.equivalent: tuple[str, ...] = ()
        self.alone: list[Trial] = []
        self.began = time.monotonic()

    def diagnosis(self) -> Diagnosis:
        look = self.bench.look(NOTHING)
        if look.first is None:
            return Diagnosis((), None, 0, ())
        findings = self._explain(NOTHING, MOST)
        unexplained = None if findings else self._facts(look)
        return Diagnosis(tuple(findings), unexplained, self.tried, self.equivalent)

    def _explain(self, base: Variant, most: int) -> list[Finding]:
        """Findings on top of ``base`` that together explain everything, or none."""
        look = self.bench.look(base)
        start = self.bench.trial(base, look)
        trials = self.singles(base, look, start)
        if base is NOTHING:
            self.alone = trials
        explaining = [trial for trial in trials if trial.explains]
        if explaining:
            return [self._finding(explaining, look)]
        if most > 1:
            for better in _furthest(trials, start):
                findings = self._explain(better[0].variant, most - 1)
                if findings:
                    return [self._finding(better, look), *findings]
        return self._pairs(look, trials, start) if most == MOST else []

    def singles(self, base: Variant, look: Look, start: Trial) -> list[Trial]:
        """Every variant of every hypothesis on top of ``base``; those that change something."""
        trials = []
        for hypothesis in hypotheses_at(self.bench.cases[0].level):
            mine = [self.bench.trial(base.then(v), look, hypothesis, start=start) for v in hypothesis.variants(look)]
            self.tried += len(mine)
            if base is NOTHING and mine and not any(trial.changes for trial in mine):
                self.equivalent += (hypothesis.name,)
            trials += [trial for trial in mine if trial.changes]
        return trials

    def _pairs(self, look: Look, trials: list[Trial], start: Trial) -> list[Finding]:
        """Two mistakes that only together give the first tensor: both behind one that the candidate does not show."""
        touching = [trial for trial in trials if abs(trial.left - start.left) > 1e-9 * start.left]
        for one, other in _by_promise(touching):
            if time.monotonic() - self.began > PATIENCE:
                return []
            assert one.hypothesis is not None and other.hypothesis is not None
            both = self.bench.trial(one.variant.then(other.variant), look, one.hypothesis, start=start)
            self.tried += 1
            if both.explains:
                return [self._finding([one], look, both), self._finding([other], look, both)]
        return []

    def _finding(self, trials: Sequence[Trial], look: Look, together: Trial | None = None) -> Finding:
        hypotheses = list(dict.fromkeys(t.hypothesis for t in trials if t.hypothesis is not None))
        codes = tuple(dict.fromkeys(code for h in hypotheses for code in h.codes))
        title = ", or with the same effect here: ".join(dict.fromkeys(h.title for h in hypotheses))
        clues = [clue for h in hypotheses if h.evidence is not None and (clue := h.evidence(look))]
        evidence = "; ".join(dict.fromkeys([*clues[:1], self._agreement(trials[0], look, together)]))
        return Finding(codes, title, evidence, look.first or "", tuple(h.name for h in hypotheses))

    def _agreement(self, trial: Trial, look: Look, together: Trial | None) -> str:
        count, cases = sum(map(len, self.bench.names)), len(self.bench.cases)
        done = trial.variant.label.rpartition("; ")[2]
        on = f"{count} tensors" + (f" of {cases} cases" if cases > 1 else "")
        if together is not None:
            return f"the reference with this and the next or previous mistake ({together.variant.label}) gives all {on}"
        if trial.explains:
            return f"the reference with this mistake ({done}) gives all {on}"
        return f"with this mistake ({done}) the reference gives {look.first} too"

    def _facts(self, look: Look) -> str:
        """What can be said where nothing explains."""
        i, row = next(
            (i, row) for i, tape in enumerate(look.reference) if (row := self.bench.first_row(tape, i)) is not None
        )
        names = self.bench.names[i]
        before = names[: names.index(row.name)]
        agree = f"; {', '.join(before[-3:])} agree" if before else ""
        facts = [f"{row.name} is the first tensor that differs ({row.note}){agree}", picture(look)]
        start = max(self.bench.trial(NOTHING, look).left, 1e-300)
        least: dict[str, float] = {}
        for trial in self.alone:
            if trial.hypothesis is not None:
                name = trial.hypothesis.name
                least[name] = min(trial.left / start, least.get(name, NEAR))
        nearest = [
            f"{n} leaves {left:.2g} of the error" for n, left in sorted(least.items(), key=_second) if left < NEAR
        ]
        facts.append(f"none of {self.tried} known ways gives it")
        if nearest:
            facts[-1] += f"; the nearest: {', '.join(nearest[:3])}"
        return ". ".join(fact for fact in facts if fact)


def _second(pair: tuple[str, float]) -> float:
    return pair[1]


def _furthest(trials: Sequence[Trial], start: Trial) -> Iterator[list[Trial]]:
    """Trials that give more tensors than before, the furthest first; equally far ones of one hypothesis as one.

    Nothing may get worse on any case.
    """
    further = [
        trial
        for trial in trials
        if trial.depths != start.depths and all(a >= b for a, b in zip(trial.depths, start.depths, strict=True))
    ]
    further.sort(key=lambda trial: (min(trial.depths), sum(trial.depths)), reverse=True)
    if not further:
        return
    best = [trial for trial in further if trial.depths == further[0].depths]
    by_name: dict[str, list[Trial]] = {}
    for trial in best:
        by_name.setdefault(trial.hypothesis.name if trial.hypothesis else "", []).append(trial)
    yield from by_name.values()


def _by_promise(trials: Sequence[Trial]) -> Iterator[tuple[Trial, Trial]]:
    """Pairs of different hypotheses, those that leave least error first."""
    ranked = sorted(trials, key=lambda trial: trial.left)
    pairs = sorted(combinations(range(len(ranked)), 2), key=sum)
    for one, other in pairs:
        if ranked[one].hypothesis is not ranked[other].hypothesis:
            yield ranked[one], ranked[other]

"""What came of a whole session: probe by probe, tensor by tensor, and the verdict.

Nothing here decides: whether a probe held follows from its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from moectl.errors import MoectlError
from moectl.parity.case import Level
from moectl.parity.compare import Row
from moectl.parity.contest import Contest
from moectl.parity.tape import model_order
from moectl.parity.tolerance import dtype_name


class Skipped(NamedTuple):
    """A probe that does not apply, and why."""

    probe: str
    dtype: torch.dtype
    level: Level
    candidate: str
    reason: str


@dataclass(frozen=True)
class ProbeResult:
    """All cases of one probe in one dtype, of one component and one candidate.

    Attributes:
        probe: its name.
        dtype: that it ran in.
        level: the component.
        candidate: who was asked.
        contests: one per case.
    """

    probe: str
    dtype: torch.dtype
    level: Level
    candidate: str
    contests: tuple[Contest, ...]

    @property
    def ok(self) -> bool:
        return bool(self.contests) and all(contest.ok for contest in self.contests)

    @property
    def rows(self) -> Iterator[Row]:
        """Of all cases."""
        for contest in self.contests:
            if contest.comparison is not None:
                yield from contest.comparison.rows

    @property
    def compared(self) -> int:
        return sum(row.ok is not None for row in self.rows)

    @property
    def worst(self) -> Row | None:
        """The row that is nearest to its tolerance, or furthest past it."""
        return max((row for row in self.rows if row.ok is not None), key=lambda row: row.ratio, default=None)

    @property
    def ratio(self) -> float:
        return 0.0 if self.worst is None else self.worst.ratio

    @property
    def first(self) -> Row | None:
        """The first tensor that differs in the first case in which one does."""
        for contest in self.contests:
            if contest.comparison is not None and contest.comparison.first is not None:
                return contest.comparison.first
        return None

    @property
    def failure(self) -> MoectlError | None:
        return next((contest.failure for contest in self.contests if contest.failure is not None), None)

    @property
    def missing(self) -> tuple[str, ...]:
        """Outputs that were not compared although nothing excuses it."""
        found = (contest.comparison.missing for contest in self.contests if contest.comparison is not None)
        return next((names for names in found if names), ())

    @property
    def tied(self) -> int:
        return sum(contest.tied for contest in self.contests)

    @property
    def ties(self) -> int:
        """Tokens that a tie sent elsewhere; in bfloat16 these are route flips, and counted there."""
        return sum(len(c.comparison.ties) for c in self.contests if c.comparison and self.dtype != torch.bfloat16)

    @property
    def flips(self) -> int:
        return sum(len(contest.flips) for contest in self.contests)

    def worst_rows(self) -> list[Row]:
        """One row per tensor, the worst of all cases, in model order."""
        by_name: dict[str, Row] = {}
        for row in self.rows:
            if row.name not in by_name or _badness(row) > _badness(by_name[row.name]):
                by_name[row.name] = row
        return sorted(by_name.values(), key=lambda row: model_order(row.name))


@dataclass(frozen=True)
class Report:
    """A whole session.

    Attributes:
        family: compared.
        header: what with what: versions, commit, device, seed, config, candidates.
        results: in the order in which they ran.
        skipped: what does not apply.
        diagnosis: of what differs; None where nothing does.
        seconds: of it all.
        problems: of the candidate itself, apart from its numbers; each ``{code, title, evidence, hint, fails}``.
        guessed: how somebody's candidate was built, called and given its weights.
    """

    family: str
    header: Mapping[str, Any]
    results: tuple[ProbeResult, ...]
    skipped: tuple[Skipped, ...] = ()
    diagnosis: Any = None
    seconds: float = 0.0
    problems: tuple[Mapping[str, Any], ...] = field(default=())
    guessed: Mapping[str, Any] | None = None

    @property
    def ok(self) -> bool:
        """Everything that was compared held, and something was."""
        failing = any(problem["fails"] for problem in self.problems)
        return bool(self.results) and all(result.ok for result in self.results) and not failing

    @property
    def broken(self) -> tuple[ProbeResult, ...]:
        return tuple(result for result in self.results if not result.ok)

    @property
    def first(self) -> tuple[ProbeResult, Row] | None:
        """The first divergent tensor: of the first probe that has one, in model order."""
        for result in self.results:
            if result.first is not None:
                return result, result.first
        return None

    @property
    def base(self) -> ProbeResult | None:
        """What the table of tensors shows: the first probe that failed to hold, else the first of all."""
        return next(iter(self.broken or self.results), None)

    def worst_ratios(self) -> dict[str, float]:
        """The worst error over tolerance, by dtype."""
        worst: dict[str, float] = {}
        for result in self.results:
            name = dtype_name(result.dtype)
            worst[name] = max(worst.get(name, 0.0), result.ratio)
        return worst

    def to_json(self) -> dict[str, Any]:
        """The document of ``--json``."""
        first = self.first
        return {
            "ok": self.ok,
            "family": self.family,
            **self.header,
            "seconds": round(self.seconds, 2),
            "first_divergent": None if first is None else _tensor(first[0], first[1]),
            "worst_ratio": self.worst_ratios(),
            "probes": [_probe(result) for result in self.results],
            "not_applicable": [{**each._asdict(), "dtype": dtype_name(each.dtype)} for each in self.skipped],
            "tensors": [_tensor(result, row) for result in self.results for row in result.worst_rows()],
            "not_compared": list(_not_compared(self.results)),
            "ties": list(_tokens(self.results, flips=False)),
            "route_flips": list(_tokens(self.results, flips=True)),
            "problems": list(self.problems),
            "candidate": self.guessed,
            "diagnosis": findings_of(self.diagnosis),
            "unexplained": getattr(self.diagnosis, "unexplained", None),
        }


def findings_of(diagnosis: Any) -> list[dict[str, Any]]:
    """A diagnosis's findings as plain data; ``code`` is the first of ``codes``."""
    found = []
    for finding in getattr(diagnosis, "findings", ()):
        codes = list(finding.codes)
        found.append(
            {
                "code": codes[0] if codes else None,
                "codes": codes,
                "title": finding.title,
                "evidence": finding.evidence,
                "tensor": finding.tensor,
            }
        )
    return found


def _probe(result: ProbeResult) -> dict[str, Any]:
    worst, failure = result.worst, result.failure
    return {
        "name": result.probe,
        "dtype": dtype_name(result.dtype),
        "level": result.level,
        "candidate": result.candidate,
        "ok": result.ok,
        "cases": len(result.contests),
        "tensors": result.compared,
        "worst_ratio": result.ratio,
        "worst_tensor": None if worst is None else worst.name,
        "first_divergent": None if result.first is None else result.first.name,
        "tied_tokens": result.tied,
        "ties": result.ties,
        "route_flips": result.flips,
        "output_not_compared": list(result.missing),
        "error": None if failure is None else {"message": failure.message, "hint": failure.hint},
    }


def _tensor(result: ProbeResult, row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "shape": list(row.shape),
        "max_abs": row.max_abs,
        "max_rel": row.max_rel,
        "tolerance": row.tolerance,
        "ok": row.ok,
        "verdict": row.verdict,
        "note": row.note,
        "probe": result.probe,
        "dtype": dtype_name(result.dtype),
        "level": result.level,
        "candidate": result.candidate,
    }


def _not_compared(results: Iterable[ProbeResult]) -> Iterator[dict[str, Any]]:
    for result in results:
        seen = set()
        for row in result.rows:
            if row.ok is None and (row.name, row.note) not in seen:
                seen.add((row.name, row.note))
                yield {
                    "name": row.name,
                    "reason": row.note,
                    "probe": result.probe,
                    "dtype": dtype_name(result.dtype),
                    "level": result.level,
                    "candidate": result.candidate,
                }


def _tokens(results: Iterable[ProbeResult], *, flips: bool) -> Iterator[dict[str, Any]]:
    for result in results:
        if flips != (result.dtype == torch.bfloat16):
            continue
        for number, contest in enumerate(result.contests):
            tokens = contest.flips if flips else contest.comparison.ties if contest.comparison else ()
            for token in tokens:
                yield {
                    "probe": result.probe,
                    "dtype": dtype_name(result.dtype),
                    "level": result.level,
                    "candidate": result.candidate,
                    "case": number,
                    "layer": token.layer,
                    "token": token.token,
                    "margin": token.margin,
                    "reference": list(token.reference),
                    "chosen": list(token.candidate),
                }


def _badness(row: Row) -> tuple[int, float]:
    rank = {"not compared": 0, "ok": 1, "tie": 2, "differs": 3}[row.verdict]
    return rank, row.ratio

"""What an examination says: checks, and the findings that they made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

Severity = Literal["problem", "warning", "note"]
Result = Literal["ok", "note", "warning", "problem", "not made"]
#: The worst first.
SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """Something that was found.

    Attributes:
        code: of the catalogue, or None where it is no mistake in a model (a damaged file, a full disk).
        severity: a problem makes numbers wrong or training vain; a warning may; a note is to be known.
        layer: it was found in, or None.
        seen: what was seen, with numbers.
        todo: what to do about it.
    """

    code: str | None
    severity: Severity
    layer: int | None
    seen: str
    todo: str


@dataclass(frozen=True)
class Check:
    """One check: the worst of its findings, ``ok`` without any, or ``not made`` and why in ``detail``.

    Attributes:
        name: stable.
        outcome: see above.
        detail: what was seen, or why the check could not be made.
        code: the catalogue's entry that it looks for first, or None.
    """

    name: str
    outcome: Result
    detail: str
    code: str | None = None


#: What a check returns: what it saw, in a line, and what it found.
Checked = tuple[str, list[Finding]]


class NotMade(Exception):
    """Raised by a check that has nothing to look at; says why."""


@dataclass(frozen=True)
class Report:
    """All checks of one examination.

    Attributes:
        subject: what was looked at.
        checks: in order.
        findings: the worst first, each kind in the order found.
        notes: what every number must be read with, such as the tokens that were used.
    """

    subject: str
    checks: tuple[Check, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, subject: str, made: Iterable[tuple[Check, Sequence[Finding]]], notes: Sequence[str] = ()) -> Report:
        """The report of checks with their findings."""
        pairs = list(made)
        findings = [finding for _, found in pairs for finding in found]
        findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
        return cls(subject, tuple(check for check, _ in pairs), tuple(findings), tuple(notes))

    @property
    def ok(self) -> bool:
        """No problem; warnings and notes there may be."""
        return not self.problems

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "problem"]

    def summary(self) -> str:
        """One line of counts."""
        counts = [
            f"{number} {severity}{'s' if number != 1 else ''}"
            for severity in SEVERITIES
            if (number := sum(finding.severity == severity for finding in self.findings))
        ]
        skipped = sum(check.outcome == "not made" for check in self.checks)
        parts = [f"{len(self.checks) - skipped} checks: {', '.join(counts) or 'nothing found'}"]
        return "; ".join([*parts, f"{skipped} could not be made"] if skipped else parts)

    def to_dict(self) -> dict[str, Any]:
        """Stable keys for JSON."""
        return {
            "subject": self.subject,
            "ok": self.ok,
            "findings": [asdict(finding) for finding in self.findings],
            "checks": [asdict(check) for check in self.checks],
            "notes": list(self.notes),
        }


def layer_of(name: str) -> int | None:
    """The number of the layer that a parameter's name lies in."""
    return next((int(b) for a, b in pairwise(name.split(".")) if a == "layers" and b.isdigit()), None)


def listed(names: Sequence[object], most: int = 4) -> str:
    """The first of ``names``, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def by_layer(rows: Sequence[tuple[float, str]], most: int = 6) -> str:
    """What was measured, layer by layer; of more than ``most`` layers the worst, those of the least measure, first."""
    if len(rows) <= most:
        return "; ".join(said for _, said in rows)
    ordered = [said for _, said in sorted(rows, key=lambda row: row[0])]
    return f"the worst first: {'; '.join(ordered[:most])}; and {len(rows) - most} layers more"


def worst(findings: Sequence[Finding]) -> Result:
    """The outcome of a check that made these findings."""
    return min((finding.severity for finding in findings), key=SEVERITIES.index, default="ok")

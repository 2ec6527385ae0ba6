"""A line of the environment's report."""

from __future__ import annotations

from moectl.doctor.report import Check, Finding, Severity, worst

Line = tuple[Check, list[Finding]]


def line(
    name: str,
    detail: str,
    severity: Severity | None = None,
    todo: str = "",
    code: str | None = None,
) -> Line:
    """One line: ok, or a finding of that severity with what to do about it."""
    findings = [] if severity is None else [Finding(code, severity, None, f"{name}: {detail}", todo)]
    return Check(name, worst(findings), detail, code), findings

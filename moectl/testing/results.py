"""What checking a router gives: one verdict and one sentence per check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from moectl.errors import CheckError

Status = Literal["ok", "failed", "skipped"]


class Check(NamedTuple):
    """One check's outcome.

    Attributes:
        name: what was checked, one or two words with hyphens; stable.
        status: ok, failed, or skipped where the question does not arise.
        says: one sentence, with the evidence.
    """

    name: str
    status: Status
    says: str


class RouterCheckError(CheckError, AssertionError):
    """A router that does not keep the contract; the message lists every check that failed."""


class Report(NamedTuple):
    """All checks of one router, in the order in which they ran.

    Attributes:
        router: its name, ``path.py:Class``, or the class's name.
        hidden_size: ``D``.
        num_experts: ``E``.
        options: the options it was built with, beyond its defaults.
        checks: the outcomes.
    """

    router: str
    hidden_size: int
    num_experts: int
    options: Mapping[str, Any]
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == "failed")

    @property
    def ok(self) -> bool:
        return not self.failed

    def summary(self) -> str:
        """``"24 checks: 22 ok, 1 failed, 1 skipped"``."""
        of = {status: sum(check.status == status for check in self.checks) for status in ("ok", "failed", "skipped")}
        return f"{len(self.checks)} checks: " + ", ".join(
            f"{number} {status}" for status, number in of.items() if number
        )

    def raise_if_failed(self) -> None:
        """
        Raises:
            RouterCheckError: a check failed.
        """
        if self.failed:
            lines = "".join(f"\n  {check.name}: {check.says}" for check in self.failed)
            raise RouterCheckError(
                f"the router '{self.router}' fails {len(self.failed)} of {len(self.checks)} checks:{lines}",
                "Mend it and check again; `moectl routers check` shows what holds too.",
            )


class Failure(Exception):
    """Raised by a check that does not hold; its text is the evidence."""


class NotApplicable(Exception):
    """Raised by a check whose question does not arise for this router; its text says why."""

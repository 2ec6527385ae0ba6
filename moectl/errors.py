"""Every failure that a user can meet, with what to do next and the exit code it ends in.

Exit codes: 0 ok, 1 failure, 2 usage or config, 3 a check did not hold, 4 not found,
5 missing extra or device, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MoectlError(Exception):
    """A failure explained to the user: what happened, and what to do next.

    Args:
        message: one sentence, what happened.
        hint: one sentence, what to do next (no leading "hint:").
        exit_code: overrides the class's own exit code.
    """

    exit_code: int = 1

    def __init__(self, message: str, hint: str | None = None, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if exit_code is not None:
            self.exit_code = exit_code


class ConfigError(MoectlError):
    """A wrong option, config key or value, or an unknown router, domain or preset."""

    exit_code = 2


class CheckError(MoectlError):
    """A check did not hold: a hash mismatch, a collapse stop, parity."""

    exit_code = 3


class NotFoundError(MoectlError):
    """A run, dataset or file that is not there."""

    exit_code = 4


class MissingDependencyError(MoectlError):
    """An optional package or a device that this machine has not."""

    exit_code = 5


def did_you_mean(name: str, options: Iterable[str]) -> str | None:
    """``"Did you mean 'x'?"`` for the nearest option, or None when nothing is near."""
    lowered = {option.lower(): option for option in options}
    matches = get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    return f"Did you mean '{lowered[matches[0]]}'?" if matches else None


def unknown(kind: str, name: str, options: Iterable[str], error: type[MoectlError] = ConfigError) -> MoectlError:
    """The error for a name that is not among ``options``: names the nearest, then lists all.

    >>> str(unknown("router", "topp1", ["top1", "switch"]))
    "unknown router 'topp1'"
    """
    known = sorted(set(options))
    listing = f"Known: {', '.join(known)}." if known else "There is none yet."
    suggestion = did_you_mean(name, known)
    return error(f"unknown {kind} '{name}'", f"{suggestion} {listing}" if suggestion else listing)

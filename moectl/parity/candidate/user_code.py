"""Running code that somebody else wrote: what it prints, how it fails, and where.

Whatever it raises becomes one sentence that names the place in *their* file; ``sys.exit`` and a bottomless
recursion count as failures, and only an interrupt from the keyboard goes through.
"""

from __future__ import annotations

import contextlib
import io
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moectl.errors import MoectlError
from moectl.parity.case import Level, Unsupported

_OURS = Path(__file__).resolve().parents[1]
_NOT_THEIRS = (str(Path(torch.__file__).resolve().parent), str(_OURS), sysconfig.get_paths()["stdlib"], "<frozen")
_DEVICES = ("expected all tensors to be on the same device", "found at least two devices", "on meta tensors",
            "is not on the expected device")  # fmt: skip


class CandidateError(MoectlError):
    """Somebody's code cannot be compared: what it did, and what to do."""


class AdapterError(MoectlError):
    """An adapter failed; the message names its file and line."""


class Failure(NamedTuple):
    """What their code raised."""

    error: BaseException

    def __str__(self) -> str:
        """Type, first line of the message, and the place."""
        error = self.error
        if isinstance(error, SyntaxError):
            return f"{type(error).__name__}: {error.msg} ({_short(error.filename or '?')}:{error.lineno})"
        if isinstance(error, SystemExit):
            text = f"it called sys.exit({error.code!r})"
        else:
            lines = str(error).strip().splitlines()
            text = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
        place = self.place
        return f"{text} ({place})" if place else text

    @property
    def place(self) -> str | None:
        """``file.py:12``: the last line of theirs that ran, outside of torch, Python and moectl."""
        frames = traceback.extract_tb(self.error.__traceback__)
        theirs = [frame for frame in frames if not frame.filename.startswith(_NOT_THEIRS)]
        return f"{_short(theirs[-1].filename)}:{theirs[-1].lineno}" if theirs else None

    @property
    def of_devices(self) -> bool:
        """Whether torch complains of tensors on different devices."""
        return any(text in str(self.error).lower() for text in _DEVICES)


def attempt(action: Callable[[], Any]) -> Any:
    """What ``action`` returns, or the :class:`Failure` of their code; moectl's own errors go through."""
    try:
        with quiet():
            return action()
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, MoectlError, Unsupported)):
            raise
        return Failure(error)


def a_level(level: Level) -> str:
    """With its article."""
    return {"moe": "an MoE block", "attention": "an attention"}.get(level, f"a {level}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Prints go to stderr, since stdout may be a JSON document; ``input()`` finds nothing; warnings are dropped."""
    with (
        contextlib.redirect_stdout(sys.stderr),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        stdin, sys.stdin = sys.stdin, io.StringIO()
        try:
            yield
        finally:
            sys.stdin = stdin


def _short(filename: str) -> str:
    path = Path(filename)
    with contextlib.suppress(ValueError, OSError):
        return str(path.resolve().relative_to(Path.cwd()))
    return str(path)

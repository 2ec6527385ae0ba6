"""How a run's files are written and read: atomic JSON, append-only JSON lines, honest numbers.

JSON has no NaN and no infinity, and nothing here heals them: they travel as the strings
``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moectl.disk import fsync
from moectl.errors import MoectlError

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode_number(value: float) -> float | int | str:
    """A JSON value for any number; NaN and infinities become strings."""
    number = value if isinstance(value, int) and not isinstance(value, bool) else float(value)
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return number


def decode_number(value: Any) -> float:
    """The inverse of ``encode_number``, always a float. Raises ``ValueError`` or ``TypeError`` for others."""
    if isinstance(value, str):
        try:
            return _NON_FINITE[value]
        except KeyError:
            raise ValueError(f"{value!r} is not a number") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def json_safe(value: Any) -> Any:
    """``value`` with every non-finite float as a string, paths as text, tuples and sets as lists."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(json_safe(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return encode_number(value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy scalars and arrays, tensors
        return json_safe(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def dumps(value: Any, *, indent: int | None = None) -> str:
    """JSON text that any parser reads: no NaN literal, keys as given."""
    return json.dumps(json_safe(value), indent=indent, ensure_ascii=False, allow_nan=False)


@contextlib.contextmanager
def explained(action: str) -> Iterator[None]:
    """Turn an ``OSError`` into a ``MoectlError`` that says what was tried and what to do."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        hint = "Set MOECTL_HOME to a folder that you can write to."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "Free some space; what was written before is intact."
        raise MoectlError(f"cannot {action}{where}: {error.strerror or error}", hint) from error


def write_atomic(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` whole or not at all: temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained(f"write {path.name}"):
        try:
            with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object. A missing or broken file is a ``MoectlError`` that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MoectlError(f"{path} is missing", "The run folder is not complete; copy it again or remove it.") from None
    except (OSError, ValueError) as error:
        raise MoectlError(f"cannot read {path}: {error}", "Restore the file, or remove the run folder.") from error
    if not isinstance(value, dict):
        raise MoectlError(f"{path} does not hold a JSON object", "Restore the file, or remove the run folder.")
    return value


class Line(NamedTuple):
    """One parsed line: its object, and the bytes where it begins and where the next does."""

    value: dict[str, Any]
    begin: int
    end: int


def read_lines(path: Path, *, start: int = 0, problems: list[str] | None = None) -> Iterator[Line]:
    """The JSON objects of a ``.jsonl`` file from byte ``start`` on, which must begin a line.

    A last line without its newline was cut while being written: it never counted, and is passed
    over. Any other broken line is a ``MoectlError`` naming file and line, or a message appended to
    ``problems`` when that list is given.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(start)
        end = start
        for raw in file:
            begin, end = end, end + len(raw)
            if not raw.endswith(b"\n"):
                return
            try:
                value = dict(json.loads(raw))
            except (ValueError, TypeError) as error:
                message = f"{path}: line {line_number(path, begin)} is broken ({error})"
                if problems is None:
                    raise MoectlError(message, "Remove the line, or restore the file from a copy.") from None
                problems.append(message)
                continue
            yield Line(value, begin, end)


def line_number(path: Path, byte: int) -> int:
    """The number, from 1, of the line that begins at ``byte``: for messages only, it reads the file."""
    with open(path, "rb") as file:
        return file.read(byte).count(b"\n") + 1


class LineWriter:
    """Appends JSON lines; a line is written whole, or taken back when the disk is full.

    Opening cuts off a torn last line, so that a new row never grows onto half an old one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with explained(f"open {path.name}"):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._size = _whole_lines(self._descriptor)
            os.ftruncate(self._descriptor, self._size)

    def write(self, value: Mapping[str, Any]) -> int:
        """Append one line; returns the file's size in bytes after it."""
        data = (dumps(value) + "\n").encode()
        with explained(f"write {self.path.name}"):
            try:
                written = 0
                while written < len(data):
                    written += os.write(self._descriptor, data[written:])
            except OSError:
                os.ftruncate(self._descriptor, self._size)
                raise
        self._size += len(data)
        return self._size

    def sync(self) -> None:
        """Flush what was written to the disk."""
        with explained(f"write {self.path.name}"):
            os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1


def _whole_lines(descriptor: int) -> int:
    """Bytes up to and including the last newline."""
    size = os.fstat(descriptor).st_size
    end = size
    while end > 0:
        begin = max(0, end - 65536)
        newline = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0

"""Reading the user's own files: JSONL, Parquet, and plain text files. Errors name file and line."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moectl.corpus.texts import MAX_TEXT_BYTES, Text, checked_group, checked_text, too_long
from moectl.errors import MoectlError

_BOM = b"\xef\xbb\xbf"
_PARQUET_ROWS = 1024
# Accented letters of a Latin-1 text are a few in a hundred bytes; of compressed data nearly half are no UTF-8.
_FEW_BYTES, _FEW_SHARE = 8, 0.1


class Row(NamedTuple):
    """A text and the domain that its record names, if it names one; ``where`` is for messages."""

    text: Text
    domain: str | None
    where: str


def read_records(path: Path) -> Iterator[Row]:
    """Rows of a ``.jsonl`` or ``.parquet`` file with the fields text and, if wanted, group, domain, source.

    Raises:
        MoectlError: no regular file, empty, binary, invalid UTF-8, a broken or too long line, a
            missing text (exit 1).
    """
    _regular_size(path)
    for where, record in _parquet(path) if path.suffix == ".parquet" else _jsonl(path):
        if "text" not in record:
            fields = ", ".join(sorted(map(str, record))[:8]) or "none"
            raise MoectlError(
                f"{where}: there is no field 'text'", f"Rename the field that holds it. Fields: {fields}."
            )
        text = checked_text(record["text"], where)
        domain = record.get("domain")
        if domain is not None:
            domain = checked_text(domain, where, field="domain")
        source = record.get("source")
        source = path.name if source is None else checked_text(source, where, field="source")
        yield Row(Text(text, checked_group(record.get("group"), text, where), source), domain, where)


def read_text_files(folder: Path) -> Iterator[Text]:
    """Every file below ``folder`` as one text whose group is its relative path, in sorted order.

    Hidden files and folders are passed over; anything else that is not UTF-8 text is an error, and
    so is what is not a regular file.
    """
    for path in text_files(folder):
        name = path.relative_to(folder).as_posix()
        yield Text(read_text_file(path), checked_text(name, str(folder), field="file name"), name)


def text_files(folder: Path) -> list[Path]:
    """All files below ``folder`` that are not hidden, sorted."""
    found = []

    def refuse(error: OSError) -> None:
        raise _unreadable(Path(error.filename or folder), error)

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root) / name for name in names if not name.startswith(".")]
    return sorted(found)


def read_text_file(path: Path) -> str:
    """The text of a file; binary content, invalid UTF-8 (with its offset) and over 8 MiB are errors."""
    if _regular_size(path) > MAX_TEXT_BYTES:
        raise too_long(str(path))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    return _decode(data, path, str(path), 0)


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    empty = True
    for number, offset, line in _lines(path):
        empty = False
        where = f"{path}, line {number}"
        try:
            record = json.loads(_decode(line, path, where, offset).rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            raise MoectlError(
                f"{where}: not valid JSON ({_reason(error)})",
                "Each line must be one whole JSON object with a field 'text'.",
            ) from error
        if not isinstance(record, dict):
            raise MoectlError(
                f"{where}: a JSON {type(record).__name__}, not an object", 'Write {"text": "..."} on each line.'
            )
        yield where, record
    if empty:
        raise _empty(path)


def _reason(error: Exception) -> str:
    """What json found wrong; some of its messages end in " at" or a colon, for a place to follow."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    return f"{error.msg.rstrip(': ').removesuffix(' at')} at column {error.colno}"


def _regular_size(path: Path) -> int:
    """The size of a regular file. Reading a pipe or a device could wait for ever."""
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise MoectlError(
            f"{path} is not a regular file", "Only regular files can be prepared; move it away or name another source."
        )
    return status.st_size


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, byte offset and bytes of each line that is not blank; memory is bounded by the limit."""
    try:
        with path.open("rb") as stream:
            offset = number = 0
            while line := stream.readline(MAX_TEXT_BYTES + 1):
                number += 1
                if len(line) > MAX_TEXT_BYTES:
                    raise too_long(f"{path}, line {number}")
                start, offset = offset, offset + len(line)
                if number == 1 and line.startswith(_BOM):
                    start, line = start + len(_BOM), line[len(_BOM) :]
                if line.strip():
                    yield number, start, line
    except OSError as error:
        raise _unreadable(path, error) from error


def _decode(data: bytes, path: Path, where: str, offset: int) -> str:
    if b"\0" in data:
        raise MoectlError(
            f"{where}: a binary file (a zero byte at offset {offset + data.index(0)})",
            "Only UTF-8 text can be prepared; leave this file out.",
        )
    try:
        return data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        position = offset + error.start + (len(_BOM) if data.startswith(_BOM) else 0)
        message = f"{where}: invalid UTF-8 at byte offset {position} of the file"
        wrong = len(data) - len(data.decode("utf-8", errors="ignore").encode())
        if wrong > max(_FEW_BYTES, _FEW_SHARE * len(data)):
            raise MoectlError(
                f"{message}; {wrong / len(data):.0%} of its bytes are no UTF-8: it looks binary",
                "Leave it out; if it is text after all, convert it to UTF-8 first.",
            ) from error
        raise MoectlError(message, f"Convert it, for example: iconv -f latin1 -t utf-8 {path.name}") from error


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in ("text", "group", "domain", "source")]
            if "text" not in columns:
                names = ", ".join(file.schema_arrow.names)
                raise MoectlError(
                    f"{path}: there is no column 'text'", f"Rename the one that holds it. Columns: {names}."
                )
            if file.metadata.num_rows == 0:
                raise _empty(path)
            row = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path}, row {row}", record
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        if path.is_file() and path.stat().st_size == 0:
            raise _empty(path) from error
        raise MoectlError(
            f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})", "Write it again."
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _empty(path: Path) -> MoectlError:
    return MoectlError(f"{path} is empty", "Give a file with at least ten texts.")


def _unreadable(path: Path, error: OSError) -> MoectlError:
    return MoectlError(f"cannot read {path}: {error.strerror or error}", "Check that it exists and its permissions.")

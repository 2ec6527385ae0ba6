"""The text as every source delivers it, and the checks that no source may skip."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable
from typing import Any, NamedTuple

from moectl.errors import MoectlError

MAX_TEXT_BYTES = 8 * 2**20
"""Limit per text, and per line of a JSONL file: 8 MiB. Longer ones are refused, not cut."""


class Text(NamedTuple):
    """One text. ``group`` is what must not be torn apart by the split (a file, play, repository);
    ``source`` says where it came from."""

    text: str
    group: str
    source: str


class DomainTexts(NamedTuple):
    """All texts of one domain in a fixed order, with what the manifest says about them."""

    name: str
    texts: list[Text]
    source: str
    revision: str
    licence: str
    empty: int


def text_hash(text: str) -> str:
    """SHA-256 (hex) of the text up to Unicode form, case and white space: equal hashes, same text."""
    normalised = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.sha256(normalised.encode()).hexdigest()


def texts_hash(texts: Iterable[Text]) -> str:
    """SHA-256 (hex) over all texts with group and source, in order."""
    digest = hashlib.sha256()
    for text in texts:
        for field in text:
            data = field.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()


def checked_text(value: Any, where: str, *, field: str = "text") -> str:
    """``value`` as a usable text, or an error (exit 1) that starts with ``where``.

    Refuses what is no string, what UTF-8 cannot write (a lone surrogate) and what is over the limit.
    """
    if not isinstance(value, str):
        raise MoectlError(
            f"{where}: '{field}' is {'null' if value is None else type(value).__name__}, not a string",
            f"Every record needs a string in '{field}'.",
        )
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise MoectlError(
            f"{where}: '{field}' holds a lone surrogate at character {error.start}, which is no Unicode text",
            "Repair the text: UTF-16 was probably cut in the middle of a character.",
        ) from error
    if size > MAX_TEXT_BYTES:
        raise too_long(where)
    return value


def checked_group(value: Any, text: str, where: str) -> str:
    """The group: ``value`` where given, else the text itself (by its hash)."""
    if value is None:
        return f"text:{text_hash(text)[:16]}"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    group = checked_text(value, where, field="group")
    return group or f"text:{text_hash(text)[:16]}"


def too_long(where: str) -> MoectlError:
    return MoectlError(
        f"{where}: longer than {MAX_TEXT_BYTES // 2**20} MiB, the limit per text",
        "Cut it into shorter texts that share one 'group', one JSON object a line.",
    )

"""The entries of the catalogue, read once from their files."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from moectl.catalogue.entry import Entry, EntryError, parse

FOLDER = Path(__file__).resolve().parent / "entries"


@cache
def entries() -> tuple[Entry, ...]:
    """Every entry of the catalogue, in the order of their codes.

    Raises:
        EntryError: the installation lacks the files, or one is not written as an entry.
    """
    found = []
    for path in sorted(FOLDER.glob("*.md")):
        one = parse(path.read_text(encoding="utf-8"), path.name)
        if one.code != path.stem:
            raise EntryError(f"the catalogue's file {path.name} holds {one.code}", "Name it after its code.")
        found.append(one)
    if not found:
        raise EntryError(f"the catalogue is missing: {FOLDER}", "Reinstall moectl: the wheel carries it.")
    return tuple(found)

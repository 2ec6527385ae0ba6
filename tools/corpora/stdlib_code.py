"""The `code` domain: pieces of the CPython standard library, cut at top-level definitions.

Only files that carry no copyright or licence line of anybody but the Python Software Foundation are used:
the rest of the library is under the PSF licence, but a few files quote a licence of their own.
"""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

from .common import Row, bundle, size, spread, tidy

BYTES_PER_GROUP = 3_750
SKIPPED_PACKAGES = {
    "test",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "site-packages",
    "config",
    "tkinter",
    "encodings",
    "pydoc_data",
    "__pycache__",
    "msilib",
    "distutils",
    "this",
    "antigravity",
    "__phello__",
    "xmlrpc",
}  # tests, tables, bundled tools, teaching material; xmlrpc derives from code under its author's own notice
_RIGHTS = re.compile(r"copyright|licen[cs]e|all rights reserved|\(c\) *(19|20)\d\d", re.IGNORECASE)
_PSF = re.compile(r"python software foundation|contributor agreement", re.IGNORECASE)


def is_plain_psf(source: str) -> bool:
    """True when no line speaks of rights, or every such line is the Foundation's own."""
    lines = source.splitlines()
    if any("contributor agreement" in line.lower() for line in lines):
        return False  # contributed code whose author kept a notice
    return all(_PSF.search(line) for line in lines if _RIGHTS.search(line))


def pieces(source: str) -> list[str]:
    """Cut one module at the boundaries of its top-level statements, and big classes between methods."""
    lines = source.splitlines()
    tree = ast.parse(source)
    starts = [0]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            starts.append(_first_line(node, lines))
            if isinstance(node, ast.ClassDef) and _span(node, lines) > 6_000:
                methods = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
                starts.extend(_first_line(n, lines) for n in methods[1:])
    starts = [*sorted(set(starts)), len(lines)]
    cut = ["\n".join(lines[a:b]) for a, b in itertools.pairwise(starts)]
    return [tidy(piece) for piece in cut if piece.strip()]


def _first_line(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, lines: list[str]) -> int:
    """Index of the first line that belongs to a definition: its decorators and the comments right above it."""
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    while first > 0 and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return first


def _span(node: ast.ClassDef, lines: list[str]) -> int:
    return sum(len(line) + 1 for line in lines[node.lineno - 1 : node.end_lineno])


def _is_code(text: str) -> bool:
    """A piece that defines something and is not mostly a table of literals or one long string."""
    if not re.search(r"^\s*(async )?(def|class) ", text, re.MULTILINE):
        return False
    letters = sum(c.isalpha() for c in text)
    digits = sum(c.isdigit() for c in text)
    return digits < 0.08 * letters


def build(stdlib: Path, version: str) -> list[Row]:
    """Rows of the code domain. ``stdlib`` is Python's ``Lib`` folder, ``version`` its release (3.11.7)."""
    groups: dict[str, list[tuple[str, str]]] = {}
    foreign = {
        init.parent.name
        for init in stdlib.glob("*/__init__.py")
        if not is_plain_psf(init.read_text(encoding="utf-8", errors="replace"))
    }  # a package whose own notice names somebody else is left out whole
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        top = relative.parts[0].removesuffix(".py")
        if top in SKIPPED_PACKAGES | foreign or top.startswith(("config-", "_sysconfig")) or "test" in relative.parts:
            continue
        source = path.read_text(encoding="utf-8")
        if size(source) < 2_500 or not source.isascii() or not is_plain_psf(source):
            continue
        texts = bundle(pieces(source), low=1_100, high=3_600)
        usable = [text for text in texts if 500 <= size(text) <= 4_600 and _is_code(text)]
        groups.setdefault(top, []).extend((text, relative.as_posix()) for text in usable)
    rows: list[Row] = []
    for group, found in sorted(groups.items()):
        origin = dict(found)
        rows.extend(
            Row(text, group, f"CPython {version} Lib/{origin[text]}") for text in spread(list(origin), BYTES_PER_GROUP)
        )
    return rows

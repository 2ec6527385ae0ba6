"""What every module keeps to: its size, and who may print, exit or catch everything."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "moectl"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_the_package_was_found() -> None:
    assert {"errors.py", "moe/layer.py", "cli/app.py"} <= {name_of(file) for file in MODULES}


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_module_fits(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{name_of(file)} has {lines} lines: past {MAX_LINES} it is two modules"


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_module_says_what_it_is(file: Path) -> None:
    tree = tree_of(file)
    assert not tree.body or ast.get_docstring(tree), f"{name_of(file)} has no docstring"


@pytest.mark.parametrize("name", ["errors.py", "paths.py", "plugins.py", "plugin_source.py", "scaffold.py"])
def test_ground_floor_needs_the_standard_library_only(name: str) -> None:
    roots = {module.partition(".")[0] for module in imported(tree_of(PACKAGE / name))}
    assert roots <= {*sys.stdlib_module_names, "moectl"}


def test_click_is_never_imported() -> None:
    """Typer vendors it: another click would be another library."""
    guilty = [name_of(file) for file in MODULES for name in imported(tree_of(file)) if name.startswith("click")]
    private = [name_of(file) for file in MODULES for name in imported(tree_of(file)) if name.startswith("typer._")]
    assert guilty + private == []


def test_services_neither_print_nor_exit() -> None:
    guilty = []
    for file in MODULES:
        if name_of(file).startswith("cli/") or file.name == "__main__.py":
            continue
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.exit", "exit", "quit"):
                guilty.append(f"{name_of(file)}:{node.lineno}")
    assert guilty == []


def test_only_the_boundary_swallows_everything() -> None:
    """A broad ``except`` elsewhere raises again: it cleans up or explains, and hides nothing."""
    guilty = []
    for file in MODULES:
        for node in ast.walk(tree_of(file)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            if broad and not raises and name_of(file) != "cli/boundary.py":
                guilty.append(f"{name_of(file)}:{node.lineno}")
    assert guilty == []

"""What a plug-in's source says, read without importing it: what its class does, and why it cannot load.

Reading finds a module that is not there, one that does not parse, and a class that is missing; what
goes wrong while the module runs, only importing can tell.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

_UNKNOWN = "an answer that only importing can give"


class Reading(NamedTuple):
    """What was read.

    Attributes:
        summary: the first line of the class's docstring, or "".
        problem: why the class cannot be loaded, or None where reading finds nothing wrong.
    """

    summary: str = ""
    problem: str | None = None


def read(module: str, attribute: str) -> Reading:
    """Read the class ``attribute`` of the module called ``module``. Runs none of its code, and never fails."""
    if not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        return Reading(problem=f"its entry point '{module}:{attribute}' is not of the form module:Class")
    spec = _find(module)
    if isinstance(spec, str):
        return Reading() if spec == _UNKNOWN else Reading(problem=spec)
    if spec.origin is None or not spec.origin.endswith(".py"):
        return Reading()  # compiled, or a namespace: nothing to read
    file = Path(spec.origin)
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file))
    except OSError as error:
        return Reading(problem=f"{file} cannot be read: {error.strerror or error}")
    except (RecursionError, MemoryError):
        return Reading()  # too deep for this parser
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"{file}, line {line}" if line else str(file)
        return Reading(problem=f"{where}: {type(error).__name__}: {getattr(error, 'msg', None) or error}")
    return _look_up(tree, attribute, file)


def _find(module: str) -> ModuleSpec | str:
    """Where the module is, or why it is nowhere. A parent package is looked through, and not imported."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)  # of a top-level name: imports nothing
    except (ImportError, ValueError, AttributeError):
        return _UNKNOWN
    name = top
    for part in rest:
        if spec is None:
            break
        if spec.submodule_search_locations is None:
            return f"'{name}' is a module, not a package, so that there is no '{module}'"
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec if spec is not None else f"no module named '{name}'"


def _look_up(tree: ast.Module, attribute: str, file: Path) -> Reading:
    name, _, below = attribute.partition(".")
    bound = dict(_bindings(tree))
    node = bound.get(name)
    if node is None:
        made_while_running = "*" in bound or "__getattr__" in bound or "globals" in _names(tree)
        return Reading() if made_while_running else Reading(problem=f"{file} has no '{name}'")
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return Reading(problem=f"'{name}' in {file} is a function, not a subclass of moectl.moe.Router")
    if not isinstance(node, ast.ClassDef) or below:
        return Reading()
    summary = (ast.get_docstring(node) or "").partition("\n")[0]
    if not (node.bases or node.keywords or node.decorator_list):
        return Reading(summary, f"'{name}' in {file} is not a subclass of moectl.moe.Router")
    return Reading(summary)


def _bindings(block: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Names that a module's statements bind, under an if or a try too, each with its node; ``*`` for a star import."""
    for node in ast.iter_child_nodes(block):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name.partition(".")[0], node) for alias in node.names)
        elif isinstance(node, (ast.stmt, ast.excepthandler, ast.match_case, ast.withitem)):
            yield from _bindings(node)
        else:
            inner = (part for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store))
            yield from ((part.id, part) for part in inner)


def _names(tree: ast.Module) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}

"""Somebody's class by ``package.module:Class`` or ``path/file.py:Class``.

The current folder is importable, as under ``python -m``; so is a file's own folder, as under ``python file.py``;
a file inside a package is imported as that package's module, so that its relative imports work.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from moectl.errors import ConfigError, MoectlError, NotFoundError, did_you_mean, unknown
from moectl.parity.candidate.user_code import AdapterError, CandidateError, Failure, attempt

_LISTED = 30
FORM = "Name it as package.module:Class or path/to/file.py:Class."


def load_object(spec: str) -> tuple[Any, ModuleType]:
    """What ``spec`` names, and the module it comes from.

    Raises:
        ConfigError: ``spec`` is not of the form; it names nothing in the module.
        NotFoundError: no such file, module or class.
        CandidateError: importing it fails; the message says how and where.
    """
    location, colon, attribute = spec.rpartition(":")
    if not colon and spec.endswith(".py"):
        location, attribute = spec, ""
    if not location or (not attribute and not spec.endswith((".py", ":"))):
        raise ConfigError(f"'{spec}' names no class", FORM)
    module = load_file(Path(location)) if _is_file(location) else _load_module(location)
    found: Any = module
    if not attribute:
        names = classes_of(module)
        listing = f"Name one, as in {' or '.join(f'{location}:{name}' for name in names[:3])}." if names else FORM
        raise ConfigError(f"'{spec}' names no class", listing)
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = classes_of(module)
            near = get_close_matches(attribute, names, n=8, cutoff=0.4) if len(names) > _LISTED else names
            raise unknown(f"class in {location}:", attribute, near, NotFoundError)
        found = getattr(found, part)
    return found, module


def classes_of(module: ModuleType) -> list[str]:
    """The classes that the module defines itself."""
    own = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    return [name for name, value in own.items() if value.__module__ == module.__name__]


def load_file(path: Path, error: type[CandidateError | AdapterError] = CandidateError) -> ModuleType:
    """Import a file; once, as long as its text stays the same.

    Raises:
        NotFoundError: no such file.
        CandidateError: it cannot be imported (``error`` in its stead where given).
    """
    file = path.expanduser()
    if not file.is_file():
        near = (
            did_you_mean(file.name, [each.name for each in file.parent.glob("*.py")]) if file.parent.is_dir() else None
        )
        raise NotFoundError(f"no file {path}", near or FORM)
    file = file.resolve()
    root = _package_root(file)
    text = file.read_bytes()
    if root is not None:
        name = ".".join(file.relative_to(root).with_suffix("").parts)
        _importable(root)
        known = sys.modules.get(name)
        if known is None or getattr(known, "__file__", None) == str(file):
            return _imported(lambda: importlib.import_module(name), str(path), name, error)
    name = f"moectl_candidate_{hashlib.sha256(str(file).encode() + text).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    _importable(file.parent)
    return _imported(lambda: _execute(name, file), str(path), name, error)


def _is_file(location: str) -> bool:
    return location.endswith(".py") or "/" in location or Path(location).is_file()


def _load_module(name: str) -> ModuleType:
    _importable(Path.cwd())
    outcome = attempt(lambda: importlib.import_module(name))
    if isinstance(outcome, ModuleType):
        return outcome
    missing = getattr(outcome.error, "name", None)
    absent = isinstance(outcome.error, ModuleNotFoundError) and missing and f"{name}.".startswith(f"{missing}.")
    if absent or (isinstance(outcome.error, (ValueError, TypeError)) and outcome.place is None):
        there = [each.stem for each in Path.cwd().glob("*.py")] + [
            each.parent.name for each in Path.cwd().glob("*/__init__.py")
        ]
        near = did_you_mean(name, there)
        raise NotFoundError(f"no module '{name}' in the current folder or among installed packages", near or FORM)
    raise _explained(outcome, name, CandidateError)


def _imported(action: Any, what: str, name: str, error: type[CandidateError | AdapterError]) -> ModuleType:
    outcome = attempt(action)
    if isinstance(outcome, Failure):
        sys.modules.pop(name, None)
        raise _explained(outcome, what, error)
    assert isinstance(outcome, ModuleType)
    return outcome


def _explained(failure: Failure, what: str, error: type[CandidateError | AdapterError]) -> MoectlError:
    kind = "the adapter" if error is AdapterError else "the candidate"
    if isinstance(failure.error, SystemExit):
        hint = 'Put what the file runs as a script under `if __name__ == "__main__":`.'
    elif isinstance(failure.error, ModuleNotFoundError):
        hint = "Install what it imports, or run from the folder in which it can be imported."
    else:
        hint = "Mend it, and see that `python -c 'import …'` works; --debug shows the traceback."
    raised = error(f"{kind} {what} cannot be imported: {failure}", hint)
    raised.__cause__ = failure.error
    return raised


def _execute(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look a class's module up here
    spec.loader.exec_module(module)
    return module


def _package_root(file: Path) -> Path | None:
    """The folder that holds the outermost package around ``file``, or None where it lies in none."""
    folder = file.parent
    if not (folder / "__init__.py").is_file() or file.stem == "__init__":
        return None
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder


def _importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()

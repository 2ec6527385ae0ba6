"""A new router as an installable package: one module, its test, and the entry point that names it."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template
from typing import NamedTuple

from moectl import __version__
from moectl.errors import ConfigError, NotFoundError
from moectl.plugins import router_entries

MAX_LENGTH = 40
NAME_RULE = f"lower-case letters, digits and single hyphens, starting with a letter, at most {MAX_LENGTH} characters"
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_TEMPLATES = Path(__file__).resolve().parent / "_templates" / "router"


class NewRouter(NamedTuple):
    """A package that was written.

    Attributes:
        name: the router's name.
        folder: of the package.
        files: what was written, relative to the folder.
        target: ``src/module.py:Class``, to be used before the package is installed.
    """

    name: str
    folder: Path
    files: tuple[str, ...]
    target: str


def new_router(name: str, parent: Path) -> NewRouter:
    """Write the package ``parent/moectl-NAME``. Nothing is ever overwritten.

    Raises:
        ConfigError: a name that cannot be used, or that is taken; a folder that exists already.
        NotFoundError: no such parent folder.
    """
    _check_name(name)
    if not parent.is_dir():
        raise NotFoundError(f"no folder {parent}", "Make it first, or name another with --into.")
    distribution = f"moectl-{name}"
    folder = parent / distribution
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"{folder} exists already", "Choose another name, or another folder with --into.")
    module = distribution.replace("-", "_")
    class_name = "".join(part.capitalize() for part in name.split("-"))
    class_name += "" if class_name.endswith("Router") else "Router"
    values = {
        "name": name,
        "distribution": distribution,
        "module": module,
        "test": module.removeprefix("moectl_"),
        "class_name": class_name,
        "moectl_version": __version__,
    }
    files = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"src/{module}.py": "module.py",
        f"tests/test_{values['test']}.py": "test.py",
    }
    texts = {file: _render(template, values) for file, template in files.items()}  # all, before any is written
    folder.mkdir()
    for file, text in texts.items():
        (folder / file).parent.mkdir(exist_ok=True)
        with (folder / file).open("x", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
    return NewRouter(name, folder, tuple(files), f"src/{module}.py:{class_name}")


def _check_name(name: str) -> None:
    if len(name) > MAX_LENGTH or not _NAME.fullmatch(name):
        nearest = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:MAX_LENGTH].rstrip("-")
        suggestion = f"Use '{nearest}', perhaps." if _NAME.fullmatch(nearest) else "Example: my-router."
        raise ConfigError(f"{name!r} cannot name a router: {NAME_RULE}", suggestion)
    entry = router_entries().get(name)
    if entry is not None:
        raise ConfigError(
            f"the router name '{name}' is taken by '{entry.distribution}'",
            "Choose another: two packages with one name are refused. `moectl routers ls` lists all.",
        )


def _render(template: str, values: dict[str, str]) -> str:
    return Template((_TEMPLATES / f"{template}.tmpl").read_text(encoding="utf-8")).substitute(values)

"""Where things live: one home folder per project, never the user's home.

``MOECTL_HOME`` or, without it, the ``.moectl`` folder of the working folder or of the nearest
parent that has one; a new one is made in the working folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from moectl.errors import MoectlError

_HF_CACHE_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
NAME_RULE = "letters, digits, '.', '_' and '-', at most 100, starting with a letter or digit"


def check_name(name: str) -> str:
    """``name`` if it is safe as a folder's name. Raises ``ValueError`` that says the rule."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a usable name: {NAME_RULE}")
    return name


def home() -> Path:
    """The folder that holds data, runs, registry and cache. Not created here."""
    configured = os.environ.get("MOECTL_HOME")
    if configured:
        return Path(configured).expanduser().resolve()
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / ".moectl").is_dir():
            return folder / ".moectl"
    return here / ".moectl"


def ensure(folder: Path) -> Path:
    """Create ``folder`` and return it; a read-only place is an error that says what to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoectlError(
            f"cannot create {folder}: {error.strerror or error}",
            "Set MOECTL_HOME to a folder that you can write to.",
        ) from error
    return folder


def data_dir() -> Path:
    return home() / "data"


def runs_dir() -> Path:
    return home() / "runs"


def groups_dir() -> Path:
    return home() / "groups"


def registry_path() -> Path:
    return home() / "registry.db"


def cache_dir() -> Path:
    return home() / "cache"


def shipped(kind: str) -> Path:
    """A folder that ships with moectl: ``corpora`` or ``configs``.

    Found beside the package in an installed wheel and in the source tree otherwise, from any
    working folder.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / "_data" / kind, package.parent / "data" / kind):
        if candidate.is_dir():
            return candidate
    raise MoectlError(
        f"the shipped '{kind}' folder is missing from this installation",
        "Reinstall moectl: the wheel carries it.",
    )


def use_project_cache() -> None:
    """Keep the caches of Hugging Face and matplotlib under our home, unless the user set their place."""
    if not any(name in os.environ for name in _HF_CACHE_VARIABLES):
        os.environ["HF_HOME"] = str(cache_dir() / "huggingface")
    os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))

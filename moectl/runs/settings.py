"""A run's config.yaml as a tree: the one place that reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moectl.errors import MoectlError

_HINT = "Restore the file from a copy: it says what the run is, so nothing can be measured or resumed without it."


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration of the run in ``folder``, as plain containers.

    Raises:
        MoectlError: config.yaml is missing, broken or no table (exit 1), naming its path.
    """
    path = folder / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MoectlError(f"{path} is missing", _HINT) from None
    except (OSError, ValueError) as error:
        raise MoectlError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}", _HINT) from None
    tree = parse_config(text, path)
    if not isinstance(tree, dict) or not tree:
        raise broken_config(path, "it is no table of settings")
    return tree


def parse_config(text: str, path: Path) -> Any:
    """``text`` as YAML. Raises ``MoectlError`` naming ``path`` and the line."""
    import yaml

    try:
        return yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f"line {mark.line + 1}: "
        raise broken_config(path, f"{where}{getattr(error, 'problem', None) or error}") from None


def broken_config(path: Path, what: str) -> MoectlError:
    """The error for a config.yaml that says nothing usable."""
    return MoectlError(f"{path} is broken: {what}", _HINT)

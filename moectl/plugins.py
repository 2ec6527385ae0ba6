"""Routers by name: entry points of group ``moectl.routers``, read as metadata, loaded when used.

Listing imports nothing, so a broken plug-in can break only itself. moectl's own routers are entry
points too; a table stands in for them when moectl runs from a source tree without being installed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from moectl.errors import ConfigError, MoectlError, NotFoundError, unknown

GROUP = "moectl.routers"
OWN = "moectl"
BUILT_IN: dict[str, str] = {
    "top1": "moectl.routers.top1:Top1Router",
    "topk": "moectl.routers.topk:TopKRouter",
    "top2": "moectl.routers.topk:Top2Router",
    "switch": "moectl.routers.switch:SwitchRouter",
}


class RouterEntry(NamedTuple):
    """A router that can be loaded by name.

    Attributes:
        name: what ``--router`` takes.
        target: ``"package.module:Class"``.
        distribution: the installed package that brings it.
        version: that package's version, or "".
        rivals: other distributions that claim the same name; with any, loading is refused.
    """

    name: str
    target: str
    distribution: str
    version: str = ""
    rivals: tuple[str, ...] = ()


def router_entries() -> dict[str, RouterEntry]:
    """Name -> entry, moectl's own first, then by name. Reads metadata only, and never fails."""
    found: dict[str, RouterEntry] = {}
    for point in metadata.entry_points(group=GROUP):
        dist = point.dist
        entry = RouterEntry(
            point.name, point.value, dist.name if dist else "unknown package", dist.version if dist else ""
        )
        first = found.get(point.name)
        if first is None:
            found[point.name] = entry
        elif entry.distribution not in (first.distribution, *first.rivals):
            found[point.name] = first._replace(rivals=(*first.rivals, entry.distribution))
    for name, target in BUILT_IN.items():
        other = found.get(name)
        if other is None:
            found[name] = RouterEntry(name, target, OWN)
        elif other.distribution != OWN and OWN not in other.rivals:
            found[name] = other._replace(rivals=(*other.rivals, OWN))
    order = {name: index for index, name in enumerate(BUILT_IN)}
    return {name: found[name] for name in sorted(found, key=lambda name: (order.get(name, len(order)), name))}


def summary(entry: RouterEntry) -> str:
    """The first line of the router's docstring, read from its source without importing it; "" if unknown."""
    module_name, _, attribute = entry.target.partition(":")
    relative = module_name.replace(".", "/") + ".py"
    if entry.distribution == OWN:
        file = Path(__file__).resolve().parent.parent / relative
    else:
        try:
            file = Path(str(metadata.distribution(entry.distribution).locate_file(relative)))
        except metadata.PackageNotFoundError:
            return ""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == attribute:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


def load_router_class(spec: str) -> Any:
    """The class behind a router's name or behind ``path.py:Class``.

    Raises:
        ConfigError: no such router or class; two packages claim the name.
        NotFoundError: no such file.
        MoectlError: its module cannot be imported; the message names the plug-in and its package.
    """
    if ".py:" in spec or spec.endswith(".py"):
        return _load_from_file(spec)
    entries = router_entries()
    entry = entries.get(spec)
    if entry is None:
        raise unknown("router", spec, entries)
    if entry.rivals:
        claimants = " and ".join((entry.distribution, *entry.rivals))
        raise ConfigError(f"the router name '{spec}' is claimed by {claimants}", "Uninstall all but one of them.")
    return _load_entry(entry)


def _load_entry(entry: RouterEntry) -> Any:
    module_name, _, attribute = entry.target.partition(":")
    who = f"the router '{entry.name}' of the package '{entry.distribution}' ({entry.target})"
    hint = f"Update or uninstall '{entry.distribution}', or report this to its authors."
    try:
        loaded: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            loaded = getattr(loaded, part)
    except (Exception, SystemExit) as error:  # a plug-in's import may raise anything
        raise MoectlError(f"{who} cannot be loaded: {type(error).__name__}: {error}", hint) from error
    return loaded


def _load_from_file(spec: str) -> Any:
    location, _, attribute = spec.rpartition(":") if ".py:" in spec else (spec, "", "")
    file = Path(location).expanduser()
    if not file.is_file():
        raise NotFoundError(f"no router file {file}", "Write --router path/to/file.py:ClassName.")
    module = _import_file(file.resolve(), spec)
    own = [
        name for name, value in vars(module).items() if isinstance(value, type) and value.__module__ == module.__name__
    ]
    if not attribute:
        example = f"{location}:{own[-1]}" if own else f"{location}:ClassName"
        raise ConfigError(f"{spec} names no class", f"Write --router {example}")
    loaded: Any = module
    for part in attribute.split("."):
        if not hasattr(loaded, part):
            raise unknown(f"class in {location}:", attribute, own)
        loaded = getattr(loaded, part)
    return loaded


def _import_file(file: Path, spec: str) -> Any:
    """Import a file under a name made from its path, once per process."""
    name = f"moectl_file_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, file)
    assert module_spec is not None and module_spec.loader is not None, file
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # pydantic and typing look a class's module up here
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # user code may raise anything
        del sys.modules[name]
        line = getattr(error, "lineno", None)
        where = f"{spec} (line {line})" if line else spec
        raise MoectlError(
            f"the router file {where} cannot be imported: {type(error).__name__}: {error}",
            "Mend the file and run again; --debug shows the traceback.",
        ) from error
    return module

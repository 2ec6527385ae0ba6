"""Routers by name: entry points of group ``moectl.routers``, read as metadata, loaded when used.

Listing imports nothing, so a broken plug-in can break only itself. moectl's own routers are entry
points too; a table stands in for them when moectl runs from a source tree without being installed.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from moectl.errors import ConfigError, MoectlError, NotFoundError, unknown
from moectl.plugin_source import Reading, read

GROUP = "moectl.routers"
OWN = "moectl"
BUILT_IN: dict[str, str] = {
    "top1": "moectl.routers.top1:Top1Router",
    "topk": "moectl.routers.topk:TopKRouter",
    "top2": "moectl.routers.topk:Top2Router",
    "switch": "moectl.routers.switch:SwitchRouter",
    "noisy-topk": "moectl.routers.noisy_topk:NoisyTopKRouter",
    "sigmoid": "moectl.routers.sigmoid:SigmoidRouter",
    "expert-choice": "moectl.routers.expert_choice:ExpertChoiceRouter",
    "expert-choice-threshold": "moectl.routers.expert_choice_threshold:ExpertChoiceThresholdRouter",
}


class PluginError(MoectlError):
    """A plug-in that is there and cannot be loaded."""


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

    @property
    def module(self) -> str:
        return self.target.partition(":")[0].strip()

    @property
    def attribute(self) -> str:
        """The class's name in its module; extras in brackets, which a target may end in, are left away."""
        return self.target.partition(":")[2].partition("[")[0].strip()

    @property
    def clash(self) -> str | None:
        """Who claims the name, where it is more than one."""
        return f"claimed by {' and by '.join((self.distribution, *self.rivals))}" if self.rivals else None

    @property
    def surplus(self) -> str:
        """What to uninstall, so that one claimant is left: moectl itself, where it is among them."""
        claimants = (self.distribution, *self.rivals)
        others = [distribution for distribution in claimants if distribution != OWN]
        return f"{'' if OWN in claimants else 'all but one of '}{', '.join(others)}"


def router_entries() -> dict[str, RouterEntry]:
    """Name -> entry, moectl's own first, then by name. Reads metadata only, and never fails."""
    found: dict[str, RouterEntry] = {}
    for entry in (*_installed(), *(RouterEntry(name, target, OWN) for name, target in BUILT_IN.items())):
        first = found.get(entry.name)
        if first is None:
            found[entry.name] = entry
        elif entry.distribution not in (first.distribution, *first.rivals):
            found[entry.name] = first._replace(rivals=(*first.rivals, entry.distribution))
    order = {name: index for index, name in enumerate(BUILT_IN)}
    return {name: found[name] for name in sorted(found, key=lambda name: (order.get(name, len(order)), name))}


def router_entry(name: str) -> RouterEntry:
    """The entry of that name, claimed by one package alone.

    Raises:
        ConfigError: there is none, or several packages claim it.
    """
    entries = router_entries()
    entry = entries.get(name)
    if entry is None and "/" in name:
        raise ConfigError(f"unknown router '{name}'", "A router in a file is named path/to/file.py:ClassName.")
    if entry is None:
        raise unknown("router", name, entries)
    if entry.rivals:
        raise ConfigError(
            f"the router name '{name}' is {entry.clash}",
            f"Uninstall {entry.surplus}, or name the one you mean as path/to/module.py:Class.",
        )
    return entry


def reading(entry: RouterEntry) -> Reading:
    """What the router's source says of it, without importing it."""
    return read(entry.module, entry.attribute)


def is_file(spec: str) -> bool:
    """Whether a router is named by its file, as ``path.py:Class``, and not by its name."""
    return ".py:" in spec or spec.endswith(".py")


def _installed() -> Iterator[RouterEntry]:
    """The routers of every installed package.

    The text of each package's entry points is read here and not by ``metadata.entry_points``, which
    one malformed line in any package would break for all.
    """
    for dist in metadata.distributions():
        try:
            text = dist.read_text("entry_points.txt") or ""
        except (OSError, ValueError):  # unreadable, or not text: no router can be named from it
            continue
        if GROUP not in text:
            continue
        name, version = _identity(dist)
        if _is_shadowed(dist, name):
            continue
        section = ""
        for line in map(str.strip, text.splitlines()):
            if line.startswith("["):
                section = line.strip("[]").strip()
            elif section == GROUP and line and line[0] not in "#;":
                router, _, target = line.partition("=")
                yield RouterEntry(router.strip(), target.strip(), name, version)


def _identity(dist: metadata.Distribution) -> tuple[str, str]:
    """Name and version of a package; a stand-in and "" where its metadata is missing."""
    try:
        return dist.metadata["Name"] or "unknown package", dist.metadata["Version"] or ""
    except (LookupError, OSError, TypeError, ValueError):
        return "unknown package", ""


def _is_shadowed(dist: metadata.Distribution, name: str) -> bool:
    """Whether another copy of the package comes earlier on the path, so that this one is not in use."""
    try:
        first = metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError):
        return False
    return first.locate_file("") != dist.locate_file("")


def load_router_class(spec: str) -> Any:
    """The class behind a router's name or behind ``path.py:Class``.

    Raises:
        ConfigError: no such router or class; two packages claim the name.
        NotFoundError: no such file.
        PluginError: its module cannot be imported; the message names the plug-in and its package.
    """
    return _load_from_file(spec) if is_file(spec) else _load_entry(router_entry(spec))


def _load_entry(entry: RouterEntry) -> Any:
    who = f"the router '{entry.name}' of the package '{entry.distribution}' ({entry.target})"
    hint = f"Update or uninstall '{entry.distribution}', or report this to its authors."
    try:
        loaded: Any = importlib.import_module(entry.module)
        for part in entry.attribute.split("."):
            loaded = getattr(loaded, part)
    except (Exception, SystemExit) as error:  # a plug-in's import may raise anything
        raise PluginError(f"{who} cannot be loaded: {type(error).__name__}: {error}", hint) from error
    return loaded


def _load_from_file(spec: str) -> Any:
    location, _, attribute = spec.rpartition(":") if ".py:" in spec else (spec, "", "")
    file = Path(location).expanduser()
    if not file.is_file():
        raise NotFoundError(f"no router file {file}", "Name it as path/to/file.py:ClassName.")
    module = _import_file(file.resolve(), spec)
    classes = _classes(module)
    if not attribute:
        names = [f"{location}:{name}" for name in classes] or [f"{location}:ClassName"]
        raise ConfigError(f"{spec} names no class", f"Name one, as in {' or '.join(names)}.")
    loaded: Any = module
    for part in attribute.split("."):
        if not hasattr(loaded, part):
            raise unknown(f"class in {location}:", attribute, classes)
        loaded = getattr(loaded, part)
    return loaded


def _classes(module: Any) -> list[str]:
    """The classes that a module defines: its routers, or all of them where none looks like a router."""
    own = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    own = {name: value for name, value in own.items() if value.__module__ == module.__name__}
    return [name for name, value in own.items() if hasattr(value, "route")] or list(own)


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
        raise PluginError(
            f"the router file {where} cannot be imported: {type(error).__name__}: {error}",
            "Mend the file and run again; --debug shows the traceback.",
        ) from error
    return module

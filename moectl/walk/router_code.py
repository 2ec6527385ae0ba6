"""Which code a router ran: a plug-in's file can change under a run, moectl's own source is hashed elsewhere."""

from __future__ import annotations

import hashlib
import inspect
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from moectl.config.schema import ExperimentConfig, MoEConfig
from moectl.hf.folder import ROUTER
from moectl.plugins import OWN, router_entries
from moectl.routers import router_class


class RouterCode(NamedTuple):
    """The module of a router that is not moectl's own.

    Attributes:
        file: where it was read from.
        sha256: of its bytes.
        distribution: the package that brings it and its version; "" for a file named as ``path.py:Class``.
    """

    file: Path
    sha256: str
    distribution: str

    def record(self) -> dict[str, Any]:
        """For run.json."""
        return {"file": str(self.file), "sha256": self.sha256, "distribution": self.distribution}


def router_code(config: ExperimentConfig) -> RouterCode | None:
    """The code behind the config's router; None for a dense model and for moectl's own routers."""
    if config.moe is None:
        return None
    name = config.moe.router_name
    entry = router_entries().get(name)
    if entry is not None and entry.distribution == OWN:
        return None
    file = Path(inspect.getfile(router_class(name))).resolve()
    distribution = "" if entry is None else f"{entry.distribution} {entry.version}".strip()
    return RouterCode(file, hashlib.sha256(file.read_bytes()).hexdigest(), distribution)


def router_file(moe: MoEConfig) -> Path | None:
    """The file of a router that is named as ``path.py:Class``; None for any other."""
    file, colon, _ = moe.router_name.rpartition(":")
    return Path(file).expanduser().resolve() if colon and file.endswith(".py") else None


def with_absolute_router(config: ExperimentConfig) -> ExperimentConfig:
    """The same config with a router file named by its absolute path, so that it is found from anywhere."""
    if config.moe is None or ".py:" not in config.moe.router_name:
        return config
    file, _, name = config.moe.router_name.rpartition(":")
    router = {**config.moe.router, "name": f"{Path(file).expanduser().resolve()}:{name}"}
    return config.model_copy(update={"moe": config.moe.model_copy(update={"router": router})})


def keep(code: RouterCode | None, folder: Path) -> None:
    """Copy the router's module into the run folder."""
    if code is not None:
        shutil.copyfile(code.file, folder / ROUTER)

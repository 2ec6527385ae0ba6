"""Distributions as pip leaves them: a module and a dist-info folder, on the path of one test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moectl.plugins import GROUP

ROUTER = '''
from moectl.moe import Router

class Mine(Router):
    """Sends every token home."""
'''


class Installer:
    """Installs distributions under a folder, each on ``sys.path`` until the test ends."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.patch = patch

    def __call__(
        self,
        distribution: str,
        *,
        router: str,
        source: str = ROUTER,
        target: str | None = None,
        points: str | None = None,
    ) -> Path:
        """Install one module with one router, and return the module's file.

        Args:
            distribution: its name; the module's with underscores.
            router: the router's name.
            source: the module's text.
            target: what the entry point names, if not the module's class ``Mine``.
            points: the whole text of entry_points.txt instead.
        """
        module = distribution.replace("-", "_")
        site = self.root / f"site-{distribution}-{router}"
        info = site / f"{module}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        text = f"[{GROUP}]\n{router} = {target or f'{module}:Mine'}\n" if points is None else points
        (info / "entry_points.txt").write_text(text)
        file = site / f"{module}.py"
        file.write_text(source)
        self.patch.syspath_prepend(str(site))
        self.patch.delitem(sys.modules, module, raising=False)
        return file

"""Routers tried in processes of their own: what a module does to its interpreter, it does to no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from moectl.plugins import router_entries
from moectl.testing.trial import try_entries
from tests.testing.install import Installer


def test_each_package_is_tried_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install = Installer(tmp_path, monkeypatch)
    good = "from moectl.routers.topk import TopKRouter as Mine\nprint('hello from an import')"
    install("good-routers", router="good", source=good)
    install("raising-routers", router="raising", source="raise RuntimeError('no luck')")
    install("killed-routers", router="killed", source="import os; os.kill(os.getpid(), 9)")
    install("gone-routers", router="gone", source="import os, sys; print('bye', file=sys.stderr); os._exit(0)")
    install("no-routers", router="number", source="Mine = 7")
    names = ["top1", "good", "raising", "killed", "gone", "number"]
    packages: list[str] = []

    entries = router_entries()
    outcome = try_entries([entries[name] for name in names], tried=packages.append)

    assert packages == ["moectl", *(f"{name}-routers" for name in ("good", "raising", "killed", "gone", "no"))]
    assert list(outcome) == names
    assert outcome["top1"] is None
    assert outcome["good"] is None
    assert "RuntimeError: no luck" in str(outcome["raising"])
    assert outcome["killed"] == "importing it ended the interpreter (killed by signal 9)"
    assert outcome["gone"] == "importing it ended the interpreter (exit code 0): bye"
    assert "is 7, not a subclass of moectl.moe.Router" in str(outcome["number"])


def test_an_import_that_never_ends_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install = Installer(tmp_path, monkeypatch)
    install("slow-routers", router="slow", source="import time; time.sleep(600)")
    assert try_entries([router_entries()["slow"]], timeout_s=8.0) == {"slow": "importing it took more than 8 s"}

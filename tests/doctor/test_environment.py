"""This machine as it is, and with faults planted where they would lie: in metadata, home, disk and terminal."""

from __future__ import annotations

import importlib
import json
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moectl.doctor import home
from moectl.doctor.environment import devices, environment, requirements, router_logits, versions
from moectl.doctor.lines import Line
from moectl.hf import releases
from moectl.runs.database import SCHEMA_VERSION
from moectl.runs.rundir import RunDir
from moectl.runs.store import Registry
from tests.doctor.conftest import Lab

ROOT = Path(__file__).resolve().parents[2]


def by_name(lines: Any) -> dict[str, Line]:
    return {check.name: (check, findings) for check, findings in lines}


def outcome(lines: Any, name: str) -> tuple[str, str, str]:
    """(outcome, detail, what to do) of one line."""
    check, findings = by_name(lines)[name]
    return check.outcome, check.detail, findings[0].todo if findings else ""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a package's metadata first on the path, as an installed one would lie there."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))

    def install(name: str, version: str, entry_points: str = "") -> None:
        folder = tmp_path / "site" / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if entry_points:
            (folder / "entry_points.txt").write_text(entry_points)
        importlib.invalidate_caches()

    return install


# --- versions


def test_this_machine_has_what_moectl_asks_for() -> None:
    lines = by_name(versions())
    asked = {Requirement(text).name for text in metadata.requires("moectl") or [] if "extra" not in text}
    assert {"torch", "transformers", "safetensors"} <= asked <= lines.keys()
    assert all(check.outcome == "ok" for check, _ in lines.values())
    assert metadata.version("torch") in lines["torch"][0].detail and ">=2.11" in lines["torch"][0].detail
    assert {"extra 'dev'", "pytest"}.isdisjoint(lines)


def test_the_requirements_are_those_of_pyproject_installed_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    python, required, extras = requirements()
    monkeypatch.setattr("moectl.doctor.environment.OWN", "moectl-that-is-not-installed")
    source_python, source_required, source_extras = requirements()
    assert python == source_python

    def plain(each: Any) -> list[tuple[str, str]]:
        return sorted((one.name, str(one.specifier)) for one in each)

    assert plain(required) == plain(source_required)
    assert {extra: plain(each) for extra, each in extras.items()} == {
        extra: plain(each) for extra, each in source_extras.items()
    }
    assert {"report", "gpu", "track"} <= extras.keys()


def test_an_old_and_a_too_new_package_are_problems_and_an_old_extra_warns(packages: Callable[..., None]) -> None:
    packages("rich", "1.0")
    packages("torch", "2.99")
    packages("matplotlib", "1.5")
    lines = list(versions())
    assert outcome(lines, "rich")[0] == "problem" and "1.0, but moectl asks for >=13.9" in outcome(lines, "rich")[1]
    assert outcome(lines, "torch")[0] == "problem"
    assert outcome(lines, "matplotlib")[0] == "warning"
    assert "pip install 'rich>=13.9'" in outcome(lines, "rich")[2]


def test_a_missing_package_is_a_problem(tmp_path: Path) -> None:
    """In a process that has nothing but moectl and torch's like on its path; typer is left away."""
    site = tmp_path / "site"
    site.mkdir()
    for path in map(Path, sys.path):
        if path.name == "site-packages":
            for entry in path.iterdir():
                if not entry.name.startswith(("typer-", "__editable__", "_moectl")):
                    (site / entry.name).symlink_to(entry)
    code = (
        "import sys\n"
        f"sys.path[:] = [p for p in sys.path if 'site-packages' not in p] + [{str(site)!r}, {str(ROOT)!r}]\n"
        "from moectl.doctor.environment import versions\n"
        "print([(c.outcome, c.detail) for c, _ in versions() if c.name == 'typer'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[('problem', 'not installed')]", done.stderr


# --- transformers


@pytest.mark.parametrize(
    ("version", "bad"),
    [
        ("4.57.6", False), ("5.0.0", True), ("5.0.0rc1", True), ("5.3.0", True), ("5.5.4", True), ("5.6.0", False),
        ("5.17.0", False), ("5.23.0", False),
    ],
)  # fmt: skip
def test_the_releases_that_return_probabilities_are_known(version: str, bad: bool) -> None:
    families = [family for entry in releases.known_bad(version) if entry.balance_loss for family in entry.families]
    assert bool(families) == bad
    assert not bad or {"mixtral", "qwen3_moe", "olmoe"} <= set(families)
    assert all("transformers" in entry.source for entry in releases.KNOWN)


def test_a_known_bad_release_is_a_problem_under_its_code(packages: Callable[..., None]) -> None:
    packages("transformers", "5.5.4")
    check, findings = by_name(router_logits())["router_logits, known"]
    assert check.outcome == "problem" and check.code == findings[0].code == "MOE057"
    assert "45120" in check.detail and "qwen3_moe" in check.detail
    assert "transformers>=5.17" in findings[0].todo


def test_an_unknown_release_is_found_by_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = list(router_logits())
    assert outcome(lines, "router_logits, known")[0] == outcome(lines, "router_logits, tried")[0] == "ok"
    assert releases.probe_router_logits().exact < 1e-6  # float32: the same product, perhaps in another order

    def forward(self: Any, hidden_states: Tensor) -> Any:
        """As in transformers 5.0.0 to 5.5.4."""
        probs_TE = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight).softmax(-1)
        weights_TK, indices_TK = probs_TE.topk(self.top_k, dim=-1)
        return probs_TE, weights_TK, indices_TK

    monkeypatch.setattr(Qwen3MoeTopKRouter, "forward", forward)
    check, findings = by_name(router_logits())["router_logits, tried"]
    assert check.outcome == "problem" and findings[0].code == "MOE057"
    assert "rows sum to 1 … 1" in check.detail


def test_probabilities_are_told_from_logits_by_every_row() -> None:
    probs_TE = torch.tensor([[0.5, 0.5], [0.1, 0.9]])
    assert releases.are_probabilities(probs_TE) and releases.are_probabilities(probs_TE.bfloat16())
    assert not releases.are_probabilities(torch.tensor([[2.0, -1.0], [0.1, 0.9]]))  # sums to one, by chance
    assert not releases.are_probabilities(torch.tensor([[0.5, 0.5], [0.1, 0.8]]))


def test_the_probe_leaves_chance_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    releases.probe_router_logits()
    assert torch.equal(torch.rand(2), expected)


# --- devices


def test_threads_are_held_against_the_cores_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    threads = torch.get_num_threads()
    try:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
        for count, expected in ((1, "warning"), (2, "ok"), (4, "ok"), (5, "warning")):
            torch.set_num_threads(count)
            assert outcome(devices(), "threads")[0] == expected, count
    finally:
        torch.set_num_threads(threads)


def test_devices_are_those_of_torch() -> None:
    lines = by_name(devices())
    expected = {f"cuda:{index}" for index in range(torch.cuda.device_count())} or {"cuda"}
    assert {name for name in lines if name.startswith("cuda")} == expected
    for name in expected & {"cuda:0"}:
        assert "GiB free" in lines[name][0].detail and "bfloat16" in lines[name][0].detail
    assert "bfloat16" in lines["cpu bfloat16"][0].name


# --- plug-ins


def test_a_broken_plug_in_is_a_problem_and_the_others_load(packages: Callable[..., None]) -> None:
    assert [check.outcome for check, _ in home.plugins()] == ["ok"]
    packages("moe-broken", "0.1", "[moectl.routers]\nshaky = no_such_module_at_all:Router\n")
    lines = list(home.plugins())
    state, detail, todo = outcome(lines, "router 'shaky'")
    assert state == "problem" and "no_such_module_at_all" in detail and "moe-broken" in todo
    assert "8 of 9 load" in outcome(lines, "routers")[1]


# --- the registry and the runs


@pytest.fixture
def project(lab: Lab, healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own with one indexed run."""
    folder = tmp_path / "home"
    (folder / "runs").mkdir(parents=True)
    shutil.copytree(healthy, folder / "runs" / "one")
    monkeypatch.setenv("MOECTL_HOME", str(folder))
    registry = Registry(folder / "registry.db")
    registry.reindex(folder / "runs")
    registry.close()
    return folder


def test_a_sound_registry_says_what_the_folders_say(project: Path) -> None:
    state, detail, _ = outcome(home.registry(), "registry")
    assert state == "ok" and f"schema version {SCHEMA_VERSION}" in detail and "1 run" in detail


def test_a_registry_that_differs_is_a_warning_that_names_the_runs(project: Path) -> None:
    shutil.copytree(project / "runs" / "one", project / "runs" / "two")
    assert "not in it: two" in outcome(home.registry(), "registry")[1]
    RunDir.open(project / "runs" / "one").update(tokens=10**9)  # the index shows the larger of this and the log
    assert "out of date: one" in outcome(home.registry(), "registry")[1]
    shutil.rmtree(project / "runs" / "one")
    state, detail, todo = outcome(home.registry(), "registry")
    assert state == "warning" and "folder gone: one" in detail and "reindex" in todo
    (project / "registry.db").unlink()
    assert outcome(home.registry(), "registry")[0] == "warning"
    shutil.rmtree(project / "runs")
    assert outcome(home.registry(), "registry")[0] == "ok"


def test_a_damaged_and_a_newer_registry_are_problems(project: Path) -> None:
    with sqlite3.connect(project / "registry.db") as connection:
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    connection.close()
    state, detail, _ = outcome(home.registry(), "registry")
    assert state == "problem" and f"schema version {SCHEMA_VERSION + 1}" in detail
    with sqlite3.connect(project / "registry.db") as connection:
        connection.execute("PRAGMA user_version=0")
    connection.close()
    assert outcome(home.registry(), "registry")[0] == "warning"
    for name in ("registry.db-wal", "registry.db-shm"):
        (project / name).unlink(missing_ok=True)
    (project / "registry.db").write_bytes(b"no database " * 1000)
    assert outcome(home.registry(), "registry")[0] == "problem"
    assert (project / "registry.db").read_bytes().startswith(b"no database")  # not set aside by a look


def test_lost_live_and_unreadable_runs_are_told(project: Path) -> None:
    RunDir.open(project / "runs" / "one").update(status="running")
    state, detail, todo = outcome(home.registry(), "stale runs")
    assert state == "warning" and "one say" in detail and "--resume one" in todo
    with RunDir.open(project / "runs" / "one").acquire():
        lines = by_name(home.registry())
        assert "stale runs" not in lines and lines["locks"][0].detail == "one being written"
    (project / "runs" / "one" / "run.json").write_text("{")
    assert outcome(home.registry(), "runs")[0] == "warning"


# --- disk, git, terminal


def test_a_full_disk_is_found_by_writing(tmp_path: Path) -> None:
    """A limit on file sizes stands in for the full disk: the system refuses the write either way."""
    code = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "from moectl.doctor import home\n"
        "print([(c.name, c.outcome, c.detail) for c, _ in home.disk()])"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],  # no bytecode: the limit would cut it
        capture_output=True,
        text=True,
        check=False,
        env={"MOECTL_HOME": str(tmp_path)},
    )
    assert "('writable', 'problem'" in done.stdout and "too large" in done.stdout, done.stdout + done.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100
    assert list(tmp_path.iterdir()) == []


def test_little_room_warns_and_none_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path / "not" / "yet"))
    assert outcome(home.disk(), "disk")[0] == "ok"
    assert outcome(home.disk(), "writable")[1] == str(tmp_path)
    free = shutil.disk_usage(tmp_path).free
    monkeypatch.setattr(home, "LITTLE", free * 2)
    assert outcome(home.disk(), "disk")[0] == "warning"
    monkeypatch.setattr(home, "TOO_LITTLE", free * 2)
    assert outcome(home.disk(), "disk")[0] == "problem"
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path / "file"))
    assert outcome(home.disk(), "writable")[0] == "problem"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_git_and_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert outcome(home.surroundings(), "git")[:2] == ("ok", "this folder is no repository")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert outcome(home.surroundings(), "git")[0] == "warning"
    code = "from moectl.doctor import home\nprint([(c.name, c.outcome) for c, _ in home.surroundings()])"
    for encoding, expected in (("ascii", "warning"), ("utf-8", "ok"), ("latin-1", "warning")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            env={"PYTHONIOENCODING": encoding, "PATH": ""},
        )
        assert f"('terminal', '{expected}')" in done.stdout, (encoding, done.stdout, done.stderr)


# --- all of it


def test_the_whole_is_sound_changes_nothing_and_makes_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path / "home"))
    report = environment()
    assert report.ok, report.problems
    assert report.subject == "environment" and list(tmp_path.iterdir()) == []
    names = [check.name for check in report.checks]
    assert len(set(names)) == len(names)
    assert {"python", "torch", "threads", "routers", "registry", "locks", "disk", "writable", "git", "terminal"} <= set(
        names
    )
    json.dumps(report.to_dict())


def test_what_cannot_be_looked_at_is_a_problem_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers without Qwen3-MoE: the probe cannot be built."""
    import transformers

    with monkeypatch.context() as patch:
        patch.delitem(transformers.__dict__, "Qwen3MoeConfig", raising=False)
        patch.setattr(type(transformers), "__getattr__", _without_qwen3, raising=False)
        report = environment()
    broken = next(check for check in report.checks if check.name == "transformers" and check.outcome == "problem")
    assert "cannot be looked at: ImportError" in broken.detail
    assert report.checks[-1].name == "terminal"


def _without_qwen3(module: Any, name: str) -> Any:
    raise AttributeError(name)

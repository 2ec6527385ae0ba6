"""Commit, changes, command, environment: recorded, bounded, and without a secret."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moectl import paths
from moectl.errors import MoectlError
from moectl.runs import RunDir
from moectl.runs.git import PATCH_BYTES, read_repository
from moectl.runs.logger import RunRecorder
from moectl.runs.provenance import collect
from moectl.runs.store import Registry

MakeRun = Callable[..., RunDir]
# Put together here, so that a patch of this very file (source.patch, where it has changes) holds none of them.
P = "plan" + "ted"
OPTION, ENV, TOKEN, PASSWORD, CODE = f"{P}-option-6", f"{P}-env-9", f"hf_{'aB3' * 10}{P}", f"{P}-pass", f"{P}-code-8"
PLANTED = (OPTION, ENV, TOKEN, PASSWORD, CODE)


def git(folder: Path, *arguments: str) -> str:
    if shutil.which("git") is None:
        pytest.skip("needs the git program")
    identity = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, which is the working folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "a.py").write_text("x = 1\n")
    git(folder, "add", "a.py")
    git(folder, "commit", "-qm", "first")
    monkeypatch.chdir(folder)
    return folder


def test_clean_then_changed(repository: Path) -> None:
    head = git(repository, "rev-parse", "HEAD")
    clean = collect(["moectl", "train"])
    assert (clean.commit, clean.dirty, clean.patch) == (head, False, "")
    (repository / "a.py").write_text("x = 2\n")
    (repository / "new.py").write_text("untracked\n")
    changed = collect(["moectl", "train"])
    assert (changed.commit, changed.dirty) == (head, True)
    assert "-x = 1\n+x = 2\n" in changed.patch and "untracked" not in changed.patch
    assert changed.repository["untracked"] == 1
    assert not [warning for warning in changed.warnings if "this run" in warning]


def test_the_patch_applies(repository: Path, tmp_path: Path, home: Path) -> None:
    (repository / "a.py").write_text("x = 2\nné = 3\n", encoding="utf-8")
    home.mkdir()
    collect([]).write(home)
    git(repository, "checkout", "-q", "--", "a.py")
    git(repository, "apply", str(home / "diff.patch"))
    assert (repository / "a.py").read_text(encoding="utf-8") == "x = 2\nné = 3\n"


def test_given_commit_comes_first(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECTL_GIT_COMMIT", "feedface")
    found = collect([])
    assert found.commit == "feedface" and any("git says" in warning for warning in found.warnings)
    assert collect([], commit="cafe").commit == "cafe"


def test_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    found = collect([])
    assert (found.commit, found.dirty, found.patch) == ("unknown", None, "")
    assert any("is not in a git repository" in warning and "--commit" in warning for warning in found.warnings)


def test_no_git_program(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    found = collect([])
    assert (found.commit, found.source_commit, found.dirty) == ("unknown", "unknown", None)
    assert any("no git program" in warning for warning in found.warnings)
    assert len(found.source_sha256) == 64
    assert collect([], commit="abc123").commit == "abc123"


def test_repository_without_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("x = 1\n")
    git(tmp_path, "add", "a.py")
    monkeypatch.chdir(tmp_path)
    found = collect([])
    assert (found.commit, found.dirty) == ("unknown", True)
    assert "+x = 1" in found.patch
    assert any("has no commit yet" in warning for warning in found.warnings)


def test_a_patch_stays_below_its_limit_in_whole_files(repository: Path) -> None:
    (repository / "big.txt").write_text("start\n")
    git(repository, "add", "big.txt")
    git(repository, "commit", "-qm", "second")
    (repository / "a.py").write_text("x = 2\n")
    (repository / "big.txt").write_text("a line that is long enough\n" * 60_000)
    patch = read_repository(repository).patch
    assert len(patch.encode()) <= PATCH_BYTES
    assert "+x = 2" in patch and "# left out: a/big.txt b/big.txt" in patch
    git(repository, "checkout", "-q", "--", ".")
    subprocess.run(["git", "apply", "-"], cwd=repository, input=patch, text=True, check=True)
    assert (repository / "a.py").read_text() == "x = 2\n"


def test_environment_is_by_allow_list(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "0", "PYTORCH_CUDA_ALLOC_CONF": "x",
                        "HOME_ADDRESS": "private", "MOECTL_API_TOKEN": ENV}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    environment = collect([]).environment
    assert environment["OMP_NUM_THREADS"] == "2" and environment["PYTORCH_CUDA_ALLOC_CONF"] == "x"
    assert not {"HOME_ADDRESS", "MOECTL_API_TOKEN", "PATH"} & set(environment)


def test_a_planted_secret_is_nowhere(repository: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", ENV)
    monkeypatch.setenv("OMP_PROXY", f"http://me:{PASSWORD}@proxy")
    (repository / "a.py").write_text(
        f'API_KEY = "{CODE}"\nlogin("{TOKEN}")\nurl = "https://me:{PASSWORD}@host"\nother = "{ENV}"\n'
    )
    command = ["moectl", "train", "--hf-token", OPTION, "--set", f"x.api_key={OPTION}",
               "--data", f"https://me:{PASSWORD}@host/x", ENV]  # fmt: skip
    found = collect(command)
    run = RunDir.create("a", config_yaml="seed: 1\n", record={**found.record(), "note": TOKEN})
    found.write(run.path)
    with RunRecorder(run, paths.registry_path()) as recorder:
        recorder.log(1, 10, {"train/loss": 1.0})
        recorder.event("failed", f"GET https://me:{PASSWORD}@host said no", detail=[ENV])
        recorder.update(status="failed", exit_reason=f"bad token {TOKEN}", api_key=OPTION)
    registry = Registry(paths.registry_path())
    registry.backup(home / "copy.db")
    registry.close()
    files = [file for file in home.rglob("*") if file.is_file()]
    assert {"run.json", "diff.patch", "env.json", "events.jsonl", "config.yaml", "registry.db", "copy.db"} <= {
        file.name for file in files
    }
    for file in files:
        content = file.read_bytes()
        for secret in PLANTED:
            assert secret.encode() not in content, f"{secret} in {file}"
    env = json.loads((run.path / "env.json").read_text())
    assert env["environment"]["OMP_PROXY"] == "http://***@proxy"
    assert env["repository"]["patch_masked"] is True


def test_nothing_here_needs_torch_or_a_database() -> None:
    code = (
        "import sys; from moectl.runs.provenance import collect; import moectl.runs; collect(['x']);"
        "print([m for m in ('torch', 'sqlalchemy', 'alembic', 'pydantic', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_recorder_survives_a_registry_that_cannot_be_used(home: Path) -> None:
    home.mkdir()
    paths.registry_path().write_bytes(b"this is no database, and long enough to be read as one" * 40)
    said: list[str] = []
    with RunRecorder(
        RunDir.create("a", config_yaml="", record={}), paths.registry_path(), warn=said.append
    ) as recorder:
        for step in range(250):
            recorder.log(step, step, {"train/loss": 1.0})
        recorder.update(status="finished")
    assert len(said) == 1 and "moectl runs reindex" in said[0]
    run = RunDir.open(home / "runs/a")
    assert len(list(run.metrics())) == 250 and run.status == "finished"
    assert [event["kind"] for event in run.events()] == ["warning"]
    with pytest.raises(MoectlError, match="is damaged"):
        Registry(paths.registry_path())

"""``moectl routers new``: the package passes its own tests, its linter and the check, and overwrites nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import moectl
from moectl.errors import ConfigError, NotFoundError
from moectl.plugins import BUILT_IN
from moectl.scaffold import MAX_LENGTH, new_router
from moectl.testing import check_router

LONGEST = "a-" * (MAX_LENGTH // 2 - 1) + "bc"


def run(*args: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_files_and_names(tmp_path: Path) -> None:
    made = new_router("my-idea", tmp_path)
    assert made.folder == tmp_path / "moectl-my-idea"
    assert made.target == "src/moectl_my_idea.py:MyIdeaRouter"
    written = {str(file.relative_to(made.folder)) for file in made.folder.rglob("*") if file.is_file()}
    assert written == set(made.files)
    assert written == {"pyproject.toml", "README.md", "src/moectl_my_idea.py", "tests/test_my_idea.py"}
    project = tomllib.loads((made.folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "moectl-my-idea"
    assert project["entry-points"]["moectl.routers"] == {"my-idea": "moectl_my_idea:MyIdeaRouter"}
    assert project["dependencies"] == [f"moectl>={moectl.__version__}"]
    assert "$" not in "".join((made.folder / file).read_text() for file in made.files)


def test_class_is_not_called_router_twice(tmp_path: Path) -> None:
    assert new_router("best-router", tmp_path).target == "src/moectl_best_router.py:BestRouter"


@pytest.mark.parametrize("name", ["my-idea", LONGEST, "b", "x1"])
def test_what_is_written_passes_the_linter(name: str, tmp_path: Path) -> None:
    folder = new_router(name, tmp_path).folder
    for command in (("check",), ("format", "--check")):
        done = run("-m", "ruff", *command, "--no-cache", ".", cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_written_passes_the_check_and_its_own_tests(tmp_path: Path) -> None:
    made = new_router("my-idea", tmp_path)
    check_router(f"{made.folder}/{made.target}", num_experts=4, top_k=1)
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=made.folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed, 1 skipped" in done.stdout  # the name cannot be found before it is installed


@pytest.mark.parametrize("build", ["build_wheel", "build_editable"])
def test_installed_it_is_found_by_name(build: str, tmp_path: Path) -> None:
    """Built by its own build backend, and unpacked as pip would, on the path of a new process."""
    folder = new_router("my-idea", tmp_path).folder
    done = run("-c", f"from hatchling.build import {build} as build; build({str(tmp_path)!r})", cwd=folder)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(site)
    installed = f"import site; site.addsitedir({str(site)!r}); "
    command = f"{installed}from moectl.cli.app import main; raise SystemExit(main())"

    listed = run("-c", command, "routers", "ls", "--json", cwd=tmp_path)
    assert '"distribution": "moectl-my-idea"' in listed.stdout, listed.stderr
    assert "The k most probable experts per token, of a softmax with a temperature." in listed.stdout
    shown = run("-c", command, "routers", "show", "my-idea", cwd=tmp_path)
    assert "temperature" in shown.stdout, shown.stderr
    by_name = f"{installed}import pytest; raise SystemExit(pytest.main(['-q', '-k', 'the_name']))"
    tested = run("-c", by_name, cwd=folder)
    assert "1 passed" in tested.stdout, tested.stdout + tested.stderr


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    mine = tmp_path / "moectl-my-idea"
    mine.mkdir()
    (mine / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match="exists already") as caught:
        new_router("my-idea", tmp_path)
    assert "--into" in str(caught.value.hint)
    assert [file.read_text() for file in mine.iterdir()] == ["mine"]
    (tmp_path / "moectl-dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists already"):
        new_router("dangling", tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("My_Idea", "'my-idea'"),
        ("my idea", "'my-idea'"),
        ("-idea", "'idea'"),
        ("a--b", "'a-b'"),
        ("../escape", "'escape'"),
        ("a" * (MAX_LENGTH + 1), f"'{'a' * MAX_LENGTH}'"),
        ("1st", "my-router"),
        ("", "my-router"),
        ("ß", "my-router"),
        ("a\n", "'a'"),
    ],
)
def test_names_that_cannot_be_used(name: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot name a router: lower-case letters") as caught:
        new_router(name, tmp_path)
    assert hint in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", BUILT_IN)
def test_names_that_are_taken(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is taken by 'moectl'"):
        new_router(name, tmp_path)


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no folder"):
        new_router("my-idea", tmp_path / "none")


def test_templates_are_in_the_wheel(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    done = run("-c", f"from hatchling.build import build_wheel; build_wheel({str(tmp_path)!r})", cwd=root)
    assert done.returncode == 0, done.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    templates = {file.name for file in (root / "moectl" / "_templates" / "router").iterdir()}
    assert len(templates) == 4
    assert {f"moectl/_templates/router/{name}" for name in templates} <= names

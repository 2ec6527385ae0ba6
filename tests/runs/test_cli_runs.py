"""``moectl runs`` from the outside: exit codes, stdout, stderr."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moectl import paths
from moectl.cli.app import main
from moectl.cli.runs_view import listing
from moectl.runs import RunDir
from moectl.runs.catalog import list_runs
from moectl.runs.logger import RunRecorder

MakeRun = Callable[..., RunDir]
AsNobody = Callable[[], AbstractContextManager[None]]
Capture = pytest.CaptureFixture[str]


def call(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    code = main(["runs", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def document(capsys: Capture, *arguments: str) -> Any:
    code, text, _ = call(capsys, *arguments, "--json")
    assert code == 0
    return json.loads(text)


def test_ls_json_is_the_same_after_delete_and_reindex(make_run: MakeRun, capsys: Capture) -> None:
    make_run("a", losses=[3.0, float("nan")])
    make_run("b", router=None, preset="dense")
    before = document(capsys, "ls")
    assert [run["id"] for run in before["runs"]] == ["b", "a"]
    assert {"id", "name", "status", "commit", "router"} <= set(before["runs"][0])
    assert before["runs"][1]["eval_lm_loss"] == "NaN" and before["runs"][1]["created"].endswith("Z")
    for file in paths.home().glob("registry.db*"):
        file.unlink()
    code, text, error = call(capsys, "reindex")
    assert (code, text) == (0, "") and "Indexed 2 runs" in error
    assert document(capsys, "ls") == before


def test_ls_off_a_terminal_keeps_every_run_on_one_line(make_run: MakeRun, capsys: Capture) -> None:
    """However long a router's path is: the name of a run is what the other commands take."""
    router = f"mine.py:Mine{'Very' * 40}Own"
    make_run("a-run-with-a-long-name-s0-0123456789", router=f"{'/a/very/long/path' * 20}/{router}")
    code, text, _ = call(capsys, "ls")
    line = text.splitlines()[2]
    assert code == 0 and line.startswith("a-run-with-a-long-name-s0-0123456789  finished")
    assert router in line and "/path" not in line and line == line.rstrip()


def test_ls_in_a_narrow_terminal_breaks_the_router_and_never_a_runs_name(make_run: MakeRun) -> None:
    make_run("moe-Mine-s0-01234567", router="mine.py:MineWithAVeryLongNameForAnEightyColumnTerminal")
    entries, _ = list_runs()
    screen = io.StringIO()
    Console(file=screen, width=80).print(listing(entries))
    lines = screen.getvalue().splitlines()
    assert sum(line.startswith("moe-Mine-s0-01234567  finished") for line in lines) == 1
    assert all(len(line) <= 80 for line in lines)


def test_collapse_and_large_logits_are_said_once_per_layer_and_always_recorded(make_run: MakeRun) -> None:
    said: list[str] = []
    run = make_run("a")
    run.acquire()
    with RunRecorder(run, warn=said.append) as recorder:
        for step in (10, 20):
            recorder.event("imbalance", "layer 0 leans", step=step, layer=0)
            recorder.event("collapse", "layer 0 collapsed", step=step, layer=0)
            recorder.event("router_logits", "layer 0 is loud", step=step, layer=0)
            recorder.event("collapse", "layer 1 collapsed", step=step, layer=1)
    assert said == [f"warning: at step 10: layer {what}" for what in ("0 collapsed", "0 is loud", "1 collapsed")]
    assert [event["kind"] for event in run.events()].count("collapse") == 4


def test_ls_in_the_terminal(make_run: MakeRun, capsys: Capture) -> None:
    make_run("a", dirty=True)
    make_run("b", status="running")
    code, text, error = call(capsys, "ls")
    assert code == 0 and error == ""
    for piece in ("finished", "lost", "top1", "300k", "2.0000", "ccccccc*"):
        assert piece in text
    assert call(capsys, "ls", "--status", "lost")[1].count("top1") == 1


def test_nothing_yet(capsys: Capture) -> None:
    assert document(capsys, "ls") == {"runs": []}
    assert not paths.home().exists()  # looking makes nothing
    code, text, error = call(capsys, "ls")
    assert (code, text) == (0, "") and "moectl train" in error
    assert call(capsys, "show")[0] == 4


def test_show(make_run: MakeRun, capsys: Capture) -> None:
    run = make_run("a", command="moectl train --token ***", odd_field={"x": 1}, close=False)
    run.event("collapse", "layer 3 collapsed", step=50)
    (run.checkpoints / "step-00000100").mkdir()
    run.release()
    code, text, _ = call(capsys, "show", "a")
    assert code == 0
    for piece in ("moectl train --token ***", "layer 3 collapsed", "step-00000100", "eval/code/lm_loss", "odd_field"):
        assert piece in text
    found = document(capsys, "show")
    assert found["id"] == "a" and found["metrics"]["eval/lm_loss"] == 2.0 and found["record"]["seed"] == 0
    assert found["checkpoints"] == ["step-00000100"] and found["events"][0]["kind"] == "collapse"


def test_unknown_and_ambiguous(make_run: MakeRun, capsys: Capture) -> None:
    make_run("moe-1")
    make_run("moe-2")
    code, _, error = call(capsys, "show", "moe-7")
    assert code == 4 and "no run 'moe-7'" in error and "moe-" in error.split("hint")[1]
    code, _, error = call(capsys, "show", "moe")
    assert code == 2 and "moe-1, moe-2" in error
    assert call(capsys, "ls", "--status", "finnished")[0] == 2
    assert call(capsys, "compare", "moe-1")[0] == 2


def test_compare(make_run: MakeRun, capsys: Capture) -> None:
    make_run("d", router=None, losses=[3.0, 2.5, 2.2])
    make_run("m")
    code, text, _ = call(capsys, "compare", "d", "m")
    assert code == 0 and "one seed is one seed" in text and "-0.2000" in text
    assert document(capsys, "compare", "d", "m")["verdicts"][0]["difference"]["mean"] == pytest.approx(-0.2)


def test_rm(make_run: MakeRun, capsys: Capture) -> None:
    run = make_run("a")
    make_run("b")
    document(capsys, "ls")
    code, _, error = call(capsys, "rm", "a")
    assert code == 2 and "would delete the run 'a'" in error and "--yes" in error and run.path.exists()
    code, _, error = call(capsys, "rm", "a", "--yes")
    assert code == 0 and not run.path.exists()
    assert [item.name for item in paths.runs_dir().iterdir()] == ["b"]
    assert [entry["id"] for entry in document(capsys, "ls")["runs"]] == ["b"]
    assert call(capsys, "rm", "a", "--yes")[0] == 4


def test_rm_refuses_a_running_one_and_foreign_folders(make_run: MakeRun, capsys: Capture, tmp_path: Path) -> None:
    run = make_run("a", status="running", close=False)
    code, _, error = call(capsys, "rm", "a", "--yes")
    assert code == 2 and f"PID {os.getpid()}" in error and run.path.exists()
    run.release()
    shutil.copytree(run.path, tmp_path / "elsewhere")
    assert call(capsys, "rm", str(tmp_path / "elsewhere"), "--yes")[0] == 2
    assert (tmp_path / "elsewhere" / "run.json").exists()


def test_a_damaged_registry_is_said_and_the_folders_answer(make_run: MakeRun, capsys: Capture) -> None:
    make_run("a")
    before = document(capsys, "ls")
    for suffix in ("-wal", "-shm"):
        paths.registry_path().with_name("registry.db" + suffix).unlink(missing_ok=True)
    paths.registry_path().write_bytes(b"no database at all" * 100)
    code, text, error = call(capsys, "ls", "--json")
    assert code == 0 and json.loads(text) == before
    assert "is damaged" in error and "moectl runs reindex" in error
    assert call(capsys, "reindex")[0] == 0
    assert call(capsys, "ls", "--json")[1:] == (text, "")


def test_read_only_home(
    make_run: MakeRun, capsys: Capture, home: Path, monkeypatch: pytest.MonkeyPatch, without_privileges: AsNobody
) -> None:
    make_run("a")
    before = document(capsys, "ls")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    shutil.copytree(home, folder / "home")
    for item in [folder / "home", *(folder / "home").rglob("*")]:
        item.chmod(0o555 if item.is_dir() else 0o444)
    monkeypatch.setenv("MOECTL_HOME", str(folder / "home"))
    try:
        with without_privileges():
            code, text, error = call(capsys, "ls", "--json")
            removed = call(capsys, "rm", "a", "--yes")
            indexed = call(capsys, "reindex")
        assert code == 0, error
        assert json.loads(text.replace(str(folder / "home"), str(home))) == before
        assert removed[0] == 1 and "cannot" in removed[2] and "MOECTL_HOME" in removed[2]
        assert (folder / "home/runs/a/run.json").exists()
        assert indexed[0] == 1 and "internal error" not in indexed[2]
    finally:
        for item in [folder / "home", *(folder / "home").rglob("*")]:
            item.chmod(0o755)
        shutil.rmtree(folder)


def test_help_needs_no_database() -> None:
    code = (
        "import sys; import moectl.cli.runs; print([m for m in ('sqlalchemy', 'alembic', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

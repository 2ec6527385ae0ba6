"""Each exception that a user can meet has its sentence, its hint and its exit code."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy
import torch
import typer
import yaml

from moectl.cli.boundary import explain, guard
from moectl.config import TrainConfig
from moectl.errors import CheckError, ConfigError, MissingDependencyError, MoectlError, NotFoundError

Capture = pytest.CaptureFixture[str]


def raised_by(action: Callable[[], object]) -> Exception:
    """A real exception, from the library that raises it."""
    with pytest.raises(Exception) as caught:
        action()
    return caught.value


def failing(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MoectlError("m"), 1),
        (ConfigError("m"), 2),
        (CheckError("m"), 3),
        (NotFoundError("m"), 4),
        (MissingDependencyError("m"), 5),
        (MoectlError("m", exit_code=3), 3),
    ],
)
def test_own_errors_say_message_and_hint(error: MoectlError, code: int, capsys: Capture) -> None:
    error.hint = "do this"
    assert guard(failing(error)) == code
    printed = capsys.readouterr()
    assert printed.err == "error: m\n hint: do this\n"
    assert printed.out == ""


@pytest.mark.parametrize(("value", "code"), [(None, 0), (0, 0), (3, 3), (True, 0), ("text", 0)])
def test_what_an_action_returns(value: object, code: int) -> None:
    assert guard(lambda: value) == code


def test_interrupt_is_130(capsys: Capture) -> None:
    assert guard(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_interrupt_inside_a_command_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a real command of a group, which Typer alone would end without a word."""
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path))
    code = (
        "import signal, sys\nfrom moectl import paths\nfrom moectl.cli.app import main\n"
        "paths.runs_dir = lambda: signal.raise_signal(signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\nsys.exit(main(['runs', 'ls']))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.strip(), ended.stdout) == (130, "interrupted", "")


@pytest.mark.parametrize(("code", "expected"), [(None, 0), (0, 0), (3, 3), ("text", 1)])
def test_exit_keeps_its_code(code: object, expected: int) -> None:
    assert guard(failing(SystemExit(code))) == expected


def test_unknown_exception_is_one_line_and_points_to_debug(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOECTL_DEBUG", raising=False)
    assert guard(lambda: [][1]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[0] == "error: internal error: IndexError: list index out of range"
    assert "--debug" in error
    assert "Traceback" not in error
    monkeypatch.setenv("MOECTL_DEBUG", "1")
    assert guard(lambda: [][1]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_validation_error_names_the_key() -> None:
    explained = explain(raised_by(lambda: TrainConfig(steps=0)))
    assert explained.exit_code == 2
    assert "steps = 0: should be greater than 0" in explained.message


def test_yaml_error_is_usage() -> None:
    assert explain(raised_by(lambda: yaml.safe_load("a: [1"))).exit_code == 2


def test_locked_database(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    with sqlite3.connect(path) as holder:
        holder.execute("CREATE TABLE t (x)")
        holder.commit()
        holder.execute("BEGIN EXCLUSIVE")
        engine = sqlalchemy.create_engine(f"sqlite:///{path}", connect_args={"timeout": 0})
        with engine.connect() as other:
            error = raised_by(lambda: other.execute(sqlalchemy.text("INSERT INTO t VALUES (1)")))
        holder.rollback()
        engine.dispose()
    explained = explain(error)
    assert explained.exit_code == 1
    assert "database is locked" in explained.message
    assert "Another process" in str(explained.hint)


def test_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    path.write_bytes(b"not a database, but long enough to be looked at" * 20)
    connection = sqlite3.connect(path)
    explained = explain(raised_by(lambda: connection.execute("SELECT * FROM sqlite_master")))
    connection.close()
    assert "file is not a database" in explained.message
    assert "reindex" in str(explained.hint)


@pytest.mark.parametrize(
    ("number", "says", "code"),
    [
        (errno.ENOSPC, "no space left on the disk", 1),
        (errno.EACCES, "permission denied", 1),
        (errno.EROFS, "the file system is read-only", 1),
        (errno.ENOENT, "no such file or folder", 4),
        (errno.EIO, "Input/output error", 1),
    ],
)
def test_operating_system_errors_name_the_file(number: int, says: str, code: int) -> None:
    explained = explain(OSError(number, os.strerror(number), "some/file"))
    assert explained.exit_code == code
    assert says in explained.message
    assert "some/file" in explained.message
    assert explained.hint


def test_real_missing_file(tmp_path: Path) -> None:
    assert explain(raised_by((tmp_path / "none").read_text)).exit_code == 4


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_memory(error: Exception) -> None:
    explained = explain(error)
    assert explained.exit_code == 1
    assert explained.message == "out of memory"
    assert "batch_size" in str(explained.hint)


@pytest.mark.parametrize(
    ("package", "says"), [("lm_eval.api", "moectl[eval]"), ("no_such_package", "pip install no_such_package")]
)
def test_missing_package_names_what_to_install(package: str, says: str) -> None:
    explained = explain(ModuleNotFoundError(f"No module named '{package}'", name=package))
    assert explained.exit_code == 5
    assert says in str(explained.hint)


def test_bad_option_value_is_usage() -> None:
    tool = typer.Typer()
    tool.callback()(lambda: None)

    @tool.command("train")
    def train(steps: int = 1) -> None:
        """Trains."""

    error = raised_by(lambda: tool(args=["train", "--steps", "many"], prog_name="moectl", standalone_mode=False))
    explained = explain(error)
    assert explained.exit_code == 2
    assert explained.message.startswith("invalid value for '--steps': should be a valid integer")
    assert explained.hint == "See `moectl train --help`."

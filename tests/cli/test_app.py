"""The front door: help, version, unknown commands and options, options before and after a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moectl import __version__
from moectl.cli.app import COMMANDS, app, main, root_help

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MOECTL_DEBUG", raising=False)


def moectl(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moectl", *args],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_bare_is_help_on_stdout(args: list[str], capsys: Capture) -> None:
    assert main(args) == 0
    printed = capsys.readouterr()
    assert printed.out == root_help()
    assert printed.err == ""


def test_help_walks_in_order_and_starts_with_first_steps() -> None:
    text = root_help()
    walk = ["prepare", "train", "eval", "inspect", "runs", "routers", "config", "quickstart"]
    places = [text.index(f"\n  {name} ") for name in walk]
    assert places == sorted(places)
    assert text.index("First steps") < places[0]
    assert "\x1b" not in text
    assert "\x1b[1m" in root_help(color=True)
    assert max(map(len, text.splitlines())) <= 80


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"moectl {__version__}\n"


def test_help_command_shows_the_help_of_another(capsys: Capture) -> None:
    assert main(["help", "routers"]) == 0
    assert "Usage: moectl routers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message", "nearest"),
    [
        (["trian"], "unknown command 'trian'", "'train'"),
        (["routers", "lss"], "unknown command 'routers lss'", "'ls'"),
        (["--versoin"], "unknown option '--versoin'", "'--version'"),
        (["config", "show", "--resolvd"], "unknown option '--resolvd' for `moectl config show`", "'--resolved'"),
        (["routers", "ls", "--jsn"], "unknown option '--jsn' for `moectl routers ls`", "'--json'"),
    ],
)
def test_misspelt_is_usage_and_names_the_nearest(args: list[str], message: str, nearest: str, capsys: Capture) -> None:
    assert main(args) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"error: {message}" in printed.err
    assert f"Did you mean {nearest}?" in printed.err


def test_nothing_near_lists_what_there_is(capsys: Capture) -> None:
    assert main(["zzzzzzzz"]) == 2
    error = capsys.readouterr().err
    assert "Did you mean" not in error
    assert all(command.name in error for command in COMMANDS)


def test_missing_argument_is_usage(capsys: Capture) -> None:
    assert main(["routers", "show"]) == 2
    assert "See `moectl routers show --help`" in capsys.readouterr().err


def test_group_alone_is_its_help(capsys: Capture) -> None:
    assert main(["routers"]) == 0
    assert "Usage: moectl routers" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args", [["routers", "ls", "--json"], ["--json", "routers", "ls"], ["routers", "--json", "ls"]]
)
def test_options_go_before_or_after(args: list[str], capsys: Capture) -> None:
    assert main(args) == 0
    assert json.loads(capsys.readouterr().out)["routers"][0]["name"] == "top1"


def test_full_app_has_every_command_that_completion_offers() -> None:
    full = app()
    names = [info.name for info in full.registered_commands] + [info.name for info in full.registered_groups]
    assert set(names) == {command.name for command in COMMANDS}


def test_completion_offers_commands() -> None:
    shell = {"_MOECTL_COMPLETE": "complete_bash", "COMP_WORDS": "moectl ro", "COMP_CWORD": "1"}
    done = moectl(env=shell)
    assert done.stdout.split() == ["routers"]


def test_debug_shows_the_traceback_and_leaves_no_trace(capsys: Capture) -> None:
    assert main(["routers", "show", "nope", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert "MOECTL_DEBUG" not in os.environ
    assert main(["routers", "show", "nope"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_console_script_exits_with_the_code() -> None:
    done = moectl("routers", "show", "nope")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "unknown router 'nope'" in done.stderr


@pytest.mark.parametrize("args", [["--help"], ["routers", "ls"], ["routers", "--help"]])
def test_reader_that_leaves_early_is_no_failure(args: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "moectl", *args], stdout=write_end, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write_end)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_full_disk_behind_stdout_is_a_failure() -> None:
    command = f"{sys.executable} -m moectl --help > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no space left" in done.stderr


def test_ascii_terminal_gets_escapes_not_a_crash() -> None:
    done = moectl("--help", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert "prepare \\u2192 train" in done.stdout

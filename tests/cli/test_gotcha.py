"""``moectl gotcha``: a project writes its own mistakes down."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pytest

from moectl.catalogue import markdown
from moectl.cli.app import main

Capture = pytest.CaptureFixture[str]
GIVEN = {
    "title": "Wrong split",
    "component": "data",
    "severity": "wrong conclusion",
    "mistake": "We split blocks.",
    "why": "Nobody asked.",
    "fix": "Split by file.",
    "avoid": "Test it.",
}
QUESTIONS = ["The mistake, in a line", "Where", "What it does", "What was done", "Why", "What mended", "What keeps"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path / "home"))


def options(**changed: str | None) -> list[str]:
    return [word for name, value in {**GIVEN, **changed}.items() if value is not None for word in (f"--{name}", value)]


def new(*more: str, **changed: str | None) -> int:
    return main(["gotcha", "new", *options(**changed), *more])


def test_new_writes_an_entry_that_explain_reads(tmp_path: Path, capsys: Capture) -> None:
    assert new() == 0
    printed = capsys.readouterr()
    assert printed.out == "OWN001  Wrong split\n"
    assert "added to GOTCHAS.md; read it with: moectl explain OWN001" in printed.err
    text = (tmp_path / "GOTCHAS.md").read_text(encoding="utf-8")
    assert f"## OWN001: Wrong split ({date.today().isoformat()})" in text
    assert main(["explain", "OWN001"]) == 0
    said = capsys.readouterr().out
    assert all(value in said for value in GIVEN.values())


def test_new_adds_and_counts_on(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "notes.md"
    file.write_bytes(b"# Notes\r\n\r\nKeep me.\r\n")
    assert new("--file", str(file), severity="Wrong-Results") == 0
    assert new("--file", str(file), "--json", title="`x | y`") == 0
    document = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert document["file"] == str(file)
    assert document["entry"]["code"] == "OWN002"
    assert file.read_bytes().startswith(b"# Notes\r\n\r\nKeep me.\r\n")
    assert not (tmp_path / "GOTCHAS.md").exists()
    assert main(["gotcha", "ls", "--file", str(file), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["entries"]
    assert [(one["code"], one["severity"]) for one in listed] == [
        ("OWN001", "wrong results"),
        ("OWN002", "wrong conclusion"),
    ]
    assert main(["gotcha", "ls", "--file", str(file)]) == 0
    rows = capsys.readouterr().out
    assert "OWN002" in rows and "x | y" in rows and date.today().isoformat() in rows


@pytest.mark.parametrize(
    ("changed", "code", "says"),
    [
        ({"fix": None, "why": None}, 2, "missing: --why, --fix (there is no terminal to ask at)"),
        ({"title": ""}, 2, "title is empty"),
        ({"title": "a\nb"}, 2, "title must be one line"),
        ({"severity": "slowish"}, 2, "Did you mean 'slow'?"),
    ],
)
def test_what_is_missing_or_wrong_writes_nothing(
    changed: dict[str, str | None], code: int, says: str, tmp_path: Path, capsys: Capture
) -> None:
    assert new(**changed) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert says in printed.err
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written_are_refused(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.md").write_bytes(b"\xe9")
    (tmp_path / "made.md").write_text(markdown(), encoding="utf-8")
    for name, code, says in (
        ("folder", 2, "is a folder"),
        ("no/such.md", 2, "there is no folder"),
        ("latin.md", 1, "not UTF-8"),
        ("made.md", 2, "generated from moectl's catalogue"),
    ):
        assert new("--file", name) == code
        error = capsys.readouterr().err
        assert says in error and "hint:" in error and "Traceback" not in error
    assert (tmp_path / "made.md").read_text(encoding="utf-8") == markdown()


def test_ls_without_a_file_or_entries(tmp_path: Path, capsys: Capture) -> None:
    assert main(["gotcha", "ls"]) == 4
    assert "moectl gotcha new" in capsys.readouterr().err
    (tmp_path / "GOTCHAS.md").write_text("# Notes\n", encoding="utf-8")
    assert main(["gotcha", "ls"]) == 0
    assert "no entry of your own" in capsys.readouterr().err
    assert main(["gotcha", "ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": "GOTCHAS.md", "entries": []}


class Terminal:
    """A person at a terminal, answering what is asked."""

    def __init__(self, *args: str) -> None:
        self.parent, child = pty.openpty()
        command = [sys.executable, "-m", "moectl", "gotcha", "new", *args]
        env = {**os.environ, "TERM": "dumb"}
        self.process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=env)
        os.close(child)
        self.seen = ""

    def answer(self, question: str, text: str) -> None:
        """Wait for a question, then type."""
        deadline = time.monotonic() + 30
        while question not in self.seen:
            ready, _, _ = select.select([self.parent], [], [], max(deadline - time.monotonic(), 0.0))
            assert ready, f"never asked {question!r}: {self.seen}"
            self.seen += os.read(self.parent, 4096).decode("utf-8", errors="replace")
        self.seen = self.seen.partition(question)[2]
        os.write(self.parent, text.encode())

    def end(self) -> int:
        """Read to the end; somebody who still waits for an answer is stopped."""
        while True:
            try:
                if not select.select([self.parent], [], [], 30)[0]:
                    self.process.kill()
                piece = os.read(self.parent, 4096)
            except OSError:
                break
            if not piece:
                break
            self.seen += piece.decode("utf-8", errors="replace")
        os.close(self.parent)
        return self.process.wait(timeout=30)


def test_a_terminal_is_asked_for_what_is_missing(tmp_path: Path) -> None:
    terminal = Terminal()
    for question, (name, value) in zip(QUESTIONS, GIVEN.items(), strict=True):
        if name == "title":
            terminal.answer(question, "\n")  # nothing is no answer
        if name == "severity":
            terminal.answer(question, "terrible\n")
        terminal.answer(question, f"{value}\n")
    assert terminal.end() == 0
    text = (tmp_path / "GOTCHAS.md").read_text(encoding="utf-8")
    assert all(value in text for value in GIVEN.values())


def test_only_what_is_missing_is_asked_for(tmp_path: Path) -> None:
    terminal = Terminal(*options(avoid=None))
    terminal.answer("What keeps", "A linter.\n")
    assert terminal.end() == 0
    assert "What was done" not in terminal.seen
    assert "**How to avoid.** A linter." in (tmp_path / "GOTCHAS.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("leave", "code"), [("Ctrl-D", 2), ("Ctrl-C", 130)])
def test_leaving_the_questions_writes_nothing(leave: str, code: int, tmp_path: Path) -> None:
    terminal = Terminal(*options(avoid=None))
    terminal.answer("What keeps", "\x04" if leave == "Ctrl-D" else "half an ans")
    if leave == "Ctrl-C":  # as the terminal would, were it the controlling one
        terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == code
    assert "Traceback" not in terminal.seen
    assert os.listdir(tmp_path) == []


def test_a_bad_place_is_said_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "GOTCHAS.md").write_text(markdown(), encoding="utf-8")
    terminal = Terminal()
    assert terminal.end() == 2
    assert "generated" in terminal.seen
    assert "The mistake, in a line" not in terminal.seen

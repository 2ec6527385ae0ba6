"""stdout is data, stderr is talk; colour and bars are for terminals."""

from __future__ import annotations

import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moectl.cli import output
from moectl.cli.output import Output, out, to_jsonable
from moectl.config import TrainConfig
from moectl.errors import MoectlError
from moectl.moe.types import RouterOutput
from moectl.plugins import RouterEntry

Capture = pytest.CaptureFixture[str]


def on_a_terminal(code: str, **environment: str) -> str:
    """What a program writes on a real (pseudo) terminal."""
    parent, child = pty.openpty()
    inherited = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=child,
        stderr=child,
        stdin=child,
        env={**inherited, "TERM": "xterm-256color", "COLUMNS": "80", **environment},
    )
    os.close(child)
    seen = b""
    while True:
        try:
            chunk = os.read(parent, 4096)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(parent)
    assert process.wait() == 0, seen.decode()
    return seen.decode()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, "NaN"),
        (math.inf, "Infinity"),
        (-math.inf, "-Infinity"),
        (1.5, 1.5),
        ({"a": (1, math.nan), 2: None}, {"a": [1, "NaN"], "2": None}),
        ({"b", "a"}, ["a", "b"]),
        (Path("x/y"), "x/y"),
        (np.float32(0.5), 0.5),
        (np.array([[1, 2]]), [[1, 2]]),
        (torch.tensor([1.0, math.inf]), [1.0, "Infinity"]),
        (True, True),
    ],
)
def test_json_types(value: object, expected: object) -> None:
    assert to_jsonable(value) == expected


def test_json_of_records() -> None:
    assert to_jsonable(RouterEntry("a", "b:C", "d"))["distribution"] == "d"
    assert to_jsonable(TrainConfig(steps=3))["steps"] == 3
    assert RouterOutput._fields  # tensors inside a NamedTuple go through tolist


def test_data_is_one_document_on_stdout(capsys: Capture) -> None:
    out().data({"loss": math.nan, "name": "Zoë"})
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"loss": "NaN", "name": "Zoë"}
    assert "Zoë" in printed.out
    assert printed.err == ""


def test_text_is_left_alone(capsys: Capture) -> None:
    out().data("a [bold]b[/bold]")
    assert capsys.readouterr().out == "a [bold]b[/bold]\n"


def test_talk_goes_to_stderr_and_is_no_markup(capsys: Capture) -> None:
    long = "path/with [brackets] " * 20
    out().say(long)
    out().warn("careful")
    out().error(MoectlError("it broke", "mend it"))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"{long}\nwarning: careful\nerror: it broke\n hint: mend it\n"


def test_piped_table_is_neither_wrapped_nor_cut(capsys: Capture) -> None:
    wide = "x" * 300
    out().table("Runs", ("name", "loss"), [("a", 1.25), (wide, None)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Runs"
    assert any(wide in line for line in lines)
    assert all(line == line.rstrip() for line in lines)
    assert all("\x1b" not in line for line in lines)


def test_a_title_longer_than_its_table_stays_one_line(capsys: Capture) -> None:
    title, caption = "a rather long title over a narrow table", "and a caption that is no shorter than that"
    out().table(title, ("a",), [("b",)], caption=caption)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == title and lines[-1] == caption
    code = f"from moectl.cli.output import out\nout().table({title!r}, ('a',), [('b',)], caption={caption!r})"
    seen = on_a_terminal(code)
    assert f"\x1b[1m{title}" in seen and caption in seen


def test_numbers_stand_on_the_right(capsys: Capture) -> None:
    out().table(None, ("tokens",), [(7,), (123456,), (None,)])
    lines = [line for line in capsys.readouterr().out.splitlines() if "─" not in line]
    assert [line.endswith(end) for line, end in zip(lines, ("tokens", "7", "123,456", "–"), strict=True)] == [True] * 4
    assert len({len(line) for line in lines}) == 1


def test_progress_off_a_terminal_is_a_line_now_and_then(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "PLAIN_LINE_EVERY_S", 0.0)
    with Output().progress("training", total=600) as bar:
        bar.update(120, note="loss 3.2")
        bar(240)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == ["training 120/600 · 0 s · loss 3.2", "training 240/600 · 0 s · loss 3.2"]


def test_progress_is_quiet_between_lines(capsys: Capture) -> None:
    with Output().progress("training", total=600) as bar:
        for step in range(600):
            bar.update(step)
    assert capsys.readouterr().err == ""


_BAR = "from moectl.cli.output import out\nwith out().progress('training', total=4) as bar:\n"
_BAR += "    bar.update(2, note='loss 3.21'); out().say('a word')\n"


def test_terminal_has_bar_and_colour() -> None:
    seen = on_a_terminal(_BAR + "from moectl.errors import MoectlError\nout().error(MoectlError('it broke'))")
    assert "training" in seen
    assert "2/4" in seen
    assert "loss 3.21" in seen
    assert "a word" in seen
    assert "\x1b[1;31merror: " in seen


def test_no_color_is_honoured_on_a_terminal() -> None:
    code = "from moectl.cli.app import main\nfrom moectl.cli.output import out\nfrom moectl.errors import MoectlError\n"
    code += "out().error(MoectlError('it broke')); main(['--help'])"
    assert "\x1b[1m" in on_a_terminal(code)
    seen = on_a_terminal(code, NO_COLOR="1")
    assert "it broke" in seen
    assert "First steps" in seen
    assert "\x1b[3" not in seen
    assert "\x1b[1;3" not in seen

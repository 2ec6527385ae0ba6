"""``moectl explain``: a code, a list, a search, the document; in a terminal and off it."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moectl.catalogue import entries, entry, markdown
from moectl.catalogue.own import Mistake, add
from moectl.cli.app import main

Capture = pytest.CaptureFixture[str]
OWN = Mistake("Zebra in the router", "stables", "crash", "A zebra came.", "The door stood open.", "Shut it.", "A lock.")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder: the repository's own GOTCHAS.md is not here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path / "home"))


def codes_in(text: str) -> list[str]:
    return re.findall(r"^ ?(MOE\d{3}|OWN\d{3})", text, re.MULTILINE)


@pytest.mark.parametrize("code", ["7", "moe7", "MOE007"])
def test_an_entry_says_all_it_has(code: str, capsys: Capture) -> None:
    assert main(["explain", code]) == 0
    printed = capsys.readouterr()
    one = entry("7")
    assert printed.out.startswith(f"MOE007  {one.title}\n{one.severity} · {one.component}\n")
    said = " ".join(printed.out.split())
    for section in ("symptom", "cause", "check", "avoid", "source"):
        assert f"{section.capitalize()} {' '.join(getattr(one, section).split())}" in said
    assert "  gate, up = fused.chunk(2, dim=-1)  # right\n" in printed.out
    assert "```" not in printed.out
    assert "\x1b" not in printed.out
    assert printed.err == ""


def test_every_entry_can_be_printed(capsys: Capture) -> None:
    assert main(["explain", *(one.code for one in entries())]) == 0
    text = capsys.readouterr().out
    assert codes_in(text) == [one.code for one in entries()]
    assert "```" not in text
    for line in text.splitlines():
        assert line == line.rstrip()


def test_several_codes_keep_their_order_and_no_code_twice(capsys: Capture) -> None:
    assert main(["explain", "16", "moe3", "MOE016"]) == 0
    assert codes_in(capsys.readouterr().out) == ["MOE016", "MOE003"]


@pytest.mark.parametrize("args", [[], ["--list"]])
def test_list_has_a_line_for_each(args: list[str], capsys: Capture) -> None:
    assert main(["explain", *args]) == 0
    printed = capsys.readouterr()
    assert codes_in(printed.out) == [one.code for one in entries()]
    assert "moectl explain MOE001" in printed.err


@pytest.mark.parametrize("severity", ["slow", "SLOW", "wrong-training", "Wrong  Training"])
def test_list_by_severity(severity: str, capsys: Capture) -> None:
    assert main(["explain", "--list", "--severity", severity, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["entries"]
    wanted = " ".join(severity.lower().replace("-", " ").split())
    assert [one["code"] for one in found] == [one.code for one in entries() if one.severity == wanted]
    assert found


def test_list_by_component_and_severity_together(capsys: Capture) -> None:
    assert main(["explain", "--component", "router", "--severity", "wrong results", "--json"]) == 0
    found = {one["code"] for one in json.loads(capsys.readouterr().out)["entries"]}
    assert found == {one.code for one in entries() if one.component == "router" and one.severity == "wrong results"}
    assert main(["explain", "--list", "--component", "router", "--severity", "slow"]) == 4


def test_search_ranks_and_takes_words_without_quotes(capsys: Capture) -> None:
    assert main(["explain", "--search", "dead", "experts"]) == 0
    loose = capsys.readouterr()
    assert main(["explain", "--search", "dead experts"]) == 0
    assert capsys.readouterr().out == loose.out
    assert codes_in(loose.out)[0] == "MOE043"
    assert "moectl explain MOE043" in loose.err


def test_search_within_a_component(capsys: Capture) -> None:
    assert main(["explain", "--search", "softmax", "--component", "balance", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["entries"]
    assert found and {one["component"] for one in found} == {"balance"}


def test_nothing_found_says_what_to_try(capsys: Capture) -> None:
    assert main(["explain", "--search", "xyzzyqq"]) == 4
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "'xyzzyqq'" in printed.err
    assert "moectl explain --list" in printed.err


def test_json_has_every_field(capsys: Capture) -> None:
    assert main(["explain", "16", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (one,) = document["entries"]
    assert one == {name: getattr(entry("16"), name) for name in entry("16").__dataclass_fields__}


def test_markdown_is_the_document(capsys: Capture) -> None:
    assert main(["explain", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["MOE999"], "there is no catalogue entry 'MOE999'"),
        (["16", "nope"], "'nope'"),
        (["--list", "--component", "roter"], "Did you mean 'router'?"),
        (["--list", "--severity", "bad"], "unknown severity 'bad'"),
        (["--list", "--search", "x"], "--list and --search do not go together"),
        (["16", "--list"], "do not go together"),
        (["16", "--component", "router"], "do not go together"),
        (["--markdown", "16"], "do not go together"),
        (["--markdown", "--json"], "--markdown and --json do not go together"),
        (["--markdown", "--severity", "slow"], "do not go together"),
    ],
)
def test_usage_is_explained(args: list[str], says: str, capsys: Capture) -> None:
    assert main(["explain", *args]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert says in printed.err


def test_own_entries_are_listed_found_and_explained(tmp_path: Path, capsys: Capture) -> None:
    add(OWN, tmp_path / "GOTCHAS.md")
    assert main(["explain", "--list"]) == 0
    assert codes_in(capsys.readouterr().out) == [*(one.code for one in entries()), "OWN001"]
    assert main(["explain", "--search", "zebras"]) == 0
    assert codes_in(capsys.readouterr().out) == ["OWN001"]
    assert main(["explain", "--component", "stables", "--json"]) == 0
    assert [one["code"] for one in json.loads(capsys.readouterr().out)["entries"]] == ["OWN001"]
    assert main(["explain", "own1", "1"]) == 0
    text = capsys.readouterr().out
    assert codes_in(text) == ["OWN001", "MOE001"]
    assert "The door stood open." in text
    assert main(["explain", "own2"]) == 2
    assert "OWN001" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["latin", "folder"])
def test_an_own_file_that_cannot_be_read_takes_nothing_away(kind: str, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "GOTCHAS.md"
    file.mkdir() if kind == "folder" else file.write_bytes(b"\xe9")
    assert main(["explain", "--list"]) == 0
    printed = capsys.readouterr()
    assert len(codes_in(printed.out)) == len(entries())
    assert "warning: your own entries are left out" in printed.err
    assert main(["explain", "1"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["explain", "own1"]) in (1, 2)


def test_the_generated_document_is_no_file_of_ones_own(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "GOTCHAS.md").write_text(markdown(), encoding="utf-8")
    assert main(["explain", "--list"]) == 0
    printed = capsys.readouterr()
    assert codes_in(printed.out) == [one.code for one in entries()]
    assert "warning" not in printed.err


def in_terminal(*args: str, columns: int = 80, **environment: str) -> str:
    """What a terminal of this width would get."""
    parent, child = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", "moectl", *args], stdin=child, stdout=child, stderr=child, env=env
    )
    os.close(child)
    data = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:  # Linux says EIO where the other end is closed
            break
        if not piece:
            break
        data += piece
    os.close(parent)
    assert process.wait(timeout=60) == 0
    return data.decode("utf-8").replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_terminal_gets_colour_within_its_width_and_every_word(columns: int) -> None:
    text = in_terminal("explain", "24", columns=columns)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert text != plain
    assert "\x1b[31m" in text and "\x1b[32m" in text  # wrong in red, right in green
    assert max(len(line.rstrip()) for line in plain.splitlines()) <= min(columns, 110)
    words = re.findall(r"\w+", entry("24").fix.replace("python", ""))
    assert re.findall(r"\w+", plain.partition("\nFix")[2].partition("\nCheck")[0]) == words


def test_no_color_is_honoured() -> None:
    text = in_terminal("explain", "24", NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|9[0-7])m", text)
    assert "Symptom" in text


@pytest.mark.parametrize("args", [["16"], ["--list"], ["--search", "nan"], ["--markdown"]])
def test_it_is_fast_for_it_loads_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys; from moectl.cli.app import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'numpy', 'yaml', 'sqlalchemy', 'datasets'} & set(sys.modules);"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, "explain", *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

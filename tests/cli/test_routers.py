"""``moectl routers``: the list with its broken rows, a router's card, the check and a new package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moectl.cli.app import main
from moectl.plugins import BUILT_IN, router_entries
from moectl.testing import runner
from tests.testing.install import Installer
from tests.testing.mistakes import GOOD, MISTAKES

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path / "home"))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installer:
    return Installer(tmp_path, monkeypatch)


@pytest.fixture
def no_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slowest check is left out where its answer is not looked at."""
    monkeypatch.delitem(runner.CHECKS, "compile")


def listed(capsys: Capture, *args: str, code: int = 0) -> dict[str, dict[str, Any]]:
    assert main(["routers", "ls", "--json", *args]) == code
    return {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["routers"]}


def test_ls_says_what_reading_shows_to_be_broken(install: Installer, capsys: Capture) -> None:
    install("fine-routers", router="fine")
    install("typo-routers", router="typo", target="typo_routers:Mien")
    install("moved-routers", router="moved", target="moved_away:Mine")
    install("torn-routers", router="torn", source="def broken(:")
    install("raising-routers", router="raising", source=f"{GOOD}\nraise RuntimeError('no luck')")
    rows = listed(capsys)
    assert [rows[name]["problem"] for name in (*BUILT_IN, "fine", "raising")] == [None] * (len(BUILT_IN) + 2)
    assert "has no 'Mien'" in rows["typo"]["problem"]
    assert rows["moved"]["problem"] == "no module named 'moved_away'"
    assert "SyntaxError" in rows["torn"]["problem"]
    assert {row["loads"] for row in rows.values()} == {None}
    keys = {"name", "target", "distribution", "version", "rivals", "summary", "problem", "loads"}
    assert set(rows["fine"]) == keys

    assert main(["routers", "ls"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "BROKEN: no module named 'moved_away'" in lines["moved"]
    assert "moved-routers 1.2" in lines["moved"]
    assert "Sends every token home." in lines["fine"]
    assert "BROKEN" not in lines["fine"] + lines["top1"]
    assert not {"fine_routers", "raising_routers"} & set(sys.modules)


def test_ls_check_imports_each_and_names_what_cannot_be_used(install: Installer, capsys: Capture) -> None:
    install("fine-routers", router="fine")
    install("raising-routers", router="raising", source=f"{GOOD}\nraise RuntimeError('no luck')")
    install("gone-routers", router="gone", source=f"{GOOD}\nimport os; os._exit(4)")
    rows = listed(capsys, "--check", code=3)
    expected = {**dict.fromkeys((*BUILT_IN, "fine"), True), "raising": False, "gone": False}
    assert {name: rows[name]["loads"] for name in expected} == expected
    assert "RuntimeError: no luck" in rows["raising"]["problem"]
    assert "exit code 4" in rows["gone"]["problem"]

    assert main(["routers", "ls", "--check"]) == 3
    printed = capsys.readouterr()
    assert "BROKEN: " in printed.out
    assert f"2 of {len(rows)} routers cannot be used: gone, raising" in printed.err
    assert not {"fine_routers", "raising_routers", "gone_routers"} & set(sys.modules)


def test_ls_check_of_what_is_whole(capsys: Capture) -> None:
    assert main(["routers", "ls", "--check"]) == 0
    assert f"all {len(router_entries())} load" in capsys.readouterr().err


def test_a_clash_is_told_as_one_even_where_a_claimants_module_is_missing(install: Installer, capsys: Capture) -> None:
    """With a name of moectl's own, all other claimants are to go."""
    install("first-routers", router="top1", target="nothing_of_that_name:Mine")
    install("second-routers", router="top1", target="nothing_of_that_name:Mine")
    assert "claimed by" in listed(capsys)["top1"]["problem"]
    assert main(["routers", "ls"]) == 0
    warning = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: 'top1'"))
    claimants, _, remedy = warning.partition(": uninstall ")
    assert all(name in claimants for name in ("first-routers", "second-routers", "moectl"))
    assert sorted(remedy.split(", ")) == ["first-routers", "second-routers"]


def test_clash_names_both_packages(install: Installer, capsys: Capture) -> None:
    install("first-routers", router="same")
    install("second-routers", router="same")
    assert main(["routers", "ls"]) == 0
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert "claimed by" in text
        assert "first-routers" in text
        assert "second-routers" in text
    assert listed(capsys, "--check", code=3)["same"]["loads"] is False
    for command in ("show", "check"):
        assert main(["routers", command, "same"]) == 2
        assert "first-routers" in capsys.readouterr().err


def test_show_says_what_kind_of_router_it_is(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "mine.py"
    source = GOOD.replace("top_k: int = 2", "top_k: int\n        kind: 'float | None' = None")
    file.write_text(source.replace("    def route", "    causal = token_choice = learns = False\n\n    def route"))
    assert main(["routers", "show", f"{file}:Mine", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["causal"], shown["token_choice"], shown["learns"]) == (False, False, False)
    assert [(option["name"], option["required"]) for option in shown["options"]] == [("top_k", True), ("kind", False)]
    assert shown["options"][1]["type"] == "float | None"
    assert main(["routers", "show", f"{file}:Mine"]) == 0
    printed = capsys.readouterr().out
    assert "not causal: needs --allow-noncausal to train; experts choose tokens" in printed
    assert "no learned gate" in printed


@pytest.mark.parametrize("name", BUILT_IN)
def test_show_every_built_in(name: str, capsys: Capture) -> None:
    assert main(["routers", "show", name]) == 0
    assert ("not causal" in capsys.readouterr().out) == (name == "expert-choice")


def test_check_prints_a_row_per_check(capsys: Capture) -> None:
    assert main(["routers", "check", "topk", "--set", "top_k=3", "--num-experts", "6", "--hidden-size", "12"]) == 0
    printed = capsys.readouterr()
    rows = {line.split()[0]: line for line in printed.out.splitlines() if line.startswith(" ")}
    assert list(rows) == ["check", runner.LOADS, *runner.CHECKS]
    assert "K = 3: topk_* [64, 3], router_* [64, 6]" in rows["shapes"]
    assert "D = 12, E = 6, top_k=3" in printed.out
    assert f"{len(runner.CHECKS) + 1} checks: " in printed.err


@pytest.mark.usefixtures("no_compile")
def test_check_ends_in_3_when_one_fails(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "mine.py").write_text(MISTAKES["NaN weights"].source())
    assert main(["routers", "check", f"{tmp_path}/mine.py:Mine"]) == 3
    printed = capsys.readouterr()
    assert "failed in training topk_weights is [nan, nan] for token 0" in " ".join(printed.out.split())
    assert "does not keep the contract: weights" in printed.err
    assert main(["routers", "check", f"{tmp_path}/mine.py:Mine", "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False
    assert document["num_experts"] == 8
    weights = next(check for check in document["checks"] if check["name"] == "weights")
    assert set(weights) == {"name", "status", "says"}
    assert weights["status"] == "failed"


@pytest.mark.usefixtures("no_compile")
@pytest.mark.parametrize(
    ("mistake", "failed"),
    [
        ("raises on import", "loads"),
        ("weights of another shape", "shapes"),
        ("NaN weights", "weights"),
        ("index past the last expert", "indices"),
    ],
)
def test_installed_plugin_fails_the_named_check(mistake: str, failed: str, install: Installer, capsys: Capture) -> None:
    install("bad-routers", router="bad", source=MISTAKES[mistake].source())
    assert main(["routers", "check", "bad", "--json"]) == 3
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert [check["name"] for check in document["checks"] if check["status"] == "failed"] == [failed]
    assert f"the router 'bad' does not keep the contract: {failed}" in printed.err
    assert main(["routers", "check", "top1"]) == 0


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["topkk"], 2, "unknown router 'topkk'"),
        (["./none.py:Mine"], 4, "no router file none.py"),
        (["topk", "--set", "topk=2"], 2, "unknown option 'topk'"),
        (["topk", "--set", "top_k"], 2, "is not of the form key=value"),
        (["topk", "--set", "moe.router.top_k=9"], 2, "top_k is 9, but there are 8 experts"),
        (["topk", "--num-experts", "1"], 2, "should be"),
    ],
)
def test_what_the_caller_got_wrong(args: list[str], code: int, message: str, capsys: Capture) -> None:
    assert main(["routers", "check", *args]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err or "1 is not in the range" in printed.err


def test_a_misspelt_name_is_answered_before_torch_is_loaded() -> None:
    code = (
        "import sys\nfrom moectl.cli.app import main\n"
        "code = main(['routers', 'check', 'topkk'])\nsys.exit(code + 10 * ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Did you mean 'topk'?" in done.stderr


def test_file_without_a_class_name(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "mine.py").write_text(GOOD)
    assert main(["routers", "check", f"{tmp_path}/mine.py"]) == 2
    assert f"Name one, as in {tmp_path}/mine.py:Mine." in capsys.readouterr().err
    assert main(["routers", "check", f"{tmp_path}/mine.py:Mien"]) == 2
    assert "Did you mean 'Mine'?" in capsys.readouterr().err


def test_new_writes_a_package_and_says_what_comes_next(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["routers", "new", "my-idea"]) == 0
    printed = capsys.readouterr()
    files = printed.out.splitlines()
    assert "moectl-my-idea/src/moectl_my_idea.py" in files
    assert all(Path(file).is_file() for file in files)
    for step in (
        "cd moectl-my-idea",
        "moectl routers check ./src/moectl_my_idea.py:MyIdeaRouter",
        "pip install -e '.[test]'",
        "moectl routers check my-idea",
        "moectl train --router my-idea",
    ):
        assert f"  {step}" in printed.err
    assert main(["routers", "new", "my-idea"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["routers", "new", "my-idea", "--into", "none"]) == 4
    assert main(["routers", "new", "topk"]) == 2
    capsys.readouterr()
    (tmp_path / "sub").mkdir()
    assert main(["routers", "new", "other", "--into", "sub", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["target"] == "src/moectl_other.py:OtherRouter"
    assert made["folder"] == "sub/moectl-other"


def test_check_shows_no_row_for_what_could_not_be_run(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "mine.py").write_text("raise RuntimeError('no luck')")
    assert main(["routers", "check", f"{tmp_path}/mine.py:Mine"]) == 3
    printed = capsys.readouterr()
    rows = printed.out.splitlines()[3:]
    assert len(rows) == 1 and rows[0].split()[:2] == ["loads", "failed"] and "no luck" in rows[0]
    assert "1 failed, 25 skipped" in printed.err

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moectl.cli.app import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(source: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*args: str, small: bool = True) -> tuple[int, str, str]:
        extra = ["--source", str(source), "--tokenizer", "bpe:300", "--block-size", "32"] if small else []
        code = main(["prepare", *extra, *args])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_report_and_a_second_call(run: Run, home: Path) -> None:
    code, out, err = run()
    assert code == 0
    for word in ("code", "math", "prose", "train", "eval", "texts", "groups", "tokens", "blocks"):
        assert word in out
    (folder,) = (home / "data").iterdir()
    assert f"Prepared {folder}" in err
    assert "given up for balance" in err
    assert "warning: " in err and "times the training tokens" in err
    code, out, err = run()
    assert code == 0
    assert folder.name in out
    assert f"Already prepared, verified, nothing to do: {folder}" in err


def test_json_is_one_document(run: Run) -> None:
    code, out, _ = run("--json", "--domains", "code, math", "--no-balance-tokens", "--seed", "3")
    assert code == 0
    document = json.loads(out)
    assert document["created_now"] is True
    assert Path(document["folder"]).name == document["id"]
    assert [domain["name"] for domain in document["domains"]] == ["code", "math"]
    assert (document["config"]["seed"], document["config"]["balance_tokens"]) == (3, False)
    assert {"texts", "groups", "tokens", "blocks", "bytes"} == set(document["domains"][0]["train"])
    assert json.loads(run("--json", "--domains", "code,math", "--no-balance-tokens", "--seed", "3")[1]) == {
        **document,
        "created_now": False,
    }


def test_a_config_file_flags_and_set(run: Run, source: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.yaml"
    file.write_text(f"data: {{source: {source}, domains: [math], tokenizer: 'bpe:280', block_size: 64}}\n")
    code, out, err = run(str(file), "--block-size", "16", "--set", "data.seed=5", "--json", small=False)
    assert code == 0, err
    config: dict[str, Any] = json.loads(out)["config"]
    assert (config["domains"], config["tokenizer"], config["block_size"], config["seed"]) == (
        ["math"],
        "bpe:280",
        16,
        5,
    )


@pytest.mark.parametrize(
    ("args", "code", "fragments"),
    [
        (["--domains", "code,maths"], 2, ["unknown domain", "Did you mean 'math'?"]),
        (["--domains", ""], 2, ["at least one domain"]),
        (["--domains", "code,code"], 2, ["named twice"]),
        (["--source", "/nowhere/at/all"], 4, ["no source '/nowhere/at/all'"]),
        (["--tokenizer", "bpe:x"], 2, ["size must be"]),
        (["--block-size", "100000"], 2, ["do not fill one block", "--block-size"]),
        (["--block-size", "4"], 2, ["data.block_size"]),
        (["--seed", "-1"], 2, ["data.seed"]),
        (["--set", "data.blocksize=3"], 2, ["data.blocksize", "data.block_size"]),
        (["--blok-size", "3"], 2, ["--block-size"]),
    ],
)
def test_usage_errors(run: Run, args: list[str], code: int, fragments: list[str]) -> None:
    found, out, err = run(*args)
    assert found == code, err
    assert out == ""
    assert "Traceback" not in err
    for fragment in ("error: ", " hint: ", *fragments):
        assert fragment in err


@pytest.mark.parametrize(
    ("name", "content", "code", "fragment"),
    [
        ("a.jsonl", b"", 1, "is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', 1, "line 2"),
        ("a.jsonl", b'{"text": "\xff"}\n', 1, "byte offset 10"),
        ("a.jsonl", b"\x00\x01\x02\n", 1, "binary file"),
        ("a.jsonl", b'{"body": "a"}\n', 1, "no field 'text'"),
        ("a.jsonl", b'{"text": "a"}\n' * 20, 1, "too few to hold some out"),
        ("a.jsonl", b'{"text": "' + b"x" * (9 << 20) + b'"}\n', 1, "8 MiB"),
        ("a.txt", b"text", 2, "neither .jsonl nor .parquet"),
    ],
)
def test_bad_files(run: Run, tmp_path: Path, name: str, content: bytes, code: int, fragment: str) -> None:
    (tmp_path / name).write_bytes(content)
    found, out, err = run("--domains", "code", "--source", str(tmp_path / name))
    assert (found, out) == (code, "")
    assert fragment in err and str(tmp_path / name if "too few" not in fragment else "code") in err
    assert " hint: " in err and "Traceback" not in err


def test_a_pipe_in_a_source_folder_does_not_hang(run: Run, source: Path) -> None:
    (source / "code.jsonl").unlink()
    os.mkfifo(source / "code.jsonl")
    code, out, err = run()
    assert (code, out) == (1, "")
    assert f"{source / 'code.jsonl'} is not a regular file" in err


def test_an_edited_dataset_ends_in_3(run: Run, home: Path) -> None:
    run()
    (folder,) = (home / "data").iterdir()
    (folder / "train" / "doc_ids.npy").write_bytes(b"")
    code, _, err = run()
    assert code == 3
    assert "train/doc_ids.npy" in err

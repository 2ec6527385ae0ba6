from __future__ import annotations

import json
import os
import random
import resource
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from moectl.corpus.files import read_records, read_text_file, read_text_files
from moectl.corpus.texts import MAX_TEXT_BYTES
from moectl.errors import MoectlError


def refused(path: Path, *fragments: str) -> MoectlError:
    """Reading ``path`` fails with exit code 1, a hint, and a message that holds all fragments."""
    with pytest.raises(MoectlError) as caught:
        list(read_records(path))
    assert caught.value.exit_code == 1
    assert caught.value.hint
    for fragment in (path.name, *fragments):
        assert fragment in caught.value.message
    return caught.value


def lines(path: Path, *content: str | bytes) -> Path:
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in content))
    return path


def test_reads_fields_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl",
        b"\xef\xbb\xbf" + json.dumps({"text": "é", "group": "g", "domain": "code", "source": "s"}).encode(),
        "",
        '{"text": "b", "group": 7}\r',
        '{"text": "Two  words"}',
        '{"text": "two WORDS"}',
    )
    first, second, third, fourth = read_records(path)
    assert first.text == ("é", "g", "s")
    assert first.domain == "code"
    assert second.text == ("b", "7", "a.jsonl")
    assert second.domain is None
    assert third.text.group == fourth.text.group != first.text.group


def test_the_last_line_may_lack_its_newline(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    assert [row.text.text for row in read_records(tmp_path / "a.jsonl")] == ["a", "b"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    refused(tmp_path / "a.jsonl", "is empty")


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ('{"text": "cut', "not valid JSON"),
        ('{"text": "a"} {"text": "b"}', "not valid JSON"),
        ('["text"]', "a JSON list"),
        ('{"txt": "a"}', "no field 'text'"),
        ('{"text": null}', "'text' is null"),
        ('{"text": 3}', "'text' is int"),
        ('{"text": "a", "group": []}', "'group' is list"),
        ('{"text": "a", "domain": 3}', "'domain' is int"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, fragment: str) -> None:
    refused(lines(tmp_path / "a.jsonl", '{"text": "good"}', "", line), fragment, "line 3")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "cut', "(Unterminated string starting at column 10)"),
        ('{"text": "a\tb"}', "(Invalid control character at column 12)"),
        ('{"text": "\\x"}', "(Invalid \\escape at column 11)"),
        ('{"text": }', "(Expecting value at column 10)"),
    ],
)
def test_what_json_says_reads_well(tmp_path: Path, line: str, reason: str) -> None:
    refused(lines(tmp_path / "a.jsonl", line), reason)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    for read in (read_text_file, lambda path: list(read_records(path))):
        with pytest.raises(MoectlError, match=f"{name} is not a regular file") as caught:
            read(tmp_path / name)
        assert caught.value.exit_code == 1 and caught.value.hint
    with pytest.raises(MoectlError, match=f"{name} is not a regular file"):
        list(read_text_files(tmp_path))


def test_a_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("/dev/zero")
    refused(tmp_path / "a.jsonl", "not a regular file")


def test_binary_without_a_zero_byte_is_not_called_latin1(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(random.Random(0).randbytes(4000).replace(b"\0", b"\1"))
    with pytest.raises(MoectlError, match="invalid UTF-8 at byte offset .*looks binary") as caught:
        read_text_file(tmp_path / "a.bin")
    assert caught.value.hint is not None and "latin1" not in caught.value.hint
    french = "Déjà l'été s'achève, et la forêt a perdu ses feuilles à cause du vent.\n" * 50
    (tmp_path / "a.txt").write_bytes(french.encode("latin1"))
    with pytest.raises(MoectlError, match="byte offset 1 of the file$") as caught:
        read_text_file(tmp_path / "a.txt")
    assert caught.value.hint is not None and "iconv -f latin1" in caught.value.hint


def test_invalid_utf8_is_named_by_its_offset_in_the_file(tmp_path: Path) -> None:
    good = b'{"text": "good"}'
    path = lines(tmp_path / "a.jsonl", good, b'{"text": "caf\xe9"}')
    refused(path, f"byte offset {path.read_bytes().index(0xE9)}", "line 2")


def test_invalid_utf8_after_a_byte_order_mark(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "\xff"}')
    refused(path, f"byte offset {path.read_bytes().index(0xFF)}")
    plain = tmp_path / "a.txt"
    plain.write_bytes(b"\xef\xbb\xbfab\xff")
    with pytest.raises(MoectlError, match="byte offset 5"):
        read_text_file(plain)


def test_a_binary_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\x7fELF\x02\x01\x00\x00")
    refused(tmp_path / "a.jsonl", "binary file", "offset 6")


def test_a_single_line_of_100_megabytes_is_refused_quickly_and_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.write(b'{"text": "good"}\n{"text": "')
        for _ in range(100):
            stream.write(b"x" * 2**20)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    refused(path, "line 2", f"{MAX_TEXT_BYTES // 2**20} MiB")
    assert time.monotonic() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_a_text_at_the_limit_is_read(tmp_path: Path) -> None:
    text = "x" * (MAX_TEXT_BYTES - 20)
    assert next(read_records(lines(tmp_path / "a.jsonl", json.dumps({"text": text})))).text.text == text


def parquet(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", text=["a", "é"], group=["g", None], extra=[1, 2])
    first, second = read_records(path)
    assert first.text == ("a", "g", "a.parquet")
    assert second.text.group.startswith("text:")


def test_bad_parquet(tmp_path: Path) -> None:
    refused(parquet(tmp_path / "a.parquet", body=["a"]), "no column 'text'")
    refused(parquet(tmp_path / "b.parquet", text=["a", None]), "row 2", "null")
    refused(parquet(tmp_path / "c.parquet", text=[1]), "int")
    refused(parquet(tmp_path / "d.parquet", text=pyarrow.array([], pyarrow.string())), "is empty")
    (tmp_path / "e.parquet").write_bytes(b"PAR1 not really PAR1")
    refused(tmp_path / "e.parquet", "not a readable Parquet file")
    (tmp_path / "f.parquet").write_bytes(b"")
    refused(tmp_path / "f.parquet", "is empty")


def test_text_files_are_read_in_order_and_hidden_ones_passed_over(tmp_path: Path) -> None:
    for name in ("b.txt", "a/x.py", "a/.hidden", ".git/config", "B.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"content of {name}")
    assert [text.group for text in read_text_files(tmp_path)] == ["B.md", "a/x.py", "b.txt"]
    assert next(iter(read_text_files(tmp_path))).text == "content of B.md"


def test_text_files_that_are_too_long_or_gone(tmp_path: Path) -> None:
    with (tmp_path / "long.txt").open("wb") as stream:
        stream.truncate(MAX_TEXT_BYTES + 1)
    with pytest.raises(MoectlError, match=r"long\.txt.*8 MiB"):
        read_text_file(tmp_path / "long.txt")
    with pytest.raises(MoectlError, match="cannot read"):
        read_text_file(tmp_path / "gone.txt")

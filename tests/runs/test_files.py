"""Numbers are not healed, and lines are whole."""

from __future__ import annotations

import json
import math
import resource
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moectl.errors import MoectlError
from moectl.runs.files import LineWriter, decode_number, encode_number, read_lines, write_atomic


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_every_float_survives_json(value: float) -> None:
    text = json.dumps(encode_number(value), allow_nan=False)
    back = decode_number(json.loads(text))
    assert back == value or (math.isnan(back) and math.isnan(value))


def test_what_is_no_number_is_refused() -> None:
    for value in ("abc", "nan", True, None, [1]):
        with pytest.raises((ValueError, TypeError)):
            decode_number(value)


def test_torn_last_line_does_not_count_and_is_cut_before_the_next_append(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": 3')
    assert [line.value["a"] for line in read_lines(path)] == [1, 2]
    writer = LineWriter(path)
    writer.write({"a": 4})
    writer.close()
    assert path.read_bytes() == b'{"a": 1}\n{"a": 2}\n{"a": 4}\n'


def test_torn_line_longer_than_the_scan_window(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"x" * 200_000)
    LineWriter(path).close()
    assert path.read_bytes() == b'{"a": 1}\n'
    path.write_bytes(b"x" * 200_000)
    LineWriter(path).close()
    assert path.read_bytes() == b""


def test_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\nnonsense\n[1]\n{"a": 2}\n')
    with pytest.raises(MoectlError, match=r"x\.jsonl: line 2 is broken"):
        list(read_lines(path))
    problems: list[str] = []
    assert [line.value["a"] for line in read_lines(path, problems=problems)] == [1, 2]
    assert ["line 2" in problems[0], "line 3" in problems[1]] == [True, True]


def test_a_full_disk_takes_the_half_line_back(tmp_path: Path) -> None:
    # A file size limit is the nearest real thing to a full disk: write() comes back short, then fails.
    path = tmp_path / "x.jsonl"
    writer = LineWriter(path)
    writer.write({"a": "x" * 50})
    whole = path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, before[1]))
        with pytest.raises(MoectlError, match=r"cannot write x\.jsonl"):
            writer.write({"a": "y" * 50})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == whole
    writer.write({"a": "z"})
    writer.close()
    assert [line.value["a"][0] for line in read_lines(path)] == ["x", "z"]


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_atomic(path, "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        with pytest.raises(MoectlError):
            write_atomic(path, "n" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["run.json"]

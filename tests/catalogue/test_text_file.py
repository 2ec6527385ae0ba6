"""Files that are replaced whole: under a lock, with their permissions, or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moectl.catalogue import text_file
from moectl.catalogue.text_file import replaced, text_of
from moectl.errors import ConfigError, MoectlError


def append(file: Path, text: str) -> None:
    with replaced(file) as draft:
        draft.append(text)


def test_a_file_is_made_and_added_to(tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    append(file, "one\n")
    append(file, "two\n")
    assert file.read_bytes() == b"one\ntwo\n"
    assert text_of(file) == "one\ntwo\n"
    assert os.listdir(tmp_path) == ["a.md"]


def test_line_ends_follow_the_first_one_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    for before, added in ((b"a\r\nb\n", b"c\r\n"), (b"a\nb\r\n", b"c\n"), (b"a", b"c\n"), (b"\n", b"c\n")):
        file.write_bytes(before)
        append(file, "c\n")
        assert file.read_bytes() == before + added


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664])
def test_permissions_stay(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "a.md"
    file.write_text("x\n")
    file.chmod(mode)
    append(file, "y\n")
    assert stat.S_IMODE(file.stat().st_mode) == mode


def test_a_link_keeps_pointing_where_it_did(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "a.md", tmp_path / "link.md"
    link.symlink_to(real)
    append(link, "x\n")  # nothing there yet
    append(link, "y\n")
    assert link.is_symlink()
    assert real.read_bytes() == b"x\ny\n"


@pytest.mark.parametrize("before", [None, b"", b"old\n"])
def test_an_exception_leaves_everything_as_it_was(tmp_path: Path, before: bytes | None) -> None:
    file = tmp_path / "a.md"
    if before is not None:
        file.write_bytes(before)
    with pytest.raises(KeyError), replaced(file) as draft:
        draft.append("new")
        raise KeyError
    assert (file.read_bytes() if file.exists() else None) == before
    assert os.listdir(tmp_path) == ([] if before is None else ["a.md"])


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.md"
    file.write_bytes(b"old\n")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(text_file.os, "fsync", full)
    with pytest.raises(MoectlError) as error:
        append(file, "new\n")
    assert "No space left" in error.value.message
    assert file.read_bytes() == b"old\n"
    assert os.listdir(tmp_path) == ["a.md"]


def test_the_lock_keeps_others_out_and_dies_with_its_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.md"
    file.write_bytes(b"old\n")
    monkeypatch.setattr(text_file, "_PATIENCE_S", 0.2)
    holder = file.open("rb")
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(MoectlError) as error:
        append(file, "new\n")
    assert "being written by another process" in error.value.message
    assert file.read_bytes() == b"old\n"
    holder.close()
    append(file, "new\n")
    assert file.read_bytes() == b"old\nnew\n"


def test_who_waited_takes_the_file_that_is_there_now(tmp_path: Path) -> None:
    """The waiter has the old file open when the holder puts a new one in its place."""
    file = tmp_path / "a.md"
    file.write_bytes(b"0\n")
    with replaced(file) as draft:
        waiter = threading.Thread(target=append, args=(file, "2\n"))
        waiter.start()
        waiter.join(0.1)
        assert waiter.is_alive()
        draft.append("1\n")
    waiter.join(10)
    assert file.read_bytes() == b"0\n1\n2\n"


def test_a_lock_on_a_file_that_was_replaced_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the file and locking it, another one puts a new file in its place."""
    file, newer = tmp_path / "a.md", tmp_path / "newer.md"
    file.write_bytes(b"0\n")
    newer.write_bytes(b"0\n1\n")
    flock = fcntl.flock

    def late(descriptor: int, kind: int) -> None:
        if newer.exists():
            os.replace(newer, file)
        flock(descriptor, kind)

    monkeypatch.setattr(text_file.fcntl, "flock", late)
    append(file, "2\n")
    assert file.read_bytes() == b"0\n1\n2\n"


@pytest.mark.parametrize("action", [text_of, lambda file: append(file, "x")])
def test_odd_places_are_refused_with_a_sentence(tmp_path: Path, action: object) -> None:
    assert callable(action)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nul").write_bytes(b"a\0b")
    (tmp_path / "latin").write_bytes(b"\xe9")
    for name, says in {
        "folder": "is a folder",
        "no/such.md": "there is no folder",
        "file/x.md": "there is no folder",
        "pipe": "no ordinary file",
        "loop": "cannot",
        "nul": "not a text file",
        "latin": "not UTF-8",
    }.items():
        with pytest.raises(MoectlError) as error:
            action(tmp_path / name)
        assert says in error.value.message, name
        assert error.value.hint
        assert not isinstance(error.value, ConfigError) or error.value.exit_code == 2
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "latin", "loop", "nul", "pipe"]


def test_a_device_is_never_replaced() -> None:
    with pytest.raises(ConfigError):
        append(Path(os.devnull), "x")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_a_huge_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    file = tmp_path / "huge.md"
    with file.open("wb") as stream:
        stream.truncate(text_file.MAX_BYTES + 1)
    with pytest.raises(MoectlError) as error:
        append(file, "x")
    assert "too large" in error.value.message
    assert file.stat().st_size == text_file.MAX_BYTES + 1


READ_ONLY = (
    "import os, sys; from pathlib import Path; from moectl.catalogue.text_file import replaced\n"
    "from moectl.errors import MoectlError\n"
    "if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n"
    "try:\n"
    "    with replaced(Path(sys.argv[1])) as draft: draft.append('x')\n"
    "except MoectlError as error: print(error.message)\n"
    "else: print('written')\n"
)


@pytest.mark.parametrize(("file_mode", "folder_mode"), [(0o444, 0o777), (0o666, 0o555), (None, 0o555), (0o000, 0o777)])
def test_no_permission_is_a_sentence(tmp_path: Path, file_mode: int | None, folder_mode: int) -> None:
    """In a process that is not root, for root may do everything."""
    folder = tmp_path / "folder"
    folder.mkdir()
    file = folder / "a.md"
    if file_mode is not None:
        file.write_text("old")
        file.chmod(file_mode)
    folder.chmod(folder_mode)
    modes = {parent: stat.S_IMODE(parent.stat().st_mode) for parent in (tmp_path, *tmp_path.parents)}
    closed = {parent: mode for parent, mode in modes.items() if mode & 0o011 != 0o011}
    try:
        for parent, mode in closed.items():
            parent.chmod(mode | 0o011)  # others may pass through
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, str(file)], capture_output=True, text=True, check=False, timeout=60
        )
    finally:
        for parent, mode in {folder: 0o755, **closed}.items():
            parent.chmod(mode)
    assert done.returncode == 0, done.stderr
    assert "no permission to" in done.stdout
    assert os.listdir(folder) == ([] if file_mode is None else ["a.md"])
    if file_mode is not None:
        assert file.read_text() == "old"

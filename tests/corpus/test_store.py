from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moectl import paths
from moectl.config.schema import DataConfig
from moectl.corpus.manifest import verify
from moectl.corpus.prepare import prepare
from moectl.corpus.store import dataset_ids, find_dataset, publish
from moectl.errors import CheckError, ConfigError, MoectlError, NotFoundError


def test_nothing_there_yet() -> None:
    for name in (None, "abc"):
        with pytest.raises(NotFoundError) as caught:
            find_dataset(name)
        assert caught.value.exit_code == 4
        assert caught.value.hint is not None and "moectl prepare" in caught.value.hint


def test_by_id_prefix_path_and_newest(config: Callable[..., DataConfig], tmp_path: Path) -> None:
    first = prepare(config()).folder
    second = prepare(config(seed=1)).folder
    assert dataset_ids() == sorted([first.name, second.name])
    assert find_dataset() == second
    assert not prepare(config()).created
    assert find_dataset() == first, "the newest is what was prepared last, though it was there before"
    verify(first)
    assert find_dataset(first.name) == find_dataset(first.name[:6]) == find_dataset(first) == first
    assert find_dataset(first / "manifest.json") == first
    with pytest.raises(NotFoundError, match="not a prepared dataset"):
        find_dataset(tmp_path)
    wrong = first.name[:-1] + ("0" if first.name[-1] != "0" else "1")
    with pytest.raises(NotFoundError, match="unknown dataset") as caught:
        find_dataset(wrong)
    assert caught.value.hint is not None and f"Did you mean '{first.name}'?" in caught.value.hint


@pytest.mark.parametrize("name", ["manifest.json", "train/tokens.npy"])
def test_the_newest_whole_one_is_taken(config: Callable[..., DataConfig], name: str) -> None:
    first = prepare(config()).folder
    second = prepare(config(seed=1)).folder
    path = second / name
    path.write_bytes(path.read_bytes()[:-40] + b"x" * 40)
    assert find_dataset() == first
    assert find_dataset(second.name) == second, "by name it is found, and its damage told when it is opened"
    (first / "documents.jsonl").unlink()
    with pytest.raises(CheckError, match=f"{first.name}.*documents|{second.name} was changed") as caught:
        find_dataset()
    assert caught.value.exit_code == 3 and caught.value.hint


def test_an_ambiguous_prefix(config: Callable[..., DataConfig]) -> None:
    first = prepare(config()).folder
    twin = first.with_name(first.name[:-1] + ("0" if first.name[-1] != "0" else "1"))
    shutil.copytree(first, twin)
    with pytest.raises(ConfigError, match="fits several") as caught:
        find_dataset(first.name[:5])
    assert caught.value.exit_code == 2
    assert caught.value.hint is not None and first.name in caught.value.hint and twin.name in caught.value.hint


def test_publish_leaves_all_or_nothing() -> None:
    folder = paths.data_dir() / "abc"
    with pytest.raises(KeyboardInterrupt), publish(folder) as temporary:
        (temporary / "half").write_text("x")
        raise KeyboardInterrupt
    assert os.listdir(folder.parent) == []
    with publish(folder) as temporary:
        (temporary / "manifest.json").write_text("first")
        assert not folder.exists()
    with publish(folder) as temporary:  # somebody was quicker: theirs stays
        (temporary / "manifest.json").write_text("second")
    assert (folder / "manifest.json").read_text() == "first"
    assert os.listdir(folder.parent) == ["abc"]


def test_a_full_disk_leaves_nothing_behind() -> None:
    folder = paths.data_dir() / "abc"
    with pytest.raises(MoectlError, match="No space left") as caught, publish(folder) as temporary:
        (temporary / "half").write_text("x")
        with open("/dev/full", "w") as full:
            full.write("x")
    assert caught.value.exit_code == 1
    assert caught.value.__cause__ is not None and caught.value.__cause__.errno == errno.ENOSPC  # type: ignore[attr-defined]
    assert os.listdir(folder.parent) == []


@pytest.mark.parametrize("place", ["/proc/moectl", "file/home"])
def test_a_home_that_cannot_be_written(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path / place))  # /proc: read-only for root, too
    with pytest.raises(MoectlError, match="cannot create") as caught, publish(paths.data_dir() / "abc"):
        pass
    assert caught.value.exit_code == 1
    assert caught.value.hint is not None and "MOECTL_HOME" in caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_home_without_write_permission(home: Path) -> None:
    (home / "data").mkdir(parents=True)
    (home / "data").chmod(0o500)
    try:
        with pytest.raises(MoectlError, match="cannot write"), publish(paths.data_dir() / "abc"):
            pass
    finally:
        (home / "data").chmod(0o700)

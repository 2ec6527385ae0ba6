from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moectl.config.schema import DataConfig
from moectl.corpus.loader import PackedDataset
from moectl.corpus.manifest import ARRAYS, SPLITS, Manifest, verify
from moectl.corpus.prepare import prepare
from moectl.disk import hash_file
from moectl.errors import CheckError, NotFoundError

FILES = ["tokenizer.json", "documents.jsonl", *(f"{split}/{array}.npy" for split in SPLITS for array in ARRAYS)]


@pytest.fixture
def folder(config: Callable[..., DataConfig]) -> Path:
    folder = prepare(config()).folder
    verify(folder)
    return folder


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found_and_the_file_named(folder: Path, name: str) -> None:
    flip_last_byte(folder / name)
    with pytest.raises(CheckError, match=f"{folder.name} was changed.*{name}") as caught:
        PackedDataset.open(folder)
    assert caught.value.exit_code == 3
    assert caught.value.hint


def test_a_cut_and_a_missing_file_are_found(folder: Path) -> None:
    path = folder / "train" / "tokens.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckError, match=r"train/tokens\.npy .*recorded"):
        verify(folder)
    with pytest.raises(CheckError, match="not a whole array"):
        PackedDataset.open(folder, verify=False)
    path.unlink()
    with pytest.raises(CheckError, match="the file is missing"):
        verify(folder)
    path.write_bytes(whole)
    verify(folder)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"eos_id": 0', '"eos_id": 1'),
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key != "files"}),
    ],
)
def test_an_edited_manifest_is_found(folder: Path, edit: Callable[[str], str]) -> None:
    path = folder / "manifest.json"
    path.write_text(edit(path.read_text()))
    with pytest.raises(CheckError, match=r"manifest\.json"):
        Manifest.load(folder)


def test_a_missing_manifest(folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckError, match=r"manifest\.json \(the file is missing\)"):
        verify(folder)
    with pytest.raises(NotFoundError, match="not a prepared dataset"):
        verify(tmp_path)


def test_another_format_is_refused(folder: Path) -> None:
    Manifest.load(folder).model_copy(update={"format": 99}).save(folder)
    with pytest.raises(CheckError, match="format 99"):
        Manifest.load(folder)


def test_the_content_hash_knows_nothing_of_time(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert manifest.model_copy(update={"created": "later"}).content_sha256 == manifest.content_sha256
    other = {**manifest.files, "tokenizer.json": manifest.files["documents.jsonl"]}
    assert manifest.model_copy(update={"files": other}).content_sha256 != manifest.content_sha256


def test_a_tokenizer_that_is_not_the_datasets(folder: Path, config: Callable[..., DataConfig]) -> None:
    manifest = Manifest.load(folder)
    manifest.check_tokenizer(hash_file(folder / "tokenizer.json"), "the base 'x'", "Take another.")
    other = prepare(config(tokenizer="bpe:290")).manifest
    with pytest.raises(CheckError, match=f"the base 'x' is not the one that dataset {manifest.id}") as caught:
        manifest.check_tokenizer(other.tokenizer.sha256, "the base 'x'", "Take another.")
    assert (caught.value.exit_code, caught.value.hint) == (3, "Take another.")

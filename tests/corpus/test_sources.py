from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moectl import paths
from moectl.config.schema import DataConfig
from moectl.corpus.sources import check_sources, read_domain
from moectl.errors import ConfigError, MoectlError, NotFoundError

Jsonl = Callable[[Path, list[Any]], Path]


def test_a_folder_of_files_named_by_domain(source: Path) -> None:
    found = read_domain(DataConfig(source=str(source)), "math")
    assert len(found.texts) == 24
    assert len({text.group for text in found.texts}) == 12
    assert (found.name, found.source, found.empty) == ("math", str(source), 0)


def test_a_folder_of_folders_of_text_files(tmp_path: Path) -> None:
    for name in ("code/a.py", "code/deep/b.py", "math/c.tex"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "code" / "__init__.py").touch()
    found = read_domain(DataConfig(source=str(tmp_path)), "code")
    assert [text.group for text in found.texts] == ["a.py", "deep/b.py"]
    assert found.empty == 1


def test_any_text_files_do_for_one_domain_but_not_for_several(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "two.md").write_text("two")
    found = read_domain(DataConfig(source=str(tmp_path), domains=("letters",)), "letters")
    assert [text.text for text in found.texts] == ["one", "two"]
    with pytest.raises(ConfigError, match="unknown domain"):
        read_domain(DataConfig(source=str(tmp_path), domains=("letters", "notes")), "letters")


def test_a_misspelt_domain_does_not_swallow_the_whole_folder(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown domain") as caught:
        read_domain(DataConfig(source=str(source), domains=("cod",)), "cod")
    assert caught.value.hint is not None and "Did you mean 'code'?" in caught.value.hint
    for name in ("code", "math"):
        (tmp_path / "folders" / name).mkdir(parents=True)
        (tmp_path / "folders" / name / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match="unknown domain"):
        read_domain(DataConfig(source=str(tmp_path / "folders"), domains=("cod",)), "cod")


def test_one_file_for_several_domains(tmp_path: Path, jsonl: Jsonl) -> None:
    path = jsonl(tmp_path / "all.jsonl", [{"text": "a", "domain": "code"}, {"text": "b", "domain": "math"}])
    config = DataConfig(source=str(path), domains=("code", "math"))
    assert [[text.text for text in read_domain(config, name).texts] for name in config.domains] == [["a"], ["b"]]
    with pytest.raises(ConfigError, match="unknown domain") as caught:
        read_domain(DataConfig(source=str(path), domains=("code", "maths")), "maths")
    assert caught.value.hint is not None and "Did you mean 'math'?" in caught.value.hint
    jsonl(path, [{"text": "a", "domain": "code"}, {"text": "b"}])
    with pytest.raises(MoectlError, match="line 2: there is no field 'domain'"):
        read_domain(config, "code")
    assert len(read_domain(DataConfig(source=str(path), domains=("code",)), "code").texts) == 2


def test_a_source_of_its_own_for_one_domain(source: Path, tmp_path: Path, jsonl: Jsonl) -> None:
    own = jsonl(tmp_path / "own.jsonl", [{"text": "mine"}])
    config = DataConfig(source=str(source), domains=("code", "poems"), sources={"poems": str(own)})
    check_sources(config)
    assert [text.text for text in read_domain(config, "poems").texts] == ["mine"]
    assert len(read_domain(config, "code").texts) == 32
    with pytest.raises(ConfigError, match="'poem'") as caught:
        check_sources(config.model_copy(update={"sources": {"poem": str(own)}}))
    assert caught.value.hint is not None and "poems" in caught.value.hint


def test_empty_texts_are_left_out_and_counted(tmp_path: Path, jsonl: Jsonl) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": " \n"}, {"text": "a"}, {"text": ""}])
    found = read_domain(DataConfig(source=str(path), domains=("a",)), "a")
    assert ([text.text for text in found.texts], found.empty) == (["a"], 2)
    jsonl(path, [{"text": " \n"}])
    with pytest.raises(MoectlError, match="has no text"):
        read_domain(DataConfig(source=str(path), domains=("a",)), "a")


def test_the_shipped_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = sorted(path.stem for path in paths.shipped("corpora").glob("*.jsonl"))
    assert names
    found = read_domain(DataConfig(), names[0])
    assert found.source == "sample"
    assert found.licence
    with pytest.raises(ConfigError, match="unknown domain 'proze'") as caught:
        read_domain(DataConfig(), "proze")
    assert caught.value.hint is not None and names[0] in caught.value.hint


@pytest.mark.parametrize(
    ("name", "error", "fragment"),
    [("gone", NotFoundError, "no source"), ("smaple", NotFoundError, "no source"), ("a.csv", ConfigError, "neither")],
)
def test_a_source_that_is_none(tmp_path: Path, name: str, error: type[MoectlError], fragment: str) -> None:
    (tmp_path / "a.csv").write_text("text\na\n")
    spec = name if name == "smaple" else str(tmp_path / name)
    with pytest.raises(error, match=fragment) as caught:
        read_domain(DataConfig(source=spec), "code")
    assert caught.value.hint
    assert ("Did you mean 'sample'?" in caught.value.hint) == (name == "smaple")


def test_an_empty_folder_and_a_folder_with_a_binary_file(tmp_path: Path) -> None:
    config = DataConfig(source=str(tmp_path), domains=("notes",))
    with pytest.raises(MoectlError, match="is empty"):
        read_domain(config, "notes")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    with pytest.raises(MoectlError, match=r"b\.png: a binary file") as caught:
        read_domain(config, "notes")
    assert caught.value.exit_code == 1


def test_the_revision_follows_the_content(tmp_path: Path, jsonl: Jsonl) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    config = DataConfig(source=str(path), domains=("a",))
    before = read_domain(config, "a").revision
    assert read_domain(config, "a").revision == before
    path.write_text(json.dumps({"text": "b"}) + "\n")
    assert read_domain(config, "a").revision != before

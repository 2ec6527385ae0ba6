"""The hub's code path on local folders in the hub's layout: `datasets` reads them as it reads the hub."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from moectl.config.schema import DataConfig
from moectl.corpus import hub
from moectl.corpus.sources import read_domain
from moectl.errors import ConfigError, MoectlError


def gzipped(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "codeparrot-clean"
    rows = [
        {"repo_name": f"owner/repo{n // 2}", "path": f"f{n}.py", "content": f"print({n})  # é", "license": "mit"}
        for n in range(30)
    ]
    gzipped(folder / "file-000000000001.json.gz", rows)
    return folder


@pytest.fixture
def math(tmp_path: Path) -> Path:
    folder = tmp_path / "math_qa"
    for split in ("train", "test"):
        path = folder / "default" / split / "0000.parquet"
        path.parent.mkdir(parents=True)
        table = {
            "Problem": [f"what is {n} + {n} ?" for n in range(12)],
            "Rationale": [f"{split} {2 * n}" for n in range(12)],
            "options": ["a ) 1"] * 12,
        }
        pyarrow.parquet.write_table(pyarrow.table(table), path)
    return folder


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    folder = tmp_path / "c4"
    for config in ("en", "de"):
        rows = [
            {"text": f"{config} page {n}", "url": f"https://host{n // 3}.example/{n}", "timestamp": "t"}
            for n in range(9)
        ]
        gzipped(folder / config / "c4-train.00000-of-01024.json.gz", rows)
    configs = "".join(
        f"- config_name: {config}\n  data_files:\n  - split: train\n    path: {config}/c4-train.*.json.gz\n"
        for config in ("en", "de")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


def test_the_code_preset_groups_by_repository(code: Path) -> None:
    found = hub.read(replace(hub.PRESETS["code"], repo=str(code)), "code", "hub")
    assert [text.text for text in found.texts] == [f"print({n})  # é" for n in range(30)]
    assert found.texts[5].group == "owner/repo2"
    assert len({text.group for text in found.texts}) == 15


def test_the_math_preset_joins_problem_and_rationale_without_any_prefix(math: Path) -> None:
    preset = replace(hub.PRESETS["math"], repo=str(math))
    found = hub.read(preset, "math", "hub")
    assert len(found.texts) == 12
    assert found.texts[3].text == "what is 3 + 3 ?\n\ntrain 6"
    assert found.licence == "Apache-2.0"


def test_the_prose_preset_takes_english_and_groups_by_host(prose: Path) -> None:
    found = hub.read(replace(hub.PRESETS["prose"], repo=str(prose)), "prose", "hub")
    assert [text.text for text in found.texts] == [f"en page {n}" for n in range(9)]
    assert sorted({text.group for text in found.texts}) == ["host0.example", "host1.example", "host2.example"]


def test_a_dataset_by_its_name_and_options(code: Path, math: Path) -> None:
    spec = f"hub:{code}?text=content&group=repo_name&limit=7"
    found = read_domain(DataConfig(domains=("snippets",), source=spec), "snippets")
    assert len(found.texts) == 7
    assert found.source == spec
    spec = f"hub:{math}?split=test&text={{Rationale}}"
    assert read_domain(DataConfig(domains=("sums",), source=spec), "sums").texts[1].text == "test 2"


def test_caches_stay_under_the_home_folder(prose: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", "")  # restored afterwards, whatever the call below sets
    monkeypatch.delenv("HF_HOME")
    hub.read(replace(hub.PRESETS["prose"], repo=str(prose)), "prose", "hub")
    import os

    assert os.environ["HF_HOME"] == str(home / "cache" / "huggingface")


@pytest.mark.parametrize(
    ("spec", "domain", "fragment"),
    [
        ("hub", "poems", "unknown domain 'poems' for source 'hub'"),
        ("hub:", "code", "names no dataset"),
        ("hub:a/b?txt=c", "code", "unknown option of a hub source 'txt'"),
        ("hub:a/b?limit=0", "code", "limit is '0'"),
    ],
)
def test_bad_specs_are_usage_errors(spec: str, domain: str, fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        hub.parse(spec, domain)


def test_a_presets_own_dataset_keeps_its_columns() -> None:
    assert hub.parse("hub:allenai/c4?config=de", "prose") == replace(hub.PRESETS["prose"], config="de")


def test_a_missing_column_and_a_missing_split_are_named(code: Path) -> None:
    with pytest.raises(MoectlError, match=r"record 1: there is no column 'text'") as caught:
        hub.read(hub.HubSource(str(code)), "code", "hub")
    assert caught.value.hint is not None and "content" in caught.value.hint
    with pytest.raises(MoectlError, match="cannot read the Hugging Face dataset"):
        hub.read(hub.HubSource(str(code), text="content", split="nope"), "code", "hub")


def test_without_a_network_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port on which nobody listens refuses at once: a real connection error, on every machine."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        MoectlError, match="cannot read the Hugging Face dataset 'codeparrot/codeparrot-clean'"
    ) as caught:
        read_domain(DataConfig(domains=("code",), source="hub"), "code")
    assert caught.value.exit_code == 1
    assert caught.value.hint is not None and "--source sample" in caught.value.hint

"""Tiny real texts, made on the spot."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from moectl.config.schema import DataConfig

_WORDS = {
    "code": "def return if else for in range print self None True x y total import value list".split(),
    "math": "let sum of integers prove that 12 + 7 = 19 therefore x equals prime number é ≤ ∑".split(),
    "prose": "the old sea was grey and she walked along a quiet shore until night fell — “soon”".split(),
}
Records = list[dict[str, Any]]


def make_records(domain: str, groups: int = 12, per_group: int = 2, words: int = 120) -> Records:
    """Texts that differ from each other, some with several bytes a character."""
    draw = random.Random(domain)
    vocabulary = _WORDS[domain]
    return [
        {
            "text": " ".join(draw.choices(vocabulary, k=words)) + f" {number}.\n",
            "group": f"{domain}-{number // per_group}",
        }
        for number in range(groups * per_group)
    ]


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of the test's own."""
    folder = tmp_path / "home"
    monkeypatch.setenv("MOECTL_HOME", str(folder))
    monkeypatch.setenv("NO_COLOR", "1")
    return folder


@pytest.fixture
def records() -> Callable[..., Records]:
    return make_records


@pytest.fixture
def jsonl() -> Callable[[Path, Sequence[Any]], Path]:
    return write_jsonl


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with three small domains; math is the smallest."""
    folder = tmp_path / "texts"
    for domain, groups in (("code", 16), ("math", 12), ("prose", 20)):
        write_jsonl(folder / f"{domain}.jsonl", make_records(domain, groups))
    return folder


@pytest.fixture
def config(source: Path) -> Callable[..., DataConfig]:
    """A small config over ``source``; keywords override."""

    def build(**changes: Any) -> DataConfig:
        return DataConfig(**{"source": str(source), "tokenizer": "bpe:300", "block_size": 32, **changes})

    return build

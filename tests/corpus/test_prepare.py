from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moectl.config.schema import DataConfig
from moectl.corpus.loader import PackedDataset
from moectl.corpus.manifest import Manifest
from moectl.corpus.prepare import prepare
from moectl.disk import hash_file
from moectl.errors import CheckError, ConfigError, MoectlError, NotFoundError

Build = Callable[..., DataConfig]
Jsonl = Callable[[Path, list[Any]], Path]


def hashes(folder: Path) -> dict[str, str]:
    """Hash of every file but the manifest, which holds the time."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def source_texts(config: DataConfig) -> dict[tuple[str, str], list[str]]:
    """Texts by (domain, group), as the source files hold them."""
    found: dict[tuple[str, str], list[str]] = {}
    for domain in config.domains:
        for line in (Path(config.source) / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            found.setdefault((domain, record["group"]), []).append(record["text"])
    return found


def test_documents_decode_back_and_bytes_add_up(config: Build) -> None:
    settings = config(balance_tokens=False)
    dataset = PackedDataset.open(prepare(settings).folder)
    tokenizer = dataset.tokenizer()
    texts = [text for group in source_texts(settings).values() for text in group]
    whole = 0
    for split in (dataset.train, dataset.eval):
        tokens, docs, counts = (array.ravel() for array in (split.tokens, split.doc_ids, split.byte_counts))
        assert (counts[tokens == dataset.manifest.eos_id] == 0).all()
        for doc_id in dict.fromkeys(docs.tolist()):
            document = dataset.documents[doc_id]
            ids = tokens[docs == doc_id]
            text = tokenizer.decode(ids[ids != dataset.manifest.eos_id].tolist())
            if len(ids) == document.tokens + 1:  # not cut at the end of its domain
                assert ids[-1] == dataset.manifest.eos_id
                assert text == texts[doc_id]
                assert int(counts[docs == doc_id].sum()) == len(text.encode()) == document.bytes
                assert len(text) == document.chars
                whole += 1
            else:
                assert texts[doc_id].startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert whole >= len(texts) - 6  # one may be cut per domain and split


def test_no_group_and_no_text_on_both_sides(config: Build) -> None:
    settings = config()
    dataset = PackedDataset.open(prepare(settings).folder)
    texts = [text for group in source_texts(settings).values() for text in group]
    sides: dict[str, set[Any]] = {"train": set(), "eval": set()}
    for document in dataset.documents:
        sides[document.split] |= {(document.domain, document.group), texts[document.id]}
    assert not sides["train"] & sides["eval"]
    expected = {"code": 1, "math": 1, "prose": 2}  # a tenth of 16, 12 and 20 groups
    for domain in dataset.manifest.domains:
        assert domain.eval.groups == expected[domain.name]
        assert domain.train.texts + domain.eval.texts == 2 * (domain.train.groups + domain.eval.groups)


def test_balance_cuts_the_training_split_to_the_smallest_domain(config: Build) -> None:
    balanced = prepare(config()).manifest
    unequal = prepare(config(balance_tokens=False)).manifest
    assert balanced.id != unequal.id
    before = [domain.train.tokens for domain in unequal.domains]
    assert len(set(before)) == 3
    for domain, tokens in zip(balanced.domains, before, strict=True):
        assert domain.train.tokens == min(before) == domain.train.blocks * 32
        assert domain.truncated_tokens == tokens - min(before)
    assert [domain.eval for domain in balanced.domains] == [domain.eval for domain in unequal.domains]


def test_imbalance_is_said_with_and_without_balancing(config: Build) -> None:
    def warned(**changes: Any) -> list[str]:
        return [text for text in prepare(config(**changes)).manifest.warnings if "times" in text]

    (cut,) = warned()
    assert "times the training tokens of" in cut and "balancing cut" in cut
    (kept,) = warned(balance_tokens=False)
    assert "--balance-tokens" in kept
    assert warned(domains=("math",)) == []


def test_the_manifest_counts_what_is_in_the_files(config: Build) -> None:
    result = prepare(config())
    dataset = PackedDataset.open(result.folder)
    for index, domain in enumerate(result.manifest.domains):
        for name, side in (("train", domain.train), ("eval", domain.eval)):
            split = getattr(dataset, name)
            rows = split.domain_ids == index
            assert side.blocks == rows.sum()
            assert side.tokens == split.tokens[rows].size
            assert side.bytes == split.byte_counts[rows].sum()
            documents = [row for row in dataset.documents if (row.domain, row.split) == (domain.name, name)]
            assert (side.texts, side.groups) == (len(documents), len({row.group for row in documents}))
    assert result.manifest.tokenizer.sha256 == hash_file(result.folder / "tokenizer.json")
    assert result.manifest.vocab_size == dataset.tokenizer().get_vocab_size() == 300
    assert dataset.train.tokens.max() < 300


def test_a_second_call_does_nothing(config: Build) -> None:
    first = prepare(config())
    stamps = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    second = prepare(config())
    assert (first.created, second.created) == (True, False)
    assert second.folder == first.folder
    assert second.manifest == first.manifest
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == stamps
    assert os.listdir(first.folder.parent) == [first.folder.name]


def test_an_edited_dataset_is_refused_not_reused(config: Build) -> None:
    folder = prepare(config()).folder
    with (folder / "documents.jsonl").open("a") as stream:
        stream.write(" ")
    with pytest.raises(CheckError, match=r"documents\.jsonl"):
        prepare(config())
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckError, match=r"manifest\.json"):
        prepare(config())


def test_equal_input_gives_equal_bytes_elsewhere_and_in_another_process(
    config: Build, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = prepare(config())
    moved = source.rename(tmp_path / "moved")
    script = (
        "import sys; from moectl.config.schema import DataConfig; from moectl.corpus.prepare import prepare\n"
        "result = prepare(DataConfig(source=sys.argv[1], tokenizer='bpe:300', block_size=32))\n"
        "assert 'torch' not in sys.modules\n"
        "print(result.folder)"
    )
    environment = {
        **os.environ,
        "MOECTL_HOME": str(tmp_path / "other"),
        "RAYON_NUM_THREADS": "1",
        "PYTHONHASHSEED": "7",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(moved)], env=environment, capture_output=True, text=True, check=True
    )
    there = Path(done.stdout.strip())
    assert there.name == here.folder.name
    assert there != here.folder
    assert hashes(there) == hashes(here.folder)
    assert Manifest.load(there).content_sha256 == here.manifest.content_sha256


def test_whatever_shapes_the_result_gives_another_id(config: Build, source: Path) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"block_size": 16},
        {"tokenizer": "bpe:299"},
        {"balance_tokens": False},
        {"domains": ("math", "code", "prose")},
        {"domains": ("code", "math")},
    ]
    ids = [prepare(config(**changes)).manifest.id for changes in variants]
    path = source / "code.jsonl"
    path.write_text(path.read_text().replace("return", "yield", 1))
    ids.append(prepare(config()).manifest.id)
    assert len(set(ids)) == len(ids)


def test_another_seed_holds_out_other_groups(config: Build) -> None:
    def held_out(seed: int) -> set[str]:
        documents = PackedDataset.open(prepare(config(seed=seed)).folder).documents
        return {document.group for document in documents if document.split == "eval"}

    assert held_out(0) != held_out(1)


def test_the_tokenizer_sees_the_training_split_only(source: Path, config: Build) -> None:
    """A word that stands in held-out text alone is no token, however often it stands there."""
    settings = config(domains=("code",), tokenizer="bpe:400")
    first = PackedDataset.open(prepare(settings).folder)
    held_out = {document.group for document in first.documents if document.split == "eval"}
    for groups, learned in ((held_out, False), (set(source_groups(source)) - held_out, True)):
        rewrite(source, groups)
        dataset = PackedDataset.open(prepare(settings).folder)
        assert {document.group for document in dataset.documents if document.split == "eval"} == held_out
        assert any("zqx" in token for token in dataset.tokenizer().get_vocab()) == learned


def source_groups(source: Path) -> list[str]:
    return [json.loads(line)["group"] for line in (source / "code.jsonl").read_text().splitlines()]


def rewrite(source: Path, groups: set[str]) -> None:
    """Put a word of its own into the texts of ``groups``, and take it out of all others."""
    records = [json.loads(line) for line in (source / "code.jsonl").read_text().splitlines()]
    for record in records:
        record["text"] = record["text"].replace(" zqxzqx", "") + " zqxzqx" * (40 if record["group"] in groups else 0)
    (source / "code.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_duplicates_across_the_split_are_moved_and_counted(source: Path, config: Build) -> None:
    first = PackedDataset.open(prepare(config()).folder)
    held = next(row for row in first.documents if (row.domain, row.split) == ("code", "eval"))
    records = [json.loads(line) for line in (source / "code.jsonl").read_text().splitlines()]
    twin = next(record for record in records if record["group"] != held.group)
    twin["text"] = records[held.id]["text"].upper()
    (source / "code.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    second = PackedDataset.open(prepare(config()).folder)
    assert [domain.duplicates_moved for domain in second.manifest.domains] == [1, 0, 0]
    assert second.documents[held.id].split == "train"
    assert second.documents[held.id].group.startswith("duplicate:")


def test_an_existing_tokenizer_is_taken_as_it_is(config: Build) -> None:
    first = prepare(config())
    for spec in (first.folder, first.folder / "tokenizer.json"):
        again = prepare(config(tokenizer=str(spec), block_size=64))
        assert hash_file(again.folder / "tokenizer.json") == first.manifest.tokenizer.sha256
        assert again.manifest.vocab_size == 300
    assert not again.created  # by file and by folder: the same tokenizer


def test_a_large_vocabulary_needs_four_bytes(config: Build, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(prepare(config()).folder / "tokenizer.json"))
    tokenizer.add_tokens([f"<{number}>" for number in range(1 << 16)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    result = prepare(config(tokenizer=str(tmp_path / "tokenizer.json")))
    assert (result.manifest.dtype, result.manifest.vocab_size) == ("uint32", (1 << 16) + 300)
    assert PackedDataset.open(result.folder).train.tokens.dtype == np.uint32


def test_empty_texts_and_a_small_vocabulary_are_said(source: Path, config: Build) -> None:
    with (source / "code.jsonl").open("a") as stream:
        stream.write('{"text": "  "}\n')
    warnings = "\n".join(prepare(config(tokenizer="bpe:50000")).manifest.warnings)
    assert "code: 1 empty texts were left out" in warnings
    assert "not 50000" in warnings


@pytest.mark.parametrize(
    ("changes", "error", "exit_code", "message", "hint"),
    [
        ({"domains": ("code", "maths")}, ConfigError, 2, "unknown domain", "Did you mean 'math'?"),
        ({"block_size": 100_000}, ConfigError, 2, "training tokens do not fill one block of 100000", "--block-size"),
        ({"block_size": 2048}, ConfigError, 2, "held-out tokens do not fill one block of 2048", "--block-size"),
        ({"tokenizer": "bpe:12"}, ConfigError, 2, "size must be", "bpe:8192"),
        ({"tokenizer": "nowhere"}, NotFoundError, 4, "no tokenizer", "bpe:SIZE"),
        ({"source": "nowhere"}, NotFoundError, 4, "no source", "folder"),
        ({"sources": {"cod": "x"}}, ConfigError, 2, "'cod'", "Did you mean 'code'?"),
        ({"domains": tuple(f"d{n}" for n in range(256))}, ConfigError, 2, "256 domains", "Merge"),
    ],
)
def test_bad_settings(
    config: Build,
    changes: dict[str, Any],
    error: type[MoectlError],
    exit_code: int,
    message: str,
    hint: str,
    home: Path,
) -> None:
    with pytest.raises(error, match=message) as caught:
        prepare(config(**changes))
    assert caught.value.exit_code == exit_code
    assert caught.value.hint is not None and hint in caught.value.hint
    assert not (home / "data").exists() or os.listdir(home / "data") == []


def test_the_block_size_that_is_advised_works(config: Build) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(config(block_size=100_000))
    assert caught.value.hint is not None
    advised = int(caught.value.hint.split()[2])
    assert prepare(config(block_size=advised)).created


def test_a_domain_with_too_few_groups(tmp_path: Path, jsonl: Jsonl, config: Build) -> None:
    path = jsonl(tmp_path / "few.jsonl", [{"text": f"text {n}"} for n in range(9)])
    with pytest.raises(MoectlError, match="'few' has 9 groups") as caught:
        prepare(config(domains=("few",), source=str(path)))
    assert caught.value.exit_code == 1


def test_a_home_that_cannot_be_written_is_known_before_the_work(config: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECTL_HOME", "/proc/moectl")
    said: list[str] = []
    with pytest.raises(MoectlError, match="cannot create"):
        prepare(config(), progress=said.append)
    assert said == ["reading code", "reading math", "reading prose"]


def test_two_at_once_end_with_one_whole_dataset(config: Build, home: Path) -> None:
    script = (
        "import sys; from moectl.config.schema import DataConfig; from moectl.corpus.prepare import prepare\n"
        "sys.stdin.readline()\n"
        "prepare(DataConfig.model_validate_json(sys.argv[1]))"
    )
    command = [sys.executable, "-c", script, config().model_dump_json()]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        _, errors = worker.communicate(timeout=60)
        assert worker.returncode == 0, errors
    (name,) = os.listdir(home / "data")
    PackedDataset.open(home / "data" / name)

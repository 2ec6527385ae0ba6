"""The files of a dataset folder, all but the manifest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moectl.corpus.manifest import (
    ARRAYS,
    DOCUMENTS_FILE,
    SPLITS,
    TOKENIZER_FILE,
    DomainEntry,
    FileEntry,
    SplitEntry,
    file_entry,
)
from moectl.corpus.packing import Packed
from moectl.corpus.splitting import Split, SplitDomain
from moectl.corpus.texts import DomainTexts
from moectl.corpus.tokenization import Encoded


class PackedDomain(NamedTuple):
    """One domain: its texts, where they went, their tokens, the document id of the first, the
    blocks of each split before balancing."""

    texts: DomainTexts
    split: SplitDomain
    encoded: list[Encoded]
    first_id: int
    packed: dict[Split, Packed]


def write_files(
    folder: Path, domains: Sequence[PackedDomain], train: Sequence[Packed], tokenizer: bytes
) -> dict[str, FileEntry]:
    """Write tokenizer, documents and arrays into ``folder``; their entries for the manifest.

    ``train`` holds each domain's training blocks, balanced if they are to be.
    """
    (folder / TOKENIZER_FILE).write_bytes(tokenizer)
    _write_documents(folder / DOCUMENTS_FILE, domains)
    _write_split(folder / "train", train)
    _write_split(folder / "eval", [domain.packed["eval"] for domain in domains])
    names = [TOKENIZER_FILE, DOCUMENTS_FILE, *(f"{part}/{array}.npy" for part in SPLITS for array in ARRAYS)]
    return {name: file_entry(folder / name) for name in names}


def domain_entry(domain: PackedDomain, train: Packed) -> DomainEntry:
    """The manifest's entry; ``train`` is what balancing left of the training blocks."""

    def side(name: Split, packed: Packed) -> SplitEntry:
        placed = [item.text for item in domain.split.placed if item.split == name]
        return SplitEntry(
            texts=len(placed),
            groups=len({text.group for text in placed}),
            tokens=int(packed.tokens.size),
            blocks=packed.num_blocks,
            bytes=int(packed.byte_counts.sum(dtype=np.int64)),
        )

    return DomainEntry(
        name=domain.texts.name,
        source=domain.texts.source,
        revision=domain.texts.revision,
        licence=domain.texts.licence,
        train=side("train", train),
        eval=side("eval", domain.packed["eval"]),
        duplicates_moved=domain.split.duplicates_moved,
        truncated_tokens=int(domain.packed["train"].tokens.size - train.tokens.size),
    )


def _write_documents(path: Path, domains: Sequence[PackedDomain]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for domain in domains:
            for row, (item, tokens) in enumerate(zip(domain.split.placed, domain.encoded, strict=True)):
                record = {
                    "id": domain.first_id + row,
                    "domain": domain.texts.name,
                    "group": item.text.group,
                    "source": item.text.source,
                    "split": item.split,
                    "chars": len(item.text.text),
                    "bytes": len(item.text.text.encode()),
                    "tokens": len(tokens.ids),
                }
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def _write_split(folder: Path, parts: Sequence[Packed]) -> None:
    folder.mkdir()
    domains = [np.full(part.num_blocks, index, dtype=np.uint8) for index, part in enumerate(parts)]
    arrays = {
        "tokens": [part.tokens for part in parts],
        "doc_ids": [part.doc_ids for part in parts],
        "byte_counts": [part.byte_counts for part in parts],
        "domains": domains,
    }
    for name, columns in arrays.items():
        np.save(folder / f"{name}.npy", np.concatenate(columns), allow_pickle=False)

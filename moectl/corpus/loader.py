"""Reading a prepared dataset: memory-mapped splits, batches, the resumable sampler, targets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from moectl.corpus.manifest import (
    ARRAYS,
    DOCUMENTS_FILE,
    TOKENIZER_FILE,
    Manifest,
)
from moectl.corpus.manifest import verify as verify_folder
from moectl.corpus.shuffle import permutation
from moectl.errors import CheckError, NotFoundError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IGNORED = -100


class Batch(NamedTuple):
    """``B`` blocks of ``S`` tokens, all int64: ``input_ids``, ``doc_ids`` and ``byte_counts``
    ``[B, S]`` (``byte_counts``: UTF-8 bytes of text behind each token, 0 for end-of-text),
    ``domain_ids`` and ``block_ids`` ``[B]``."""

    input_ids: torch.Tensor
    doc_ids: torch.Tensor
    domain_ids: torch.Tensor
    byte_counts: torch.Tensor
    block_ids: torch.Tensor


def targets(batch: Batch) -> torch.Tensor:
    """Next-token labels ``[B, S-1]``: position t holds token t+1 of the same document, else -100.

    Nothing is predicted across a document's end, so the end-of-text token has no label after it.
    """
    labels = batch.input_ids[:, 1:].clone()
    labels[batch.doc_ids[:, 1:] != batch.doc_ids[:, :-1]] = IGNORED
    return labels


class Document(NamedTuple):
    """One row of ``documents.jsonl``; its ``id`` is what ``doc_ids`` hold. ``tokens`` counts
    without the end-of-text token."""

    id: int
    domain: str
    group: str
    source: str
    split: str
    chars: int
    bytes: int
    tokens: int


class PackedSplit:
    """One split, memory-mapped. ``tokens``, ``doc_ids`` and ``byte_counts`` are ``[N, block]``."""

    def __init__(self, folder: Path, name: str, block_size: int, num_blocks: int) -> None:
        self.name = name
        arrays: dict[str, npt.NDArray[Any]] = {}
        for array in ARRAYS:
            path = folder / name / f"{array}.npy"
            try:
                arrays[array] = np.load(path, mmap_mode="r", allow_pickle=False)
            except FileNotFoundError as error:
                raise NotFoundError(f"{path} is missing", "Run 'moectl prepare' again.") from error
            except (ValueError, EOFError) as error:
                raise CheckError(
                    f"{path} is not a whole array: {error}", f"Remove {folder} and run 'moectl prepare' again."
                ) from error
            expected = (num_blocks,) if array == "domains" else (num_blocks, block_size)
            if arrays[array].shape != expected:
                raise CheckError(
                    f"{path} has shape {arrays[array].shape}, the manifest says {expected}",
                    f"Remove {folder} and run 'moectl prepare' again.",
                )
        self.tokens, self.doc_ids, self.byte_counts = (arrays[key] for key in ("tokens", "doc_ids", "byte_counts"))
        self.domain_ids: npt.NDArray[np.uint8] = np.asarray(arrays["domains"])
        self.block_size = block_size
        self.num_blocks = num_blocks

    def __len__(self) -> int:
        return self.num_blocks

    def batch(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Batch:
        """The blocks at ``indices``, copied into fresh int64 tensors."""
        chosen = np.asarray(indices, dtype=np.int64)

        def take(array: npt.NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(array[chosen].astype(np.int64))

        return Batch(
            take(self.tokens),
            take(self.doc_ids),
            take(self.domain_ids),
            take(self.byte_counts),
            torch.from_numpy(chosen.copy()),
        )


class PackedDataset:
    """A prepared dataset, opened for reading. Use ``PackedDataset.open(folder)``."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.domains: tuple[str, ...] = manifest.domain_names
        self.train = self._split("train", sum(domain.train.blocks for domain in manifest.domains))
        self.eval = self._split("eval", sum(domain.eval.blocks for domain in manifest.domains))

    @classmethod
    def open(cls, folder: Path | str, verify: bool = True) -> PackedDataset:
        """Open ``folder``; with ``verify`` every file is hashed first.

        Raises:
            NotFoundError: no dataset there.
            CheckError: a file was edited, cut or removed (named).
        """
        folder = Path(folder)
        if verify:
            verify_folder(folder)
        return cls(folder, Manifest.load(folder))

    def _split(self, name: str, num_blocks: int) -> PackedSplit:
        return PackedSplit(self.folder, name, self.manifest.block_size, num_blocks)

    def tokenizer(self) -> Tokenizer:
        """The dataset's tokenizer, as it encoded the texts: no truncation, no padding."""
        from moectl.corpus.tokenization import load_tokenizer

        return load_tokenizer(self.folder / TOKENIZER_FILE)

    @cached_property
    def documents(self) -> tuple[Document, ...]:
        """All documents, indexed by document id."""
        with (self.folder / DOCUMENTS_FILE).open(encoding="utf-8") as lines:
            return tuple(Document(**json.loads(line)) for line in lines)

    @cached_property
    def group_ids(self) -> npt.NDArray[np.int32]:
        """Group of each document ``[num_documents]``: the unit of permutation tests and bootstraps.

        Numbered in order of first appearance; a group belongs to one domain and one split.
        """
        numbers: dict[tuple[str, str], int] = {}
        ids = [numbers.setdefault((document.domain, document.group), len(numbers)) for document in self.documents]
        return np.asarray(ids, dtype=np.int32)


class BlockSampler:
    """Endless shuffled batches of block numbers: the order of epoch e depends on (seed, e) only.

    A batch that meets the end of an epoch is filled from the next one, so every block is seen
    once before any is seen again.
    """

    def __init__(self, num_blocks: int, *, batch_size: int, seed: int) -> None:
        if num_blocks < 1 or batch_size < 1:
            raise ValueError(f"num_blocks ({num_blocks}) and batch_size ({batch_size}) must be at least 1")
        self.num_blocks = num_blocks
        self.batch_size = batch_size
        self.seed = seed
        self.position = 0
        self._order_epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    @property
    def epoch(self) -> int:
        """The epoch that the next block belongs to, from 0."""
        return self.position // self.num_blocks

    def next(self) -> npt.NDArray[np.int64]:
        """The next ``batch_size`` block numbers."""
        parts = []
        wanted = self.batch_size
        while wanted:
            if self._order_epoch != self.epoch:
                self._order_epoch = self.epoch
                self._order = permutation(self.num_blocks, self.seed, self.epoch)
            start = self.position % self.num_blocks
            part = self._order[start : start + wanted]
            parts.append(part)
            self.position += len(part)
            wanted -= len(part)
        return np.concatenate(parts)

    def state_dict(self) -> dict[str, int]:
        """What ``load_state_dict`` needs, as plain integers (JSON)."""
        return {
            "num_blocks": self.num_blocks,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "position": self.position,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where ``state`` was taken; a state of another sampler raises CheckError."""
        for key in ("num_blocks", "batch_size", "seed"):
            if state.get(key) != getattr(self, key):
                raise CheckError(
                    f"the saved data order has {key} {state.get(key)}, this run has {getattr(self, key)}",
                    "Resume with the data, batch size and seed that the run was started with.",
                )
        self.position = int(state["position"])

"""Packing: documents in a row, end-of-text after each, cut into blocks of one size, no padding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moectl.corpus.shuffle import permutation
from moectl.corpus.tokenization import Encoded


class Packed(NamedTuple):
    """Blocks of one domain and split: ``tokens``, ``doc_ids`` (int32) and ``byte_counts`` (uint16),
    each ``[N, block]``. ``available`` counts the tokens before cutting."""

    tokens: npt.NDArray[Any]
    doc_ids: npt.NDArray[np.int32]
    byte_counts: npt.NDArray[np.uint16]
    available: int

    @property
    def num_blocks(self) -> int:
        return len(self.tokens)

    def take(self, blocks: npt.NDArray[np.int64]) -> Packed:
        """Only these blocks."""
        return Packed(self.tokens[blocks], self.doc_ids[blocks], self.byte_counts[blocks], self.available)


def pack(documents: Iterable[tuple[int, Encoded]], *, block_size: int, eos_id: int, dtype: str) -> Packed:
    """Lay documents (id, tokens) end to end and cut; the rest that fills no block is dropped.

    End-of-text belongs to the document that it ends, and stands for 0 bytes.
    """
    tokens: list[npt.NDArray[Any]] = []
    doc_ids: list[npt.NDArray[np.int32]] = []
    byte_counts: list[npt.NDArray[np.uint16]] = []
    end, nothing = np.array([eos_id], dtype=dtype), np.zeros(1, dtype=np.uint16)
    for doc_id, encoded in documents:
        tokens += [encoded.ids.astype(dtype), end]
        byte_counts += [encoded.byte_counts, nothing]
        doc_ids.append(np.full(len(encoded.ids) + 1, doc_id, dtype=np.int32))
    available = sum(len(part) for part in tokens)
    used = available - available % block_size

    def blocks(parts: list[npt.NDArray[Any]], kind: str) -> npt.NDArray[Any]:
        row = np.concatenate(parts) if parts else np.empty(0, dtype=kind)
        return row[:used].reshape(-1, block_size)

    return Packed(blocks(tokens, dtype), blocks(doc_ids, "int32"), blocks(byte_counts, "uint16"), available)


def balanced(packed: Sequence[Packed], names: Sequence[str], seed: int) -> list[Packed]:
    """Cut every domain to the blocks of the smallest, a random choice that keeps their order.

    Nothing is repeated. The choice depends on seed and domain only.
    """
    smallest = min(part.num_blocks for part in packed)
    result = []
    for part, name in zip(packed, names, strict=True):
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        chosen = np.sort(permutation(part.num_blocks, seed, key)[:smallest])
        result.append(part if part.num_blocks == smallest else part.take(chosen))
    return result

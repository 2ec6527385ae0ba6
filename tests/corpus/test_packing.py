from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moectl.corpus.packing import balanced, pack
from moectl.corpus.tokenization import Encoded


def encoded(ids: list[int]) -> Encoded:
    return Encoded(np.asarray(ids, dtype=np.uint32), np.asarray([i % 7 for i in ids], dtype=np.uint16))


@settings(max_examples=100, deadline=None)
@given(documents=st.lists(st.lists(st.integers(1, 999), max_size=30), max_size=20), block_size=st.integers(2, 16))
def test_documents_come_back_in_order_with_their_ends(documents: list[list[int]], block_size: int) -> None:
    packed = pack(
        [(5 + n, encoded(ids)) for n, ids in enumerate(documents)], block_size=block_size, eos_id=0, dtype="uint16"
    )
    flat = [(token, 5 + n) for n, ids in enumerate(documents) for token in [*ids, 0]]
    assert packed.available == len(flat)
    used = len(flat) // block_size * block_size
    assert packed.tokens.shape == packed.doc_ids.shape == packed.byte_counts.shape == (used // block_size, block_size)
    assert list(zip(packed.tokens.ravel().tolist(), packed.doc_ids.ravel().tolist(), strict=True)) == flat[:used]
    assert packed.byte_counts.ravel().tolist() == [token % 7 for token, _ in flat[:used]]
    assert [str(part.dtype) for part in packed[:3]] == ["uint16", "int32", "uint16"]


def test_a_large_vocabulary_is_kept_whole() -> None:
    packed = pack([(0, encoded([100_000] * 4))], block_size=2, eos_id=3, dtype="uint32")
    assert packed.tokens.dtype == np.uint32
    assert packed.tokens.ravel().tolist() == [100_000] * 4


def test_balance_takes_a_random_choice_repeats_nothing_and_keeps_the_order() -> None:
    large = pack([(0, encoded(list(range(1, 401))))], block_size=4, eos_id=0, dtype="uint16")
    small = pack([(1, encoded(list(range(500, 580))))], block_size=4, eos_id=0, dtype="uint16")
    cut, same = balanced([large, small], ["a", "b"], seed=0)
    assert same is small
    assert cut.num_blocks == small.num_blocks == 20
    first = cut.tokens[:, 0].tolist()
    assert first == sorted(set(first))
    assert max(first) > 200, "a choice over the whole domain, not its beginning"
    assert not np.array_equal(cut.tokens, balanced([large, small], ["a", "b"], seed=1)[0].tokens)
    assert np.array_equal(cut.tokens, balanced([small, large], ["b", "a"], seed=0)[1].tokens)

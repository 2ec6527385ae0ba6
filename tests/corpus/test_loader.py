from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moectl.config.schema import DataConfig
from moectl.corpus.loader import Batch, BlockSampler, PackedDataset, targets
from moectl.corpus.prepare import prepare
from moectl.errors import CheckError, NotFoundError

torch.set_num_threads(1)


@pytest.fixture
def dataset(config: Callable[..., DataConfig]) -> PackedDataset:
    return PackedDataset.open(prepare(config()).folder)


def test_a_batch_holds_the_blocks_asked_for(dataset: PackedDataset) -> None:
    split = dataset.train
    batch = split.batch([3, 0, split.num_blocks - 1])
    assert all(tensor.dtype == torch.int64 for tensor in batch)
    assert batch.input_ids.shape == batch.doc_ids.shape == batch.byte_counts.shape == (3, split.block_size)
    assert batch.block_ids.tolist() == [3, 0, split.num_blocks - 1]
    for row, block in enumerate(batch.block_ids.tolist()):
        assert batch.input_ids[row].tolist() == split.tokens[block].tolist()
        assert batch.domain_ids[row] == split.domain_ids[block]
    batch.input_ids.zero_()  # a copy: the data cannot be written through it
    assert split.batch([3]).input_ids.any()


def test_every_block_belongs_to_one_domain_and_its_documents(dataset: PackedDataset) -> None:
    for name in ("train", "eval"):
        split = getattr(dataset, name)
        for domain, row in zip(split.domain_ids, split.doc_ids, strict=True):
            for doc_id in set(row.tolist()):
                document = dataset.documents[doc_id]
                assert document.id == doc_id
                assert (document.domain, document.split) == (dataset.domains[domain], name)


def test_groups_number_documents_and_never_cross_domain_or_split(dataset: PackedDataset) -> None:
    ids = dataset.group_ids
    assert ids.dtype == np.int32
    assert len(ids) == len(dataset.documents)
    assert set(ids.tolist()) == set(range(16 + 12 + 20))
    for group in set(ids.tolist()):
        rows = [document for document, number in zip(dataset.documents, ids, strict=True) if number == group]
        assert len({(row.domain, row.group, row.split) for row in rows}) == 1


def test_targets_never_cross_documents() -> None:
    ids = torch.tensor([[5, 6, 0, 7, 8, 0, 9]])
    docs = torch.tensor([[1, 1, 1, 2, 2, 2, 3]])
    nothing = torch.zeros(1, dtype=torch.int64)
    labels = targets(Batch(ids, docs, nothing, torch.zeros_like(ids), nothing))
    assert labels.tolist() == [[6, 0, -100, 8, 0, -100]]
    assert ids.tolist() == [[5, 6, 0, 7, 8, 0, 9]]


@settings(max_examples=50, deadline=None)
@given(num_blocks=st.integers(1, 30), batch_size=st.integers(1, 40), seed=st.integers(0, 9), steps=st.integers(0, 12))
def test_the_sampler_sees_all_before_any_again_and_resumes_exactly(
    num_blocks: int, batch_size: int, seed: int, steps: int
) -> None:
    sampler = BlockSampler(num_blocks, batch_size=batch_size, seed=seed)
    drawn: list[int] = []
    for _ in range(steps):
        assert sampler.epoch == len(drawn) // num_blocks
        batch = sampler.next()
        assert batch.dtype == np.int64
        assert batch.shape == (batch_size,)
        drawn += batch.tolist()
    for start in range(0, len(drawn) - num_blocks + 1, num_blocks):
        assert sorted(drawn[start : start + num_blocks]) == list(range(num_blocks))
    other = BlockSampler(num_blocks, batch_size=batch_size, seed=seed)
    other.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    for _ in range(4):
        assert np.array_equal(sampler.next(), other.next())


def test_the_order_follows_seed_and_epoch() -> None:
    def epochs(seed: int) -> list[list[int]]:
        sampler = BlockSampler(20, batch_size=20, seed=seed)
        return [sampler.next().tolist() for _ in range(2)]

    assert epochs(0) == epochs(0)
    assert epochs(0)[0] != epochs(0)[1]
    assert epochs(0) != epochs(1)


def test_the_state_of_another_order_is_refused() -> None:
    state = BlockSampler(20, batch_size=4, seed=0).state_dict()
    for key, sampler in {
        "num_blocks": BlockSampler(21, batch_size=4, seed=0),
        "batch_size": BlockSampler(20, batch_size=5, seed=0),
        "seed": BlockSampler(20, batch_size=4, seed=1),
    }.items():
        with pytest.raises(CheckError, match=key):
            sampler.load_state_dict(state)
    with pytest.raises(ValueError, match="at least 1"):
        BlockSampler(0, batch_size=4, seed=0)


def test_opening_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="not a prepared dataset"):
        PackedDataset.open(tmp_path / "none")

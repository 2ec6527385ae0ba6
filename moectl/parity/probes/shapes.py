"""Probes of what goes in: few tokens and many, padding, documents, strange memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moectl.parity.case import Case, Unsupported
from moectl.parity.probes.bench import Bench
from moectl.parity.probes.probe import Probe

#: Attention scores, ``[B, H, S, S]``, may take so much.
_SCORES_BYTES = 1 << 30


def _one_token(bench: Bench) -> Iterator[Case]:
    # One token has no next token: a model then has no loss, and nothing to differentiate.
    yield bench.case("one-token", bench.inputs(batch=1, length=1), gradients=bench.level != "model")


def _batch_of_one(bench: Bench) -> Iterator[Case]:
    yield bench.case("batch-of-one", bench.inputs(batch=1))


def _batch_of_many(bench: Bench) -> Iterator[Case]:
    yield bench.case("batch-of-many", bench.inputs(batch=7, length=5))


def _left_padding(bench: Bench) -> Iterator[Case]:
    yield bench.case("left-padding", bench.inputs(batch=3, padding="left"))


def _right_padding(bench: Bench) -> Iterator[Case]:
    yield bench.case("right-padding", bench.inputs(batch=3, padding="right"))


def _documents(bench: Bench) -> Iterator[Case]:
    inputs = bench.inputs()
    rows = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2]])
    yield bench.case("documents", inputs._replace(doc_ids=rows))


def _longest(bench: Bench) -> Iterator[Case]:
    length = int(bench.config["max_position_embeddings"])
    if bench.formula.attention.num_heads * length * length * bench.dtype.itemsize > _SCORES_BYTES:
        raise Unsupported(f"attention over all {length:,} positions of this config does not fit a small machine")
    yield bench.case("longest", bench.inputs(batch=1, length=length))


def _non_contiguous(bench: Bench) -> Iterator[Case]:
    inputs = bench.inputs()
    if inputs.input_ids is not None:
        strided = inputs._replace(input_ids=inputs.input_ids.t().contiguous().t())
    else:
        assert inputs.hidden is not None
        strided = inputs._replace(hidden=inputs.hidden.transpose(0, 1).contiguous().transpose(0, 1))
    yield bench.case("non-contiguous", strided)


PROBES = (
    Probe("one-token", "a batch of one token", _one_token),
    Probe("batch-of-one", "one row", _batch_of_one),
    Probe("batch-of-many", "seven short rows", _batch_of_many),
    Probe(
        "left-padding", "rows of unequal length, padded in front", _left_padding, ("model", "layer", "moe", "attention")
    ),
    Probe(
        "right-padding", "rows of unequal length, padded behind", _right_padding, ("model", "layer", "moe", "attention")
    ),
    Probe(
        "documents",
        "several documents in a row; attention stays within each",
        _documents,
        ("model", "layer", "attention"),
    ),
    Probe("longest", "as many positions as the config allows", _longest, ("model", "attention")),
    Probe("non-contiguous", "an input that is a transposed view", _non_contiguous, of_code=True),
)

"""Probes of the whole: every dtype, the anchor, training and evaluation, the cache, the config's own switches."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moectl.parity.case import Case, Unsupported
from moectl.parity.probes.bench import LENGTH, Bench
from moectl.parity.probes.probe import EVERY_LEVEL, Probe

BASE = ("float64", "float32", "bfloat16")


def _base(bench: Bench) -> Iterator[Case]:
    yield bench.case(str(bench.dtype).removeprefix("torch."))


def _anchor(bench: Bench) -> Iterator[Case]:
    yield bench.case("anchor")
    yield bench.case("anchor", bench.inputs(batch=3, padding="right") if bench.level != "router" else None)


def _train(bench: Bench) -> Iterator[Case]:
    yield bench.case("train", training=True)


def _eval(bench: Bench) -> Iterator[Case]:
    yield bench.case("eval", training=False)


def _compiled(bench: Bench) -> Iterator[Case]:
    yield bench.case("compiled", compiled=True)


def _chunked(bench: Bench) -> Iterator[Case]:
    for chunks in ((5, 4, 3), (1, 10, 1)):
        yield bench.case("chunked-prefill", bench.inputs()._replace(chunks=chunks), gradients=False)


def _cached(bench: Bench) -> Iterator[Case]:
    yield bench.case("cached-decoding", bench.inputs()._replace(chunks=(4,) + (1,) * (LENGTH - 4)), gradients=False)


def _sparse_step(bench: Bench) -> Iterator[Case]:
    _require(bench, "decoder_sparse_step")
    yield bench.changed(decoder_sparse_step=2).case("decoder-sparse-step")


def _mlp_only(bench: Bench) -> Iterator[Case]:
    _require(bench, "mlp_only_layers")
    last = bench.formula.num_layers - 1
    for layers in dict.fromkeys(((0,), (last,))):
        yield bench.changed(mlp_only_layers=list(layers)).case("mlp-only-layers")


def _tied(bench: Bench) -> Iterator[Case]:
    yield bench.changed(tie_word_embeddings=True).case("tied-embeddings")


def _require(bench: Bench, key: str) -> None:
    if key not in bench.config:
        raise Unsupported(f"{bench.family} has no {key}")


PROBES = (
    Probe("float64", "every tensor and gradient, to 1e-10", _base, dtypes=(torch.float64,)),
    Probe("float32", "every tensor and gradient, to 1e-5", _base, dtypes=(torch.float32,)),
    Probe("bfloat16", "every tensor and gradient, by the reference's own error", _base, dtypes=(torch.bfloat16,)),
    Probe(
        "anchor",
        "our formula with Hugging Face's casts = Hugging Face as it is",
        _anchor,
        dtypes=(torch.float64,),
        sides="formula",
    ),
    Probe("train", "in training mode", _train, of_code=True),
    Probe("eval", "in evaluation mode", _eval, of_code=True),
    Probe("compiled", "under torch.compile", _compiled, EVERY_LEVEL, (torch.float32,), largest_only=True, of_code=True),
    Probe("chunked-prefill", "fed in pieces with a cache = the full forward", _chunked, ("model",), of_code=True),
    Probe("cached-decoding", "fed token by token with a cache = the full forward", _cached, ("model",), of_code=True),
    Probe("decoder-sparse-step", "experts in every other layer", _sparse_step, ("model",)),
    Probe("mlp-only-layers", "a dense first layer; a dense last one", _mlp_only, ("model",)),
    Probe("tied-embeddings", "the head shares the embedding's weights", _tied, ("model",)),
)

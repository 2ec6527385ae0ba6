"""A real tiny dataset and real tiny models for the tests of inspection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moectl.config.schema import MoEConfig
from moectl.corpus.loader import PackedDataset
from moectl.models.decoder import Decoder
from tests.support import prepare_tiny, tiny_shape


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    """Two domains with words of their own; two held-out groups each."""
    return _prepared(tmp_path_factory, "fish", "sums")


@pytest.fixture(scope="session")
def one_domain(tmp_path_factory: pytest.TempPathFactory, dataset: PackedDataset) -> PackedDataset:
    """The first of the two domains alone, in the same tokens."""
    return _prepared(tmp_path_factory, "fish", tokenizer=str(dataset.folder))


def _prepared(factory: pytest.TempPathFactory, *domains: str, tokenizer: str = "bpe:300") -> PackedDataset:
    folder, _ = prepare_tiny(factory.mktemp("home"), factory.mktemp("texts"), *domains, tokenizer=tokenizer)
    return PackedDataset.open(folder)


@pytest.fixture
def build(dataset: PackedDataset) -> Callable[..., Decoder]:
    """A decoder of two layers, drawn from ``seed``; keywords go to its MoE section."""

    def make(seed: int = 0, **moe: Any) -> Decoder:
        torch.manual_seed(seed)
        options: dict[str, Any] = {"router": {"name": "top1"}, "num_experts": 4, "layers": "all", **moe}
        section = MoEConfig.model_validate(options) if options["num_experts"] else None
        return Decoder(tiny_shape(dataset.manifest.vocab_size, section))

    return make

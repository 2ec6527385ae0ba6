"""A real tiny dataset and model for the tests of evaluation."""

from __future__ import annotations

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
    folder, _ = prepare_tiny(tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("texts"), "fish", "sums")
    return PackedDataset.open(folder)


@pytest.fixture
def model(dataset: PackedDataset) -> Decoder:
    torch.manual_seed(0)
    moe = MoEConfig.model_validate({"router": {"name": "top1", "noise_std": 20.0}, "num_experts": 4, "layers": "all"})
    return Decoder(tiny_shape(dataset.manifest.vocab_size, moe))

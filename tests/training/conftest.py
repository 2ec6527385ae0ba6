"""A real, tiny prepared dataset for the tests of the loop: two domains of generated text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moectl.config.schema import DataConfig, ExperimentConfig
from moectl.corpus.loader import PackedDataset
from tests.support import prepare_tiny


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DataConfig]:
    """The home folder that holds the dataset, and its config."""
    home = tmp_path_factory.mktemp("home")
    return home, prepare_tiny(home, tmp_path_factory.mktemp("texts"), "fish", "sums")[1]


@pytest.fixture
def dataset(prepared: tuple[Path, DataConfig]) -> PackedDataset:
    (folder,) = (prepared[0] / "data").iterdir()
    return PackedDataset.open(folder)


@pytest.fixture
def experiment(prepared: tuple[Path, DataConfig]) -> Callable[..., ExperimentConfig]:
    """An experiment of a dozen quick steps; keyword arguments replace parts of it."""

    def make(**changes: object) -> ExperimentConfig:
        values: dict[str, object] = {
            "data": prepared[1].model_dump(),
            "model": {"num_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "head_dim": 8},
            "moe": {"router": {"name": "top1"}, "num_experts": 4, "layers": "all"},
            "optim": {"warmup_steps": 2},
            "train": {
                "steps": 12,
                "batch_size": 4,
                "threads": 1,
                "log_every": 1,
                "eval_every": 6,
                "check_every": 4,
                "checkpoint_every": 4,
            },
        }
        for key, value in changes.items():
            old = values.get(key)
            values[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        return ExperimentConfig.model_validate(values)

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)

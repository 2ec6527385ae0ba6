"""Presets and the text that they are trained on: the same blocks in the same order, at the same learning rates.

Not from configs alone: real trainers take real steps, and what reaches the model is looked at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moectl.config.loading import shipped_configs
from moectl.config.schema import ExperimentConfig
from moectl.config.variants import configs_of, variants_of
from moectl.corpus.loader import Batch, PackedDataset
from moectl.evaluation.losses import evaluate
from moectl.models.language_model import LanguageModel
from moectl.training.protocol import ObjectiveSums, language_modelling
from moectl.training.trainer import Trainer
from moectl.walk.models import build_model, on_base
from tests.hf.tiny_models import tiny
from tests.support import prepare_tiny

STEPS = 3


class Nowhere:
    """A logger that keeps nothing."""

    def log(self, *_: Any) -> None: ...

    def event(self, *_: Any, **__: Any) -> None: ...

    def routing(self, *_: Any) -> None: ...

    def position(self) -> dict[str, int]:
        return {}

    def rewind(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    folder = tmp_path_factory.mktemp("presets")
    return PackedDataset.open(prepare_tiny(folder / "home", folder / "texts", "fish", "sums")[0])


def seen(config: ExperimentConfig, data: PackedDataset, folder: Path) -> tuple[list[Tensor], list[float], list[int]]:
    """Every micro-batch of the first steps, their learning rates, and tokens and groups of a held-out evaluation."""
    config = on_base(config)
    batches: list[Tensor] = []

    def watched(model: LanguageModel, batch: Batch, labels: Tensor) -> ObjectiveSums:
        batches.append(torch.cat([batch.input_ids, batch.doc_ids]))
        return language_modelling(model, batch, labels)

    model, _ = build_model(config, data.manifest)
    trainer = Trainer(model, data, config, logger=Nowhere(), checkpoints=folder, objective=watched)
    with trainer.loader:
        rates = [trainer.optimizer_step()[0]["train/lr"] for _ in range(STEPS)]
    report = evaluate(model, data, batch_size=config.eval.batch_size, max_blocks=config.eval.max_blocks, bootstrap=0)
    measured = [(losses.tokens, losses.groups) for losses in (report.overall, *report.domains.values())]
    return batches, rates, [number for pair in measured for number in pair]


def assert_all_see_the_same(configs: dict[str, ExperimentConfig], data: PackedDataset, folder: Path) -> None:
    (batches, rates, measured), *others = [seen(config, data, folder) for config in configs.values()]
    assert len(others) == 3 and len(batches) >= STEPS and len(set(rates)) > 1
    assert not torch.equal(batches[0], batches[1])
    for theirs in others:
        assert len(batches) == len(theirs[0]) and all(map(torch.equal, batches, theirs[0]))
        assert (rates, measured) == theirs[1:]


@pytest.mark.parametrize("shipped", sorted(shipped_configs()))
def test_every_shipped_config(shipped: str, data: PackedDataset, tmp_path: Path) -> None:
    small = {"model.num_layers": 4, "model.hidden_size": 16, "model.intermediate_size": 24, "model.head_dim": 8}
    small |= {"model.num_heads": 2, "model.num_kv_heads": 1, "train.threads": 1}  # the arithmetic's size is no matter
    small["model.base"] = "tiny"  # no test downloads a trained one
    configs = configs_of(shipped, variants_of(None), sets=["eval.max_blocks=8"], overrides=small)
    assert_all_see_the_same(configs, data, tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_models_of_hugging_face_as_the_base(kind: str, data: PackedDataset, tmp_path: Path) -> None:
    base = tmp_path / kind
    tiny(kind, torch.float32, vocab_size=data.manifest.vocab_size).save_pretrained(base)
    given = {"model.base": str(base), "moe.layers": "last:2", "train.batch_size": 4, "train.threads": 1}
    configs = configs_of(None, variants_of(None), sets=["eval.max_blocks=8"], overrides=given)
    assert_all_see_the_same(configs, data, tmp_path)

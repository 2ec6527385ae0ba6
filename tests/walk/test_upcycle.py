"""A dense run of our own as the base: its decoder, its tokenizer, and what is refused of other runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moectl.cli.app import main
from moectl.config.schema import ExperimentConfig, MoEConfig
from moectl.errors import ConfigError
from moectl.models.decoder import Decoder
from moectl.walk.loading import load_run
from moectl.walk.train import RunRequest, start_run
from moectl.walk.upcycle import load_upcycled, open_base, upcycle_to_folder
from tests.hf.tiny_models import tiny
from tests.support import write_corpus


@pytest.fixture
def dense_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    write_corpus(tmp_path / "texts")
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path / "home"))
    return make_run(tmp_path, "parent", moe=None)


def make_run(tmp_path: Path, name: str, moe: dict[str, object] | None, seed: int = 0) -> str:
    config = ExperimentConfig.model_validate(
        {
            "name": name,
            "data": {
                "domains": ["fish", "sums"], "source": str(tmp_path / "texts"), "tokenizer": "bpe:300",
                "block_size": 16,
            },
            "model": {"num_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "head_dim": 8},
            "moe": moe,
            "optim": {"warmup_steps": 1},
            "train": {"steps": 2, "batch_size": 4, "threads": 1, "seed": seed},
        }
    )  # fmt: skip
    start_run(config, RunRequest())
    return name


def test_a_run_becomes_a_folder_that_loads_back(dense_run: str, tmp_path: Path) -> None:
    moe = MoEConfig(num_experts=4, layers="all", init_noise=0.0)
    receipt = upcycle_to_folder(dense_run, tmp_path / "moe", moe)
    assert receipt.keeps_function is True
    assert receipt.family == "decoder"
    model, _ = load_upcycled(tmp_path / "moe")
    assert isinstance(model, Decoder)
    dense = load_run(dense_run)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids), dense.model(ids), rtol=0, atol=1e-4)
    tokenizer = (tmp_path / "moe" / "tokenizer.json").read_bytes()
    assert tokenizer == (dense.data / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["kind"] == "decoder"


def test_experts_from_runs(dense_run: str, tmp_path: Path) -> None:
    donor = make_run(tmp_path, "donor", moe=None, seed=1)
    values = {"num_experts": 2, "layers": "1", "init": "experts-from", "experts_from": [dense_run, donor]}
    upcycle_to_folder(dense_run, tmp_path / "moe", MoEConfig.model_validate(values))
    layer = load_upcycled(tmp_path / "moe")[0].moe_layers()[1]
    for expert, name in enumerate((dense_run, donor)):
        mlp = load_run(name).model.layers[1].mlp
        assert torch.equal(layer.experts.down_proj[expert], mlp.down_proj.weight)
    tiny("llama", torch.float32).save_pretrained(tmp_path / "llama")
    mixed = MoEConfig.model_validate({**values, "experts_from": [dense_run, str(tmp_path / "llama")]})
    with pytest.raises(ConfigError, match="is not of the base's kind"):
        upcycle_to_folder(dense_run, tmp_path / "mixed", mixed)
    assert not (tmp_path / "mixed").exists()


def test_a_run_with_experts_is_refused(dense_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "sparse", moe={"num_experts": 2, "layers": "all", "router": {"name": "top1"}})
    assert main(["upcycle", "sparse", "--out", str(tmp_path / "moe")]) == 2
    assert "has experts already" in capsys.readouterr().err
    assert open_base(dense_run).folder is None

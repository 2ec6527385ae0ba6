"""Where configs and weights come from, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moectl.errors import ConfigError, MoectlError, NotFoundError
from moectl.parity.families import config_of, formula_of, random_weights
from moectl.parity.session import Request, compare_hf
from moectl.parity.source import check_size, open_source, parameter_count


def folder(path: Path, **changes: Any) -> Path:
    """A checkpoint of the tiny model, as transformers would save it fused."""
    config = {**config_of("qwen3", "tiny"), **changes}
    weights = random_weights(formula_of("qwen3", config), "model", seed=3, dtype=torch.float32)
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "model.safetensors")
    return path


def test_sizes_by_name() -> None:
    assert open_source("qwen3", "tiny").config == config_of("qwen3", "tiny")
    published = open_source("qwen3", "published")
    assert published.config["num_experts"] == 128 and published.tensors is None
    with pytest.raises(ConfigError, match=r"30\.53 billion"):
        check_size(published, "model")
    check_size(published, "router")
    assert parameter_count(published, "router") == 128 * 2048


def test_a_config_alone_gets_random_weights(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**config_of("qwen3", "tiny"), "num_hidden_layers": 2}))
    for given in (file, tmp_path):
        source = open_source("qwen3", str(given))
        assert source.config["num_hidden_layers"] == 2 and source.tensors is None
        assert source.weights("model", torch.float64, 0) is None


def test_a_checkpoint_is_compared_with_its_own_weights(tmp_path: Path) -> None:
    source = open_source("qwen3", str(folder(tmp_path, mlp_only_layers=[0])))
    whole = source.weights("model", torch.float64, 1)
    assert whole is not None
    for level, prefix in (("layer", ""), ("moe", "mlp."), ("router", "mlp.gate."), ("attention", "self_attn.")):
        part = source.weights(level, torch.float64, 1)  # type: ignore[arg-type]
        assert part
        for name, tensor in part.items():
            assert torch.equal(tensor, whole[f"model.layers.1.{prefix}{name}"])
    probes = ("float64", "k-1", "tied-embeddings", "float32")
    report = compare_hf(Request("qwen3", config=str(tmp_path), probes=probes))
    assert report.ok and {result.level for result in report.results} == {"model", "layer", "moe", "attention", "router"}
    assert [(each.probe, each.level) for each in report.skipped] == [("tied-embeddings", "model")] * 2
    assert all("checkpoint" in each.reason for each in report.skipped)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="neither a size nor a file"):
        open_source("qwen3", str(tmp_path / "none"))
    with pytest.raises(MoectlError):
        open_source("mixtral", str(folder(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MoectlError, match="JSON"):
        open_source("qwen3", str(tmp_path / "config.json"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(NotFoundError):
        open_source("qwen3", str(empty))

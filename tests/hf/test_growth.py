"""Whole models grown: the same logits, a description that fits, and experts that open in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moectl.config.schema import MoEConfig
from moectl.errors import ConfigError
from moectl.hf import upcycle
from moectl.hf.exact import exact_copy
from moectl.hf.folder import load_folder, save_folder
from moectl.hf.growth import extend_model, multiply_model
from moectl.hf.language_model import HFLanguageModel
from moectl.models.config import DecoderConfig
from moectl.models.decoder import Decoder
from moectl.models.language_model import LanguageModel
from tests.hf.tiny_models import left_padding, some_ids, tiny

KINDS = ("gpt2", "qwen3", "decoder")


def model_of(kind: str, router: str = "top2") -> LanguageModel:
    moe = MoEConfig(router={"name": router}, num_experts=4, layers="last:2", init_noise=0.3, n_shared_experts=1)
    if kind == "decoder":
        torch.manual_seed(0)
        shape = DecoderConfig(vocab_size=61, hidden_size=16, intermediate_size=24, num_layers=3, head_dim=4)
        return Decoder(shape.with_moe(moe)).double().eval()
    return HFLanguageModel(upcycle(tiny(kind), moe)).eval()


def logits(model: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return exact_copy(model, torch.float64)(some_ids())


@pytest.mark.parametrize("kind", KINDS)
def test_a_grown_model_is_the_same_function_and_comes_back(tmp_path: Path, kind: str) -> None:
    model = model_of(kind)
    before = logits(model)
    assert multiply_model(model, 2) is model
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-10)
    multiply_model(model, 4, parts=True)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-10)
    extend_model(model, 5)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-10)
    assert [layer.experts.num_experts for layer in model.moe_layers().values()] == [37, 37]
    save_folder(model, tmp_path / "grown", receipt={})
    loaded = load_folder(tmp_path / "grown")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.describe() == model.describe()


def test_masks_still_reach_a_grown_model() -> None:
    model, (ids, mask) = model_of("qwen3", "top1"), left_padding()
    assert isinstance(model, HFLanguageModel)
    extend_model(model, 2)
    with torch.no_grad():
        model.model(ids, attention_mask=mask)
    for layer in model.moe_layers().values():
        assert torch.equal(layer.token_mask, mask.bool().flatten())  # type: ignore[arg-type]


def test_a_dense_model_cannot_be_grown() -> None:
    dense = HFLanguageModel(tiny("llama"))
    with pytest.raises(ConfigError, match="no experts to grow"):
        multiply_model(dense, 2)
    shape = DecoderConfig(vocab_size=61, hidden_size=16, intermediate_size=24, num_layers=3, head_dim=4)
    with pytest.raises(ConfigError, match="no experts to grow"):
        extend_model(Decoder(shape), 2)

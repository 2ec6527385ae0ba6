"""The upcycle receipt: measured errors that are the real ones, and counts that are those of the models."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from moectl.config.schema import MoEConfig
from moectl.errors import CheckError, ConfigError
from moectl.hf.language_model import HFLanguageModel
from moectl.models.config import DecoderConfig
from moectl.models.decoder import Decoder
from moectl.models.language_model import LanguageModel
from moectl.walk.receipt import Receipt, logits_in, measure_dense
from moectl.walk.upcycle import Base, upcycle_model
from tests.hf.tiny_models import KINDS, tiny


def receipt_of(model: LanguageModel, **changes: Any) -> tuple[LanguageModel, Receipt]:
    values = {"num_experts": 4, "layers": "last:2", "init_noise": 0.0, **changes}
    return upcycle_model(Base("the base", model, [], None), MoEConfig.model_validate(values), seed=3)


def hugging_face(kind: str, dtype: torch.dtype = torch.float32) -> HFLanguageModel:
    return HFLanguageModel(tiny(kind, dtype)).eval()


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(vocab_size=61, hidden_size=16, intermediate_size=20, num_layers=3, head_dim=4)).eval()


@pytest.mark.parametrize("kind", [*KINDS, "decoder"])
def test_copies_keep_the_function(kind: str) -> None:
    model, receipt = receipt_of(decoder() if kind == "decoder" else hugging_face(kind))
    assert receipt.keeps_function is True
    assert receipt.error["float64"] <= 1e-10
    assert 0 < receipt.error["float32"] <= 1e-4
    assert receipt.init == "copy"
    assert receipt.layers == tuple(model.moe_layers()) == (1, 2)
    assert receipt.family == {"mistral": "llama"}.get(kind, kind)
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "measuring in float64 has left traces"
    assert not model.training
    _, exact = receipt_of(decoder() if kind == "decoder" else hugging_face(kind), backend="full")
    assert exact.error == {"float32": 0.0, "float64": 0.0}


def test_errors_are_those_of_the_models() -> None:
    dense, same = hugging_face("qwen3"), hugging_face("qwen3")
    moe, receipt = receipt_of(dense, init="drop")
    ids = measure_dense(same, seed=3).ids
    with torch.no_grad():
        by_hand = float((moe(ids) - same(ids)).abs().max())
    assert receipt.error["float32"] == by_hand > 0.1
    assert receipt.error["float64"] == pytest.approx(by_hand, rel=1e-4)
    assert receipt.keeps_function is None
    assert "another function, as the init means" in receipt.to_text()


def test_a_function_that_was_meant_to_stay_and_did_not() -> None:
    """bfloat16 rounds matrices that are scaled by three: the receipt says so."""
    split = {"init": "split", "granularity": 3, "num_experts": 6, "router": {"name": "topk", "top_k": 3}}
    _, rounded = receipt_of(hugging_face("qwen3", torch.bfloat16), **split)
    assert rounded.keeps_function is False
    assert rounded.error["float32"] > 1e-4
    assert "NOT the same function" in rounded.to_text()
    _, exact = receipt_of(hugging_face("qwen3"), **split)
    assert exact.keeps_function is True
    _, noisy = receipt_of(hugging_face("qwen3"), init_noise=0.1)
    assert noisy.keeps_function is None


def test_counts_and_json() -> None:
    dense = hugging_face("gpt2")
    numbers = sum(p.numel() for p in dense.parameters())
    model, receipt = receipt_of(dense, router={"name": "top2"}, n_shared_experts=1)
    plain = json.loads(json.dumps(receipt.to_json()))
    assert plain["parameters"]["dense"] == {"total": numbers, "active": numbers, "inactive": 0}
    total = sum(p.numel() for p in model.parameters())
    expert = 2 * 32 * 128 + 32 + 128
    assert plain["parameters"]["moe"] == {"total": total, "inactive": 2 * 2 * expert, "active": total - 4 * expert}
    assert plain["length"] == 64, "not more than the model takes"
    before, after = plain["flops"]["dense"], plain["flops"]["moe"]
    assert after["training"] == 3 * after["forward"]["total"]
    assert before["forward"]["total"] - before["forward"]["mlp"] == (
        after["forward"]["attention"] + after["forward"]["head"]
    )
    assert after["forward"]["experts"] == 2 * 3 * 4 * 32 * 128
    assert after["forward"]["router"] == 2 * 2 * 4 * 32
    assert plain["flops_ratio"] == after["forward"]["total"] / before["forward"]["total"] > 1
    assert 4 * total <= plain["bytes"]["moe"] < 4 * total + 1000
    text = receipt.to_text()
    for part in ("the base (gpt2): layers 1, 2 have 4 experts", "2 per token and 1 shared", f"{total:,} in total"):
        assert part in text


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_base_that_computes_no_numbers_is_refused(bad: float) -> None:
    dense = hugging_face("llama")
    with torch.no_grad():
        dense.model.model.norm.weight[0] = bad
    with pytest.raises(CheckError, match="the model's logits are not finite in float32: its weights are damaged"):
        receipt_of(dense)


def test_noise_beyond_all_numbers_is_refused() -> None:
    with pytest.raises(CheckError, match="the upcycled model's logits are not finite") as error:
        receipt_of(hugging_face("llama"), init_noise=1e300)
    assert "moe.init_noise" in str(error.value.hint)


SPLIT = {"init": "split", "granularity": 4, "num_experts": 8}


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "decoder"])
@pytest.mark.parametrize(
    ("changes", "keeps"),
    [
        ({"router": {"name": "topk", "top_k": 2}}, True),  # whichever copies the noise chooses
        ({**SPLIT, "router": {"name": "topk", "top_k": 4, "noise_std": 0.0}}, True),
        ({**SPLIT, "router": {"name": "topk", "top_k": 4, "noise_std": 0.1}}, False),
        ({"capacity": {"factor": 0.25}}, False),
    ],
    ids=str,
)
def test_what_training_mode_changes_is_measured(kind: str, changes: dict[str, Any], keeps: bool) -> None:
    """Noise mixes the parts of two MLPs, a capacity leaves tokens to the residual path; evaluation has neither."""
    model, receipt = receipt_of(decoder() if kind == "decoder" else hugging_face(kind), **changes)
    assert receipt.keeps_function is True
    assert receipt.keeps_training is keeps
    assert (receipt.training_error <= 1e-4) is keeps
    assert receipt.to_json()["training_error"] == receipt.training_error
    assert receipt.to_text().count("NOT the same function") == (not keeps)
    assert not model.training and not any(layer.training for layer in model.moe_layers().values())
    _, again = receipt_of(decoder() if kind == "decoder" else hugging_face(kind), **changes)
    assert again.training_error == receipt.training_error, "the seed's"


def test_experts_per_token_are_those_that_compute() -> None:
    router = {"name": "expert-choice", "top_k": 2, "capacity_factor": 1.5}
    _, receipt = receipt_of(hugging_face("llama"), init="random", init_noise=1e-3, router=router)
    assert (receipt.top_k, receipt.per_token) == (2, 3.0)
    assert "3 per token, init random" in receipt.to_text()
    assert receipt.flops["moe"].experts == 2 * 3 * 6 * 32 * 48


def test_what_cannot_be_is_refused_before_anything_is_measured() -> None:
    """The measurement takes a float64 copy of the model: asking for its vocabulary is where it begins."""

    class Measured(Exception):
        pass

    class Watched(HFLanguageModel):
        @property
        def vocab_size(self) -> int:
            raise Measured

    for changes in ({"router": {"name": "switch"}}, {"backend": "fast"}, {"router": {"name": "topk", "top_k": 9}},
                    {"expert_intermediate_size": 7}):  # fmt: skip
        with pytest.raises(ConfigError):
            receipt_of(Watched(tiny("llama", torch.float32)).eval(), **changes)
    with pytest.raises(Measured):
        receipt_of(Watched(tiny("llama", torch.float32)).eval())


def test_measuring_in_float64_is_exact_to_its_last_digits() -> None:
    """A hundredth of a change is a hundredth of the error; transformers' float32 norms would make it 0, or 1e-9."""

    def error(change: float) -> float:
        model = hugging_face("llama", torch.float64)
        ids = measure_dense(model).ids
        before = logits_in(model, ids, torch.float64)
        with torch.no_grad():
            model.model.model.layers[0].mlp.down_proj.weight.mul_(1 + change)
        return float((logits_in(model, ids, torch.float64) - before).abs().max())

    assert error(1e-10) == pytest.approx(100 * error(1e-12), rel=0.05)


def test_the_draws_are_the_seeds_and_leave_no_trace() -> None:
    def weights(seed: int) -> torch.Tensor:
        base = Base("b", hugging_face("llama"), [], None)
        model, _ = upcycle_model(base, MoEConfig(num_experts=4, layers="1"), seed=seed)
        layer = model.moe_layers()[1]
        return torch.cat([layer.router.weight.flatten(), layer.experts.down_proj.flatten()])

    torch.manual_seed(11)
    expected = torch.rand(1)
    hugging_face("llama")
    torch.manual_seed(11)
    base = hugging_face("llama")
    torch.manual_seed(11)
    upcycle_model(Base("b", base, [], None), MoEConfig(num_experts=4, layers="1"), seed=5)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))

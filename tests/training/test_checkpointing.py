"""Activation checkpointing: the same gradients to the last bit, the same routes, nothing counted twice, less memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from moectl.config.schema import ExperimentConfig, MoEConfig
from moectl.corpus.loader import PackedDataset
from moectl.hf.language_model import HFLanguageModel
from moectl.hf.upcycle import upcycle
from moectl.moe.layer import MoELayer
from moectl.routers.expert_choice_threshold import ExpertChoiceThresholdRouter
from moectl.training.routing import StepRouting
from tests.training.test_trainer import NOISY, assert_equal, make_trainer, weights

Make = Callable[..., ExperimentConfig]
ROUTERS = ["topk", "sigmoid", "expert-choice", "expert-choice-threshold"]


@pytest.mark.parametrize(
    ("router", "precision"), [(None, "float32"), ("top1", "bfloat16"), *((router, "float32") for router in ROUTERS)]
)
def test_a_run_is_the_same_to_the_last_bit(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, router: str | None, precision: str
) -> None:
    """With noise, accumulation, a capacity and dropped tokens: weights, optimizer, counts, every logged number."""
    moe: dict[str, Any] | None = None
    if router is not None:
        moe = {"router": {"name": router, **NOISY.get(router, {})}, "n_shared_experts": 1}
        moe |= {} if "choice" in router else {"capacity": 1.1}
    train = {"grad_accum": 2, "allow_noncausal": router == "expert-choice", "precision": precision}
    runs = []
    for again in (False, True):
        config = experiment(moe=moe, train={**train, "activation_checkpointing": again})
        trainer = make_trainer(config, dataset, tmp_path / str(again))
        assert trainer.train().status == "finished"
        runs.append(trainer)
    plain, again = runs
    assert again.model.checkpointing and not plain.model.checkpointing
    assert plain.logger.rows == again.logger.rows and plain.logger.counts == again.logger.counts  # type: ignore[attr-defined]
    assert_equal(weights(plain), weights(again))


def test_layers_are_run_a_second_time_and_keep_less(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    """It is not a switch without a wire: forward passes doubled, bytes saved for the backward pass a fraction."""
    kept, passes = {}, {}
    for again in (False, True):
        config = experiment(train={"activation_checkpointing": again})
        trainer = make_trainer(config, dataset, tmp_path / str(again))
        sizes: list[int] = []
        calls: list[int] = []
        for layer in trainer.model.layers:
            layer.mlp.router.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        batch = trainer.loader.next()
        trainer.model.train()

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = trainer.model.lm_loss_sum(batch.batch.input_ids[:, :-1], batch.labels, batch.batch.doc_ids[:, :-1])
            kept[again] = sum(sizes)
        loss.backward()
        passes[again] = len(calls)
    assert passes == {False: 2, True: 4}
    assert kept[True] < 0.4 * kept[False]


def test_what_a_router_counts_on_the_side_is_counted_once(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    counted = []
    for again in (False, True):
        moe = {"router": {"name": "expert-choice-threshold"}}
        train = {"activation_checkpointing": again, "allow_noncausal": True}
        trainer = make_trainer(experiment(moe=moe, train=train), dataset, tmp_path / str(again))
        trainer.model.train()
        batch = trainer.loader.next()
        trainer.model.lm_loss_sum(batch.batch.input_ids[:, :-1], batch.labels, batch.batch.doc_ids[:, :-1]).backward()
        router = trainer.model.layers[0].mlp.router
        assert isinstance(router, ExpertChoiceThresholdRouter)
        counted.append(router._tokens.clone())
    assert torch.equal(*counted) and int(counted[0]) > 0


def hugging_face(family: str, again: bool) -> HFLanguageModel:
    torch.manual_seed(0)
    if family == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=1, max_position_embeddings=32, **sizes))
    moe = MoEConfig(router={"name": "top1", "noise_std": 0.5}, num_experts=4, layers="all", init="copy")
    wrapped = HFLanguageModel(upcycle(model, moe))
    wrapped.checkpoint_activations(again)
    return wrapped.train()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_models_of_transformers_too(family: str) -> None:
    """Dropout in GPT-2, noise in the routers: the same routes, gradients and losses to the last bit, twice in a row."""
    ids = torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(1))
    docs = torch.arange(20).div(8, rounding_mode="floor").expand(3, 20)
    results = []
    for again in (False, True):
        model, calls = hugging_face(family, again), []
        for layer in model.moe_layers().values():
            layer.router.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        found: list[torch.Tensor] = []
        torch.manual_seed(5)
        for _ in range(2):
            model.zero_grad()
            moe = MoEConfig(num_experts=4)
            step = StepRouting(model.moe_layers(), moe, 1, tokens=60)
            loss = model.lm_loss_sum(ids, ids, docs)
            loss = loss + step.losses(torch.zeros(3, dtype=torch.int64))[0]
            before = [layer.routing for layer in model.moe_layers().values()]
            loss.backward()
            assert all(
                a is b.routing
                for a, b in zip(before, model.moe_layers().values(), strict=True)
                if isinstance(b, MoELayer)
            )
            found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            found += [layer.routing.topk_indices for layer in model.moe_layers().values() if layer.routing is not None]
            found += [each.counts_E for each in step.steps.values()]
        results.append((found, len(calls)))
    (plain, once), (again_, twice) = results
    assert len(plain) == len(again_) and all(map(torch.equal, plain, again_))
    assert (once, twice) == (4, 8)
    model.checkpoint_activations(False)
    assert not model.model.is_gradient_checkpointing

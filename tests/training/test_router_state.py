"""Router state that moves by the load, in the loop: once per optimizer step, exactly, in float32, and never in eval."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import PackedDataset
from moectl.training.state import newest_checkpoint
from moectl.training.trainer import Trainer
from tests.training.test_trainer import assert_equal, make_trainer, weights

Make = Callable[..., ExperimentConfig]
RATE = 0.01


def sigmoid(experiment: Make, **train: Any) -> ExperimentConfig:
    """Biases that move by more than scores differ, so that they change routes at once."""
    return experiment(moe={"router": {"name": "sigmoid", "top_k": 2, "bias_update_rate": RATE}}, train=train)


def biases(trainer: Trainer) -> dict[int, Tensor]:
    return {number: layer.router.expert_bias.clone() for number, layer in trainer.layers.items()}


def watch(trainer: Trainer) -> dict[int, list[Tensor]]:
    """The expert ids of every call of every router, in order."""
    calls: dict[int, list[Tensor]] = {number: [] for number in trainer.layers}
    for number, layer in trainer.layers.items():
        layer.router.register_forward_hook(lambda m, i, out, n=number: calls[n].append(out.topk_indices.clone()))
    return calls


def checkpointed(trainer: Trainer) -> Trainer:
    """Every decoder layer under activation checkpointing: its forward runs again in the backward pass."""
    for layer in trainer.model.layers:
        forward = layer.forward
        layer.forward = lambda *inputs, forward=forward: checkpoint(forward, *inputs, use_reentrant=False)
    return trainer


def test_the_bias_moves_once_per_step_by_the_load_of_the_whole_step(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    """Four micro-batches a step, three steps: b += γ · sign(mean load - load), the load counted here over all four."""
    trainer = make_trainer(sigmoid(experiment, grad_accum=4), dataset, tmp_path)
    calls, expected = watch(trainer), {number: torch.zeros(4) for number in trainer.layers}
    micro_differs = False
    for _ in range(3):
        trainer.optimizer_step()
        for number, ids in calls.items():
            assert len(ids) == 4
            loads = torch.stack([torch.bincount(i.flatten(), minlength=4) for i in ids])
            signs = (loads.sum(0).double().mean() - loads.sum(0)).sign()
            micro_differs |= any(not torch.equal((load.double().mean() - load).sign(), signs) for load in loads)
            expected[number] += RATE * signs.float()
            ids.clear()
        assert all(layer.router.step_tokens == 4 * 4 * 15 for layer in trainer.layers.values())
    assert micro_differs, "the load of a single micro-batch would have moved it elsewhere"
    for number, bias in biases(trainer).items():
        assert bias.dtype == torch.float32
        assert torch.equal(bias, expected[number])
        assert bias.any()


@pytest.mark.parametrize("router", ["sigmoid", "expert-choice-threshold", "topk", "noisy-topk"])
def test_under_activation_checkpointing_routes_are_replayed_and_state_moves_once(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, router: str
) -> None:
    """Each micro-batch is routed twice, to the same experts with the same noise; the run is the one without it.

    To the last bit; but a threshold is the mean of a float32 sum, which has each term twice then: 1e-6.
    """
    options = {"topk": {"noise_std": 0.5, "expert_dropout": 0.2, "random_routing": 0.2}}.get(router, {})
    config = experiment(moe={"router": {"name": router, **options}}, train={"grad_accum": 2})
    plain = make_trainer(config, dataset, tmp_path / "plain")
    again = checkpointed(make_trainer(config, dataset, tmp_path / "again"))
    once, twice = watch(plain), watch(again)
    for _ in range(3):
        torch.manual_seed(2)
        ours, _ = plain.optimizer_step()
        torch.manual_seed(2)
        theirs, _ = again.optimizer_step()
        assert ours == theirs
    ours_now, theirs_now = weights(plain), weights(again)
    for name in [name for name in ours_now if name.endswith("router.threshold")]:
        torch.testing.assert_close(theirs_now.pop(name), ours_now.pop(name), rtol=1e-6, atol=0)
    assert_equal(ours_now, theirs_now)
    assert all(torch.isfinite(tensor).all() for tensor in weights(again).values())
    for number, ids in once.items():
        assert len(ids) == 6 and len(twice[number]) == 12
        for step in range(6):  # forward, then again in its backward
            assert torch.equal(twice[number][2 * step], ids[step])
            assert torch.equal(twice[number][2 * step + 1], ids[step])


def test_evaluation_moves_nothing(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    for router in ("sigmoid", "expert-choice-threshold"):
        config = experiment(moe={"router": router}, train={"eval_every": 1, "steps": 4, "checkpoint_every": 1})
        seen: list[bool] = []

        def evaluate(model: Any, final: bool, seen: list[bool] = seen) -> dict[str, float]:
            before = {name: buffer.clone() for name, buffer in model.named_buffers()}
            model.eval()
            for block in range(3):
                model(dataset.train.batch([block]).input_ids)
            for layer in model.moe_layers().values():  # not even when told a load
                layer.router.after_step(torch.tensor([9, 0, 0, 0]))
            model.train()
            seen.append(all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers()))
            return {}

        with_evaluation = make_trainer(config, dataset, tmp_path / router / "a", evaluate=evaluate)
        without = make_trainer(config, dataset, tmp_path / router / "b")
        assert with_evaluation.train().status == without.train().status == "finished"
        assert seen == [True] * 5, router
        assert_equal(weights(with_evaluation), weights(without))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_the_bias_is_float32_in_the_loop_the_checkpoint_and_after_casts(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, precision: str
) -> None:
    """1e-5 steps, which bfloat16 would lose beside a bias of order one: nothing is lost on the way."""
    moe = {"router": {"name": "sigmoid", "bias_update_rate": 1e-5}}
    config = experiment(moe=moe, train={"precision": precision, "steps": 8})
    trainer = make_trainer(config, dataset, tmp_path)
    for layer in trainer.layers.values():
        layer.router.expert_bias.fill_(1.0)
    for _ in range(4):
        trainer.optimizer_step()
    moved = biases(trainer)
    for bias in moved.values():
        assert bias.dtype == torch.float32
        assert 0 < (bias - 1.0).abs().max() <= 4.1e-5
        assert not torch.equal(bias, bias.bfloat16().float()), "bfloat16 would have stood still"
    trainer.save()
    saved, _ = newest_checkpoint(tmp_path)
    resumed = make_trainer(config, dataset, tmp_path / "resumed")
    resumed.restore(saved)
    for number, bias in moved.items():
        tensor = saved.tensors["model"][f"layers.{number}.mlp.router.expert_bias"]
        assert tensor.dtype == torch.float32 and torch.equal(tensor, bias)
        router = resumed.layers[number].router
        assert torch.equal(router.expert_bias, bias)
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        resumed.model.to(cast)
        for number, bias in moved.items():
            assert resumed.layers[number].router.weight.dtype == cast
            assert resumed.layers[number].router.expert_bias.dtype == torch.float32
            assert torch.equal(resumed.layers[number].router.expert_bias, bias)


def test_a_step_that_is_not_finite_moves_no_state(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    trainer = make_trainer(sigmoid(experiment), dataset, tmp_path)
    trainer.optimizer_step()
    before = weights(trainer)
    trainer.model.norm.weight.register_hook(lambda grad: grad * float("nan"))
    _, problem = trainer.optimizer_step()
    assert problem is not None
    assert_equal(before, weights(trainer))


def test_the_bias_alone_spreads_a_load_that_one_expert_took(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    """No balance loss, a gate that does not learn, and a bias that gives expert 0 every token at first."""
    router = {"name": "sigmoid", "top_k": 1, "norm_topk_prob": False, "bias_update_rate": 0.01}
    config = experiment(moe={"router": router}, train={"steps": 100, "batch_size": 16}, optim={"router_lr": 1e-12})
    trainer = make_trainer(config, dataset, tmp_path)
    for layer in trainer.layers.values():
        with torch.no_grad():
            layer.router.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
            layer.router.expert_bias[0] = 1.0
    shares = [trainer.optimizer_step()[0]["max_share/worst"] for _ in range(100)]
    assert shares[0] == 1.0
    assert sum(shares[-20:]) / 20 < 0.45, "0.25 is even"


@pytest.mark.parametrize("exact", [False, True], ids=["running", "two-passes"])
def test_two_passes_move_state_once(experiment: Make, dataset: PackedDataset, tmp_path: Path, exact: bool) -> None:
    """The first pass routes every micro-batch too; biases, thresholds and noise know nothing of it."""
    for router in ("sigmoid", "expert-choice-threshold", "top2"):
        state = {}
        for balance_exact in (False, exact):
            moe = {"router": router, "balance_exact": balance_exact, "lb_coef": 0.0, "z_coef": 0.0}
            trainer = make_trainer(experiment(moe=moe, train={"grad_accum": 2}), dataset, tmp_path)
            torch.manual_seed(4)
            for _ in range(3):
                trainer.optimizer_step()
            state[balance_exact] = weights(trainer)
        if exact:
            assert_equal(state[False], state[True])

"""Gradient norms by group and by expert, against sums of squares done here."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import PackedDataset
from moectl.moe import MLPExperts, MoELayer
from moectl.routers import build_router
from moectl.training.gradients import expert_norms, group_norms
from tests.training.test_trainer import Recorder, make_trainer

Make = Callable[..., ExperimentConfig]


def square(tensors: list[torch.Tensor | None]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("router", ["top2", None])
def test_the_groups_make_up_the_whole(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, router: str | None
) -> None:
    """Sums of float64 squares in another order: 1e-12."""
    moe = None if router is None else {"router": {"name": router}}
    config = experiment(moe=moe, optim={"grad_clip": None}, train={"precision": "float64"})
    trainer = make_trainer(config, dataset, tmp_path)
    metrics, _ = trainer.optimizer_step()
    named = dict(trainer.model.named_parameters())
    routers = [p.grad for name, p in named.items() if ".router." in name]
    experts = [p.grad for name, p in named.items() if ".experts." in name]
    dense = [p.grad for name, p in named.items() if ".router." not in name and ".experts." not in name]
    expected = {"grad_norm/dense": math.sqrt(square(dense))}
    if router is not None:
        expected |= {"grad_norm/router": math.sqrt(square(routers)), "grad_norm/experts": math.sqrt(square(experts))}
    found = {name: value for name, value in metrics.items() if name.startswith("grad_norm/") and "layer" not in name}
    assert found == pytest.approx(expected, rel=1e-12) and all(value > 0 for value in found.values())
    assert sum(value**2 for value in found.values()) == pytest.approx(metrics["train/grad_norm"] ** 2, rel=1e-12)
    for number, layer in trainer.layers.items():
        for expert in range(4):
            slices = [p.grad[expert] for p in layer.experts.parameters() if p.grad is not None]
            here = metrics[f"grad_norm/layer.{number}.expert.{expert}"]
            assert here == pytest.approx(math.sqrt(square(slices)), rel=1e-12)


def test_each_gradient_is_squared_once(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    """In float64, which is what the metrics cost: an expert's squares are its layer's, too."""
    trainer = make_trainer(experiment(moe={"router": {"name": "top2"}}), dataset, tmp_path)
    trainer.optimizer_step()
    squared = []

    class Counting(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.linalg.vector_norm:
                squared.append(args[0].numel())
            return function(*args, **(kwargs or {}))

    with Counting():
        group_norms(trainer.optimizer.param_groups, trainer.layers)
    assert sum(squared) == sum(p.numel() for p in trainer.model.parameters() if p.grad is not None)


def test_they_are_measured_at_log_steps_alone_and_before_clipping(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    config = experiment(train={"log_every": 5, "steps": 12}, optim={"grad_clip": 1e-3})
    trainer = make_trainer(config, dataset, tmp_path)
    seen = [any(name.startswith("grad_norm/") for name in trainer.optimizer_step()[0]) for _ in range(12)]
    assert [step for step, there in enumerate(seen, start=1) if there] == [5, 10, 12]
    trainer = make_trainer(config, dataset, tmp_path / "whole")
    trainer.train()
    assert isinstance(trainer.logger, Recorder)
    logged = [values for _, values in trainer.logger.rows if "grad_norm/dense" in values]
    assert len(logged) == 3 and all(values["grad_norm/dense"] > 1e-2 for values in logged)


def test_an_expert_without_tokens_has_a_norm_of_zero_and_biases_count() -> None:
    torch.manual_seed(0)
    layer = MoELayer(build_router("top1", hidden_size=8, num_experts=3), MLPExperts(3, 8, 6))
    with torch.no_grad():
        layer.router.weight[2] = -100 * layer.router.weight[:2].sum(0)
    x = torch.randn(40, 8)
    layer.eval()(x).square().sum().backward()
    assert layer.routing is not None
    used = set(layer.routing.topk_indices.flatten().tolist())
    norms = expert_norms(layer)
    assert norms is not None and norms.dtype == torch.float64
    for expert in range(3):
        slices = [p.grad[expert] for p in layer.experts.parameters() if p.grad is not None]
        assert len(slices) == 4
        assert float(norms[expert]) == pytest.approx(math.sqrt(square(slices)), rel=1e-12)
        assert (float(norms[expert]) > 0) == (expert in used)
    layer.zero_grad(set_to_none=True)
    assert expert_norms(layer) is None

"""A resumed run is the same run, with everything on that moves over training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import PackedDataset
from moectl.training.state import newest_checkpoint
from moectl.training.trainer import Trainer
from tests.training.test_trainer import Recorder, _interrupt_at, assert_equal, make_trainer, weights

Make = Callable[..., ExperimentConfig]
SCHEDULE = {
    "top_k": [[0, 4], [0.4, 3], [0.7, 2]],
    "lb_coef": {"points": [[0, 0.3], [0.9, 0.01]], "interpolate": "linear"},
}
NOISE = {"noise_std": {"points": [[0, 0.5], [0.8, 0.1]], "interpolate": "linear"}}
DYNAMIC = {"factor": 1.3, "dynamic": True, "overflow": "next-best"}
CASES: dict[str, dict[str, Any]] = {
    "topk, dynamic capacity": {
        "router": {"name": "topk", "top_k": 2, "random_routing": 0.1, "expert_dropout": 0.1},
        "capacity": DYNAMIC,
        "schedule": {**SCHEDULE, **NOISE},
    },
    "topk, scheduled capacity": {
        "router": {"name": "topk", "top_k": 2},
        "capacity": {"factor": 1.2, "in_eval": True},
        "schedule": {**SCHEDULE, **NOISE, "capacity_factor": [[0, 2.0], [0.3, 1.6], [0.6, 1.2]]},
        "balance_loss": "switch+cv2+entropy",
    },
    "top1, revival": {
        "router": {"name": "top1"},
        "capacity": DYNAMIC,
        "lb_coef": 0.0,
        "schedule": {"noise_std": [[0, 0.0], [0.8, 0.3]]},
    },
    "noisy-topk": {"router": {"name": "noisy-topk"}, "capacity": DYNAMIC, "schedule": SCHEDULE},
    "sigmoid": {"router": {"name": "sigmoid"}, "capacity": DYNAMIC, "schedule": {"top_k": SCHEDULE["top_k"]}},
    "expert-choice-threshold": {"router": {"name": "expert-choice-threshold"}, "lb_coef": 0.0},
}


def config_of(experiment: Make, case: str) -> ExperimentConfig:
    return experiment(
        moe={**CASES[case], "revive_dead": True, "revive_noise": 0.001},
        optim={"router_lr": 1e-5},
        train={
            "steps": 20,
            "grad_accum": 2,
            "check_every": 4,
            "keep_checkpoints": 9,
            "collapse": {"min_expected_count": 20},
        },
    )


def starve(trainer: Trainer) -> Trainer:
    """Expert 3's gate row at the mean of the others': it gets few tokens or none, so that something is revived."""
    with torch.no_grad():
        for layer in trainer.layers.values():
            layer.router.weight.normal_(generator=torch.Generator().manual_seed(1), std=0.5)
            layer.router.weight[3] = layer.router.weight[:3].mean(0)
    return trainer


@pytest.mark.parametrize(("case", "stop"), [*((case, 12) for case in CASES), ("top1, revival", 4)])
def test_resume_is_bit_exact(experiment: Make, dataset: PackedDataset, tmp_path: Path, case: str, stop: int) -> None:
    config = config_of(experiment, case)
    whole = starve(make_trainer(config, dataset, tmp_path / "whole"))
    assert whole.train().status == "finished"

    interrupted = starve(make_trainer(config, dataset, tmp_path / "cut", progress=_interrupt_at(stop)))
    assert interrupted.train().status == "interrupted"
    resumed = make_trainer(config, dataset, tmp_path / "cut")
    checkpoint, _ = newest_checkpoint(tmp_path / "cut")
    assert checkpoint.step == stop
    torch.manual_seed(999)  # a resumed process starts anywhere
    resumed.restore(checkpoint)
    assert resumed.train().status == "finished"

    assert_equal(weights(whole), weights(resumed))
    for ours, theirs in zip(whole.optimizer.state.values(), resumed.optimizer.state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    one, other = whole.logger, resumed.logger
    assert isinstance(one, Recorder) and isinstance(other, Recorder)
    assert [row for row in one.rows if row[0] > stop] == other.rows
    assert [row for row in one.counts if row[0] > stop] == other.counts
    assert whole.capacity.state_dict() == resumed.capacity.state_dict()
    assert other.events == one.events[-len(other.events) :]


def test_the_case_of_revival_revives_and_moves_before_and_after_it_is_cut(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    class Steps(Recorder):
        def event(self, kind: str, message: str, **details: Any) -> None:
            self.events.append((kind, str(details.get("step"))))

    recorder = Steps()
    trainer = starve(make_trainer(config_of(experiment, "top1, revival"), dataset, tmp_path, logger=recorder))
    trainer.train()
    for kind in ("revived", "capacity"):
        steps = {int(step) for name, step in recorder.events if name == kind}
        assert min(steps) <= 4 < max(steps), (kind, steps)
    assert any(layer.capacity is not None and layer.capacity.factor != 1.3 for layer in trainer.layers.values())

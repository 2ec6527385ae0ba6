"""Schedules on real layers: what each step runs with, what evaluation sees, and what is refused before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import PackedDataset
from moectl.corpus.manifest import Manifest
from moectl.errors import ConfigError
from moectl.moe.capacity import Capacity
from moectl.training.schedules import Schedules
from moectl.walk.models import build_model
from tests.training.test_trainer import Recorder, make_trainer

Make = Callable[..., ExperimentConfig]
TOPK = {"name": "topk", "top_k": 2, "noise_std": 0.0}
ALL = {
    "router": TOPK,
    "capacity": 1.5,
    "schedule": {
        "top_k": {"warm-up": 4, "main": 3, "final": 2},
        "capacity_factor": {"points": [[0, 3.0], [0.5, 1.5]], "interpolate": "linear"},
        "lb_coef": [[0, 0.1], [0.5, 0.02]],
        "noise_std": [[0, 0.4], [0.25, 0.0]],
    },
}


def schedules(config: ExperimentConfig, data: PackedDataset) -> Schedules:
    model, _ = build_model(config, Manifest.load(data.folder))
    return Schedules(config, model.train().moe_layers())


def test_every_step_runs_with_its_own_values(experiment: Make, dataset: PackedDataset) -> None:
    made = schedules(experiment(moe=ALL, train={"steps": 20}), dataset)
    seen = [made.apply(step) for step in range(20)]
    assert [values.top_k for values in seen] == [4] * 2 + [3] * 14 + [2] * 4
    assert [values.lb_coef for values in seen] == [0.1] * 10 + [0.02] * 10
    assert [values.noise_std for values in seen] == [0.4] * 5 + [0.0] * 15
    assert [values.capacity_factor for values in seen] == pytest.approx(
        [3.0 - 0.15 * step for step in range(10)] + [1.5] * 10
    )
    assert seen[0].metrics() == {
        "schedule/lb_coef": 0.1,
        "schedule/top_k": 4.0,
        "schedule/capacity_factor": 3.0,
        "schedule/noise_std": 0.4,
    }


def test_the_layers_do_what_the_schedule_says(experiment: Make, dataset: PackedDataset) -> None:
    """The router's output and its noise, and the layer's capacity: not what was set, but what comes out."""
    made = schedules(experiment(moe=ALL, train={"steps": 20}), dataset)
    x_TD = torch.randn(400, 16)
    for layer in made.layers.values():
        for step, k, factor in ((0, 4, 3.0), (5, 3, 2.25), (19, 2, 1.5)):
            values = made.apply(step)
            out = layer.router(x_TD)
            assert out.topk_indices.shape == (400, k)
            assert layer.capacity == Capacity(factor=factor)
            noise = (out.router_probs.log() - out.router_probs_clean.log()).detach()
            spread = float((noise - noise.mean(1, keepdim=True)).std(correction=0))
            # Centred on its mean over E experts, Gaussian noise keeps sqrt(1 - 1/E) of its spread; 1600 draws: 5 %.
            assert spread == pytest.approx(values.noise_std * (1 - 1 / 4) ** 0.5, rel=0.05, abs=1e-6)


def test_linear_numbers_of_experts_are_rounded(experiment: Make, dataset: PackedDataset) -> None:
    moe = {"router": TOPK, "schedule": {"top_k": {"points": [[0, 4], [1, 2]], "interpolate": "linear"}}}
    made = schedules(experiment(moe=moe, train={"steps": 8}), dataset)
    assert [made.apply(step).top_k for step in range(8)] == [4, 4, 4, 3, 3, 3, 3, 2]  # 4 - step/4, halves upwards


def test_it_is_a_function_of_the_step_alone(experiment: Make, dataset: PackedDataset) -> None:
    config = experiment(moe=ALL, train={"steps": 20})
    forward, jumping = schedules(config, dataset), schedules(config, dataset)
    ahead = [forward.apply(step) for step in range(20)]
    for step in (19, 0, 7, 7, 12):
        assert jumping.apply(step) == ahead[step]
        assert all(layer.router.top_k == ahead[step].top_k for layer in jumping.layers.values())


def test_evaluation_sees_the_configs_own_values(experiment: Make, dataset: PackedDataset) -> None:
    made = schedules(experiment(moe=ALL, train={"steps": 20}), dataset)
    made.apply(0)
    layer = made.layers[0]
    with made.as_configured():
        assert layer.capacity == Capacity(factor=1.5)
        layer.eval()
        assert layer.router(torch.randn(7, 16)).topk_indices.shape == (7, 2)
        layer.train()
    assert layer.capacity == Capacity(factor=3.0)
    with pytest.raises(KeyError), made.as_configured():
        raise KeyError
    assert layer.capacity == Capacity(factor=3.0)


def test_without_schedules_nothing_is_touched(experiment: Make, dataset: PackedDataset) -> None:
    made = schedules(experiment(moe={"router": TOPK, "capacity": 1.5}), dataset)
    before = made.layers[0].capacity
    values = made.apply(3)
    assert (values.top_k, values.capacity_factor, values.noise_std) == (None, None, None)
    assert made.layers[0].capacity is before
    assert values.metrics() == {"schedule/lb_coef": 0.01}


def test_a_dense_model_has_nothing_to_schedule(experiment: Make, dataset: PackedDataset) -> None:
    assert schedules(experiment(moe=None), dataset).apply(0).lb_coef == 0.0


@pytest.mark.parametrize(
    ("moe", "says"),
    [
        (
            {"router": TOPK, "schedule": {"top_k": [[0, 4], [0.5, 1]]}},
            "ends at 1, but layer 0's router 'topk' has top_k 2",
        ),
        ({"router": {"name": "top1"}, "schedule": {"top_k": [[0, 4], [0.5, 1]]}}, "does not let top_k be chosen"),
        ({"router": {"name": "top2"}, "schedule": {"top_k": [[0, 4], [0.5, 2]]}}, "does not let top_k be chosen"),
        # On the way through k = 1 the renormalised weight is the constant 1: a gate without a gradient.
        ({"router": TOPK, "schedule": {"top_k": [[0, 1], [0.5, 2]]}}, "comes to 1, but layer 0's router 'topk'"),
        (
            {"router": TOPK, "schedule": {"top_k": {"points": [[0, 1], [0.5, 2]], "interpolate": "linear"}}},
            "comes to 1, but",
        ),
    ],
)
def test_what_the_router_cannot_follow_is_refused_before_training(
    experiment: Make, dataset: PackedDataset, moe: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(experiment(moe=moe), Manifest.load(dataset.folder))
    assert says in caught.value.message and caught.value.exit_code == 2
    assert caught.value.hint


def test_dense_to_sparse_trains_and_ends_with_the_routers_own_k(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    """Assignments per step follow k, and what is logged is what ran."""
    config = experiment(
        moe={"router": TOPK, "schedule": {"top_k": [[0, 4], [0.5, 3], [0.75, 2]]}},
        train={"steps": 12, "check_every": 3},
    )
    recorder = Recorder()
    trainer = make_trainer(config, dataset, tmp_path, logger=recorder)
    assert trainer.train().status == "finished"
    assert [row["schedule/top_k"] for _, row in recorder.rows if "schedule/top_k" in row] == [4] * 6 + [3] * 3 + [2] * 3
    routed = 3 * 4 * 15  # three steps of four blocks, 15 of whose 16 tokens pass the routers
    for (step, payload), k in zip(recorder.counts, (4, 4, 3, 2), strict=True):
        for layer in payload["layers"].values():
            assert sum(map(sum, layer["counts"])) == k * routed, step
    first, last = (row["train/lm_loss"] for _, row in (recorder.rows[0], recorder.rows[-1]))
    assert last < first


def test_a_capacity_schedule_drops_what_it_must(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    """With room for everything nothing is dropped; with room for a quarter at most that much is kept."""
    moe = {"router": {"name": "top1", "noise_std": 0.0}, "capacity": 0.25, "layers": "all"}
    moe |= {"schedule": {"capacity_factor": [[0, 4.0], [0.5, 0.25]]}}
    recorder = Recorder()
    trainer = make_trainer(experiment(moe=moe, train={"check_every": 6}), dataset, tmp_path, logger=recorder)
    assert trainer.train().status == "finished"
    (_, roomy), (_, tight) = recorder.counts
    assignments = 6 * 4 * 15
    for layer in roomy["layers"].values():
        assert layer["dropped"] == 0
    for layer in tight["layers"].values():
        kept = assignments - layer["dropped"]
        assert 0 < kept <= 6 * 4 * -(-60 * 1 // 16)  # four experts, ceil(60 tokens / 4 experts · 0.25) each, six steps
    factors = [row["schedule/capacity_factor"] for _, row in recorder.rows if "schedule/capacity_factor" in row]
    assert factors == [4.0] * 6 + [0.25] * 6


def test_the_scheduled_balance_coefficient_is_the_one_in_the_loss(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    moe = {"router": TOPK, "z_coef": 0.0, "schedule": {"lb_coef": [[0, 0.5], [0.5, 0.0]]}}
    trainer = make_trainer(experiment(moe=moe), dataset, tmp_path)
    trainer.train()
    rows = [row for _, row in trainer.logger.rows if "train/loss" in row]  # type: ignore[attr-defined]
    for step, row in enumerate(rows):
        coefficient = 0.5 if step < 6 else 0.0
        # Summed in float32 by the loss, in float64 here: a few parts in 1e7.
        assert row["train/loss"] == pytest.approx(row["train/lm_loss"] + coefficient * row["train/lb_loss"], rel=1e-6)
        assert row["train/lb_loss"] > 0.9

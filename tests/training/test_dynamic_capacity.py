"""Dynamic capacity: when the factor moves, how far it may, and that a run records and resumes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import PackedDataset
from moectl.corpus.manifest import Manifest
from moectl.errors import CheckError
from moectl.moe.capacity import Capacity
from moectl.moe.stats import load_cv
from moectl.training.dynamic_capacity import DynamicCapacity
from moectl.walk.models import build_model
from tests.training.test_trainer import Recorder, make_trainer

Make = Callable[..., ExperimentConfig]
EVEN, MIDDLING, UNEVEN = (
    torch.tensor([100, 101, 99, 100]),
    torch.tensor([130, 70, 120, 80]),
    torch.tensor([300, 40, 30, 30]),
)


def dynamic(experiment: Make, data: PackedDataset, **capacity: Any) -> DynamicCapacity:
    config = experiment(moe={"capacity": {"factor": 1.5, "dynamic": True, "overflow": "next-best", **capacity}})
    model, _ = build_model(config, Manifest.load(data.folder))
    return DynamicCapacity(config.moe, model.moe_layers())


def factors(made: DynamicCapacity) -> list[float]:
    return [layer.capacity.factor for layer in made.layers.values()]  # type: ignore[union-attr]


def test_each_layer_goes_its_own_way(experiment: Make, dataset: PackedDataset) -> None:
    made = dynamic(experiment, dataset)
    assert [load_cv(counts) for counts in (EVEN, MIDDLING, UNEVEN)] == pytest.approx([0.007, 0.255, 1.156], abs=1e-3)
    changes = made.check({0: UNEVEN, 1: EVEN})
    assert factors(made) == [1.5 * 1.1, 1.5 / 1.1]
    assert [(change.layer, change.before, change.after) for change in changes] == [
        (0, 1.5, 1.5 * 1.1),
        (1, 1.5, 1.5 / 1.1),
    ]
    assert str(changes[0]) == "layer 0: the capacity factor grows from 1.5 to 1.65 (load CV 1.16)"
    assert str(changes[1]).startswith("layer 1: the capacity factor shrinks from 1.5 to 1.36 (load CV 0.01")
    assert changes[0].details() == {"layer": 0, "before": 1.5, "after": 1.5 * 1.1, "load_cv": load_cv(UNEVEN)}
    # All else of the capacity stays.
    assert made.layers[0].capacity == Capacity(factor=1.5 * 1.1, overflow="next-best")


def test_between_the_two_marks_nothing_moves(experiment: Make, dataset: PackedDataset) -> None:
    made = dynamic(experiment, dataset)
    before = made.layers[0].capacity
    assert made.check({0: MIDDLING, 1: torch.zeros(4, dtype=torch.int64)}) == []
    assert made.layers[0].capacity is before and factors(made) == [1.5, 1.5]


@pytest.mark.parametrize(("counts", "end", "checks"), [(UNEVEN, 3.0, 8), (EVEN, 1.1, 4)])
def test_bounds_are_reached_and_kept(
    experiment: Make, dataset: PackedDataset, counts: torch.Tensor, end: float, checks: int
) -> None:
    made = dynamic(experiment, dataset)
    moved = [len(made.check({0: counts, 1: MIDDLING})) for _ in range(12)]
    assert moved == [1] * checks + [0] * (12 - checks)  # ln(3.0/1.5)/ln 1.1 = 7.3, ln(1.5/1.1)/ln 1.1 = 3.3
    assert factors(made) == [end, 1.5]


def test_bounds_are_the_configs(experiment: Make, dataset: PackedDataset) -> None:
    made = dynamic(experiment, dataset, min_factor=1.45, max_factor=1.55)
    made.check({0: UNEVEN, 1: EVEN})
    assert factors(made) == [1.55, 1.45]


def test_idle_unless_asked_for(experiment: Make, dataset: PackedDataset) -> None:
    for moe in ({"capacity": 1.5}, {"capacity": None}, None):
        config = experiment(moe=moe)
        model, _ = build_model(config, Manifest.load(dataset.folder))
        made = DynamicCapacity(config.moe, model.moe_layers())
        assert made.check({0: UNEVEN, 1: EVEN}) == [] and made.state_dict() == {}


def test_state_goes_through_a_checkpoint_exactly(experiment: Make, dataset: PackedDataset) -> None:
    made, fresh = dynamic(experiment, dataset), dynamic(experiment, dataset)
    for _ in range(3):
        made.check({0: UNEVEN, 1: EVEN})
    fresh.load_state_dict(made.state_dict())
    assert factors(fresh) == factors(made) and factors(made)[0] == 1.5 * 1.1 * 1.1 * 1.1
    for wrong in ({}, {"0": 1.5}, {"0": 1.5, "1": 1.5, "2": 1.5}, {"0": 1.5, "1": "wide"}, {"0": 1.5, "1": 0.0}):
        with pytest.raises(CheckError, match="capacity factors"):
            fresh.load_state_dict(wrong)
    assert factors(fresh) == factors(made)


def test_a_run_moves_its_capacity_and_says_so(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    """What moves at a check follows from the counts recorded at that check."""
    moe = {"router": {"name": "top1"}, "capacity": {"factor": 1.5, "dynamic": True}}
    recorder = Recorder()
    config = experiment(moe=moe, train={"steps": 12, "check_every": 2})
    trainer = make_trainer(config, dataset, tmp_path, logger=recorder)
    trainer.train()
    expected = {0: 1.5, 1: 1.5}
    moves = 0
    for step, payload in recorder.counts:
        if step == 12:  # nothing runs after the last check
            continue
        for number in expected:
            cv = load_cv(torch.tensor(payload["layers"][str(number)]["counts"]).sum(0))
            if cv > 0.5:
                expected[number] = min(expected[number] * 1.1, 3.0)
            elif cv < 0.1:
                expected[number] = max(expected[number] / 1.1, 1.1)
            moves += cv > 0.5 or cv < 0.1
    assert moves > 0
    assert {number: layer.capacity.factor for number, layer in trainer.layers.items()} == expected  # type: ignore[union-attr]
    assert len([kind for kind, _ in recorder.events if kind == "capacity"]) == moves

"""Where time goes: every part is there, the parts of a step sum to it, and the share of a peak is what it says."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import PackedDataset
from moectl.models.accounting import BACKWARD, decoder_shape, forward_flops
from moectl.planning.devices import measured_rate, peak_rate
from moectl.training.timing import PARTS, STEP_PARTS, Clock, Yardstick
from moectl.walk.speed import yardstick
from tests.training.test_trainer import make_trainer

Make = Callable[..., ExperimentConfig]


class Rows:
    """Keeps what it is told, times too."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, float]] = []

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        self.rows.append(values)

    def event(self, kind: str, message: str, **details: object) -> None: ...

    def routing(self, step: int, payload: Mapping[str, object]) -> None: ...

    def position(self) -> dict[str, int]:
        return {}

    def rewind(self, step: int, position: Mapping[str, int]) -> None: ...


def test_a_run_says_where_its_time_went(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    config = experiment(train={"log_every": 3, "steps": 12})
    logger = Rows()

    def slow(model: object, final: bool) -> dict[str, float]:
        time.sleep(0.05)
        return {"eval/lm_loss": 1.0}

    trainer = make_trainer(
        config,
        dataset,
        tmp_path,
        logger=logger,
        evaluate=slow,
    )
    trainer.clock.yardstick = Yardstick(1e6, 1e12, "a device")
    started = time.perf_counter()
    result = trainer.train()
    wall = time.perf_counter() - started
    speed = result.speed
    assert speed is not None and set(speed.seconds) == set(PARTS) and speed.precision == "float32"
    assert 0.15 <= speed.seconds["evaluation"] < 0.5 and speed.seconds["checkpoint"] > 0
    inside = sum(speed.seconds[part] for part in STEP_PARTS)
    assert 0.5 * result.train_seconds < inside <= result.train_seconds, "routing and bookkeeping are the rest"
    assert sum(speed.seconds.values()) < wall
    logged = [row for row in logger.rows if "train/loss" in row]
    assert len(logged) == 4 and all({f"time/{part}" for part in PARTS} <= row.keys() for row in logged)
    for part in STEP_PARTS:
        assert sum(3 * row[f"time/{part}"] for row in logged) == pytest.approx(speed.seconds[part], rel=1e-6)
    assert speed.mfu == pytest.approx(result.train_tokens * 1e6 / result.train_seconds / 1e12)
    assert (speed.peak, speed.about, speed.flops_per_token) == (1e12, "a device", 1e6)
    for row in logged:
        assert row["train/mfu"] == pytest.approx(row["train/tokens_per_second"] * 1e6 / 1e12)


def test_a_lap_is_per_step_and_starts_anew() -> None:
    clock = Clock(torch.device("cpu"))
    for _ in range(4):
        with clock.part("forward"):
            time.sleep(0.01)
        assert clock.stepped(100, 0.02) == {"train/tokens_per_second": 5000.0}
    with clock.part("checkpoint"):
        time.sleep(0.03)
    lap = clock.lap()
    assert 0.01 <= lap["time/forward"] < 0.03 and lap["time/checkpoint"] >= 0.03 and lap["time/data"] == 0.0
    assert set(clock.lap().values()) == {0.0}
    assert clock.settled()["forward"] >= 0.04 and (clock.steps, clock.tokens) == (4, 400)


def test_the_yardstick_counts_active_experts_and_measures_the_cpu(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    few, many = (
        make_trainer(experiment(moe={"num_experts": experts}), dataset, tmp_path / str(experts)).model
        for experts in (2, 4)
    )
    torch.manual_seed(3)
    before = torch.get_rng_state()
    sticks = [yardstick(model, experiment().train, length=15) for model in (few, many)]
    assert torch.equal(torch.get_rng_state(), before), "measuring draws from no generator of the run"
    flops = forward_flops(decoder_shape(many.config), many.moe_layers().values(), length=15)
    assert sticks[1].flops_per_token == (1 + BACKWARD) * flops.total
    gates = 2 * 3 * 2 * 2 * many.config.hidden_size  # two layers, two more gate rows each
    assert sticks[1].flops_per_token - sticks[0].flops_per_token == gates
    assert sticks[1].peak is not None and sticks[1].peak > 1e8
    assert "1 thread" in sticks[1].about and "float32" in sticks[1].about


def test_an_unknown_peak_gives_no_share() -> None:
    assert Yardstick(1e6, None, "unknown device").utilisation(10, 1.0) is None
    assert Clock(torch.device("cpu"), Yardstick(1e6, None, "")).stepped(10, 1.0) == {"train/tokens_per_second": 10.0}


def test_the_peak_is_that_of_the_precision() -> None:
    exact, double = (peak_rate(torch.device("cpu"), name)[0] for name in ("float32", "float64"))
    assert exact is not None and double is not None and double < exact
    assert measured_rate(torch.float32) > 0

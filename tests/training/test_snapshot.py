"""What a checkpoint of a run holds: all of it or an error, the best one kept, and a run that was over is over."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import PackedDataset
from moectl.errors import CheckError
from moectl.training.snapshot import KEYS, PARTS
from moectl.training.state import Checkpoint, checkpoint_steps, newest_checkpoint
from tests.training.test_trainer import Recorder, _interrupt_at, assert_equal, make_trainer, weights

Make = Callable[..., ExperimentConfig]


@pytest.fixture
def saved(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> Checkpoint:
    make_trainer(experiment(train={"steps": 8}), dataset, tmp_path, progress=_interrupt_at(5)).train()
    return newest_checkpoint(tmp_path)[0]


def spoilt(saved: Checkpoint, change: Callable[[dict[str, Any], dict[str, dict[str, torch.Tensor]]], object]) -> Any:
    state, tensors = copy.deepcopy(saved.state), {part: dict(each) for part, each in saved.tensors.items()}
    change(state, tensors)
    return dataclasses.replace(saved, state=state, tensors=tensors)


def test_the_lists_are_what_is_written(saved: Checkpoint) -> None:
    assert set(saved.tensors) == set(PARTS) and set(saved.state) == set(KEYS)
    assert saved.tensors["rng"].keys() >= {"python", "numpy", "torch"}
    assert saved.tensors["model"]["layers.1.mlp.router.noise.step"] == 5


@pytest.mark.parametrize("key", KEYS)
def test_no_key_of_the_state_may_be_missing(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, saved: Checkpoint, key: str
) -> None:
    trainer = make_trainer(experiment(train={"steps": 8}), dataset, tmp_path / "other")
    with pytest.raises(CheckError, match=f"{key} is missing"):
        trainer.restore(spoilt(saved, lambda state, tensors: state.pop(key)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state, tensors: state.update(extra=1), "extra is unexpected"),
        (lambda state, tensors: tensors.pop("rng"), "part rng is missing"),
        (lambda state, tensors: tensors.update(ema={}), "part ema is unexpected"),
        (lambda state, tensors: tensors["rng"].pop("numpy"), "numpy"),
        (lambda state, tensors: tensors["routing"].pop("apart.1"), "apart.1 is missing"),
        (lambda state, tensors: tensors["routing"].update({"layer.0": torch.zeros(3, 4)}), "routing counts 'layer.0'"),
        (lambda state, tensors: tensors["optimizer"].pop("norm.weight/exp_avg"), "norm.weight/exp_avg"),
        (lambda state, tensors: state.update(world_size=2), "of a run of 2 processes, this one has 1"),
        (lambda state, tensors: state.update(step=4), "of step 4"),
        (lambda state, tensors: state.update(tokens="many"), "does not hold what it should"),
        (lambda state, tensors: state.update(best=[1, 2]), "does not hold what it should"),
        (lambda state, tensors: state.update(monitor=None), "does not hold what it should"),
        (lambda state, tensors: state["monitor"].update(collapse={}), "does not hold what it should"),
        (lambda state, tensors: state["sampler"].update(seed=9), "seed 9"),
        (lambda state, tensors: state.update(scaler={"scale": 1.0}), "gradient scaler"),
        (lambda state, tensors: state["spikes"].pop("losses"), "does not hold what it should"),
    ],
)
def test_what_does_not_fit_is_named_and_another_checkpoint_mends_it(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, saved: Checkpoint, change: Any, said: str
) -> None:
    config = experiment(train={"steps": 8})
    trainer = make_trainer(config, dataset, tmp_path / "other")
    with pytest.raises(CheckError, match=said):
        trainer.restore(spoilt(saved, change))
    trainer.restore(saved)
    plain = make_trainer(config, dataset, tmp_path / "plain")
    ends = []
    for one in (trainer, plain):
        one.restore(saved)
        one.train()
        ends.append(weights(one))
    assert_equal(*ends)


def test_every_generator_comes_back(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, saved: Checkpoint
) -> None:
    """Python's, NumPy's with a normal number in hand, and torch's: they draw what they would have drawn."""
    trainer = make_trainer(experiment(train={"steps": 8}), dataset, tmp_path / "a")
    trainer.restore(saved)
    np.random.standard_normal()
    trainer.checkpoints = tmp_path / "b"
    trainer.save()
    expected = random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    trainer.restore(newest_checkpoint(tmp_path / "b")[0])
    assert (random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()) == expected


def test_a_gradient_scaler_has_its_place(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    trainers = [make_trainer(experiment(), dataset, tmp_path / name) for name in "ab"]
    for trainer, scale in zip(trainers, (512.0, 2.0), strict=True):
        trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=7)
    trainers[0].precision.scaler.scale(torch.ones(1))
    trainers[0].precision.scaler.update(64.0)
    trainers[0].save()
    trainers[1].restore(newest_checkpoint(tmp_path / "a")[0])
    assert trainers[1].precision.scaler is not None
    assert trainers[1].precision.scaler.state_dict() == trainers[0].precision.scaler.state_dict()
    assert trainers[1].precision.scaler.get_scale() == 64.0


# --- the best one


def losses(values: dict[int, float], metric: str = "eval/lm_loss") -> Any:
    """An evaluation that says these losses, by step."""

    def evaluate(model: torch.nn.Module, final: bool) -> dict[str, float]:
        step = int(model.moe_layers()[0].router.noise.step)  # type: ignore[operator]
        return {("eval/lm_loss" if final else metric): values[step]}

    return evaluate


FALLING = {0: 5.0, 3: 3.0, 6: 2.0, 9: 2.5, 12: 2.2}


def test_the_last_ones_the_best_and_the_first_are_kept(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    config = experiment(train={"eval_every": 3, "checkpoint_every": 4, "keep_checkpoints": 1})
    trainer = make_trainer(config, dataset, tmp_path, evaluate=losses(FALLING))
    result = trainer.train()
    assert result.best == ("eval/lm_loss", 2.0, 6)
    assert checkpoint_steps(tmp_path) == [0, 6, 12], "6 is no multiple of 4: it was saved for being the best"
    assert newest_checkpoint(tmp_path)[0].state["best"] == {"metric": "eval/lm_loss", "value": 2.0, "step": 6}
    plain = make_trainer(config, dataset, tmp_path / "plain")
    plain.train()
    assert_equal(weights(trainer), weights(plain))


def test_the_final_evaluation_may_be_the_best_and_another_metric_is_not_compared(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    config = experiment(train={"eval_every": 3, "keep_checkpoints": 1})
    best_last = losses({**FALLING, 12: 1.0})
    assert make_trainer(config, dataset, tmp_path / "a", evaluate=best_last).train().best == ("eval/lm_loss", 1.0, 12)
    assert checkpoint_steps(tmp_path / "a") == [0, 12]
    part = losses({**FALLING, 12: 1.0}, "eval_part/lm_loss")
    assert make_trainer(config, dataset, tmp_path / "b", evaluate=part).train().best == ("eval_part/lm_loss", 2.0, 6)
    nan = losses(FALLING | {6: float("nan")})
    assert make_trainer(config, dataset, tmp_path / "c", evaluate=nan).train().best == ("eval/lm_loss", 2.2, 12)
    off = experiment(train={"eval_every": 3, "keep_checkpoints": 1, "keep_best": False})
    assert make_trainer(off, dataset, tmp_path / "d", evaluate=losses(FALLING)).train().best is None
    assert checkpoint_steps(tmp_path / "d") == [0, 12]


def test_a_resumed_run_knows_the_best(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    config = experiment(train={"eval_every": 3, "keep_checkpoints": 1, "checkpoint_every": 4})
    evaluate = losses(FALLING)
    make_trainer(config, dataset, tmp_path, evaluate=evaluate, progress=_interrupt_at(10)).train()
    assert checkpoint_steps(tmp_path) == [0, 6, 10]
    resumed = make_trainer(config, dataset, tmp_path, evaluate=evaluate)
    resumed.restore(newest_checkpoint(tmp_path)[0])
    assert resumed.train().best == ("eval/lm_loss", 2.0, 6)
    assert checkpoint_steps(tmp_path) == [0, 6, 12]


# --- how it ends


def test_a_run_that_goes_on_from_its_very_first_checkpoint_begins_once(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    config, evaluate = experiment(), lambda model, final: {"eval/lm_loss": 1.0}
    whole = make_trainer(config, dataset, tmp_path / "whole", evaluate=evaluate)
    whole.train()
    cut = make_trainer(config, dataset, tmp_path / "cut", evaluate=evaluate)
    cut._begin()
    resumed = make_trainer(config, dataset, tmp_path / "cut", evaluate=evaluate, logger=cut.logger)
    resumed.restore(newest_checkpoint(tmp_path / "cut")[0])
    resumed.train()
    assert whole.logger.rows == resumed.logger.rows  # type: ignore[attr-defined]


@pytest.mark.parametrize("early_stop", [False, True], ids=["finished", "collapsed"])
def test_a_run_killed_after_its_last_checkpoint_only_says_its_last_words(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, early_stop: bool
) -> None:
    """As a kill before the final evaluation leaves it, and one after it: rows and events are there once."""
    strict = {"max_share": 0.2501, "patience": 1} if early_stop else {}
    config = experiment(train={"early_stop": early_stop, "collapse": strict})
    evaluate = lambda model, final: {"eval/lm_loss": 2.0 if final else 3.0}  # noqa: E731
    whole = make_trainer(config, dataset, tmp_path / "whole", evaluate=evaluate)
    ended = whole.train()
    assert ended.status == ("collapsed" if early_stop else "finished")
    checkpoint, _ = newest_checkpoint(tmp_path / "whole")
    assert checkpoint.state["ending"] == [ended.status, ended.reason]
    expected = whole.logger
    assert isinstance(expected, Recorder)
    for dropped in (True, False):
        recorder = copy.deepcopy(expected)
        if dropped:  # what a process resumed in earnest has been told to forget
            recorder.rewind(checkpoint.step, checkpoint.state["record"])
            assert len(recorder.rows) == len(expected.rows) - 1
        resumed = make_trainer(config, dataset, tmp_path / "whole", evaluate=evaluate, logger=recorder)
        resumed.restore(checkpoint)
        recorder.rewind(checkpoint.step, checkpoint.state["record"])
        again = resumed.train()
        assert (again.status, again.reason, again.step, again.metrics) == (
            ended.status, ended.reason, ended.step, ended.metrics,
        )  # fmt: skip
        assert recorder.rows == expected.rows and recorder.events == expected.events
        assert_equal(weights(whole), weights(resumed))

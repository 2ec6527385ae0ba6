"""The loss-spike rule by hand-made losses, and what skipping and rolling back do to a real run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from moectl.config.guards import SpikeConfig
from moectl.config.schema import ExperimentConfig, OptimConfig, TrainConfig
from moectl.corpus.loader import PackedDataset
from moectl.training.protocol import ObjectiveSums, language_modelling
from moectl.training.spikes import SpikeRule
from moectl.training.state import checkpoint_steps, load_checkpoint, newest_checkpoint, step_name
from tests.training.test_trainer import BUILT_IN, Recorder, _interrupt_at, assert_equal, make_trainer, weights

Make = Callable[..., ExperimentConfig]


def actions(rule: SpikeRule, losses: list[float], start: int = 1) -> list[str]:
    return [spike.action if (spike := rule.look(step, loss)) else "" for step, loss in enumerate(losses, start)]


def test_a_spike_is_above_mean_and_so_many_deviations_of_a_full_window() -> None:
    window = [1.0, 2.0, 3.0, 4.0]
    bound = 2.5 + 2 * statistics.stdev(window)
    for above in (False, True):
        rule = SpikeRule(SpikeConfig(action="report", window=4, std=2.0))
        assert actions(rule, [9.0, *window]) == [""] * 5, "nothing before the window is full"
        rule = SpikeRule(SpikeConfig(action="report", window=4, std=2.0))
        actions(rule, window)
        spike = rule.look(5, bound * (1 + 1e-12) if above else bound)
        assert (spike is not None) == above
        if spike is not None:
            assert (spike.mean, spike.bound) == (2.5, pytest.approx(bound, rel=1e-15))
            assert "step 5" in str(spike) and "mean 2.5" in str(spike)


def test_a_reported_loss_is_soon_normal_and_a_skipped_one_is_never_in_the_window() -> None:
    losses = [1.0, 1.1, 1.0, 1.1, 9.0, 9.0, 9.0, 9.0]
    report = SpikeRule(SpikeConfig(action="report", window=4, std=1.6))
    assert actions(report, losses) == [""] * 4 + ["report", "", "", ""]
    skip = SpikeRule(SpikeConfig(action="skip", window=4, std=1.6, limit=3))
    assert actions(skip, losses) == [""] * 4 + ["skip"] * 3 + ["fail"]
    assert list(skip.losses) == losses[:4]


def test_a_whole_window_without_a_spike_gives_the_limit_back() -> None:
    rule = SpikeRule(SpikeConfig(action="skip", window=3, std=3.0, limit=1))
    calm = [1.0, 1.1, 1.2]
    assert actions(rule, [*calm, 9.0, 1.0, 1.1, 9.0]) == ["", "", "", "skip", "", "", "fail"]
    rule = SpikeRule(SpikeConfig(action="skip", window=3, std=3.0, limit=1))
    assert actions(rule, [*calm, 9.0, 1.0, 1.1, 1.2, 9.0]) == ["", "", "", "skip", "", "", "", "skip"]


def test_steps_that_a_rollback_does_again_do_not_give_the_limit_back() -> None:
    """A loss that jumps at step 20 whatever comes before, checkpoints much further apart than the window is wide."""
    rule = SpikeRule(SpikeConfig(action="rollback", window=4, std=6.0, limit=3))
    assert actions(rule, [2.0, 2.1, 2.0, 2.1]) == [""] * 4
    before, answers, step = rule.state_dict(), [], 4
    while len(answers) < 10 and answers[-1:] != ["fail"]:
        step += 1
        spike = rule.look(step, 9.0 if step == 20 else 2.0 + 0.1 * (step % 2))
        if spike is None:
            continue
        answers.append(spike.action)
        used, furthest = rule.used, rule.furthest
        rule.load_state_dict(before)
        rule.used, rule.furthest, rule.clean, step = used, furthest, 0, 4
    assert answers == ["rollback"] * 3 + ["fail"]
    # Past the step that jumped, a whole window gives it back; three steps do not.
    for extra, left in ((3, 3), (4, 0)):
        rule.load_state_dict(before)
        rule.used, rule.furthest, rule.clean = 3, 20, 0
        assert actions(rule, [2.0, 2.1] * 8 + [2.0] * extra, 5) == [""] * (16 + extra)
        assert rule.used == left


def test_a_flat_loss_has_no_spikes_in_its_last_bits() -> None:
    for loss in (2.0, -2.0):
        rule = SpikeRule(SpikeConfig(window=3))
        assert actions(rule, [loss] * 4) == [""] * 4
        assert rule.look(5, loss + 1e-9) is None
        spike = rule.look(6, loss + 1e-4)
        assert spike is not None and spike.bound == pytest.approx(loss + 2e-6, rel=1e-9)


def test_a_wide_window_costs_little() -> None:
    """0.2 ms for ten thousand losses where exact sums took 3.5; the best of many, on a machine that does more."""
    rule = SpikeRule(SpikeConfig(window=10_000))
    for step in range(10_000):
        rule.look(step, 2.0 + (step % 7) / 100)
    times = []
    for step in range(10_000, 10_040):
        began = time.perf_counter()
        assert rule.look(step, 2.0) is None
        times.append(time.perf_counter() - began)
    assert min(times) < 1.5e-3


def test_off_looks_at_nothing_and_nan_is_no_spike() -> None:
    off = SpikeRule(SpikeConfig(action="off"))
    assert actions(off, [1.0] * 60 + [1e9]) == [""] * 61 and not off.losses
    assert SpikeRule(SpikeConfig(window=2)).look(1, float("nan")) is None


def test_a_restored_rule_finds_the_same() -> None:
    losses = [1.0, 1.2, 1.1, 5.0, 1.0, 5.0, 1.0, 1.1, 1.2, 1.0, 5.0, 5.0, 5.0]
    config = SpikeConfig(action="skip", window=3, std=3.0, limit=2)
    whole = SpikeRule(config)
    expected = actions(whole, losses)
    assert "skip" in expected and "fail" in expected
    for cut in range(len(losses)):
        first, second = SpikeRule(config), SpikeRule(config)
        seen = actions(first, losses[:cut])
        second.load_state_dict(first.state_dict())
        assert seen + actions(second, losses[cut:], cut + 1) == expected


def test_the_keys_are_strict() -> None:
    assert TrainConfig.model_validate({"spike": "skip"}).spike.action == "skip"
    assert TrainConfig.model_validate({"spike": False}).spike.action == "off"  # what YAML makes of off
    assert TrainConfig.model_validate({"spike": {"action": False}}).spike.action == "off"
    for bad in ("ignore", True, {"window": 1}, {"std": 0}, {"limit": 2}, {"action": "off", "std": 3}, {"sigma": 3}):
        with pytest.raises(ValidationError):
            TrainConfig.model_validate({"spike": bad})


# --- in the loop


def run_config(experiment: Make, action: str, router: str = "top2", **spike: Any) -> ExperimentConfig:
    """So tight a rule that the ups and downs of a tiny run are spikes."""
    rule = {"action": action, "std": 0.5, "window": 4, **({"limit": 1000} if action in ("skip", "rollback") else {})}
    train = {"steps": 20, "keep_checkpoints": 9, "eval_every": 1000, "allow_noncausal": router == "expert-choice"}
    options = {"top_k": 2} if router == "topk" else {}
    return experiment(moe={"router": {"name": router, **options}}, train={**train, "spike": rule | spike})


def test_a_skipped_step_moves_no_weight_and_all_that_counts_steps_goes_on(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    trainer = make_trainer(run_config(experiment, "skip", std=1e-9, window=3), dataset, tmp_path)
    skipped = moved = 0
    for step in range(20):
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        moments = {id(p): int(s["step"]) for p, s in trainer.optimizer.state.items()}
        metrics, problem = trainer.optimizer_step()
        assert problem is None and trainer.step == step + 1 and trainer.tokens == (step + 1) * 64
        assert int(trainer.layers[0].router.noise.step) == step + 1, "noise is annealed by steps, skipped or not"
        same = all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
        if trainer.spike is not None:
            skipped += 1
            assert same and metrics["train/lm_loss"] > trainer.spike.bound
            assert moments == {id(p): int(s["step"]) for p, s in trainer.optimizer.state.items()}
        else:
            moved += 1
            assert not same
    assert skipped >= 1 and moved >= 10
    said = [text for kind, text in trainer.logger.events if kind == "loss_spike"]  # type: ignore[attr-defined]
    assert len(said) == skipped and all("moves no weight" in text for text in said)


def test_a_report_changes_nothing(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    ends = {}
    for action in ("off", "report"):
        rule = {"std": 1e-9, "window": 3} if action == "report" else {}
        config = experiment(train={"steps": 20, "spike": {"action": action, **rule}})
        trainer = make_trainer(config, dataset, tmp_path / action)
        trainer.train()
        ends[action] = weights(trainer), trainer.logger
    assert_equal(ends["off"][0], ends["report"][0])
    assert ends["off"][1].rows == ends["report"][1].rows  # type: ignore[attr-defined]
    assert [kind for kind, _ in ends["report"][1].events].count("loss_spike") >= 1  # type: ignore[attr-defined]


def test_a_rollback_takes_the_weights_back_and_the_data_on(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    trainer = make_trainer(run_config(experiment, "rollback"), dataset, tmp_path)
    trainer._begin()
    while trainer.spike is None:
        assert trainer.step < 20, "no spike in the whole run"
        trainer._next_step()
    back = trainer.step
    spiked = trainer.spike.step
    assert back % 4 == 0 and back < spiked <= back + 4
    assert trainer.tokens == back * 64 and trainer.clock.tokens == spiked * 64, "the work of them all was done"
    # The data cursor is past the step that jumped; weights and moments are the checkpoint's, saved anew with it.
    assert trainer.sampler.position == spiked * 4
    saved = load_checkpoint(tmp_path / step_name(back))
    assert saved.state["sampler"]["position"] == spiked * 4 and saved.state["spikes"]["used"] == 1
    assert_equal(weights(trainer), saved.tensors["model"])
    assert int(saved.tensors["optimizer"]["norm.weight/step"]) == back
    recorder = trainer.logger
    assert isinstance(recorder, Recorder)
    assert [step for step, values in recorder.rows if "train/loss" in values] == list(range(1, back + 1))
    assert recorder.events[-1][0] == "loss_spike" and f"step {spiked} jumped" in recorder.events[-1][1]
    trainer.train()
    assert [step for step, values in recorder.rows if "train/loss" in values] == list(range(1, 21))


@pytest.mark.parametrize("action", ["report", "skip", "rollback"])
@pytest.mark.parametrize("stop", [6, 8, 13])
def test_resume_is_bit_exact(experiment: Make, dataset: PackedDataset, tmp_path: Path, action: str, stop: int) -> None:
    """Weights, rows and events; a rollback may come before, at and after the cut.

    Where the loss stays flat, every other step is above the mean, and a window that began anew would miss some.
    """
    config = run_config(experiment, action, std=1.0)
    if action != "rollback":
        flat = {"optim": OptimConfig(lr=1e-9, warmup_steps=2)}
        config = run_config(experiment, action, std=1e-9, window=5).model_copy(update=flat)
    whole = make_trainer(config, dataset, tmp_path / "whole")
    assert whole.train().status == "finished"
    spikes = [text for kind, text in whole.logger.events if kind == "loss_spike"]  # type: ignore[attr-defined]
    assert len(spikes) >= (1 if action == "rollback" else 4)

    cut = make_trainer(config, dataset, tmp_path / "cut", progress=_interrupt_at(stop))
    assert cut.train().status == "interrupted"
    resumed = make_trainer(config, dataset, tmp_path / "cut", logger=cut.logger)
    checkpoint, _ = newest_checkpoint(tmp_path / "cut")
    torch.manual_seed(999)
    resumed.restore(checkpoint)
    assert resumed.train().status == "finished"
    assert_equal(weights(whole), weights(resumed))
    assert whole.logger.rows == resumed.logger.rows  # type: ignore[attr-defined]
    again = [text for kind, text in resumed.logger.events if kind == "loss_spike"]  # type: ignore[attr-defined]
    assert spikes == again
    ours, theirs = (newest_checkpoint(tmp_path / name)[0] for name in ("whole", "cut"))
    assert ours.state["spikes"] == theirs.state["spikes"] and ours.state["sampler"] == theirs.state["sampler"]


def test_a_rollback_that_meets_the_same_jump_again_and_again_uses_up_the_limit(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    """From step 15 on the loss is fifty times as high, whatever the data: checkpoints are ten windows apart."""
    spike = {"action": "rollback", "std": 6.0, "window": 4, "limit": 2}
    config = experiment(train={"steps": 60, "checkpoint_every": 40, "check_every": 60, "spike": spike})
    trainers: list[Any] = []

    def objective(model: Any, batch: Any, labels: Any) -> ObjectiveSums:
        sums = language_modelling(model, batch, labels)
        return ObjectiveSums(sums.total, sums.lm * (50 if trainers[0].step >= 14 else 1))

    trainers.append(make_trainer(config, dataset, tmp_path, objective=objective))
    trainers[0]._begin()
    ending, steps = None, 0
    while ending is None and steps < 200:
        ending, steps = trainers[0]._next_step(), steps + 1
    assert ending is not None and ending.status == "failed" and "train.spike.limit is used up" in ending.reason
    assert steps == 3 * 15, "two rollbacks, each to the first checkpoint"
    assert newest_checkpoint(tmp_path)[0].state["spikes"]["furthest"] == 15


@pytest.mark.parametrize("router", BUILT_IN)
def test_a_run_that_went_back_is_the_run_that_is_resumed(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, router: str
) -> None:
    """Whatever the router keeps between forward and the end of a step: the step that jumped had no end."""
    config = run_config(experiment, "rollback", router)
    trainer = make_trainer(config, dataset, tmp_path / "a")
    trainer._begin()
    while trainer.spike is None:
        assert trainer.step < 20, "no spike in the whole run"
        trainer._next_step()
    resumed = make_trainer(config, dataset, tmp_path / "b")
    resumed.restore(newest_checkpoint(tmp_path / "a")[0])
    fresh = make_trainer(config, dataset, tmp_path / "c").unsaved
    for each in (trainer, resumed):
        assert_equal({name: b for name, b in each.model.named_buffers() if name in fresh}, fresh)
        each.spikes = SpikeRule(SpikeConfig(action="off"))
    ends = []
    for each, drawn in ((trainer, torch.get_rng_state()), (resumed, torch.get_rng_state())):
        torch.set_rng_state(drawn)
        for _ in range(3):
            assert each.optimizer_step()[1] is None
        ends.append(weights(each))
    assert_equal(*ends)


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_past_the_limit_the_run_fails_and_the_last_checkpoint_stays(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, action: str
) -> None:
    """A rate at which nothing is learned: half of all losses are above the mean of those before."""
    config = run_config(experiment, action, limit=1, std=1e-9).model_copy(update={"optim": OptimConfig(lr=1e-12)})
    trainer = make_trainer(config, dataset, tmp_path)
    result = trainer.train()
    assert result.status == "failed" and "train.spike.limit is used up" in result.reason
    good, messages = newest_checkpoint(tmp_path)
    assert not messages and good.step == checkpoint_steps(tmp_path)[-1] <= result.step

"""Reading ahead: the same order, the same cursor, and errors that reach whoever asks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import BlockSampler, PackedDataset, targets
from moectl.training.prefetch import Loader
from moectl.training.state import newest_checkpoint
from tests.training.test_trainer import _interrupt_at, assert_equal, make_trainer, weights

Make = Callable[..., ExperimentConfig]
CPU = torch.device("cpu")


def loader(dataset: PackedDataset, ahead: int, batch_size: int = 5) -> Loader:
    sampler = BlockSampler(dataset.train.num_blocks, batch_size=batch_size, seed=3)
    return Loader(dataset.train, sampler, CPU, ahead=ahead)


@pytest.mark.parametrize("ahead", [1, 2, 7])
def test_the_order_and_the_cursor_are_those_of_reading_one_by_one(dataset: PackedDataset, ahead: int) -> None:
    """Over more than two epochs, with batches that meet their ends."""
    with loader(dataset, 0) as plain, loader(dataset, ahead) as thread:
        for _ in range(2 * dataset.train.num_blocks // 5 + 3):
            ours, theirs = plain.next(), thread.next()
            assert all(map(torch.equal, ours.batch, theirs.batch)) and torch.equal(ours.labels, theirs.labels)
            assert torch.equal(ours.labels, targets(ours.batch))
            assert ours.scored == theirs.scored == int((ours.labels >= 0).sum())
            assert plain.sampler.state_dict() == thread.sampler.state_dict()


def test_a_cursor_set_meanwhile_is_followed(dataset: PackedDataset) -> None:
    """As a restored or rolled back run sets it: what was read ahead is of no use then."""
    with loader(dataset, 3) as thread:
        first = [thread.next().batch.block_ids.tolist() for _ in range(4)]
        thread.sampler.position = 5
        assert [thread.next().batch.block_ids.tolist() for _ in range(3)] == first[1:]
        assert thread.sampler.position == 20


def test_an_error_of_the_thread_is_raised_where_the_batch_is_asked_for(dataset: PackedDataset) -> None:
    with loader(dataset, 2) as thread:
        good = thread.next()
        tokens = dataset.train.tokens
        dataset.train.tokens = tokens[:1]  # the file has lost its end: most blocks are not there
        with pytest.raises(IndexError):
            for _ in range(9):
                thread.next()
        position = thread.sampler.position
        with pytest.raises(IndexError):
            for _ in range(9):
                thread.next()  # again, and it does not hang
        dataset.train.tokens = tokens
        thread.sampler.position = 0
        assert torch.equal(thread.next().batch.block_ids, good.batch.block_ids)
        assert position >= 5


def test_threads_end_with_the_run(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    def alive() -> list[str]:
        ours = ("moectl-loader", "moectl-checkpoint")  # those that share the work of experts stay with the process
        return [thread.name for thread in threading.enumerate() if thread.name.startswith(ours)]

    make_trainer(experiment(train={"async_checkpoint": True}), dataset, tmp_path).train()
    assert alive() == []
    trainer = make_trainer(experiment(), dataset, tmp_path / "b", progress=lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert alive() == []


@pytest.mark.parametrize("asynchronous", [False, True])
def test_runs_and_resumed_runs_are_the_same_with_and_without(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, asynchronous: bool
) -> None:
    plain = make_trainer(experiment(train={"prefetch": 0, "grad_accum": 2}), dataset, tmp_path / "plain")
    plain.train()
    train = {"prefetch": 3, "grad_accum": 2, "async_checkpoint": asynchronous}
    config = experiment(train=train)
    make_trainer(config, dataset, tmp_path / "cut", progress=_interrupt_at(7)).train()
    resumed = make_trainer(config, dataset, tmp_path / "cut")
    checkpoint, _ = newest_checkpoint(tmp_path / "cut")
    assert checkpoint.state["sampler"]["position"] == 7 * 2 * 4, "of what was trained on, not of what was read"
    resumed.restore(checkpoint)
    resumed.train()
    assert_equal(weights(plain), weights(resumed))


def test_a_rollback_goes_on_with_the_data_that_comes_next(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    """The rule of spikes on real losses: a bound of 0.01 deviations is met soon. The same run with and without."""
    runs = []
    for number, train in enumerate(({"prefetch": 0}, {"prefetch": 3, "async_checkpoint": True})):
        spike = {"action": "rollback", "std": 0.01, "window": 4, "limit": 50}
        config = experiment(train={**train, "steps": 16, "spike": spike}, optim={"lr": 1e-4})
        trainer = make_trainer(config, dataset, tmp_path / str(number))
        trainer.train()
        runs.append(trainer)
    kinds = [[kind for kind, _ in run.logger.events] for run in runs]  # type: ignore[attr-defined]
    assert kinds[0] == kinds[1] and "loss_spike" in kinds[0]
    assert runs[0].logger.rows == runs[1].logger.rows  # type: ignore[attr-defined]
    assert_equal(weights(runs[0]), weights(runs[1]))

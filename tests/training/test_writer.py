"""Checkpoints from a thread: what they hold is of their own step, one at a time, and failures are told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import PackedDataset
from moectl.errors import MoectlError
from moectl.training.state import checkpoint_steps, load_checkpoint, step_name
from moectl.training.writer import BackgroundWriter, copied
from tests.training.test_trainer import assert_equal, make_trainer

Make = Callable[..., ExperimentConfig]


def test_every_checkpoint_is_that_of_a_run_that_waits(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    """Weights move on while a copy is written: each file is as if they had not, and tied weights stay tied."""
    for asynchronous in (False, True):
        train = {"checkpoint_every": 1, "keep_checkpoints": 20, "async_checkpoint": asynchronous}
        make_trainer(experiment(train=train), dataset, tmp_path / str(asynchronous)).train()
    assert checkpoint_steps(tmp_path / "True") == checkpoint_steps(tmp_path / "False") == list(range(13))
    for step in range(13):
        ours, theirs = (load_checkpoint(tmp_path / name / step_name(step)) for name in ("False", "True"))
        for part in ours.tensors:
            assert_equal(ours.tensors[part], theirs.tensors[part])
        for key in ours.state.keys() - {"last", "config_hash"}:
            assert ours.state[key] == theirs.state[key], key
        head, embedding = (theirs.tensors["model"][name] for name in ("lm_head.weight", "embed_tokens.weight"))
        assert head.data_ptr() == embedding.data_ptr()


def test_a_failed_write_ends_the_run_with_its_own_words(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    """A file stands where the folder was: the write at step 4 fails, which the save at step 8 says."""
    seen: list[int] = []
    folder = tmp_path / "run"

    def progress(step: int, values: object) -> None:
        seen.append(step)
        if step == 3:
            folder.rename(tmp_path / "moved")
            folder.touch()

    trainer = make_trainer(experiment(train={"async_checkpoint": True}), dataset, folder, progress=progress)
    with pytest.raises(MoectlError, match="step-00000004"):
        trainer.train()
    assert max(seen) == 8 and checkpoint_steps(tmp_path / "moved") == [0]


def test_one_write_at_a_time_and_an_error_is_told_once() -> None:
    writer, running, most = BackgroundWriter(), [], []

    def write() -> None:
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()

    for _ in range(4):
        writer.start(write)
    writer.wait()
    assert most == [1, 1, 1, 1]

    def fail() -> None:
        raise MoectlError("no room")

    writer.start(fail)
    with pytest.raises(MoectlError, match="no room"):
        writer.start(write)
    writer.start(write)
    writer.wait()
    assert len(most) == 5


def test_a_write_goes_on_beside_what_comes_after() -> None:
    writer, go_on = BackgroundWriter(), threading.Event()
    writer.start(lambda: go_on.wait(10))
    go_on.set()  # reached while the write waits for it
    writer.wait()


def test_an_error_of_the_run_is_not_hidden_by_one_of_a_write() -> None:
    def fail() -> None:
        raise MoectlError("no room")

    with pytest.raises(KeyError), BackgroundWriter() as writer:
        writer.start(fail)
        raise KeyError("of the run")
    with pytest.raises(MoectlError, match="no room"), BackgroundWriter() as writer:
        writer.start(fail)


def test_copies_are_copies_and_share_what_was_shared() -> None:
    tensor, other = torch.ones(3, 2), torch.ones(0)
    parts = {"a": {"x": tensor, "y": tensor, "t": tensor.t(), "e": other}, "b": {"z": tensor[1]}}
    made = copied(parts)
    tensor += 1
    assert made["a"]["x"] is made["a"]["y"] and made["a"]["t"].shape == (2, 3)
    assert all(bool((t == 1).all()) for part in made.values() for t in part.values())

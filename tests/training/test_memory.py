"""Memory that runs out: against a real limit of the address space, and what a halved step is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.config.schema import DataConfig, ExperimentConfig
from moectl.corpus.loader import PackedDataset
from moectl.errors import MoectlError
from moectl.moe.router import RouterError
from moectl.runs.logger import RunRecorder
from moectl.runs.rundir import RunDir
from moectl.training.memory import OutOfMemory, explained, is_out_of_memory
from moectl.training.protocol import ObjectiveSums, language_modelling
from moectl.training.state import newest_checkpoint
from tests.training.test_trainer import Recorder, assert_equal, make_trainer, weights

Make = Callable[..., ExperimentConfig]


def fills(trainer: Any, *calls: int, error: Exception | None = None) -> None:
    """Memory runs out at these forward passes, counted from 1, as the CPU allocator says it."""
    count = 0

    def hook(module: torch.nn.Module, inputs: Any) -> None:
        nonlocal count
        count += 1
        if count in calls:
            if error is not None:
                raise error
            torch.empty(2**60)  # a real one: no machine has it

    trainer.model.layers[1].mlp.register_forward_pre_hook(hook)


def test_every_way_in_which_memory_runs_out_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    for said in (
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA out of memory. Tried to allocate 20 MiB",
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried",
    ):
        assert is_out_of_memory(RuntimeError(said)), said
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    wrapped = RouterError("layer 0's router: route() raised")
    assert not is_out_of_memory(wrapped)
    wrapped.__cause__ = caught.value
    assert is_out_of_memory(wrapped)
    for other in (RuntimeError("shapes cannot be multiplied"), ValueError("not enough memory"), MoectlError("no")):
        assert not is_out_of_memory(other)
    with pytest.raises(OutOfMemory, match="while evaluating") as told, explained("evaluating", "Lower it."):
        torch.empty(2**60)
    assert told.value.hint == "Lower it." and told.value.exit_code == 1
    with pytest.raises(RuntimeError, match="other"), explained("evaluating", ""):
        raise RuntimeError("other")


@pytest.mark.parametrize(
    ("batch_size", "said"),
    [(4, "train.batch_size=2 and train.grad_accum=2"), (3, "Micro-batches of 3 cannot be halved")],
)
def test_it_is_told_with_what_to_change(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, batch_size: int, said: str
) -> None:
    trainer = make_trainer(experiment(train={"batch_size": batch_size}), dataset, tmp_path)
    before = weights(trainer)
    fills(trainer, 1)
    with pytest.raises(OutOfMemory, match=f"at step 1, with micro-batches of {batch_size}") as caught:
        trainer.optimizer_step()
    assert said in str(caught.value.hint)
    assert_equal(before, weights(trainer))


def test_a_halved_run_is_the_run_with_half_the_batch_and_twice_the_accumulation(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    """To the last bit, noise and running counts included: from the first step on, as memory runs out in it twice."""
    moe = {"router": {"name": "topk", "top_k": 2, "noise_std": 0.3, "expert_dropout": 0.1}}
    half = experiment(moe=moe, train={"batch_size": 2, "grad_accum": 8, "steps": 8})
    whole = experiment(moe=moe, train={"batch_size": 8, "grad_accum": 2, "steps": 8, "halve_on_oom": True})
    ours = make_trainer(half, dataset, tmp_path / "half")
    theirs = make_trainer(whole, dataset, tmp_path / "whole")
    fills(theirs, 2, 4)  # in the second micro-batch of the first attempt, and in the second attempt
    for step in range(4):
        torch.manual_seed(step)
        expected, _ = ours.optimizer_step()
        torch.manual_seed(step)
        found, _ = theirs.optimizer_step()
        assert found == expected
    assert_equal(weights(ours), weights(theirs))
    assert theirs.halving.pieces == 4
    recorder = theirs.logger
    assert isinstance(recorder, Recorder)
    told = [text for kind, text in recorder.events if kind == "out_of_memory"]
    assert len(told) == 2 and "to 4, and twice as many" in told[0] and "to 2, and twice as many" in told[1]


@pytest.mark.parametrize("router", ["expert-choice-threshold", "sigmoid", "noisy-topk"])
def test_a_second_attempt_finds_generators_and_buffers_as_the_first_did(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, router: str
) -> None:
    """Memory runs out in the last micro-batch, when thresholds have counted and noise is drawn."""
    moe = {"router": {"name": router}}
    half = experiment(moe=moe, train={"batch_size": 2, "grad_accum": 4})
    whole = experiment(moe=moe, train={"batch_size": 4, "grad_accum": 2, "halve_on_oom": True})
    ours, theirs = make_trainer(half, dataset, tmp_path / "a"), make_trainer(whole, dataset, tmp_path / "b")
    fills(theirs, 2)
    for _ in range(3):
        torch.manual_seed(5)
        assert ours.optimizer_step()[1] is None
        torch.manual_seed(5)
        assert theirs.optimizer_step()[1] is None
    assert_equal(weights(ours), weights(theirs))


def test_a_checkpoint_follows_and_a_resumed_run_stays_halved(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    config = experiment(train={"halve_on_oom": True, "steps": 12, "checkpoint_every": 100})
    trainer = make_trainer(config, dataset, tmp_path / "whole")
    fills(trainer, 4)  # the first look is the first of them: at step 3
    trainer.train()
    saved, _ = newest_checkpoint(tmp_path / "whole")
    assert saved.state["pieces"] == 2

    cut = make_trainer(config, dataset, tmp_path / "cut")
    fills(cut, 4)
    cut._begin()
    for _ in range(3):
        cut._next_step()
    checkpoint, _ = newest_checkpoint(tmp_path / "cut")
    assert checkpoint.step == 3, "though none was due"
    resumed = make_trainer(config, dataset, tmp_path / "cut")
    resumed.restore(checkpoint)
    assert resumed.halving.blocks == 2
    resumed.train()
    assert_equal(weights(trainer), weights(resumed))


def test_a_halving_stays_in_the_record_of_a_run_that_goes_back_in_the_same_step(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record that is cut back is a real one. Memory runs out at step 7, whose loss is fifty times as high."""
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path))
    spike = {"action": "rollback", "window": 3, "limit": 9}
    config = experiment(train={"halve_on_oom": True, "checkpoint_every": 4, "check_every": 12, "spike": spike})
    trainers: list[Any] = []

    def objective(model: Any, batch: Any, labels: Any) -> ObjectiveSums:
        sums = language_modelling(model, batch, labels)
        return ObjectiveSums(sums.total, sums.lm * (50 if done else 1))

    done: list[int] = []
    run = RunDir.create("halved", config_yaml="{}", record={})
    said: list[str] = []
    with RunRecorder(run, warn=said.append) as recorder:
        trainers.append(make_trainer(config, dataset, run.checkpoints, logger=recorder, objective=objective))
        trainer = trainers[0]
        trainer._begin()
        for _ in range(6):
            assert trainer._next_step() is None
        done.append(trainer.step)
        fills(trainer, 1)
        assert trainer._next_step() is None
        assert trainer.spike is not None and trainer.step == 4 and trainer.halving.pieces == 2
        events = [event for event in run.events() if event["kind"] in ("out_of_memory", "loss_spike")]
    assert [(event["kind"], event.get("at"), event.get("step")) for event in events] == [
        ("out_of_memory", 7, None),
        ("loss_spike", None, 4),
    ]
    assert [line.partition(":")[2][:10] for line in said] == [" at step 7", " at step 4"]


def test_memory_that_runs_out_in_the_first_look_is_met_too(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    trainer = make_trainer(experiment(train={"halve_on_oom": True, "steps": 4}), dataset, tmp_path)
    fills(trainer, 1)
    assert trainer.train().status == "finished" and trainer.halving.pieces == 2


LIMITED = """
import gc, json, resource, sys, torch
from pathlib import Path
from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import PackedDataset
from moectl.training.memory import OutOfMemory
from moectl.training.trainer import Trainer
from moectl.walk.models import build_model
torch.set_num_threads(1)
folder, values, room = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
config = ExperimentConfig.model_validate(values)
data = PackedDataset.open(folder)

class Log:
    events = []
    def log(self, step, tokens, values): pass
    def routing(self, step, payload): pass
    def event(self, kind, message, **details): self.events.append([kind, message])
    def position(self): return {}
    def rewind(self, step, position): pass

def trainer(batch_size, grad_accum):
    train = {**values["train"], "batch_size": batch_size, "grad_accum": grad_accum}
    made = ExperimentConfig.model_validate({**values, "train": train})
    return Trainer(build_model(made, data.manifest)[0], data, made, logger=Log(), checkpoints=Path(sys.argv[4]))

# All that is loaded at first use is loaded, and the optimizer has its moments.
small = trainer(1, 1)
small.optimizer_step()
large = trainer(config.train.batch_size, 1)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + room
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    metrics, problem = large.optimizer_step()
    out = {"loss": metrics["train/lm_loss"], "pieces": large.halving.pieces, "events": large.logger.events}
except OutOfMemory as error:
    out = {"refused": error.message, "hint": error.hint}
print(json.dumps(out))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs the size of this process from /proc")
@pytest.mark.parametrize("halve", [True, False], ids=["halved", "refused"])
def test_under_a_real_limit(
    prepared: tuple[Path, DataConfig], dataset: PackedDataset, tmp_path: Path, halve: bool
) -> None:
    """256 blocks of a model 512 wide hold more than 200 MB for the backward pass, 64 a quarter of that."""
    values = {
        "data": prepared[1].model_dump(mode="json"),
        "model": {"num_layers": 2, "hidden_size": 512, "intermediate_size": 1024, "num_heads": 2, "head_dim": 32},
        "moe": None,
        "optim": {"warmup_steps": 0},
        "train": {"steps": 10, "batch_size": 256, "threads": 1, "halve_on_oom": halve},
    }
    arguments = [str(dataset.folder), json.dumps(values), str(200_000_000), str(tmp_path)]
    # Arenas of the C library would hide what is free from the limit.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    out = json.loads(done.stdout)
    if halve:
        assert out["pieces"] >= 2 and [kind for kind, _ in out["events"]] == ["out_of_memory"] * (
            out["pieces"].bit_length() - 1
        )
        assert 0 < out["loss"] < 20
    else:
        assert "out of memory at step 1, with micro-batches of 256" in out["refused"]
        assert "train.batch_size=128 and train.grad_accum=2" in out["hint"]

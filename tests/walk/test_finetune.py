"""Fine-tuning from the command line: killed and resumed, loaded, measured, trained on from, and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moectl
from moectl.cli.app import main
from moectl.corpus.loader import PackedDataset
from moectl.evaluation.losses import evaluate
from moectl.hf.lora import has_adapters, merged
from moectl.models.decoder import Decoder
from moectl.runs.rundir import RunDir
from moectl.training.state import newest_checkpoint
from moectl.walk.loading import load_run
from tests.support import of_the_clock, write_corpus

pytest.importorskip("peft")
BASE = """
data: {domains: [fish, sums], source: SOURCE, tokenizer: bpe:300, block_size: 16}
model: {num_layers: 2, hidden_size: 16, intermediate_size: 24, num_heads: 2, head_dim: 8}
moe: {router: {name: topk, top_k: 2}, num_experts: 4, layers: all}
optim: {warmup_steps: 2}
train: {steps: 12, batch_size: 4, threads: 1, log_every: 1, eval_every: 1000, check_every: 20}
"""
TUNE = """
model: {base: parent}
moe: {router: {name: topk, top_k: 2}, num_experts: 4, layers: all}
optim: {warmup_steps: 2, weight_decay: 0.3}
train: {steps: STEPS, batch_size: 4, threads: 1, log_every: 1, eval_every: 1000, check_every: 20, checkpoint_every: 10}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder whose home holds a run with experts to start from."""
    folder = tmp_path_factory.mktemp("place")
    source = write_corpus(folder / "texts")
    (folder / "base.yaml").write_text(BASE.replace("SOURCE", str(source)), encoding="utf-8")
    for name, steps in (("tune", 20), ("long", 3000)):
        (folder / f"{name}.yaml").write_text(TUNE.replace("STEPS", str(steps)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOECTL_HOME", str(folder / "home"))
        patch.chdir(folder)
        torch.set_num_threads(1)
        assert main(["train", "base.yaml", "--name", "parent"]) == 0
        yield folder


def run_of(place: Path, name: str) -> RunDir:
    return RunDir.open(place / "home" / "runs" / name)


def tune(name: str, *options: str) -> int:
    return main(["train", "tune.yaml", "--name", name, *options])


def test_lora_from_the_command_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune("adapted", "--lora", "3") == 0
    # Rank 3: q and o 16→16, k and v 16→8 columns or fewer, by layer; experts 16→48 and 24→16, four of them.
    shape = load_run("parent").model
    assert isinstance(shape, Decoder)
    keys = shape.config.num_kv_heads * shape.config.head_dim
    expected = 2 * 3 * (2 * (16 + 16) + 2 * (16 + keys) + 4 * ((16 + 48) + (24 + 16)))
    parameters = run_of(place, "adapted").record["parameters"]
    total = sum(parameter.numel() for parameter in shape.parameters()) + expected
    assert (parameters["trainable"], parameters["total"]) == (expected, total)
    assert f"training {expected:,} of {total:,} parameters" in capsys.readouterr().err


def test_step_0_of_a_lora_run_is_its_base_exactly(place: Path) -> None:
    tune("adapted", "--lora", "3")
    base, start = load_run("parent").model, load_run("adapted", step=0).model
    ids = torch.arange(20)[None]
    assert has_adapters(start)
    assert torch.equal(base(ids), start(ids))
    assert not torch.equal(base(ids), load_run("adapted").model(ids))


def test_its_checkpoint_holds_what_was_measured(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune("adapted", "--lora", "3")
    recorded = run_of(place, "adapted").record["metrics"]["eval/lm_loss"]
    capsys.readouterr()
    assert main(["eval", "adapted", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lm_loss"] == recorded
    for command in (["inspect", "routing", "adapted"], ["doctor", "adapted"]):
        assert main(command) == 0, capsys.readouterr().out


def test_a_loaded_or_taken_up_run_is_plain(place: Path) -> None:
    """``moectl.load`` and ``--base`` give the merged model: the same function to float32 rounding, trainable again."""
    tune("adapted", "--lora", "3")
    adapted, (plain, _) = load_run("adapted").model, moectl.load("adapted")
    ids = torch.arange(20)[None]
    assert not has_adapters(plain)
    torch.testing.assert_close(plain(ids), adapted(ids), rtol=0, atol=1e-5)  # logits of about 1, float32
    assert main(["train", "tune.yaml", "--name", "after", "--base", "adapted", "--freeze", "dense"]) == 0
    after = run_of(place, "after").record
    routers, expert = 2 * 4 * 16, 3 * 16 * 24
    assert after["parameters"]["trainable"] == routers + 8 * expert
    assert after["base"]["id"] == "adapted"
    assert main(["train", "tune.yaml", "--name", "again", "--base", "after"]) == 0  # nothing stays frozen for good
    assert run_of(place, "again").record["parameters"]["trainable"] == after["parameters"]["total"]


def test_frozen_parts_are_bit_for_bit_the_base(place: Path) -> None:
    assert tune("some", "--freeze", "router", "--freeze", "dense", "--train-experts", "0,3") == 0
    base, tuned = load_run("parent").model.state_dict(), load_run("some").model.state_dict()
    for name, tensor in tuned.items():
        if ".experts." in name:
            moved = [row for row in range(4) if not torch.equal(tensor[row], base[name][row])]
            assert moved == [0, 3], name
        elif "noise" not in name:
            assert torch.equal(tensor, base[name]), name


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lora", ["--lora", "2", "--set", "finetune.lora.dropout=0.1"]),
        pytest.param("rows", ["--train-experts", "1,2", "--freeze", "dense"], marks=pytest.mark.long),
    ],
)
def test_killed_and_resumed_it_is_the_same_run(place: Path, name: str, options: list[str]) -> None:
    assert main(["train", "tune.yaml", "--name", f"{name}-whole", "--steps", "30", *options]) == 0
    command = [sys.executable, "-m", "moectl", "train", "tune.yaml", "--name", f"{name}-cut", "--steps", "30", *options]
    process = subprocess.Popen(command, cwd=place, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    checkpoints = place / "home" / "runs" / f"{name}-cut" / "checkpoints"
    deadline = time.monotonic() + 120
    while not any(checkpoints.glob("step-*[1-9]0")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -9, "it ended before it could be killed"
    assert main(["train", "--resume", f"{name}-cut"]) == 0
    assert any(event.get("kind") == "resumed" for event in run_of(place, f"{name}-cut").events())
    whole, cut = (newest_checkpoint(run_of(place, f"{name}-{part}").checkpoints)[0] for part in ("whole", "cut"))
    assert whole.step == cut.step == 30
    for part in ("model", "optimizer", "rng"):
        assert whole.tensors[part].keys() == cut.tensors[part].keys()
        assert all(torch.equal(whole.tensors[part][key], cut.tensors[part][key]) for key in whole.tensors[part])
    rows = [
        [(row.step, {k: v for k, v in row.values.items() if not of_the_clock(k)}) for row in run.metrics()]
        for run in (run_of(place, f"{name}-whole"), run_of(place, f"{name}-cut"))
    ]
    assert [row for row in rows[0] if row[1]] == [row for row in rows[1] if row[1]]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--freeze", "rooter"], 2, "Did you mean 'router'"),
        (["--freeze", "router", "--freeze", "experts", "--freeze", "dense"], 2, "leaves nothing to train"),
        (["--train-experts", "0,9"], 2, "expert 9, but layer 0 has 4"),
        (["--train-experts", "x"], 2, "no expert's number"),
        (["--lora", "0"], 2, "greater than 0"),
        (["--lora", "4", "--freeze", "router"], 2, "does not go with finetune.lora"),
        (["--lora", "4", "--set", "finetune.lora.targets=mlp"], 2, "mlp has no effect"),
        (["--lora", "4", "--set", "finetune.train_experts={7: [0]}"], 2, "does not go with"),
        (["--set", "finetune.train_experts={7: [0]}"], 2, "layer 7, which has no experts"),
    ],
)
def test_bad_input_is_told_before_anything_is_trained(
    place: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, said: str
) -> None:
    assert tune("never", *options) == code
    talk = " ".join(capsys.readouterr().err.split())
    assert said in talk and "Traceback" not in talk
    assert not (place / "home" / "runs" / "never").exists()


def test_a_resumed_run_keeps_what_it_freezes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "long.yaml", "--name", "stopped", "--freeze", "router"]
    process = subprocess.Popen([sys.executable, "-m", "moectl", *command], cwd=place, stderr=subprocess.PIPE)
    checkpoints = place / "home" / "runs" / "stopped" / "checkpoints"
    while not any(checkpoints.glob("step-*10")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    capsys.readouterr()
    assert main(["train", "--resume", "stopped", "--freeze", "dense"]) == 2
    assert "finetune.freeze" in capsys.readouterr().err


def test_the_loss_after_merging_is_that_of_the_run(place: Path) -> None:
    tune("adapted", "--lora", "3")
    loaded = load_run("adapted")
    data = PackedDataset.open(loaded.data)
    adapted: Any = evaluate(loaded.model, data, bootstrap=0)
    plain: Any = evaluate(merged(loaded.model), data, bootstrap=0)
    assert plain.overall.lm_loss == pytest.approx(adapted.overall.lm_loss, rel=1e-6)

"""``moectl train`` as a process: killed, interrupted, asked twice, and given what cannot work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import of_the_clock, write_corpus

QUICK = """
data: {domains: [fish, sums], source: SOURCE, tokenizer: bpe:300, block_size: 16}
model: {num_layers: 2, hidden_size: 16, intermediate_size: 24, num_heads: 2, head_dim: 8}
moe: {router: {name: top1}, num_experts: 4, layers: all}
optim: {warmup_steps: 2}
train: {steps: STEPS, batch_size: 4, threads: 1, log_every: 1, eval_every: 1000, check_every: 20, checkpoint_every: 20}
"""
Moectl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with texts, two configs and a home of its own."""
    folder = tmp_path_factory.mktemp("place")
    source = write_corpus(folder / "texts")
    for name, steps in (("quick", 40), ("long", 4000)):
        text = QUICK.replace("SOURCE", str(source)).replace("STEPS", str(steps))
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def moectl(place: Path) -> Moectl:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(_command(*arguments), cwd=place, env=_env(place), capture_output=True, text=True)

    return run


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "moectl", *arguments]


def _env(place: Path) -> dict[str, str]:
    return {**os.environ, "MOECTL_HOME": str(place / "home"), "NO_COLOR": "1"}


def _start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        _command(*arguments), cwd=place, env=_env(place), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def _rows(place: Path, run: str) -> list[tuple[int, dict[str, Any]]]:
    lines = (place / "home" / "runs" / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["step"], {k: v for k, v in row["values"].items() if not of_the_clock(k)}) for row in rows]


def _weights(place: Path, run: str, step: int) -> bytes:
    return (place / "home" / "runs" / run / "checkpoints" / f"step-{step:08d}" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(moectl: Moectl) -> str:
    done = moectl("train", "quick.yaml", "--name", "whole", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["status"], document["step"]) == ("finished", 40)
    return "whole"


def test_killed_run_is_lost_and_resumes_bit_for_bit(place: Path, moectl: Moectl, whole: str) -> None:
    process = _start(place, "train", "quick.yaml", "--name", "killed", "--set", "train.steps=40")
    _wait_for(place / "home/runs/killed/checkpoints/step-00000020", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    listed = json.loads(moectl("runs", "ls", "--json").stdout)["runs"]
    status = next(run["status"] for run in listed if run["id"] == "killed")
    if status != "finished":  # the kill came in time
        assert status == "lost"
        resumed = moectl("train", "--resume", "killed")
        assert resumed.returncode == 0, resumed.stderr
        assert "resuming killed from step 20" in resumed.stderr
    assert _rows(place, "killed") == _rows(place, "whole")
    assert _weights(place, "killed", 40) == _weights(place, "whole", 40)


def test_interrupt_leaves_a_checkpoint_and_says_how_to_go_on(place: Path) -> None:
    process = _start(place, "train", "long.yaml", "--name", "stopped")
    _wait_for(place / "home/runs/stopped/checkpoints/step-00000020", process)
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 130, talk
    assert "moectl train --resume stopped" in talk
    record = json.loads((place / "home/runs/stopped/run.json").read_text(encoding="utf-8"))
    assert record["status"] == "interrupted" and "SIGINT" in record["exit_reason"]
    assert (place / f"home/runs/stopped/checkpoints/step-{record['step']:08d}").is_dir()


def test_two_processes_on_one_name(place: Path, moectl: Moectl) -> None:
    process = _start(place, "train", "long.yaml", "--name", "twice")
    try:
        _wait_for(place / "home/runs/twice/run.json", process)
        second = moectl("train", "long.yaml", "--name", "twice")
        assert second.returncode == 2
        assert "twice" in second.stderr and str(process.pid) in second.stderr
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def test_the_same_run_is_not_trained_twice(moectl: Moectl, whole: str) -> None:
    again = moectl("train", "quick.yaml", "--name", whole, "--json")
    assert again.returncode == 0 and json.loads(again.stdout)["already_done"] is True
    other = moectl("train", "quick.yaml", "--name", whole, "--seed", "7")
    assert other.returncode == 2 and "taken by a run of another" in other.stderr
    resumed = moectl("train", "--resume", whole)
    assert resumed.returncode == 2 and "has finished" in resumed.stderr


def test_a_checkpoint_cut_in_half_is_set_aside_by_name(place: Path, moectl: Moectl) -> None:
    process = _start(place, "train", "long.yaml", "--name", "damaged")
    _wait_for(place / "home/runs/damaged/checkpoints/step-00000040", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    checkpoints = sorted((place / "home/runs/damaged/checkpoints").glob("step-*"))
    newest, before = checkpoints[-1], checkpoints[-2]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    process = _start(place, "train", "--resume", "damaged")
    _wait_for(newest.with_name("step-00000060"), process)  # well past what it resumed from
    assert newest.with_name(f"{newest.name}.bad-1").is_dir()
    process.send_signal(signal.SIGTERM)
    _, talk = process.communicate(timeout=60)
    assert f"{newest.name}" in talk and "model.safetensors" in talk
    assert f"resuming damaged from step {int(before.name.split('-')[1])}" in talk


def test_resume_with_another_config_names_the_keys(place: Path, moectl: Moectl) -> None:
    changed = moectl("train", "--resume", "stopped", "long.yaml", "--set", "optim.lr=0.1")
    assert changed.returncode == 2
    assert "optim.lr" in changed.stderr and "train.steps" not in changed.stderr


def test_upcycling_a_dense_run_starts_as_that_run(place: Path, moectl: Moectl) -> None:
    assert moectl("train", "quick.yaml", "--preset", "dense", "--name", "parent").returncode == 0
    child = moectl(
        *("train", "quick.yaml", "--base", "parent", "--name", "child", "--set", "moe.init_noise=0"),
        *(f"--set=model.{key}=null" for key in _shape_keys()),
    )
    assert child.returncode == 0, child.stderr
    first, parent = _rows(place, "child")[0][1], _rows(place, "parent")[-1][1]
    assert first["eval/lm_loss"] == pytest.approx(parent["eval/lm_loss"], abs=1e-5)
    record = json.loads((place / "home/runs/child/run.json").read_text(encoding="utf-8"))
    assert (record["base"]["kind"], record["base"]["id"]) == ("run", "parent")


def test_a_base_with_another_tokenizer_is_refused(place: Path, moectl: Moectl, whole: str) -> None:
    source = ("--source", "texts", "--domains", "fish,sums", "--block-size", "16")
    other = json.loads(moectl("prepare", *source, "--tokenizer", "bpe:290", "--json").stdout)["id"]
    nulls = [f"--set=model.{key}=null" for key in _shape_keys()]
    refused = moectl("train", "quick.yaml", "--base", whole, "--data", other, *nulls)
    assert refused.returncode == 3, refused.stderr
    assert f"the tokenizer of the base '{whole}' is not the one that dataset {other}" in refused.stderr
    own = json.loads((place / f"home/runs/{whole}/run.json").read_text(encoding="utf-8"))["data"]["id"]
    assert f"--data {own}" in refused.stderr and "moectl prepare --tokenizer" in refused.stderr


def _shape_keys() -> list[str]:
    return ["num_layers", "hidden_size", "intermediate_size", "num_heads", "head_dim"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--router", "topp1"], 2, "top1"),
        (["--preset", "mo"], 2, "moe"),
        (["--set", "optim.lrr=1"], 2, "optim.lr"),
        (["--data", "nothing"], 4, "nothing"),
        (["--base", "tinny"], 2, "tiny"),
        (["--resume", "stoped"], 4, "stopped"),
        (["--device", "cuda:7"], 5, "cuda:7"),
        (["--device", "abacus"], 2, "abacus"),
        (["--set", "moe.layers=7"], 2, "moe.layers"),
        (["--set", "moe.router.noise_sdt=1"], 2, "noise_std"),
        (["--set", "train.steps=many"], 2, "train.steps"),
        (["--set", "train.batch_size=0"], 2, "train.batch_size"),
    ],
)
def test_bad_input(moectl: Moectl, whole: str, arguments: list[str], code: int, said: str, place: Path) -> None:
    before = sorted((place / "home/runs").iterdir())
    result = moectl("train", "quick.yaml", *arguments)
    assert result.returncode == code, result.stderr
    assert said in result.stderr and "Traceback" not in result.stderr
    assert sorted((place / "home/runs").iterdir()) == before

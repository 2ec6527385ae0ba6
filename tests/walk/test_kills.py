"""``moectl train`` killed with SIGKILL, again and again, wherever it is: it ends as the run that never was.

Kills come at three kinds of moments, drawn at random: while the process starts or takes up its checkpoint; some time
into training; and as soon as a folder that a checkpoint is being written to is seen. Every process is started
by the same command, ``moectl train CONFIG --resume auto``. In the end weights, moments, generators and every logged
number are those of the run that was left alone, to the last bit (CPU, one thread), and the registry holds each
number once.

``make test`` kills a few processes of a dense run and of one with all that moves in routing; ``make test-long``
twenty of a dense run and of one with each built-in router.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from moectl.plugins import router_entries
from moectl.runs.rundir import RunDir
from moectl.runs.store import Registry
from moectl.training.checkpoint_root import REPLACED, TEMPORARY
from moectl.training.state import checkpoint_steps, load_checkpoint, step_name
from tests.support import of_the_clock, write_corpus

#: Options that make a router move as much as it can; the others as they come.
OPTIONS: dict[str, dict[str, Any]] = {
    "topk": {"top_k": 2, "noise_std": 0.3, "random_routing": 0.1, "expert_dropout": 0.1},
}
EVERYTHING: dict[str, Any] = {
    "router": {"name": "topk", **OPTIONS["topk"]},
    "capacity": {"factor": 1.3, "dynamic": True, "overflow": "next-best"},
    "revive_dead": True,
    "balance_loss": "switch+cv2",
}
ROUTERS = sorted(name for name, entry in router_entries().items() if entry.target.startswith("moectl."))


class Kill(NamedTuple):
    """One kill: the kind of moment, the newest checkpoint then, and whether one was being written."""

    moment: str
    step: int | None
    writing: bool


class Bench:
    """A working folder with texts, a home, and one config by name of a run."""

    def __init__(self, folder: Path, moe: dict[str, Any] | None, steps: int, **train: Any) -> None:
        self.folder, self.steps = folder, steps
        self.home = folder / "home"
        self.environment = {**os.environ, "MOECTL_HOME": str(self.home), "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
        source = {"domains": ["fish", "sums"], "source": str(write_corpus(folder / "texts"))}
        noncausal = moe is not None and moe["router"]["name"] == "expert-choice"
        config = {
            "data": {**source, "tokenizer": "bpe:300", "block_size": 16},
            "model": {"num_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "head_dim": 8},
            "moe": None if moe is None else {"num_experts": 4, "layers": "all", **moe},
            "optim": {"warmup_steps": 2},
            "eval": {"max_blocks": 4},
            "train": {
                "steps": steps, "batch_size": 4, "grad_accum": 2, "threads": 1, "log_every": 1, "eval_every": 10,
                "check_every": 7, "checkpoint_every": 4, "allow_noncausal": noncausal,
                "collapse": {"min_expected_count": 20.0},
                "spike": {"action": "skip", "std": 2.0, "window": 8, "limit": 10_000}, **train,
            },
        }  # fmt: skip
        (folder / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")

    def start(self, name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "moectl", "train", "run.yaml", "--resume", "auto", "--name", name]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, text=True, **pipes)

    def finish(self, name: str) -> float:
        """Run to the end; how long it took until it logged something."""
        started, before = time.monotonic(), self.logged(name)
        process = self.start(name)
        while self.logged(name) == before and process.poll() is None:
            time.sleep(0.01)
        startup = time.monotonic() - started
        _, talk = process.communicate(timeout=600)
        assert process.returncode == 0, talk
        return startup

    def run(self, name: str) -> Path:
        return self.home / "runs" / name

    def writing(self, name: str) -> bool:
        """Whether a checkpoint is, or was, in the middle of being written."""
        try:
            entries = os.listdir(self.run(name) / "checkpoints")
        except FileNotFoundError:
            return False
        return any(entry.startswith((TEMPORARY, REPLACED)) for entry in entries)

    def logged(self, name: str) -> int:
        try:
            return (self.run(name) / "metrics.jsonl").stat().st_size
        except FileNotFoundError:
            return 0


def kill(bench: Bench, name: str, moment: str, draw: random.Random, startup: float) -> Kill | None:
    """Start the run and kill it at such a moment; None where it had ended before."""
    process = bench.start(name)
    before = bench.logged(name)
    with contextlib.closing(_moments(bench, name, moment, draw, startup, before)) as wait:
        for _ in wait:
            if process.poll() is not None:
                break
    process.kill()
    _, talk = process.communicate()
    assert process.returncode in (0, -9), talk
    steps = checkpoint_steps(bench.run(name) / "checkpoints")
    for step in steps:
        load_checkpoint(bench.run(name) / "checkpoints" / step_name(step))  # what has a name is whole
    if process.returncode == 0:
        return None
    if (bench.run(name) / "run.json").exists():
        assert RunDir.open(bench.run(name)).status in ("lost", "finished")
    return Kill(moment, steps[-1] if steps else None, bench.writing(name))


def _moments(bench: Bench, name: str, moment: str, draw: random.Random, startup: float, before: int) -> Iterator[None]:
    """Yields until it is time."""

    def until(seconds: float) -> Iterator[None]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            yield
            time.sleep(0.002)

    if moment == "start":
        yield from until(draw.uniform(0.0, startup))
        return
    while bench.logged(name) == before:  # it has trained on
        yield
        time.sleep(0.002)
    yield from until(draw.uniform(0.0, 0.25))
    while moment == "write" and not bench.writing(name):
        yield
    yield from until(draw.choice([0.0, draw.uniform(0.0, 0.006)]) if moment == "write" else 0.0)


def rows(folder: Path) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [
        (line["step"], line["tokens"], {k: v for k, v in line["values"].items() if not of_the_clock(k)})
        for line in lines
    ]


def assert_same(bench: Bench) -> None:
    whole, killed = bench.run("whole"), bench.run("killed")
    assert rows(whole) == rows(killed)
    last = step_name(bench.steps)
    for part in ("model", "optimizer", "rng", "routing"):
        ours, theirs = (folder / "checkpoints" / last / f"{part}.safetensors" for folder in (whole, killed))
        assert ours.read_bytes() == theirs.read_bytes(), part
    for folder in sorted((whole / "routing").iterdir()):
        assert folder.read_bytes() == (killed / "routing" / folder.name).read_bytes()
    told = [
        [(event["kind"], event["message"]) for event in RunDir.open(folder).events() if event["kind"] != "resumed"]
        for folder in (whole, killed)
    ]
    said = [[event for event in events if event[0] != "warning"] for events in told]
    assert said[0] == said[1], "each event once"
    leftovers = sorted(entry.name for entry in (killed / "checkpoints").iterdir())
    assert leftovers == sorted(entry.name for entry in (whole / "checkpoints").iterdir())


def assert_registered_once(bench: Bench) -> None:
    registry = Registry(bench.home / "registry.db")
    try:
        registry.sync(bench.home / "runs")
        entries = {entry.id: entry for entry in registry.list_runs(bench.home / "runs")}
        assert set(entries) == {"whole", "killed"}
        assert entries["whole"].tokens == entries["killed"].tokens and entries["killed"].status == "finished"
        assert registry.metric_names("whole") == registry.metric_names("killed")
        for name in registry.metric_names("whole"):
            ours, theirs = (registry.metrics(run, name) for run in ("whole", "killed"))
            assert [point.step for point in ours] == [point.step for point in theirs], name
            if not of_the_clock(name):
                assert [point.value for point in ours] == [point.value for point in theirs], name
    finally:
        registry.close()


def survives(bench: Bench, moments: list[str], seed: str) -> list[Kill]:
    """Kill a run at these moments, then let it end, and compare; the kills that hit."""
    draw, kills = random.Random(seed), []
    startup = bench.finish("whole")
    for moment in moments:
        hit = kill(bench, "killed", moment, draw, startup)
        if hit is None:
            break
        kills.append(hit)
    bench.finish("killed")
    assert_same(bench)
    assert_registered_once(bench)
    return kills


@pytest.mark.parametrize(
    ("moe", "train"),
    [(None, {}), (EVERYTHING, {}), (None, {"async_checkpoint": True})],
    ids=["dense", "everything", "async"],
)
def test_a_few_kills_change_nothing(tmp_path: Path, moe: dict[str, Any] | None, train: dict[str, Any]) -> None:
    kills = survives(Bench(tmp_path, moe, 80, **train), ["train", "write", "start"], "few")
    assert len(kills) >= 2


@pytest.mark.long
@pytest.mark.parametrize("router", ["dense", "everything", "async", "rollback", *ROUTERS])
def test_twenty_kills_change_nothing(tmp_path: Path, router: str) -> None:
    """``async``: everything, checkpoints written by a thread, and each layer computed twice. ``rollback``: everything,
    and a run that goes back and saves anew at every jump of the loss.
    """
    known = {"dense": None, "everything": EVERYTHING, "async": EVERYTHING, "rollback": EVERYTHING}
    moe = known.get(router, {"router": {"name": router, **OPTIONS.get(router, {})}})
    train: dict[str, Any] = {
        "async": {"async_checkpoint": True, "activation_checkpointing": True},
        "rollback": {"spike": {"action": "rollback", "std": 2.0, "window": 8, "limit": 10_000}},
    }.get(router, {})
    draw = random.Random(router)
    moments = ["train", "write", "write", "start"] * 5
    draw.shuffle(moments)
    bench = Bench(tmp_path, moe, 400, **train)
    kills = survives(bench, moments, router)
    if router == "rollback":
        jumps = [event for event in RunDir.open(bench.run("whole")).events() if event["kind"] == "loss_spike"]
        assert len(jumps) >= 4, "it has gone back"
    print(f"\n{router}: " + ", ".join(f"{k.moment}@{k.step}{' writing' * k.writing}" for k in kills))
    assert len(kills) == len(moments), "the run ended before"
    assert any(hit.writing for hit in kills), "kills hit checkpoints that were being written"

"""One run's process, as its group sees it: told to stop, left alone, killed, given what cannot be."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from moectl.runs.rundir import RunDir
from moectl.walk.children import Child, wait
from tests.support import write_corpus

STEPS = 4000


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """A run's process; what is still there at the end is killed."""
    config = {
        "name": "run",
        "data": {"domains": ["fish", "sums"], "source": str(write_corpus(tmp_path / "texts")), "tokenizer": "bpe:300",
                 "block_size": 16},
        "model": {"num_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "head_dim": 8},
        "moe": None,
        "optim": {"warmup_steps": 2},
        "train": {"steps": STEPS, "batch_size": 4, "threads": 1, "eval_every": STEPS, "checkpoint_every": STEPS},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    spec = {
        "config": str(tmp_path / "run.yaml"), "data": None, "command": ["moectl", "ablate"], "commit": "c" * 40,
        "group": {"name": "g", "variant": "dense"}, "terms": {"price_per_hour": 3600.0, "share": 0.5},
    }  # fmt: skip
    environment = {"MOECTL_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    children: list[Child] = []

    def begin(**changes: Any) -> Child:
        children.append(Child({**spec, **changes}, environment=environment, log=tmp_path / "log"))
        return children[-1]

    yield begin
    for child in children:
        if not child.over:
            child._process.kill()
        child.close()


def heard(child: Child, kind: str | None = None) -> list[dict[str, Any]]:
    """Its messages up to the first of this kind, or to its end."""
    messages: list[dict[str, Any]] = []
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        wait([child], 0.05)
        over = child.over
        messages += child.messages()
        if over or (kind is not None and any(message["kind"] == kind for message in messages)):
            return messages
    raise AssertionError(f"no {kind} came: {messages}")


def run_of(folder: Path) -> RunDir:
    return RunDir.open(folder / "home" / "runs" / "run")


def test_asked_to_stop_it_ends_in_order(start: Callable[..., Child], tmp_path: Path) -> None:
    child = start()
    first = heard(child, "step")
    assert [message["run"] for message in first if message["kind"] == "begun"] == ["run"]
    child.stop("the money is gone")
    heard(child)
    assert child.ending is not None and child.ending["status"] == "interrupted"
    record = run_of(tmp_path).record
    assert record["exit_reason"].startswith("the money is gone after step ") and 0 < record["step"] < STEPS
    assert record["group"] == {"name": "g", "variant": "dense"} and record["command"] == "moectl ablate"
    assert (run_of(tmp_path).checkpoints / f"step-{record['step']:08d}").is_dir()
    assert record["cost"] == pytest.approx(record["duration_s"] / 2, abs=1e-2)


def test_with_its_group_gone_it_ends_in_order(start: Callable[..., Child], tmp_path: Path) -> None:
    child = start()
    heard(child, "step")
    assert child._process.stdin is not None
    child._process.stdin.close()  # as the kernel closes the pipes of a process that was killed
    heard(child)
    run = run_of(tmp_path)
    assert (run.status, run.live) == ("interrupted", False)
    assert run.record["exit_reason"].startswith("the process of the group is gone after step ")
    assert (run.checkpoints / f"step-{run.record['step']:08d}").is_dir()


def test_killed_it_is_missed_and_its_last_words_are_kept(start: Callable[..., Child], tmp_path: Path) -> None:
    child = start()
    heard(child, "begun")
    os.kill(json.loads((run_of(tmp_path).path / ".lock").read_text("utf-8"))["pid"], signal.SIGKILL)
    heard(child)
    assert child.ending is None and child.death == "its process was killed by SIGKILL"
    assert run_of(tmp_path).status == "lost"


def test_what_cannot_be_is_said_and_not_thrown(start: Callable[..., Child], tmp_path: Path) -> None:
    child = start(data="nothing")
    heard(child)
    assert child.ending is not None and (child.ending["kind"], child.ending["exit_code"]) == ("error", 4)
    assert "nothing" in child.ending["message"] and child.ending["hint"]
    broken = start(config=str(tmp_path / "none.yaml"))
    heard(broken)
    assert broken.ending is not None and broken.ending["exit_code"] == 4
    assert "Traceback" not in (tmp_path / "log").read_text("utf-8")

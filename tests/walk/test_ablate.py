"""``moectl ablate`` as processes: killed, interrupted, out of money, with runs that die or fail; and typed again.

In the end every number is that of the group that nobody touched, to the last bit (CPU, one thread), and nothing is
there twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moectl.cli.app import main
from moectl.runs.rundir import RunDir
from moectl.runs.store import Registry
from tests.support import of_the_clock, write_corpus

CONFIG = """
data: {domains: [fish, sums], source: SOURCE, tokenizer: bpe:300, block_size: 16}
model: {num_layers: 2, hidden_size: 16, intermediate_size: 24, num_heads: 2, head_dim: 8}
moe: {num_experts: 4, layers: all}
optim: {warmup_steps: 2}
eval: {max_blocks: 4}
train: {steps: 120, batch_size: 4, threads: 1, log_every: 1, eval_every: 40, check_every: 20, checkpoint_every: 20}
"""
STEPS = 120
ASKED = ("ablate", "run.yaml", "--presets", "dense,moe", "--seeds", "2")
RUNS = ("dense-s0", "moe-s0", "dense-s1", "moe-s1")


class Bench:
    """A working folder with texts and a config, and a home of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        text = CONFIG.replace("SOURCE", str(write_corpus(folder / "texts")))
        (folder / "run.yaml").write_text(text, encoding="utf-8")
        (folder / "json.py").write_text("raise SystemExit('a user file that no process of ours may import')")
        self.environment = {**os.environ, "MOECTL_HOME": str(self.home), "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, "-P", "-m", "moectl", *arguments]
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, text=True, **pipes)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        text, talk = process.communicate(timeout=300)
        return subprocess.CompletedProcess(arguments, process.returncode, text, talk)

    def done(self, code: int, *arguments: str) -> dict[str, Any]:
        """The JSON document of a command that ends with ``code``."""
        result = self.run(*arguments, "--json")
        assert result.returncode == code, (result.stdout, result.stderr)
        document: dict[str, Any] = {**json.loads(result.stdout), "talk": result.stderr}
        return document

    def folder_of(self, run: str) -> Path:
        return self.home / "runs" / run

    def opened(self, run: str) -> RunDir:
        return RunDir.open(self.folder_of(run))

    def steps(self, run: str) -> int:
        """Of the newest checkpoint; -1 without one."""
        found = (self.folder_of(run) / "checkpoints").glob("step-????????")
        return max((int(path.name[5:]) for path in found), default=-1)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("ablate"))


@pytest.fixture(scope="module")
def whole(bench: Bench) -> dict[str, Any]:
    return bench.done(0, *ASKED, "--name", "whole", "--price-per-hour", "3600")


def until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def kill_writer(folder: Path) -> None:
    """SIGKILL for the process that writes a run, if there is one."""
    run = RunDir(folder)
    if run.live:
        with contextlib.suppress(ProcessLookupError):
            os.kill(json.loads((folder / ".lock").read_text("utf-8"))["pid"], signal.SIGKILL)


def rows(folder: Path) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [
        (line["step"], line["tokens"], {k: v for k, v in line["values"].items() if not of_the_clock(k)})
        for line in lines
    ]


def assert_as_whole(bench: Bench, group: str, names: tuple[str, ...] = RUNS) -> None:
    """Every run of ``group`` is that of the group that was left alone, bit for bit, and registered once."""
    for name in names:
        ours, theirs = bench.folder_of(f"{group}-{name}"), bench.folder_of(f"whole-{name}")
        assert rows(ours) == rows(theirs), name
        for part in ("model", "optimizer", "rng"):
            file = f"checkpoints/step-{STEPS:08d}/{part}.safetensors"
            assert (ours / file).read_bytes() == (theirs / file).read_bytes(), (name, part)
    registry = Registry(bench.home / "registry.db")
    try:
        registry.sync(bench.home / "runs")
        entries = registry.list_runs(bench.home / "runs", group=group)
        assert sorted(entry.id for entry in entries) == sorted(f"{group}-{name}" for name in names)
        assert {entry.status for entry in entries} == {"finished"}
        points = registry.metrics(f"{group}-{names[-1]}", "train/lm_loss")
        assert [point.step for point in points] == list(range(1, STEPS + 1))
    finally:
        registry.close()


def test_a_group_is_trained_compared_and_not_trained_again(bench: Bench, whole: dict[str, Any]) -> None:
    assert [run["run"] for run in whole["runs"]] == [f"whole-{name}" for name in RUNS]  # seed by seed
    assert {(run["status"], run["step"]) for run in whole["runs"]} == {("finished", STEPS)}
    comparison = whole["comparison"]
    (verdict,) = comparison["verdicts"]
    assert comparison["matched"] and comparison["at_tokens"] == STEPS * 4 * 16
    assert (verdict["baseline"], verdict["other"], verdict["method"]) == ("dense", "moe", "paired by seed")
    assert verdict["difference"]["low"] is not None
    # Cost: a dollar a second, over all runs; the columns are those of the runs.
    assert whole["cost"] == pytest.approx(sum(run["cost"] for run in whole["runs"]), abs=1e-3)
    for run in whole["runs"]:
        assert run["cost"] == pytest.approx(run["duration_s"], abs=1e-3)
    configurations = comparison["configurations"]
    assert [group["label"] for group in configurations] == ["dense", "moe"]
    assert sum(group["cost"] for group in configurations) == pytest.approx(whole["cost"], abs=1e-3)

    record = json.loads((bench.home / "groups" / "whole" / "group.json").read_text("utf-8"))
    assert [member["run"] for member in record["members"]] == [f"whole-{name}" for name in RUNS]
    assert bench.opened("whole-moe-s1").record["group"] == {"name": "whole", "variant": "moe"}
    before = {name: (bench.folder_of(f"whole-{name}") / "run.json").stat().st_mtime_ns for name in RUNS}
    again = bench.done(0, *ASKED, "--name", "whole")
    assert not any(run["trained"] for run in again["runs"]) and again["comparison"] == comparison
    assert before == {name: (bench.folder_of(f"whole-{name}") / "run.json").stat().st_mtime_ns for name in RUNS}
    assert bench.done(0, "runs", "compare", "--group", "whole")["verdicts"] == comparison["verdicts"]
    listed = bench.done(0, "runs", "ls", "--group", "whole")["runs"]
    assert {run["group"] for run in listed} == {"whole"} and len(listed) == 4
    shown = bench.run("runs", "compare", "--group", "whole").stdout
    assert "paired by seed, n = 2" in shown and "$" in shown


def test_all_variants_see_the_same(bench: Bench, whole: dict[str, Any]) -> None:
    dense, moe = (rows(bench.folder_of(f"whole-{name}")) for name in ("dense-s0", "moe-s0"))
    assert [row[:2] for row in dense] == [row[:2] for row in moe]
    rates = [[row[2]["train/lr"] for row in lines if "train/lr" in row[2]] for lines in (dense, moe)]
    assert rates[0] == rates[1] and len(rates[0]) == STEPS
    assert max(rates[0]) == rates[0][1]  # the warm-up's two steps


def kill_all(bench: Bench, process: subprocess.Popen[str], group: str) -> None:
    """SIGKILL for the group's process and those of its runs."""
    process.kill()
    for folder in bench.home.glob(f"runs/{group}-*"):
        kill_writer(folder)
    process.communicate()
    until(lambda: not any(RunDir(folder).live for folder in bench.home.glob(f"runs/{group}-*")))


def test_killed_in_the_middle_it_ends_as_if_it_had_not_been(bench: Bench, whole: dict[str, Any]) -> None:
    asked = (*ASKED[:-1], "0,", "--name", "killed", "--parallel", "2")
    process = bench.start(*asked)
    until(lambda: bench.steps("killed-moe-s0") >= 20, process)
    kill_all(bench, process, "killed")
    assert bench.opened("killed-moe-s0").status in ("lost", "finished")
    done = bench.done(0, *asked)
    assert {(run["status"], run["step"]) for run in done["runs"]} == {("finished", STEPS)}
    assert_as_whole(bench, "killed", RUNS[:2])
    losses = {row["id"].removeprefix("whole-"): row["eval_lm_loss"] for row in whole["comparison"]["runs"]}
    for row in done["comparison"]["runs"]:
        assert row["eval_lm_loss"] == losses[row["id"].removeprefix("killed-")]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again(bench: Bench, whole: dict[str, Any], seed: int) -> None:
    """At random moments: the group's process alone (its runs then end in order), or all processes at once."""
    draw, group, kills = random.Random(seed), f"often{seed}", []
    asked = (*ASKED, "--name", group)
    while len(kills) < 8:
        process = bench.start(*asked, "--parallel", str(draw.choice([1, 2])))
        moment, alone = time.monotonic() + draw.uniform(1.0, 9.0), draw.random() < 0.4
        while time.monotonic() < moment and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None:
            break
        kills.append("alone" if alone else "all")
        if alone:
            process.kill()
            process.communicate()  # typed again at once: it waits for what still ends
        else:
            kill_all(bench, process, group)
    done = bench.done(0, *asked)
    print(f"\n{group}: {', '.join(kills)}")
    assert kills and {run["status"] for run in done["runs"]} == {"finished"}
    assert_as_whole(bench, group)
    ours, theirs = (document["comparison"]["verdicts"] for document in (done, whole))
    assert ours == theirs


def test_ctrl_c_and_a_budget_stop_all_with_checkpoints(bench: Bench, whole: dict[str, Any]) -> None:
    names = ("dense-s0", "dense-s1")
    asked = ("ablate", "run.yaml", "--presets", "dense", "--seeds", "2", "--name", "stopped", "--parallel", "2")
    process = bench.start(*asked)
    until(lambda: min(bench.steps(f"stopped-{name}") for name in names) >= 0, process)
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped by SIGINT" in talk, talk
    for name in names:
        run = bench.opened(f"stopped-{name}")
        assert run.status in ("interrupted", "finished") and bench.steps(run.id) == run.record["step"]

    # A dollar a second, of which two runs have half each: what they had before has that price, too.
    spent = sum(bench.opened(f"stopped-{name}").record["duration_s"] for name in names) / 2
    priced = (*asked, "--price-per-hour", "3600", "--max-cost")
    short = bench.done(130, *priced, f"{spent + 0.5:.2f}")
    assert "the group's budget" in short["stopped"] and "used up" in short["stopped"]
    reached = {run["run"]: run["step"] for run in short["runs"]}
    assert all(step < STEPS for step in reached.values()), "the test's budget is too large"
    done = bench.done(0, *priced, "1000")
    assert done["cost"] > short["cost"] > 0
    assert done["cost"] == pytest.approx(sum(run["cost"] for run in done["runs"]), abs=1e-3)
    for ended in done["runs"]:
        assert ended["cost"] == pytest.approx(ended["duration_s"] / 2, abs=1e-2)
    assert_as_whole(bench, "stopped", names)


def test_a_run_that_dies_or_fails_leaves_the_others_alone(bench: Bench) -> None:
    asked = ("ablate", "run.yaml", "--presets", "dense", "--variant", "wild:optim.lr=1e30,optim.grad_clip=null")
    asked = (*asked, "--variant", "calm:optim.lr=1e-3", "--seeds", "3,", "--name", "mixed")
    process = bench.start(*asked, "--json")
    until(lambda: bench.steps("mixed-dense-s3") >= 0, process)
    kill_writer(bench.folder_of("mixed-dense-s3"))
    text, talk = process.communicate(timeout=120)
    assert process.returncode == 1, talk
    dense, wild, calm = json.loads(text)["runs"]
    assert (dense["status"], calm["status"], wild["status"]) == ("lost", "finished", "failed")
    assert "killed by SIGKILL" in dense["trouble"] and "nan" in wild["reason"]
    again = bench.done(1, *asked)
    dense, wild, calm = again["runs"]
    assert (dense["status"], dense["trained"], wild["trained"], calm["trained"]) == ("finished", True, False, False)
    assert "would again" in again["talk"]


BAD = [
    (("--price-per-hour", "-1"), "--price-per-hour"),
    (("--price-per-hour", "0"), "--price-per-hour"),
    (("--price-per-hour", "nan"), "--price-per-hour"),
    (("--price-per-hour", "1", "--max-cost", "-80"), "--max-cost"),
    (("--price-per-hour", "1", "--max-cost", "inf"), "--max-cost"),
    (("--price-per-hour", "1", "--max-cost-per-run", "0"), "--max-cost-per-run"),
    (("--name", "new", "--max-cost", "80"), "--price-per-hour"),
    (("--parallel", "0"), "--parallel"),
    (("--parallel", "4096"), "cores"),
    (("--name", "../x"), "group name"),
    (("--name", "whole", "--steps", "100"), "train.steps"),
    (("--seeds", "none"), "--seeds"),
    (("--data", "nothing"), "nothing"),
    (("--set", "moe.router.noise_sdt=1"), "noise_std"),
    (("--set", "train.seed=1"), "--seeds"),
    (("--variant", "long:train.steps=130"), "train.steps"),
    (("--variant", "again:model.num_layers=2"), "the same configuration"),
    (("--presets", "dense,mo"), "moe"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD)
def test_bad_input_starts_nothing(
    bench: Bench,
    whole: dict[str, Any],
    arguments: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MOECTL_HOME", str(bench.home))
    monkeypatch.chdir(bench.folder)
    before = sorted(path.name for path in (bench.home / "runs").iterdir())
    code = main([*ASKED, *arguments])
    error = capsys.readouterr().err
    assert code == (4 if "--data" in arguments else 2), error
    assert said in error and "Traceback" not in error
    assert sorted(path.name for path in (bench.home / "runs").iterdir()) == before

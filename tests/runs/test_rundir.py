"""The run folder: one writer, whole files, nothing doubled on resume."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from moectl.errors import ConfigError, MoectlError, NotFoundError
from moectl.runs import RunDir, find_run

MakeRun = Callable[..., RunDir]

_HOLD = """
import sys, time
from moectl.runs import RunDir
run = RunDir.create(sys.argv[1], config_yaml="", record={"seed": 0})
run.log(1, 10, {"train/loss": 1.0})
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other_process(home: Path):  # type: ignore[no-untyped-def]
    """Another process that writes the run ``busy``."""
    process = subprocess.Popen([sys.executable, "-c", _HOLD, "busy"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


def test_second_writer_is_refused_and_told_the_pid(other_process: subprocess.Popen[str], home: Path) -> None:
    for attempt in (
        lambda: RunDir.create("busy", config_yaml="", record={}),
        lambda: RunDir.open(home / "runs/busy").acquire(),
        lambda: RunDir.open(home / "runs/busy").update(status="finished"),
    ):
        with pytest.raises(ConfigError, match=f"PID {other_process.pid} ") as caught:
            attempt()
        assert caught.value.exit_code == 2
    assert RunDir.open(home / "runs/busy").status == "running"


def test_killed_run_is_lost_and_its_lock_is_free(other_process: subprocess.Popen[str], home: Path) -> None:
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    run = RunDir.open(home / "runs/busy")
    assert (run.status, run.record["status"]) == ("lost", "running")
    run.acquire()
    assert run.status == "running"
    assert [row.step for row in run.metrics()] == [1]
    run.release()


def test_an_existing_run_is_never_overwritten(make_run: MakeRun) -> None:
    make_run("a")
    with pytest.raises(ConfigError, match="the run 'a' exists already"):
        RunDir.create("a", config_yaml="", record={})


@pytest.mark.parametrize("id", ["", "..", "a/b", ".hidden", "a b", "x" * 101])
def test_unusable_names(id: str) -> None:
    with pytest.raises(ConfigError, match="not a usable run name"):
        RunDir.create(id, config_yaml="", record={})


TOKEN = "hf_" + "aB3dEfGh" * 4 + "iJ"


def test_a_config_is_written_as_it_is(home: Path) -> None:
    config = (
        "name: sk-learn-moe1\ndata: {sources: {code: ./hf_poems12345, cookie: ./sk-learn-baseline-2}}\n"
        "moe: {router: {name: top1, secret_width: 4, router_key: gate, token_mode: causal, eos_token: '<|end|>'}}\n"
    )
    with RunDir.create("sk-learn-moe1", config_yaml=config, record={"data": {"folder": "./hf_poems12345"}}) as run:
        assert (run.path / "config.yaml").read_text() == config
    record = RunDir.open(run.path).record
    assert (record["id"], record["name"], record["data"]) == (
        "sk-learn-moe1",
        "sk-learn-moe1",
        {"folder": "./hf_poems12345"},
    )


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ("moe: {router: {name: top1, api_token: planted-value-1}}", "moe.router.api_token"),
        ("moe: {router: {hf_key: planted-value-1}}", "moe.router.hf_key"),
        (f"model: {{base: '{TOKEN}'}}", "model.base"),
        ("data: {sources: {code: 'https://me:planted-value-1@host/x'}}", "data.sources.code"),
        ("data: {files: [plain, planted-in-environment]}", "data.files[1]"),
    ],
)
def test_a_secret_in_a_config_reaches_no_file(
    home: Path, config: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "planted-in-environment")
    with pytest.raises(ConfigError) as caught:
        RunDir.create("a", config_yaml=config, record={})
    assert f"'{key}'" in caught.value.message and "environment" in (caught.value.hint or "")
    assert "planted" not in str(caught.value) and TOKEN not in str(caught.value)
    assert not (home / "runs").exists()


def test_numbers_come_back_as_logged(make_run: MakeRun) -> None:
    run = make_run("a", losses=[], close=False)
    run.log(1, 10, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1})
    run.release()
    (row,) = run.metrics()
    assert math.isnan(row.values["a"]) and row.values["b"] == math.inf
    assert row.values["c"] == -math.inf and row.values["d"] == 0.1
    assert json.loads((run.path / "metrics.jsonl").read_text())["values"]["a"] == "NaN"


def test_truncate_after_forgets_what_will_be_done_again(make_run: MakeRun) -> None:
    run = make_run("a", close=False)
    run.event("note", "no step")
    for step in (100, 200, 300):
        run.event("check", "with a step", step=step)
        run.routing(step, {"layers": {"3": [1, 2]}})
    run.truncate_after(200)
    run.log(201, 201_000, {"train/lm_loss": 1.0})
    run.release()
    assert [row.step for row in run.metrics()] == [100, 100, 200, 200, 201]
    assert [event.get("step") for event in run.events()] == [None, 100, 200]
    assert sorted(file.name for file in (run.path / "routing").iterdir()) == [
        "step-00000100.json",
        "step-00000200.json",
    ]
    assert run.record["generation"] == 1


def test_a_position_cuts_what_came_later_of_the_same_step_and_earlier_positions_stay_true(make_run: MakeRun) -> None:
    run = make_run("r", losses=[3.0, 2.0, 1.0], status="running", close=False)
    metrics, events = run.path / "metrics.jsonl", run.path / "events.jsonl"
    run.event("collapse", "at 300, däs Ünicode", step=300)
    first = run.position()
    assert first == {"metrics": metrics.stat().st_size, "events": events.stat().st_size}
    run.event("warning", "of no step")
    run.log(300, 300_000, {"eval/lm_loss": 0.5})
    run.event("finished", "all done", step=300)
    run.routing(400, {})
    kept, said = metrics.read_bytes()[: first["metrics"]], events.read_bytes()[: first["events"]]
    run.truncate_after(300, first)
    assert metrics.read_bytes() == kept
    assert events.read_bytes().startswith(said) and [event["kind"] for event in run.events()] == ["collapse", "warning"]
    assert not list((run.path / "routing").iterdir())
    run.event("resumed", "from 300", step=300)
    second = run.position()
    run.log(400, 400_000, {"train/lm_loss": 0.4})
    run.truncate_after(300, second)
    assert metrics.read_bytes() == kept and [event["kind"] for event in run.events()][-1] == "resumed"
    run.truncate_after(300, first)
    assert [event["kind"] for event in run.events()] == ["collapse", "warning"]
    run.release()


def test_update_outside_the_lock_takes_it_for_the_moment(make_run: MakeRun) -> None:
    run = make_run("a")
    first, second = RunDir.open(run.path), RunDir.open(run.path)
    first.update(cost=1.5)
    second.update(marks=["x"])  # must not lose what the first one wrote
    assert (RunDir.open(run.path).record["cost"], RunDir.open(run.path).record["marks"]) == (1.5, ["x"])
    assert not run.live


def test_read_only_home_says_what_to_do(
    tmp_path: Path, without_privileges: Callable[[], AbstractContextManager[None]]
) -> None:
    tmp_path.chmod(0o500)
    try:
        with without_privileges(), pytest.raises(MoectlError) as caught:
            RunDir.create("a", config_yaml="", record={})
    finally:
        tmp_path.chmod(0o700)
    assert "MOECTL_HOME" in (caught.value.hint or "")


def test_find_by_id_prefix_name_folder(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_run("moe-abc", name="pretty")
    make_run("moe-abd")
    assert find_run("moe-abc") == find_run("pretty") == find_run(one.path) == one.path
    assert find_run("moe-abd").name == "moe-abd"
    monkeypatch.chdir(one.path.parent.parent)
    assert find_run("runs/moe-abc") == one.path
    with pytest.raises(ConfigError, match="'moe-ab' fits 2 runs: moe-abc, moe-abd"):
        find_run("moe-ab")
    with pytest.raises(NotFoundError) as caught:
        find_run("moe-xbc")
    assert caught.value.exit_code == 4 and "moe-abc" in (caught.value.hint or "")


def test_without_a_name_the_newest_finished_run(make_run: MakeRun) -> None:
    with pytest.raises(NotFoundError, match="no run yet"):
        find_run()
    make_run("c", status="collapsed")
    with pytest.raises(NotFoundError, match="no run has finished yet; the newest, 'c', is collapsed"):
        find_run()
    make_run("old", created="2026-01-01T00:00:00.000Z")
    make_run("new", created="2026-01-02T00:00:00.000Z")
    assert find_run().name == "new"

"""The sign of life: where the lock does not reach, it tells the living from the lost."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moectl.cli.app import main
from moectl.errors import ConfigError
from moectl.runs import RunDir, heartbeat, rundir
from moectl.runs.heartbeat import Beat, Heartbeat, alive_elsewhere, last_beat
from moectl.runs.logger import RunRecorder
from tests.runs.conftest import MakeRun


def seen(
    folder: Path, *, ago: float, host: str = "host-b", boot: str | None = None, written: float | None = None
) -> None:
    """A sign of life ``ago`` seconds by its writer's clock, and ``written`` by that of the file system."""
    note = {"pid": 77, "host": host, "time": time.time() - ago, "boot": boot}
    (folder / heartbeat.NAME).write_text(json.dumps(note), encoding="ascii")
    moment = time.time() - (ago if written is None else written)
    os.utime(folder / heartbeat.NAME, (moment, moment))


def test_it_beats_until_it_is_stopped(tmp_path: Path) -> None:
    beating = Heartbeat(tmp_path, every=0.01)
    first = last_beat(tmp_path)
    assert first is not None and (first.pid, first.host) == (os.getpid(), platform.node()) and 0 <= first.age < 5
    deadline = time.monotonic() + 20
    while (now := last_beat(tmp_path)) is None or now.time == first.time:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    beating.stop()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pid": "x", "host": "a", "time": 1}'])
def test_what_cannot_be_read_is_no_sign(tmp_path: Path, text: str) -> None:
    (tmp_path / heartbeat.NAME).write_text(text, encoding="ascii")
    assert last_beat(tmp_path) is None and alive_elsewhere(tmp_path, network=True) is None


@pytest.mark.parametrize(
    ("ago", "host", "network", "alive"),
    [
        (100.0, "host-b", True, True),
        (-100.0, "host-b", True, True),  # a clock that is ahead
        (130.0, "host-b", True, False),
        (-130.0, "host-b", True, False),
        (1.0, platform.node(), True, False),  # of this host the lock knows
        (1.0, "host-b", False, False),  # a container's name changes; the lock of a local disk does not lie
    ],
)
def test_who_is_alive_elsewhere(tmp_path: Path, ago: float, host: str, network: bool, alive: bool) -> None:
    seen(tmp_path, ago=ago, host=host)
    found = alive_elsewhere(tmp_path, network=network)
    assert (found is not None) == alive
    assert found is None or (found.pid, found.host) == (77, "host-b")


@pytest.mark.parametrize(
    ("host", "boot", "alive"),
    [
        (platform.node(), "another-boot", True),  # names come twice
        (platform.node(), None, False),
        ("host-b", heartbeat._boot(), False),  # a container of this machine, whose locks reach here
        ("host-b", "another-boot", True),
    ],
)
@pytest.mark.skipif(heartbeat._boot() is None, reason="this system gives its boots no names")
def test_the_boot_tells_machines_apart_not_the_name(tmp_path: Path, host: str, boot: str | None, alive: bool) -> None:
    seen(tmp_path, ago=1.0, host=host, boot=boot)
    assert (alive_elsewhere(tmp_path, network=True) is not None) == alive


def test_one_clock_that_is_wrong_makes_no_run_lost(tmp_path: Path) -> None:
    seen(tmp_path, ago=-3600.0, written=5.0)
    assert alive_elsewhere(tmp_path, network=True) is not None, "the writer's clock is an hour ahead"
    seen(tmp_path, ago=3600.0, written=3600.0)
    assert alive_elsewhere(tmp_path, network=True) is None
    # This machine's clock is an hour ahead: what it writes itself has the file system's time.
    assert alive_elsewhere(tmp_path, network=True, now=time.time() - 3600.0 + 20.0) is not None


def test_a_sign_that_cannot_be_removed_keeps_no_run_from_its_end(make_run: MakeRun) -> None:
    run = make_run("stuck", close=False)
    recorder = RunRecorder(run)
    recorder._heartbeat.path = run.path / "routing"  # a folder, which unlink refuses
    recorder.close()
    assert not run.live


def test_a_run_alive_elsewhere_is_running_and_gets_no_second_writer(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder as on a network file system that carries no locks: the kind of file system is all that is set here."""
    run = make_run("far", status="running")
    seen(run.path, ago=4.0)
    assert run.status == "lost", "on a local disk the lock alone decides"
    monkeypatch.setattr(
        rundir, "alive_elsewhere", lambda folder, now=None: alive_elsewhere(folder, network=True, now=now)
    )
    assert run.live and run.status == "running"
    with pytest.raises(ConfigError, match=r"written by PID 77 on host-b, [45] s ago") as caught:
        run.acquire()
    assert "120 s" in str(caught.value.hint)
    seen(run.path, ago=500.0)
    assert not run.live and run.status == "lost"
    run.acquire().release()


KILLED = """
import sys, time
from pathlib import Path
from moectl.runs import RunDir
from moectl.runs.logger import RunRecorder
run = RunDir.create("killed", config_yaml="{}", record={})
with RunRecorder(run) as recorder:
    recorder.log(1, 10, {"train/lm_loss": 1.0})
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_killed_run_is_lost_and_says_when_it_was_last_seen(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {**os.environ, "MOECTL_HOME": str(home)}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        assert RunDir.open(home / "runs" / "killed").status == "running"
        process.kill()
    assert main(["runs", "ls", "--json"]) == 0
    assert [run["status"] for run in json.loads(capsys.readouterr().out)["runs"]] == ["lost"]
    assert main(["runs", "show", "killed", "--json"]) == 0
    last = json.loads(capsys.readouterr().out)["last_seen"]
    assert last["pid"] == process.pid and time.time() - last["time"] < 60
    assert main(["runs", "show", "killed"]) == 0
    assert f"PID {process.pid} on {platform.node()}" in capsys.readouterr().out
    run = RunDir.open(home / "runs" / "killed").acquire()
    with RunRecorder(run):
        now = pytest.approx(time.time(), abs=60)
        assert last_beat(run.path) == Beat(os.getpid(), platform.node(), now, heartbeat._boot())
    assert last_beat(run.path) is None, "who ends in order leaves its ending, and no sign of life"

"""What a run costs over all its sittings, and the budget that ends it: no number of the run moves by either."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from moectl import paths
from moectl.cli.app import main
from moectl.config.schema import ExperimentConfig
from moectl.errors import ConfigError
from moectl.runs.rundir import RunDir, now, seconds_since_epoch
from moectl.walk.budget import Meter, Terms, spent_before, used_up
from moectl.walk.train import RunRequest, resume_run, start_run
from tests.support import of_the_clock, write_corpus

STEPS = 60
DOLLAR_A_SECOND = 3600.0


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_COLOR", "1")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_corpus(tmp_path_factory.mktemp("budget") / "texts"))


@pytest.fixture
def config(texts: str) -> ExperimentConfig:
    values: dict[str, Any] = {
        "name": "run",
        "data": {"domains": ["fish", "sums"], "source": texts, "tokenizer": "bpe:300", "block_size": 16},
        "model": {"num_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "head_dim": 8},
        "moe": {"num_experts": 4, "layers": "all"},
        "optim": {"warmup_steps": 2},
        "train": {
            "steps": STEPS, "batch_size": 4, "threads": 1, "log_every": 1, "eval_every": 30, "checkpoint_every": 30,
        },
    }  # fmt: skip
    return ExperimentConfig.model_validate(values)


@pytest.fixture
def run() -> Iterator[RunDir]:
    with RunDir.create("other", config_yaml="train: {}\n", record={}) as made:
        yield made


def rows(run: RunDir) -> list[Any]:
    return [
        (row.step, row.tokens, {name: value for name, value in row.values.items() if not of_the_clock(name)})
        for row in run.metrics()
    ]


def test_a_budget_ends_a_run_between_two_steps_and_more_money_ends_it_as_if_it_had_not(
    config: ExperimentConfig,
) -> None:
    rich = start_run(config.model_copy(update={"name": "rich"}), RunRequest())
    # All that one step takes is too much, so that it stops after the first.
    poor = start_run(config, RunRequest(terms=Terms(DOLLAR_A_SECOND, 1e-6)))
    assert (poor.status, poor.step, poor.exit_code) == ("interrupted", 1, 130)
    record = RunDir.open(poor.folder).record
    assert record["cost"] == pytest.approx(record["duration_s"], abs=2e-3)  # a dollar a second
    assert (record["price_per_hour"], record["max_cost"]) == (DOLLAR_A_SECOND, 1e-6)
    assert record["exit_reason"].startswith("the budget of 0.00 dollars is used up (")
    assert record["exit_reason"].endswith("at 3600.00 an hour) after step 1")
    # The budget of the record stands, until there is a higher one.
    with pytest.raises(ConfigError, match="the run 'run' has used up its budget") as caught:
        resume_run("run", RunRequest())
    assert "--max-cost" in (caught.value.hint or "")
    assert RunDir.open(poor.folder).record == record and not RunDir.open(poor.folder).live
    more = resume_run("run", RunRequest(terms=Terms(max_cost=1000.0)))
    assert more.status == "finished"
    ended = RunDir.open(more.folder)
    assert ended.record["cost"] > record["cost"]
    assert ended.record["cost"] == pytest.approx(ended.record["duration_s"], abs=2e-3)
    # Neither price nor budget is in the config, the hash or a number.
    whole = RunDir.open(rich.folder)
    assert rows(ended) == rows(whole)
    for part in ("model", "optimizer", "rng", "routing"):
        file = f"checkpoints/step-{STEPS:08d}/{part}.safetensors"
        assert (ended.path / file).read_bytes() == (whole.path / file).read_bytes()
    assert ended.record["run_key"] == whole.record["run_key"]
    assert "cost" not in (ended.path / "config.yaml").read_text()


def test_the_reason_is_said_as_people_would() -> None:
    reason = "the budget of 10.00 dollars is used up (10.00 at 2.50 an hour)"
    assert used_up(10, 10.004, 2.5) == reason


def test_a_run_can_be_halted_from_outside(config: ExperimentConfig) -> None:
    reached: list[int] = []

    def progress(run: str, steps: int) -> Any:
        def shown(step: int, values: Mapping[str, float]) -> None:
            reached.append(step)

        return shown

    halted = start_run(config, RunRequest(progress=progress, halt=lambda: "enough" if len(reached) >= 7 else None))
    assert (halted.status, halted.step, halted.reason) == ("interrupted", 7, "enough after step 7")
    assert (halted.folder / "checkpoints" / "step-00000007").is_dir()


def test_without_a_price_nothing_costs_anything(config: ExperimentConfig) -> None:
    record = RunDir.open(start_run(config, RunRequest()).folder).record
    assert record["cost"] is None and record["max_cost"] is None and record["duration_s"] > 0


def test_sittings_add_up_each_at_its_own_price(run: RunDir) -> None:
    run.update(status="interrupted", duration_s=3600.0, cost=2.0, price_per_hour=2.0)
    meter = Meter(run, Terms(price_per_hour=720.0))  # 0.2 dollars a second
    assert meter.seconds == pytest.approx(3600, abs=0.5) and meter.cost == pytest.approx(2.0, abs=0.1)
    time.sleep(0.3)
    assert meter.cost == pytest.approx(2.06, abs=0.03)
    # Sittings before there was a price get it now.
    run.update(cost=None, price_per_hour=None)
    assert spent_before(run, 3.0).cost == pytest.approx(3.0)
    assert spent_before(run).cost is None


def test_a_sitting_began_when_its_process_did(run: RunDir) -> None:
    meter = Meter(run, Terms(DOLLAR_A_SECOND, since=time.monotonic() - 20))
    assert meter.seconds == pytest.approx(20, abs=0.5) and meter.cost == pytest.approx(20, abs=0.5)


def test_a_share_of_a_device_costs_its_share(run: RunDir) -> None:
    meter = Meter(run, Terms(DOLLAR_A_SECOND, share=0.25, since=time.monotonic() - 20))
    assert meter.cost == pytest.approx(5, abs=0.2) and meter.fields()["device_share"] == 0.25


def test_a_killed_sitting_counts_up_to_its_last_sign_of_life_and_once(run: RunDir) -> None:
    began = time.time() - 1000
    started = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(began))
    run.update(status="running", started=started, duration_s=50.0, cost=50.0, price_per_hour=DOLLAR_A_SECOND)
    assert spent_before(run).seconds == 50.0  # it never gave a sign
    (run.path / "heartbeat.json").write_text(json.dumps({"pid": 1, "host": "x", "time": began + 100}))
    spent = spent_before(run)
    assert spent.seconds == pytest.approx(150, abs=1.5) and spent.cost == pytest.approx(150, abs=1.5)
    # Without the heartbeat, its last line of numbers tells; the later of both counts.
    run.log(1, 1, {"a": 1.0})
    assert spent_before(run).seconds == pytest.approx(1050, abs=2)
    # Entered as spent before anything else happens: killed again at once, the time in between is not counted.
    Meter(run, Terms()).settle()
    assert run.record["duration_s"] == pytest.approx(1050, abs=2) and run.status == "running"
    assert seconds_since_epoch(run.record["started"]) == pytest.approx(time.time(), abs=2)
    assert spent_before(run).seconds == pytest.approx(1050, abs=3)


def test_moments_are_read_back() -> None:
    assert seconds_since_epoch(now()) == pytest.approx(time.time(), abs=0.1)


@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf", "-inf"])
@pytest.mark.parametrize("key", ["--price-per-hour", "--max-cost"])
def test_what_is_no_price_or_budget_is_named(key: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    other = [] if key == "--price-per-hour" else ["--price-per-hour", "2.5"]
    for command in (["train", "tiny-moe"], ["train", "--resume", "nothing"], ["train", "tiny-moe", "--dry-run"]):
        assert main([*command, key, value, *other]) == 2
        assert f"{key} {value}" in capsys.readouterr().err
    assert not paths.runs_dir().exists()


def test_a_budget_needs_a_price(config: ExperimentConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny-moe", "--max-cost", "10"]) == 2
    assert "--max-cost needs --price-per-hour" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="needs --price-per-hour"):
        start_run(config, RunRequest(go_on=True, terms=Terms(max_cost=10.0)))
    assert not paths.runs_dir().exists()


def test_a_run_that_has_ended_is_not_resumed(config: ExperimentConfig, capsys: pytest.CaptureFixture[str]) -> None:
    start_run(config, RunRequest())
    before = (paths.runs_dir() / "run" / "run.json").read_bytes()
    assert main(["train", "--resume", "run", "--price-per-hour", "1", "--max-cost", "5"]) == 2
    error = capsys.readouterr().err
    assert "the run 'run' has finished: there is nothing to resume" in error and "--seed" in error
    assert (paths.runs_dir() / "run" / "run.json").read_bytes() == before


def test_dollars_are_finite() -> None:
    for value in (math.nan, -1.0, 0.0, math.inf):
        with pytest.raises(ConfigError, match="--max-cost"):
            Terms(1.0, value).check()
    Terms(1e-9, 1e9).check()
    Terms(max_cost=1.0).check(remembered=True)

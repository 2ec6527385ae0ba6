"""What makes two runs the same run, what a resumed run may change, and what is said of a run that cannot be made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl import paths
from moectl.cli.app import main
from moectl.config.schema import ExperimentConfig
from moectl.errors import ConfigError, MoectlError, NotFoundError
from moectl.runs.rundir import RunDir
from moectl.training.state import checkpoint_steps
from moectl.training.trainer import Trainer
from moectl.walk.loading import load_run
from moectl.walk.train import RunOutcome, RunRequest, resume_run, start_run
from tests.support import write_corpus

ROUTER = '''
import torch
from moectl.moe import Router, RouterConfig, RouterOutput
from moectl.moe.router import entropy, stable_topk


class Mine(Router):
    """Top-1, scaled."""

    class Config(RouterConfig):
        scale: float = 1.0

    def route(self, x_TD, mask_T):
        logits = self.logits(x_TD) * self.config.scale
        probs = torch.softmax(logits, -1)
        chosen = stable_topk(logits.detach(), 1)
        return RouterOutput(chosen, SCALE * probs.gather(1, chosen), logits, probs, probs, entropy(probs))
'''


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_corpus(tmp_path / "texts")
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def experiment(home: Path, **changes: Any) -> ExperimentConfig:
    values: dict[str, Any] = {
        "data": {"domains": ["fish", "sums"], "source": str(home / "texts"), "tokenizer": "bpe:300", "block_size": 16},
        "model": {"num_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "head_dim": 8},
        "moe": {"router": {"name": "top1"}, "num_experts": 4, "layers": "all"},
        "optim": {"warmup_steps": 2},
        "train": {"steps": 6, "batch_size": 4, "threads": 1, "log_every": 1, "checkpoint_every": 2},
    }
    for key, value in changes.items():
        old = values.get(key)
        values[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return ExperimentConfig.model_validate(values)


def interrupted(home: Path, at: int, **changes: Any) -> RunOutcome:
    """A run that was asked to stop after step ``at``."""
    trainers: list[Trainer] = []
    original = Trainer.train

    def train(self: Trainer) -> Any:
        trainers.append(self)
        return original(self)

    def progress(run: str, steps: int) -> Any:
        def stop(step: int, values: Any) -> None:
            if step == at:
                trainers[0].stop.reason = "stopped by a test"

        return stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train", train)
        return start_run(experiment(home, **changes), RunRequest(progress=progress))


def test_a_router_file_that_was_edited_is_another_run(home: Path) -> None:
    file = home / "mine.py"
    file.write_text(ROUTER.replace("SCALE", "1.0"), encoding="utf-8")
    config = experiment(home, moe={"router": {"name": "mine.py:Mine"}})
    first = start_run(config, RunRequest())
    assert start_run(config, RunRequest()).already_done
    before = load_run(first.folder).model(torch.arange(8)[None])
    file.write_text(ROUTER.replace("SCALE", "0.5"), encoding="utf-8")
    second = start_run(config, RunRequest())
    assert not second.already_done and second.id != first.id
    # The first run still means the code that it was trained with.
    assert torch.equal(load_run(first.folder).model(torch.arange(8)[None]), before)
    kept = RunDir.open(first.folder).record["router_code"]["sha256"]
    assert kept != RunDir.open(second.folder).record["router_code"]["sha256"]


def test_a_run_with_a_router_file_is_readable_from_another_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "mine.py").write_text(ROUTER.replace("SCALE", "1.0"), encoding="utf-8")
    run = start_run(experiment(home, moe={"router": {"name": "./mine.py:Mine"}}), RunRequest())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (home / "mine.py").unlink()
    assert load_run(run.folder).step == 6


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("probs.gather(1, chosen).squeeze(1)", "topk_weights of shape"),
        ("probs", "topk_weights of shape"),
    ],
)
def test_a_router_that_returns_the_wrong_shape_is_named(home: Path, wrong: str, said: str) -> None:
    source = ROUTER.replace("SCALE * probs.gather(1, chosen)", wrong)
    (home / "mine.py").write_text(source, encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as caught:
        start_run(experiment(home, moe={"router": {"name": "mine.py:Mine"}}), RunRequest())
    assert "layer 0's router" in caught.value.message and "mine.py:Mine" in caught.value.message


def test_a_noncausal_router_is_refused_before_a_run_is_made(home: Path) -> None:
    source = ROUTER.replace("SCALE", "1.0").replace('"""Top-1, scaled."""', "causal = False")
    (home / "mine.py").write_text(source, encoding="utf-8")
    with pytest.raises(ConfigError, match="later tokens"):
        start_run(experiment(home, moe={"router": {"name": "mine.py:Mine"}}), RunRequest())
    assert not paths.runs_dir().exists() or not list(paths.runs_dir().iterdir())


def test_another_base_of_the_same_name_is_another_run(home: Path) -> None:
    shape = dict.fromkeys(("num_layers", "hidden_size", "intermediate_size", "num_heads", "head_dim"))
    upcycled = {"model": {"base": "parent", **shape}, "name": None}

    def child() -> RunOutcome:
        return start_run(experiment(home, **upcycled), RunRequest())

    start_run(experiment(home, moe=None, name="parent"), RunRequest())
    first = child()
    assert child().already_done
    assert len(RunDir.open(first.folder).record["base"]["sha256"]) == 64
    assert main(["runs", "rm", "parent", "--yes"]) == 0
    start_run(experiment(home, moe=None, name="parent", train={"seed": 3}), RunRequest())
    second = child()
    assert not second.already_done and second.id != first.id


def test_an_upcycled_run_resumes_without_its_base(home: Path) -> None:
    start_run(experiment(home, moe=None, name="parent"), RunRequest())
    shape = dict.fromkeys(("num_layers", "hidden_size", "intermediate_size", "num_heads", "head_dim"))
    stopped = interrupted(home, 3, model={"base": "parent", **shape})
    assert stopped.status == "interrupted"
    assert main(["runs", "rm", "parent", "--yes"]) == 0
    assert resume_run(stopped.id, RunRequest()).status == "finished"


def test_a_dense_config_on_a_base_with_experts_is_refused(home: Path) -> None:
    start_run(experiment(home, name="sparse"), RunRequest())
    shape = dict.fromkeys(("num_layers", "hidden_size", "intermediate_size", "num_heads", "head_dim"))
    with pytest.raises(ConfigError, match="has experts, but the config is dense"):
        start_run(experiment(home, moe=None, model={"base": "sparse", **shape}), RunRequest())


def test_the_same_command_with_resume_goes_on(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped = interrupted(home, 3)
    own = str(stopped.folder / "config.yaml")
    assert main(["train", "--resume", stopped.id, own, "--router", "top2"]) == 2
    assert "moe.router.name" in capsys.readouterr().err
    assert main(["train", "--resume", stopped.id, "--threads", "2"]) == 2
    assert "train.threads differs" in capsys.readouterr().err
    assert main(["train", "--resume", stopped.id, "--data", "x"]) == 2
    assert main(["train", "--resume", stopped.id, "--threads", "1", "--router", "top1"]) == 0


def test_a_resumed_record_says_nothing_of_the_first_ending(home: Path) -> None:
    stopped = interrupted(home, 3)
    first = RunDir.open(stopped.folder).record
    assert first["status"] == "interrupted" and first["train_tokens"] == 3 * 4 * 16
    done = resume_run(stopped.id, RunRequest())
    record = RunDir.open(done.folder).record
    assert record["exit_reason"] == "all 6 steps done" and record["train_tokens"] == record["tokens"] == 6 * 4 * 16
    rows = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    trained = [row["step"] for row in rows if "train/loss" in row["values"]]
    assert trained == [1, 2, 3, 4, 5, 6]


def test_an_interrupted_run_goes_on_where_it_is_wanted(home: Path) -> None:
    stopped = interrupted(home, 3)
    with pytest.raises(ConfigError, match="with a checkpoint of step 3"):
        start_run(experiment(home), RunRequest())
    done = start_run(experiment(home), RunRequest(go_on=True))
    assert (done.id, done.status) == (stopped.id, "finished")


def as_lost(folder: Path, name: str, *, status: str = "running", **fields: Any) -> None:
    """A copy of a run, as a process that was killed leaves it."""
    copied = shutil.copytree(folder, folder.with_name(name))
    record = {**json.loads((folder / "run.json").read_text("utf-8")), "id": name, "status": status, **fields}
    (copied / "run.json").write_text(json.dumps(record), encoding="utf-8")


def test_auto_takes_the_newest_run_that_can_go_on(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotFoundError, match="no run can go on") as nothing:
        resume_run("auto", RunRequest())
    assert nothing.value.exit_code == 4
    stopped = interrupted(home, 3, name="older")
    as_lost(stopped.folder, "newer", created="2090-01-01T00:00:00.000Z")
    as_lost(stopped.folder, "nan", status="failed", fails_again=True, created="2091-01-01T00:00:00.000Z")
    as_lost(stopped.folder, "bare", created="2092-01-01T00:00:00.000Z")
    shutil.rmtree(home / "home" / "runs" / "bare" / "checkpoints")
    said: list[str] = []
    assert resume_run("auto", RunRequest(say=said.append)).id == "newer"
    assert said[0] == (
        "going on with newer, which is lost (newer, but cannot go on: bare lost without a checkpoint, nan failed)"
    )
    assert main(["train", "--resume", "auto", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == "older"
    assert main(["train", "--resume", "auto"]) == 4
    assert "newer finished" in capsys.readouterr().err


def test_auto_passes_over_a_corrupt_checkpoint_and_says_so(home: Path) -> None:
    stopped = interrupted(home, 3)
    weights = stopped.folder / "checkpoints" / "step-00000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    said: list[str] = []
    assert resume_run("auto", RunRequest(say=said.append)).status == "finished"
    assert any("step-00000003 is bad and set aside" in line and "model.safetensors" in line for line in said)
    assert any(line == f"resuming {stopped.id} from step 2" for line in said)


def test_auto_with_a_config_starts_goes_on_and_has_nothing_to_do(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command for a machine that is restarted whenever it dies."""
    stopped = interrupted(home, 3, name="mine")
    command = ["train", str(stopped.folder / "config.yaml"), "--resume", "auto", "--json"]
    assert main(command) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["id"], done["status"], done["already_done"]) == ("mine", "finished", False)
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["already_done"] is True
    assert main([*command, "--name", "other"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert (other["id"], other["step"], other["already_done"]) == ("other", 6, False)
    assert main([*command, "--set", "optim.lr=0.1"]) == 2, "the name is taken by another config"


def test_auto_with_a_config_starts_anew_what_was_killed_before_its_first_checkpoint(home: Path) -> None:
    whole = start_run(experiment(home, name="whole"), RunRequest())
    killed = start_run(experiment(home, name="killed"), RunRequest())
    record = json.loads((killed.folder / "run.json").read_text("utf-8"))
    ended = ("metrics", "best", "train_seconds", "train_tokens", "duration_s", "finished", "exit_reason")
    opening = {key: value for key, value in record.items() if key not in ended}
    (killed.folder / "run.json").write_text(json.dumps({**opening, "status": "running"}), encoding="utf-8")
    shutil.rmtree(killed.folder / "checkpoints")
    again = start_run(experiment(home, name="killed"), RunRequest(go_on=True))
    assert (again.status, again.already_done) == ("finished", False)
    rows = [
        [(row.step, row.values.get("train/loss")) for row in RunDir.open(run.folder).metrics()]
        for run in (whole, again)
    ]
    assert rows[0] == rows[1]
    record = RunDir.open(again.folder).record
    assert record["train_tokens"] == record["tokens"] and record["generation"] > 0


def test_a_finished_run_is_not_resumed_and_it_says_what_to_do(home: Path) -> None:
    done = start_run(experiment(home), RunRequest())
    with pytest.raises(ConfigError, match="has finished: there is nothing to resume") as caught:
        resume_run(done.id, RunRequest())
    assert f"--base {done.id}" in str(caught.value.hint) and "--steps" in str(caught.value.hint)


def test_the_best_checkpoint_is_in_the_record(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = start_run(experiment(home, train={"eval_every": 3, "keep_checkpoints": 1}), RunRequest())
    best = RunDir.open(done.folder).record["best"]
    losses = {
        row.step: row.values["eval/lm_loss"]
        for row in RunDir.open(done.folder).metrics()
        if "eval/lm_loss" in row.values
    }
    assert losses.keys() == {0, 3, 6}
    assert best == {
        "metric": "eval/lm_loss",
        "value": min(losses.values()),
        "step": min(losses, key=losses.__getitem__),
    }
    assert set(checkpoint_steps(done.folder / "checkpoints")) == {0, 6, best["step"]}
    assert load_run(done.folder, step=best["step"]).step == best["step"]


def test_what_failed_by_its_own_numbers_is_marked_and_a_full_disk_is_not(home: Path) -> None:
    failed = start_run(experiment(home, optim={"lr": 1e22, "warmup_steps": 0}), RunRequest())
    assert failed.status == "failed" and RunDir.open(failed.folder).record["fails_again"] is True
    stopped = interrupted(home, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "optimizer_step", lambda self: torch.empty(2**60))
        with pytest.raises(RuntimeError):
            resume_run(stopped.id, RunRequest())
    record = RunDir.open(stopped.folder).record
    assert record["status"] == "failed" and not record["fails_again"]
    assert resume_run("auto", RunRequest()).id == stopped.id


def test_a_run_without_a_checkpoint_says_so(home: Path) -> None:
    config = experiment(home)
    run = start_run(config, RunRequest())
    record = json.loads((run.folder / "run.json").read_text("utf-8"))
    (run.folder / "run.json").write_text(json.dumps({**record, "status": "running"}), encoding="utf-8")
    for step in checkpoint_steps(run.folder / "checkpoints"):
        (run.folder / "checkpoints" / f"step-{step:08d}").rename(run.folder / f"gone-{step}")
    with pytest.raises(ConfigError, match="without a checkpoint") as caught:
        start_run(config, RunRequest())
    assert "runs rm" in str(caught.value.hint) and "--resume" not in str(caught.value.hint)
    with pytest.raises(NotFoundError, match="before its first checkpoint"):
        resume_run(run.id, RunRequest())


def test_a_collapsed_run_has_ended(home: Path) -> None:
    strict = {"max_share": 0.2501, "patience": 1}  # any load that is not exactly even
    train = {"early_stop": True, "check_every": 2, "collapse": strict}
    first = start_run(experiment(home, train=train), RunRequest())
    assert (first.status, first.exit_code, first.step) == ("collapsed", 3, 2)
    again = start_run(experiment(home, train=train), RunRequest())
    assert again.already_done and again.exit_code == 3
    with pytest.raises(ConfigError, match="has collapsed"):
        resume_run(first.id, RunRequest())


def test_a_failed_step_is_in_the_record_as_it_was(home: Path) -> None:
    failed = start_run(experiment(home, optim={"lr": 1e22, "warmup_steps": 0}), RunRequest())
    assert (failed.status, failed.exit_code) == ("failed", 1)
    run = RunDir.open(failed.folder)
    last = list(run.metrics())[-1]
    assert last.step == failed.step + 1
    assert not all(torch.isfinite(torch.tensor(list(last.values.values()))))
    assert "layers." in run.record["exit_reason"] or "norm" in run.record["exit_reason"]


def test_unknown_commit_is_said_aloud(home: Path) -> None:
    said: list[str] = []
    start_run(experiment(home), RunRequest(say=said.append))
    assert any("commit" in line and line.startswith("warning") for line in said)


def test_a_full_disk_is_told_as_what_it_was(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first error reaches the user even where the record cannot be written either."""
    run = interrupted(home, 3)
    checkpoints = run.folder / "checkpoints"
    original = RunDir.update

    def update(self: RunDir, **fields: Any) -> None:
        if fields.get("status") == "failed":
            raise MoectlError("cannot write run.json")
        original(self, **fields)

    def save(self: Trainer, *, background: bool = False) -> Path:
        raise MoectlError(f"the checkpoint in {checkpoints} was not written")

    monkeypatch.setattr(RunDir, "update", update)
    monkeypatch.setattr(Trainer, "save", save)
    with pytest.raises(MoectlError, match="was not written"):
        resume_run(run.id, RunRequest())

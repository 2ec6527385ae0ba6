"""``moectl distill``: both students, the same but for the loss; skipped when done; resumed; and bad teachers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.cli.app import main
from moectl.config.loading import load_config
from moectl.corpus.prepare import prepare
from moectl.evaluation.losses import EvalReport
from moectl.evaluation.paired import Difference
from moectl.resampling import Interval
from moectl.runs.intervals import MeanInterval, mean_interval
from moectl.runs.rundir import RunDir
from moectl.training.state import newest_checkpoint
from moectl.walk.distill import Distillate, Pair
from moectl.walk.train import RunOutcome, RunRequest, resume_run, start_run
from tests.support import of_the_clock, write_corpus

TEACHER = """
data: {domains: [fish, sums], source: SOURCE, tokenizer: bpe:300, block_size: 16}
model: {num_layers: 2, hidden_size: 16, intermediate_size: 24, num_heads: 2, head_dim: 8}
moe: {router: {name: topk, top_k: 2}, num_experts: 4, layers: all}
optim: {warmup_steps: 2, lr: 0.01}
train: {steps: 12, batch_size: 4, threads: 1, log_every: 1, eval_every: 1000, checkpoint_every: 4, keep_checkpoints: 9}
"""
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder whose home holds a finished run with experts."""
    folder = tmp_path_factory.mktemp("place")
    source = write_corpus(folder / "texts")
    (folder / "teacher.yaml").write_text(TEACHER.replace("SOURCE", str(source)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOECTL_HOME", str(folder / "home"))
        patch.chdir(folder)
        torch.set_num_threads(1)
        assert main(["train", "teacher.yaml", "--name", "teacher"]) == 0
        yield folder


def run_of(place: Path, name: str) -> RunDir:
    return RunDir.open(place / "home" / "runs" / name)


def distilled(capsys: Capture, *options: str) -> dict[str, Any]:
    capsys.readouterr()
    code = main(["distill", "teacher", "--json", *options])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def test_both_students_differ_in_the_loss_alone(place: Path, capsys: Capture) -> None:
    found = distilled(capsys, "--temperature", "3", "--alpha", "0.7")
    (pair,) = found["pairs"]
    taught, direct = (run_of(place, pair[name]["id"]) for name in ("distilled", "direct"))
    configs = [load_config(run.path / "config.yaml") for run in (taught, direct)]
    assert configs[0].distill is not None and configs[1].distill is None
    assert (configs[0].distill.temperature, configs[0].distill.alpha) == (3.0, 0.7)
    assert configs[0].model_copy(update={"distill": None}) == configs[1]
    assert configs[1].moe is None and configs[1].train.steps == 12
    assert taught.record["tokens"] == direct.record["tokens"] == found["tokens"]
    first = [run.path / "checkpoints" / "step-00000000" / "model.safetensors" for run in (taught, direct)]
    assert first[0].read_bytes() == first[1].read_bytes()
    assert taught.record["kind"] == "distilled" and direct.record["kind"] == "dense"
    teacher = newest_checkpoint(run_of(place, "teacher").checkpoints)[0]
    assert taught.record["teacher"] == {"id": "teacher", "step": 12, "sha256": teacher.sha256}
    assert direct.record["teacher"] is None
    rows = [row.values for row in taught.metrics() if "train/kd_loss" in row.values]
    assert len(rows) == 12
    for row in rows:
        assert row["train/loss"] == pytest.approx(0.3 * row["train/lm_loss"] + 0.7 * row["train/kd_loss"], rel=1e-5)
    # Measured as `eval` measures it.
    for name, run in (("distilled", taught), ("direct", direct)):
        assert pair[name]["lm_loss"] == pytest.approx(run.final["eval/lm_loss"], rel=1e-6)
    assert pair["difference"] == pytest.approx(pair["distilled"]["lm_loss"] - pair["direct"]["lm_loss"], rel=1e-6)
    assert found["scope"].startswith("these two models")


def test_what_is_done_is_not_done_again(place: Path, capsys: Capture) -> None:
    before = distilled(capsys)
    runs = sorted(path.name for path in (place / "home" / "runs").iterdir())
    after = distilled(capsys)
    assert after == before and sorted(path.name for path in (place / "home" / "runs").iterdir()) == runs


def test_several_seeds_give_an_interval_over_seeds(place: Path, capsys: Capture) -> None:
    found = distilled(capsys, "--seeds", "2", "--steps", "6", "--set", "optim.warmup_steps=1")
    assert [pair["seed"] for pair in found["pairs"]] == [0, 1]
    assert found["scope"] == "over seeds" and found["over_seeds"]["n"] == 2
    expected = mean_interval([pair["difference"] for pair in found["pairs"]])
    assert found["over_seeds"]["low"] == pytest.approx(expected.low)
    assert found["better"] == (None if not expected.excludes_zero else "distilled" if expected.mean < 0 else "direct")


def test_into_a_size_of_another_shape(place: Path, capsys: Capture) -> None:
    sets = [
        "--set",
        "model.num_layers=1",
        "--set",
        "model.hidden_size=24",
        "--set",
        "model.num_heads=3",
        "--set",
        "model.num_kv_heads=1",
    ]
    found = distilled(capsys, "--into", "tiny", "--steps", "4", *sets)
    config = load_config(run_of(place, found["pairs"][0]["direct"]["id"]).path / "config.yaml")
    assert (config.model.base, config.model.num_layers, config.model.head_dim) == ("tiny", 1, None)


def test_a_resumed_student_is_the_same(place: Path) -> None:
    sets = ["moe=null", "distill={teacher: teacher, alpha: 0.6}", "preset=dense"]
    config = load_config("teacher.yaml", sets=sets)
    start_run(config.model_copy(update={"name": "whole"}), RunRequest())

    def halted() -> str | None:
        done = place / "home" / "runs" / "cut" / "checkpoints" / "step-00000004"
        return "stopped for the test" if done.is_dir() else None

    cut = start_run(config.model_copy(update={"name": "cut"}), RunRequest(halt=halted))
    assert cut.status == "interrupted" and 4 <= cut.step < 12
    assert resume_run("cut", RunRequest()).status == "finished"
    one, other = (newest_checkpoint(run_of(place, name).checkpoints)[0] for name in ("whole", "cut"))
    for part in ("model", "optimizer"):
        assert all(torch.equal(one.tensors[part][key], other.tensors[part][key]) for key in one.tensors[part])
    rows = [
        [(row.step, {k: v for k, v in row.values.items() if not of_the_clock(k)}) for row in run.metrics()]
        for run in (run_of(place, "whole"), run_of(place, "cut"))
    ]
    assert [row for row in rows[0] if row[1]] == [row for row in rows[1] if row[1]]


def test_another_teacher_of_the_same_name_is_not_taken(place: Path, capsys: Capture) -> None:
    """Its hash is in the run's key, and a student that was stopped does not go on with another."""
    assert main(["train", "teacher.yaml", "--name", "other", "--seed", "1"]) == 0
    sets = ["moe=null", "preset=dense", "distill={teacher: other}"]
    config = load_config("teacher.yaml", sets=sets).model_copy(update={"name": "pupil"})
    stopped = start_run(config, RunRequest(halt=lambda: "stopped for the test"))
    assert stopped.status == "interrupted"
    assert main(["runs", "rm", "other", "--yes"]) == 0
    assert main(["train", "teacher.yaml", "--name", "other", "--seed", "2"]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "pupil"]) == 3
    assert "not what it was when this run began" in capsys.readouterr().err
    again = start_run(config.model_copy(update={"name": None}), RunRequest())
    assert again.id != "pupil" and again.status == "finished"
    assert run_of(place, again.id).record["teacher"]["sha256"] != run_of(place, "pupil").record["teacher"]["sha256"]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["nobody"], 4, "no run 'nobody'"),
        (["teacher", "--into", "teacher"], 2, "has experts"),
        (["teacher", "--into", "nothing-there"], 2, "nothing-there"),
        (["teacher", "--alpha", "1.5"], 2, "less than or equal to 1"),
        (["teacher", "--temperature", "0"], 2, "greater than 0"),
        (["teacher", "--seeds", "0"], 2, "trains nothing"),
        (["teacher", "--steps", "1"], 2, "warmup_steps"),
        (["teacher", "--set", "moe.num_experts=2"], 2, "not for both students"),
        (["teacher", "--set", "distill.alpha=1"], 2, "--temperature and --alpha"),
    ],
)
def test_bad_input_is_told(place: Path, capsys: Capture, options: list[str], code: int, said: str) -> None:
    capsys.readouterr()
    found = main(["distill", *options])
    talk = " ".join(capsys.readouterr().err.split())
    assert said in talk and "Traceback" not in talk
    assert found == code or said == "nothing-there"  # a name that might be a hub's is not found elsewhere either
    assert found != 0


def test_data_of_another_tokenizer_are_refused(place: Path, capsys: Capture) -> None:
    other = load_config("teacher.yaml", sets=["data.tokenizer=bpe:280"]).data
    folder = prepare(other).folder
    capsys.readouterr()
    assert main(["distill", "teacher", "--data", folder.name]) == 3
    assert "tokenizer" in capsys.readouterr().err


def test_a_teacher_that_has_not_finished_or_sees_later_tokens_is_refused(place: Path, capsys: Capture) -> None:
    for name, sets, halt, said in (
        ("early", [], lambda: "stopped for the test", "not finished"),
        ("leaky", ["moe.router=expert-choice", "train.allow_noncausal=true"], lambda: None, "sees later tokens"),
    ):
        config = load_config("teacher.yaml", sets=[*sets, "train.steps=4"])
        start_run(config.model_copy(update={"name": name}), RunRequest(halt=halt))
        capsys.readouterr()
        assert main(["distill", name]) == 2
        assert said in " ".join(capsys.readouterr().err.split())


def a_result(*differences: tuple[float, tuple[float, float]]) -> Distillate:
    outcome = RunOutcome("a", Path(), "finished", "", 1, 1)
    report: dict[str, EvalReport] = {}
    pairs = [
        Pair(seed, outcome, outcome, report, Difference(mean, Interval(*interval)))
        for seed, (mean, interval) in enumerate(differences)
    ]
    over: MeanInterval = mean_interval([mean for mean, _ in differences])
    return Distillate("t", None, pairs, over, 2.0, 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("differences", "better", "words"),
    [
        ([(-0.1, (-0.2, -0.05))], "distilled", "the distilled model has the lower loss. One seed is one seed"),
        ([(0.1, (0.05, 0.2))], "direct", "trained directly has the lower loss. One seed is one seed"),
        ([(-0.1, (-0.3, 0.1))], None, "no difference is shown"),
        ([(-0.1, (-0.2, -0.05)), (0.3, (0.2, 0.4)), (-0.2, (-0.3, -0.1))], None, "over 3 seeds"),
        ([(-0.1, (-0.3, 0.1)), (-0.11, (-0.3, 0.1)), (-0.09, (-0.3, 0.1))], "distilled", "over 3 seeds"),
    ],
)
def test_the_verdict_holds_to_the_interval(differences: Any, better: str | None, words: str) -> None:
    result = a_result(*differences)
    assert result.better == better and words in result.verdict

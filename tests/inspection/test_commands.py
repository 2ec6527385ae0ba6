"""``moectl eval`` and ``moectl inspect routing`` on real runs: bare, by name, as JSON, and on what cannot work."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from moectl.cli.app import main
from moectl.runs.rundir import RunDir
from tests.support import write_corpus

CONFIG = """
data: {domains: [fish, sums], source: SOURCE, tokenizer: bpe:300, block_size: 16}
model: {num_layers: 2, hidden_size: 16, intermediate_size: 24, num_heads: 2, head_dim: 8}
moe: {router: {name: top1}, num_experts: 4, layers: all}
optim: {warmup_steps: 2}
train: {steps: 6, batch_size: 4, threads: 1, log_every: 1, eval_every: 100, check_every: 3, checkpoint_every: 3}
"""


class Said(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


Moectl = Callable[..., Said]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with three seeds of one configuration, one run of another, and, newest, a dense one."""
    home = tmp_path_factory.mktemp("home")
    config = home / "config.yaml"
    config.write_text(CONFIG.replace("SOURCE", str(write_corpus(tmp_path_factory.mktemp("texts")))), encoding="utf-8")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOECTL_HOME", str(home))
        for name, options in (
            ("s0", []),
            ("s1", ["--seed", "1"]),
            ("other", ["--seed", "3", "--set", "moe.lb_coef=0.5"]),
            ("s2", ["--seed", "2"]),
            ("plain", ["--preset", "dense"]),
        ):
            assert main(["train", str(config), "--name", name, *options]) == 0
    yield home
    torch.set_num_threads(threads)


@pytest.fixture
def moectl(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Moectl:
    monkeypatch.setenv("MOECTL_HOME", str(trained))
    monkeypatch.setenv("NO_COLOR", "1")
    capsys.readouterr()

    def run(*arguments: str) -> Said:
        code = main(list(arguments))
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return run


def test_eval_bare_takes_the_newest_finished_run_and_names_it(moectl: Moectl) -> None:
    said = moectl("eval")
    assert said.code == 0 and "plain" in said.err
    assert "fish" in said.out and "sums" in said.out


def test_eval_is_what_training_measured_at_the_end_and_is_recorded(moectl: Moectl, trained: Path) -> None:
    before = RunDir.open(trained / "runs" / "s0").final
    document = moectl("eval", "s0", "--json").json()
    assert document["run"] == "s0" and document["step"] == 6 and document["complete"]
    assert document["lm_loss"] == pytest.approx(before["eval/lm_loss"], rel=1e-6)
    run = RunDir.open(trained / "runs" / "s0")
    assert run.final["eval/fish/bits_per_byte"] == document["domains"]["fish"]["bits_per_byte"]
    assert before.keys() <= run.final.keys(), "other metrics stay"
    assert json.loads((run.path / "eval.json").read_text())["lm_loss"] == document["lm_loss"]
    listed = {entry["id"]: entry for entry in moectl("runs", "ls", "--json").json()["runs"]}
    assert listed["s0"]["eval_lm_loss"] == pytest.approx(document["lm_loss"])


def test_eval_of_an_earlier_step_is_not_recorded(moectl: Moectl, trained: Path) -> None:
    record = (trained / "runs" / "s1" / "run.json").read_text()
    document = moectl("eval", "s1", "--step", "0", "--json").json()
    assert document["step"] == 0
    assert document["lm_loss"] > moectl("eval", "s0", "--json").json()["lm_loss"]
    assert (trained / "runs" / "s1" / "run.json").read_text() == record


def test_inspect_bare_takes_the_newest_run_with_experts(moectl: Moectl) -> None:
    said = moectl("inspect", "routing")
    assert said.code == 0 and "s2" in said.err
    for words in ("Balance by layer", "Layer 0", "Layer 1", "Specialisation", "One seed is not enough"):
        assert words in said.out


def test_inspect_json_has_value_and_three_references(moectl: Moectl, trained: Path) -> None:
    document = moectl("inspect", "routing", "s0", "--json", "--draws", "100").json()
    assert document["run"] == "s0" and document["emerged"] is None and "one seed" in document["verdict"]
    assert sorted(layer["layer"] for layer in document["layers"]) == [0, 1]
    for layer in document["layers"]:
        assert layer["nmi"]["null_permutation"]["draws"] == 100
        assert layer["nmi"]["null_random_router"]["draws"] == 100
        assert 0 <= layer["nmi"]["step0"]["value"] <= 1
        assert set(layer["domains"]) == {"fish", "sums"}
        recorded = RunDir.open(trained / "runs" / "s0").final[f"nmi/layer.{layer['layer']}"]
        assert recorded == layer["nmi"]["value"]


def test_inspect_of_step_0_equals_its_own_reference(moectl: Moectl) -> None:
    document = moectl("inspect", "routing", "s0", "--json", "--step", "0").json()
    for layer in document["layers"]:
        assert layer["nmi"]["value"] == layer["nmi"]["step0"]["value"]
        assert not layer["nmi"]["step0"]["exceeded"]


def test_inspect_draws_a_figure(moectl: Moectl, tmp_path: Path) -> None:
    said = moectl("inspect", "routing", "s0", "--figure", str(tmp_path / "out.png"))
    assert said.code == 0 and "out.png" in said.err
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_three_seeds_get_a_verdict(moectl: Moectl, tmp_path: Path) -> None:
    document = moectl("inspect", "routing", "s0", "s1", "s2", "--json").json()
    assert document["seeds"] == 3 and document["problems"] == []
    assert [run["run"] for run in document["runs"]] == ["s0", "s1", "s2"]
    assert [verdict["layer"] for verdict in document["verdict"]] == [0, 1]
    for verdict in document["verdict"]:
        assert verdict["emerged"] in (True, False)
        assert verdict["margin_interval"][0] <= verdict["margin_mean"] <= verdict["margin_interval"][1]
        own = [layer for run in document["runs"] for layer in run["layers"] if layer["layer"] == verdict["layer"]]
        assert verdict["seeds_above_all"] == sum(layer["nmi"]["exceeds_all"] for layer in own)
    said = moectl("inspect", "routing", "s0", "s1", "s2", "--figure", str(tmp_path / "seeds.svg"))
    assert "over seeds" in said.out and (tmp_path / "seeds.svg").exists()
    assert " of 3" in said.out and "above all three" in " ".join(said.out.split())
    table, _, below = said.out.partition("over seeds")
    assert "Fewer than 10 held-out groups" in below, "the runs' notes stand under the verdict"
    assert below.count("Fewer than 10") == 1 and "Fewer than 10" not in table


def test_two_seeds_get_numbers_and_no_verdict(moectl: Moectl) -> None:
    document = moectl("inspect", "routing", "s0", "s1", "--json").json()
    assert [verdict["emerged"] for verdict in document["verdict"]] == [None, None]


def test_runs_of_another_configuration_are_not_seeds(moectl: Moectl) -> None:
    document = moectl("inspect", "routing", "s0", "s1", "other", "--json").json()
    assert document["verdict"] == []
    assert any("moe.lb_coef" in problem for problem in document["problems"])


def test_without_the_checkpoint_of_step_0(moectl: Moectl, trained: Path) -> None:
    folder = trained / "runs" / "without-start"
    shutil.copytree(trained / "runs" / "s0", folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000000")
    try:
        document = moectl("inspect", "routing", str(folder), "--json").json()
        said = moectl("inspect", "routing", str(folder))
    finally:
        shutil.rmtree(folder)
    assert all(layer["nmi"]["step0"] is None and not layer["nmi"]["exceeds_all"] for layer in document["layers"])
    assert "step 0 is not known" in said.out


def test_seeds_without_the_checkpoint_of_step_0_say_so(moectl: Moectl, trained: Path) -> None:
    start = trained / "runs" / "s1" / "checkpoints" / "step-00000000"
    away = trained / "away"
    start.rename(away)
    try:
        said = moectl("inspect", "routing", "s0", "s1", "s2")
        document = moectl("inspect", "routing", "s0", "s1", "s2", "--json").json()
    finally:
        away.rename(start)
    below = said.out.partition("over seeds")[2]
    assert "no step 0" in below and "not from" not in below
    assert "There is no checkpoint of step 0" in below
    assert [(v["emerged"], v["unknown"]) for v in document["verdict"]] == [(None, "no step 0")] * 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["eval", "nope"], 4, "no run 'nope'"),
        (["inspect", "routing", "nope"], 4, "no run 'nope'"),
        (["inspect", "routing", "plain"], 2, "is dense"),
        (["eval", "s0", "--step", "5"], 4, "no checkpoint of step 5"),
        (["inspect", "routing", "s0", "s0"], 2, "named twice"),
        (["inspect", "routing", "s0", "--figure", "out.gif"], 2, ".png, .svg, .pdf"),
        (["inspect", "routing", "s0", "--gates", "5"], 2, "100"),
        (["eval", "s0", "--device", "toaster"], 2, "toaster"),
        (["inspect", "rooting"], 2, "Did you mean 'routing'?"),
    ],
)
def test_what_cannot_work_says_so(moectl: Moectl, arguments: list[str], code: int, words: str) -> None:
    said = moectl(*arguments)
    assert said.code == code and words in said.err, said
    assert said.out == "" and "Traceback" not in said.err


def test_a_device_that_is_not_there(moectl: Moectl) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert moectl("eval", "s0", "--device", "cuda").code == 5


def test_an_edited_dataset_is_refused_by_name(moectl: Moectl, trained: Path) -> None:
    (dataset,) = (trained / "data").iterdir()
    file = dataset / "eval" / "tokens.npy"
    original = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    try:
        said = moectl("eval", "s0")
    finally:
        file.write_bytes(original)
    assert said.code == 3 and "tokens.npy" in said.err


def test_a_run_that_is_being_written_is_measured_but_left_alone(moectl: Moectl, trained: Path) -> None:
    run = RunDir.open(trained / "runs" / "other").acquire()
    try:
        record = (run.path / "run.json").read_text()
        said = moectl("eval", "other")
        assert said.code == 0 and f"{os.getpid()}" in said.err and "not recorded" in said.err
        assert (run.path / "run.json").read_text() == record
    finally:
        run.release()


def test_no_run_at_all(moectl: Moectl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path))
    for arguments in (["eval"], ["inspect", "routing"]):
        said = moectl(*arguments)
        assert said.code == 4 and "moectl train" in said.err


def test_only_dense_runs(moectl: Moectl, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(trained / "runs" / "plain", tmp_path / "runs" / "plain")
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path))
    said = moectl("inspect", "routing")
    assert said.code == 4 and "'plain', is dense" in said.err

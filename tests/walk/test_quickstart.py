"""The whole walk in one process, on a tiny corpus: what it measures, and that it can be taken twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

import moectl
from moectl import paths
from moectl.cli.app import main
from moectl.errors import MoectlError
from moectl.walk.quickstart import Quickstart, quickstart
from moectl.walk.train import RunRequest
from tests.support import write_corpus

SHAPE = ["model.num_layers=2", "model.hidden_size=16", "model.intermediate_size=24", "model.num_heads=2"]
SETS = [
    *SHAPE,
    "model.head_dim=8",
    "moe.layers=1",
    "moe.num_experts=4",
    "moe.expert_intermediate_size=12",
    "moe.router.top_k=2",
    "optim.warmup_steps=5",
    "train.steps=40",
    "train.threads=1",
    "train.log_every=5",
]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    source = write_corpus(tmp_path_factory.mktemp("texts"))
    data = {"domains": ["fish", "sums"], "source": str(source), "tokenizer": "bpe:300", "block_size": 16}
    return [*SETS, f"data={json.dumps(data)}"]


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory, sets: list[str]) -> tuple[Path, Quickstart]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOECTL_HOME", str(home))
        return home, quickstart(RunRequest(), sets=sets)


@pytest.fixture(autouse=True)
def _home(walked: tuple[Path, Quickstart], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECTL_HOME", str(walked[0]))


def test_both_runs_are_matched(walked: tuple[Path, Quickstart]) -> None:
    dense, moe = walked[1].dense.record, walked[1].moe.record
    assert dense["tokens"] == moe["tokens"] == 40 * 12 * 16
    assert dense["data"] == moe["data"] and dense["seed"] == moe["seed"]
    gate = 4 * 16  # one gate of 4 experts is all that the MoE computes beyond the dense model
    assert moe["parameters"]["active"] == dense["parameters"]["total"] + gate
    assert moe["parameters"]["total"] == moe["parameters"]["active"] + 2 * (3 * 12 * 16)  # two of four experts rest
    assert walked[1].comparison.matched


def test_losses_are_the_held_out_lm_loss_alone(walked: tuple[Path, Quickstart]) -> None:
    for contestant in (walked[1].dense, walked[1].moe):
        report = contestant.losses.report
        assert report.complete and report.overall.interval is not None
        assert contestant.outcome.metrics["eval/lm_loss"] == pytest.approx(report.overall.lm_loss, abs=1e-6)
        assert report.overall.lm_loss < contestant.outcome.metrics["train/lm_loss"] + 1.0


def test_it_claims_nothing_from_one_seed(walked: tuple[Path, Quickstart]) -> None:
    assert all(verdict.better is None for verdict in walked[1].comparison.verdicts)
    assert walked[1].routing.to_dict()["emerged"] is None


def test_a_second_walk_trains_nothing(walked: tuple[Path, Quickstart], sets: list[str]) -> None:
    before = sorted(paths.runs_dir().iterdir())
    again = quickstart(RunRequest(), sets=sets)
    assert again.dense.outcome.already_done and again.moe.outcome.already_done
    assert sorted(paths.runs_dir().iterdir()) == before
    assert again.routing.to_dict()["layers"] == walked[1].routing.to_dict()["layers"]


def test_every_number_is_in_the_registry_and_survives_it(capsys: pytest.CaptureFixture[str]) -> None:
    def listing() -> str:
        assert main(["runs", "ls", "--json"]) == 0
        return capsys.readouterr().out

    before = listing()
    assert {run["status"] for run in json.loads(before)["runs"]} == {"finished"}
    for file in paths.home().glob("registry.db*"):
        file.unlink()
    assert main(["runs", "reindex"]) == 0
    capsys.readouterr()
    assert listing() == before


def test_the_bare_commands_find_the_newest(walked: tuple[Path, Quickstart], capsys: pytest.CaptureFixture[str]) -> None:
    moe = walked[1].moe.outcome.id
    assert main(["eval", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == moe
    assert main(["inspect", "routing", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["run"] == moe
    references = {"null_permutation", "null_random_router", "step0"}
    assert all(references <= layer["nmi"].keys() for layer in document["layers"])


def test_the_trained_model_loads_and_generates(walked: tuple[Path, Quickstart]) -> None:
    model, tokenizer = moectl.load(walked[1].moe.outcome.id)
    prompt = torch.tensor([tokenizer.encode("salt tide net").ids])
    out = model.generate(prompt, 8)
    assert torch.equal(out[:, : prompt.shape[1]], prompt) and out.shape[1] <= prompt.shape[1] + 8
    words = set(tokenizer.decode(out[0].tolist()).split())
    assert words & set("salt tide net gull hull mast reef kelp cod oar foam sail".split())


def test_config_yaml_of_a_run_is_its_config(walked: tuple[Path, Quickstart]) -> None:
    folder = walked[1].moe.outcome.folder
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert config["moe"]["router"]["name"] == "topk" and config["moe"]["router"]["noise_std"] == 0.1
    assert config["train"]["steps"] == 40


def test_an_edited_dataset_stops_the_next_run(walked: tuple[Path, Quickstart], sets: list[str]) -> None:
    (dataset,) = paths.data_dir().iterdir()
    file = dataset / "train" / "tokens.npy"
    original = file.read_bytes()
    try:
        file.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        with pytest.raises(MoectlError, match=r"tokens\.npy") as caught:
            quickstart(RunRequest(), sets=[*sets, "train.seed=5"])
        assert caught.value.exit_code == 3
    finally:
        file.write_bytes(original)


def test_without_experts_there_is_nothing_to_compare(sets: list[str]) -> None:
    with pytest.raises(MoectlError, match="needs a moe section"):
        quickstart(RunRequest(), sets=[*[item for item in sets if not item.startswith("moe.")], "moe=null"])

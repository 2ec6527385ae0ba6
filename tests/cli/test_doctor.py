"""``moectl doctor`` at the command line: exit codes, JSON, what is shown, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moectl.cli import doctor
from moectl.cli.app import main
from moectl.config.schema import ExperimentConfig
from moectl.doctor.report import Check, Finding, Report
from moectl.training.state import load_checkpoint, save_checkpoint
from moectl.walk.train import RunRequest, start_run
from tests.support import write_corpus


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with the run 'fine', and the run 'sick', whose layer 1 has lost its gate."""
    folder = tmp_path_factory.mktemp("project")
    write_corpus(folder / "texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOECTL_HOME", str(folder / "home"))
        for name in ("fine", "sick"):
            start_run(_config(folder, name), RunRequest())
        checkpoints = folder / "home" / "runs" / "sick" / "checkpoints"
        sick = load_checkpoint(checkpoints / "step-00000004")
        sick.tensors["model"]["layers.1.mlp.router.weight"].zero_()
        save_checkpoint(checkpoints, 4, sick.tensors, sick.state, keep=2, protect=(0,))
        yield folder


def _config(folder: Path, name: str) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "name": name,
            "data": {
                "domains": ["fish", "sums"],
                "source": str(folder / "texts"),
                "tokenizer": "bpe:300",
                "block_size": 16,
            },
            "model": {"num_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "head_dim": 8},
            "moe": {"router": {"name": "top2"}, "num_experts": 4, "layers": "all"},
            "optim": {"warmup_steps": 1},
            "train": {"steps": 4, "batch_size": 8, "threads": 1, "seed": 1 if name == "sick" else 0},
        }
    )


def test_a_sound_run_ends_in_0_and_its_report_is_on_stdout(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "fine"]) == 0
    shown = capsys.readouterr()
    for name in ("lm-gradient", "dead-experts", "causality", "|∂balance/∂W|"):
        assert name in shown.out
    assert "run 'fine' (finished) at step 4" in shown.err and "held-out tokens of its own data" in shown.err
    assert "19 checks: nothing found; 1 could not be made." in shown.err


def test_a_problem_ends_in_3_and_says_what_to_do(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "sick"]) == 3
    shown = capsys.readouterr()
    assert "problem MOE034 layer 1: the gate is all zeros" in shown.out
    assert "→ Draw the gate from a small normal" in shown.out
    assert "moectl explain MOE0" in shown.err and "Traceback" not in shown.err


def test_findings_with_one_remedy_and_checks_with_one_reason_stand_together(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def finding(layer: int | None, todo: str = "do it") -> Finding:
        return Finding("MOE060", "problem", layer, f"seen in {layer}", todo)

    findings = [finding(0), finding(None, "else"), *(finding(number) for number in range(1, 12))]
    missing = [Check(name, "not made", "dense") for name in ("one", "two")]
    made = [(Check("dead", "problem", "much"), findings), *((each, []) for each in missing)]
    doctor._show(Report.of("it", made))
    shown = capsys.readouterr()
    assert "  layer 0: seen in 0\n  layer 1: seen in 1\n" in shown.out and "layer 8" not in shown.out
    assert "  and 4 more like these (--json has all)\n  → do it" in shown.out and shown.out.count("→ do it") == 1
    assert "problem MOE060: seen in None\n  → else" in shown.out
    assert "2 checks" in shown.out and "dense: one, two" in shown.out
    assert "`moectl explain MOE060` says more." in shown.err


def test_json_is_one_document_with_stable_keys(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "sick", "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert list(document) == ["subject", "ok", "findings", "checks", "notes"] and document["ok"] is False
    for finding in document["findings"]:
        assert list(finding) == ["code", "severity", "layer", "seen", "todo"]
    for check in document["checks"]:
        assert list(check) == ["name", "outcome", "detail", "code"]
        assert check["outcome"] in ("ok", "note", "warning", "problem", "not made")
    assert document["findings"][0]["severity"] == "problem"
    assert "MOE034" in {finding["code"] for finding in document["findings"]}
    assert main(["doctor", "fine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_the_machine_is_looked_at_without_a_subject(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["subject"] == "environment"
    outcomes = {check["name"]: check["outcome"] for check in document["checks"]}
    assert outcomes["torch"] == outcomes["router_logits, tried"] == outcomes["registry"] == "ok"


def test_warnings_leave_0_and_problems_end_in_3(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no git: a warning
    assert main(["doctor", "--json"]) == 0
    assert "git" in {c["name"] for c in json.loads(capsys.readouterr().out)["checks"] if c["outcome"] == "warning"}
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path / "file"))
    assert main(["doctor"]) == 3
    assert "problem: writable" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["finne"], 4, "Did you mean 'fine'?"),
        (["fine", "--step", "3"], 4, "step-00000003"),
        (["--step", "3"], 2, "--step needs a run"),
        (["."], 2, "neither a run (run.json) nor a model"),
        (["no/such"], 4, "there is no folder no/such"),
        ([" "], 2, "the name is empty"),
        (["fine", "--stpe", "3"], 2, "--step"),
    ],
)
def test_bad_input_is_answered_in_a_sentence(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", *args]) == code
    shown = capsys.readouterr()
    assert said in shown.err and "Traceback" not in shown.err and shown.out == ""


def test_a_run_is_looked_at_on_a_full_disk(project: Path) -> None:
    """Looking writes nothing, so that a limit of 64 bytes per file does not trouble it."""
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n"
        "from moectl.cli.app import main\n"
        "sys.exit(main(['doctor', 'fine', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],  # no bytecode: the limit would cut it
        capture_output=True,
        text=True,
        check=False,
        env={"MOECTL_HOME": str(project / "home"), "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True


def test_the_number_of_threads_is_left_as_it_was(project: Path) -> None:
    before = torch.get_num_threads()
    main(["doctor", "fine"])
    assert torch.get_num_threads() == before

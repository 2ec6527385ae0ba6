"""A plug-in router that does not work, from the command line: what is said, what is recorded, what is not written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from moectl.cli.app import main
from moectl.runs.rundir import RunDir
from moectl.training.state import checkpoint_steps
from tests.support import write_corpus
from tests.training.test_trainer import BAD_ROUTER


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        ("out = out._replace(topk_weights=out.topk_weights * float('nan'))", "topk_weights"),
        ("out = out._replace(topk_indices=out.topk_indices + 9)", "topk_indices"),
        ("raise RuntimeError('no such gate')", "no such gate"),
    ],
    ids=["nan", "out-of-range", "raises"],
)
def test_the_run_ends_before_its_first_checkpoint_and_names_plug_in_layer_and_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spoil: str, named: str
) -> None:
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(BAD_ROUTER.replace("{spoil}", spoil))
    config = {
        "data": {
            "domains": ["fish", "sums"],
            "source": str(write_corpus(tmp_path / "texts")),
            "tokenizer": "bpe:300",
            "block_size": 16,
        },
        "model": {"num_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "head_dim": 8},
        "moe": {"num_experts": 4, "layers": "1"},
        "optim": {"warmup_steps": 2},
        "train": {"steps": 6, "batch_size": 4, "threads": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "run.yaml", "--router", "./mine.py:Bad", "--name", "bad"]) == 2
    said = capsys.readouterr().err
    for needed in ("layer 1", "mine.py:Bad", named):
        assert needed in said
    assert "Traceback" not in said
    run = RunDir.open(tmp_path / "home" / "runs" / "bad")
    assert run.status == "failed"
    assert "layer 1" in run.record["exit_reason"] and named in run.record["exit_reason"]
    assert checkpoint_steps(run.checkpoints) == []

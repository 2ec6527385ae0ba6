"""``moectl grow``: more experts, the same function, in a new folder; and what is said of everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.cli.app import main
from moectl.walk.upcycle import load_upcycled
from tests.hf.tiny_models import some_ids, tiny

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Path:
    """Four experts of 48 neurons in two layers of a tiny Llama."""
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path / "home"))
    tiny("llama", torch.float32).save_pretrained(tmp_path / "base")
    options = ["--moe-layers", "last:2", "--experts", "4", "--router", "topk", "--set", "moe.router.top_k=2"]
    made = tmp_path / "moe"
    assert main(["upcycle", str(tmp_path / "base"), "--out", str(made), *options, "--set", "moe.init_noise=0.5"]) == 0
    (made / "tokenizer.json").write_text("{}")
    capsys.readouterr()
    return made


def grown(folder: Path, *options: str, capsys: Capture) -> dict[str, Any]:
    out = folder.with_name("grown")
    assert main(["grow", str(folder), "--out", str(out), *options, "--json"]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "receipt.json").read_text())
    return printed


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_upcycled(folder)[0](some_ids())


@pytest.mark.parametrize(
    ("options", "experts", "top_k", "size", "flops"),
    [
        (["--times", "2"], 8, 4, 48, "more"),
        (["--times", "3", "--parts"], 12, 6, 16, "same"),
        (["--add", "3"], 7, 2, 48, "same"),
    ],
)
def test_the_function_stays(
    folder: Path, options: list[str], experts: int, top_k: int, size: int, flops: str, capsys: Capture
) -> None:
    receipt = grown(folder, *options, capsys=capsys)
    out = folder.with_name("grown")
    torch.testing.assert_close(logits(out), logits(folder), rtol=0, atol=1e-4)
    # A third of the neurons has down_proj three times as large, which rounds in float32.
    assert receipt["error"]["float64"] <= (1e-6 if "3" in options and "--parts" in options else 1e-10)
    assert [receipt[key] for key in ("num_experts", "top_k", "expert_size")] == [
        {"before": 4, "after": experts}, {"before": 2, "after": top_k}, {"before": 48, "after": size},
    ]  # fmt: skip
    parts = {when: flops["forward"] for when, flops in receipt["flops"].items()}
    assert (parts["after"]["experts"] == parts["before"]["experts"]) is (flops == "same")
    model, _ = load_upcycled(out)
    assert sum(p.numel() for p in model.parameters()) == receipt["parameters"]["after"]["total"]
    assert [layer.experts.num_experts for layer in model.moe_layers().values()] == [experts, experts]
    assert (out / "tokenizer.json").read_text() == "{}"


def test_what_it_says(folder: Path, capsys: Capture) -> None:
    assert main(["grow", str(folder), "--out", str(folder.with_name("new")), "--add", "1"]) == 0
    printed = capsys.readouterr().out
    assert "4 experts of 48 neurons, 2 per token, became 5 experts" in printed and "the same function" in printed


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ([], 2, "--times 2 or more"),
        (["--times", "2", "--add", "1"], 2, "not one way"),
        (["--times", "0"], 2, "not one way"),
        (["--add", "-3"], 2, "not one way"),
        (["--add", "1", "--parts"], 2, "--times 2"),
        (["--add", "1", "--noise", "nan"], 2, "noise"),
        (["--add", "1", "--noise", "-1"], 2, "noise"),
        (["--times", "5", "--parts"], 2, "48 neurons do not divide"),
    ],
)
def test_bad_options_write_nothing(folder: Path, options: list[str], code: int, said: str, capsys: Capture) -> None:
    out = folder.with_name("new")
    assert main(["grow", str(folder), "--out", str(out), *options]) == code
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_bad_bases(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["grow", str(tmp_path / "nowhere"), "--out", str(tmp_path / "new"), "--add", "1"]) == 4
    assert main(["grow", str(tmp_path / "base"), "--out", str(tmp_path / "new"), "--add", "1"]) in (1, 2, 4)
    assert "Traceback" not in capsys.readouterr().err
    assert main(["grow", str(folder), "--out", str(folder), "--add", "1"]) == 2
    assert "exists already" in capsys.readouterr().err

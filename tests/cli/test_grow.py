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
    assert receipt["error"]["float64"] <= 1e-10
    # A third of the neurons has down_proj three times as large, which rounds in float32, as noise does that cancels.
    assert receipt["dtype"] == "float32" and receipt["rounding"] <= (1e-10 if "--add" in options else 1e-6)
    assert [receipt[key] for key in ("num_experts", "top_k", "expert_size")] == [
        {"before": 4, "after": experts}, {"before": 2, "after": top_k}, {"before": 48, "after": size},
    ]  # fmt: skip
    parts = {when: flops["forward"] for when, flops in receipt["flops"].items()}
    assert (parts["after"]["experts"] == parts["before"]["experts"]) is (flops == "same")
    model, _ = load_upcycled(out)
    assert sum(p.numel() for p in model.parameters()) == receipt["parameters"]["after"]["total"]
    assert [layer.experts.num_experts for layer in model.moe_layers().values()] == [experts, experts]
    assert (out / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("options", [["--times", "3", "--parts"], ["--times", "3"], ["--add", "2"]], ids=str)
def test_a_model_in_bfloat16_grows(tmp_path: Path, options: list[str], capsys: Capture) -> None:
    """The function is judged in float32 and float64; that matrices times three round in bfloat16 is told."""
    tiny("llama", torch.bfloat16).save_pretrained(tmp_path / "base")
    upcycled = ["--moe-layers", "last:2", "--experts", "4", "--router", "topk", "--set", "moe.router.top_k=2"]
    assert main(["upcycle", str(tmp_path / "base"), "--out", str(tmp_path / "moe"), *upcycled]) == 0
    capsys.readouterr()
    receipt = grown(tmp_path / "moe", *options, capsys=capsys)
    assert receipt["error"]["float32"] <= 1e-4 and receipt["error"]["float64"] <= 1e-10
    assert receipt["dtype"] == "bfloat16"
    # To be told from float32's rounding above; added experts round nothing.
    assert (receipt["rounding"] > 1e-5) is ("--times" in options)
    before, after = logits(tmp_path / "moe"), logits(tmp_path / "grown")
    assert before.dtype == torch.bfloat16 and (before.float() - after.float()).abs().max() < 0.5


def test_a_capacity_in_evaluation(tmp_path: Path, capsys: Capture) -> None:
    tiny("llama", torch.float32).save_pretrained(tmp_path / "base")
    capacity = ["--set", "moe.capacity.factor=0.5", "--set", "moe.capacity.in_eval=true"]
    assert main(["upcycle", str(tmp_path / "base"), "--out", str(tmp_path / "moe"), "--moe-layers", "1",
                 "--experts", "4", *capacity]) == 0  # fmt: skip
    capsys.readouterr()
    receipt = grown(tmp_path / "moe", "--add", "4", capsys=capsys)
    assert receipt["error"]["float64"] <= 1e-10
    assert receipt["notes"] == ["moe.capacity.factor is 1 now, not 0.5: the same room for the tokens of an expert"]
    model, _ = load_upcycled(tmp_path / "grown")
    assert model.moe_layers()[1].capacity.factor == 1.0


def test_copies_are_told_apart_or_told_the_same(folder: Path, capsys: Capture) -> None:
    out = folder.with_name("grown")
    (note,) = grown(folder, "--times", "2", capsys=capsys)["notes"]
    assert note == "the copies of an expert differ by 0.001 standard deviations, which cancel in their sum"
    experts = load_upcycled(out)[0].moe_layers()[1].experts.down_proj
    assert not torch.equal(experts[0], experts[1])
    again = folder.with_name("again")
    assert main(["grow", str(folder), "--out", str(again), "--times", "2", "--noise", "0"]) == 0
    assert "may stay so: --noise parts them" in capsys.readouterr().out
    experts = load_upcycled(again)[0].moe_layers()[1].experts.down_proj
    assert torch.equal(experts[0], experts[1])


@pytest.mark.parametrize("noise", ["1e300", "1e9"])
@pytest.mark.parametrize("options", [["--times", "2"], ["--add", "1"]], ids=str)
def test_noise_beyond_rounding_is_named(folder: Path, options: list[str], noise: str, capsys: Capture) -> None:
    out = folder.with_name("new")
    code = main(["grow", str(folder), "--out", str(out), *options, "--noise", noise])
    fine = options[0] == "--add" and noise == "1e9"  # closed experts may be anything that is a number
    assert code == (0 if fine else 3)
    assert out.exists() is fine
    assert fine or "smaller --noise" in capsys.readouterr().err


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
        (["--times", "2", "--seed", str(10**23)], 2, "seed"),
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

"""The command as its users meet it: exit codes, what is printed, and what is said of wrong arguments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moectl.cli.app import main
from moectl.parity.probes import PROBES

Capture = pytest.CaptureFixture[str]
QUICK = ("--probe", "float64", "--level", "moe", "--dtype", "float64")
#: An MoE block as it is written from scratch; {weights} is where mistakes are made.
BLOCK = """
import torch
from torch import nn
from torch.nn import functional as F


class Expert(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.gate_proj = nn.Linear(dim, inner, bias=False)
        self.up_proj = nn.Linear(dim, inner, bias=False)
        self.down_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.k, self.norm = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        size = config.hidden_size, config.moe_intermediate_size
        self.experts = nn.ModuleList(Expert(*size) for _ in range(config.num_experts))

    def forward(self, x):
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        logits = self.gate(x)
        weights, chosen = F.softmax(logits, dim=-1).topk(self.k, dim=-1)
        {weights}
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            out = out.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return out.reshape(shape), logits
"""
RIGHT = "weights = weights / weights.sum(-1, keepdim=True) if self.norm else weights"


def test_own_code_holds(capsys: Capture) -> None:
    assert main(["compare-hf", "qwen3", *QUICK]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].startswith("compare-hf qwen3: Hugging Face transformers 5.")
    assert "against moectl" in lines[0] and "seed 0" in lines[1] and "torch" in lines[1]
    rows = [line.split() for line in lines if line.startswith(("mlp.", "grad."))]
    assert [row[0] for row in rows[:3]] == ["mlp.router_logits", "mlp.chosen", "mlp.weights"]
    assert all("ok" in row for row in rows)
    assert lines[-1].startswith("The probe holds: 1 case, 10 tensors")
    assert "Diagnosis" not in printed.out and "error" not in printed.err


def test_json_is_one_document(capsys: Capture) -> None:
    assert main(["compare-hf", "qwen3_moe", *QUICK, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is True and document["family"] == "qwen3"
    assert {"versions", "commit", "probes", "tensors", "diagnosis", "ties", "route_flips", "not_compared"} <= set(
        document
    )
    assert len(document["tensors"]) == 10


def test_a_right_candidate_holds(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "block.py").write_text(BLOCK.replace("{weights}", RIGHT))
    assert main(["compare-hf", "qwen3", "--candidate", f"{tmp_path}/block.py:MoE", "--dtype", "float64"]) == 0
    printed = capsys.readouterr().out
    assert "experts.*.gate_proj.weight = experts.gate_up_proj[*, :F]" in printed
    assert "norm-topk-prob" in printed


def test_code_that_refuses_strided_input_is_not_wrong(tmp_path: Path, capsys: Capture) -> None:
    """``view`` raises on a transposed view, as it does in Hugging Face's own blocks: nothing came out wrong."""
    block = BLOCK.replace("{weights}", RIGHT).replace("x.reshape(-1,", "x.view(-1,")
    (tmp_path / "block.py").write_text(block)
    args = ["compare-hf", "qwen3", "--candidate", f"{tmp_path}/block.py:MoE", "--dtype", "float64"]
    assert main([*args, "--probe", "non-contiguous", "--probe", "float64"]) == 0
    assert "it takes contiguous input only" in capsys.readouterr().out


def test_a_wrong_candidate_is_told_its_mistake(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "block.py").write_text(BLOCK.replace("{weights}", "pass"))
    args = ["compare-hf", "qwen3", "--candidate", f"{tmp_path}/block.py:MoE", "--dtype", "float64"]
    assert main(args) == 3
    printed = capsys.readouterr()
    assert "First divergent tensor: mlp.weights (probe float64, moe, block.py:MoE): max abs error" in printed.out
    assert "MOE016" in printed.out and "moectl explain MOE016" in printed.out
    assert (
        "mlp.weights is the first tensor that does" in printed.err
        and "Read about it: moectl explain MOE0" in printed.err
    )
    assert main([*args, "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False
    assert "MOE016" in document["diagnosis"][0]["codes"] and document["diagnosis"][0]["code"].startswith("MOE")
    assert document["first_divergent"]["name"] == "mlp.weights"


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["qwen4"], 2, "unknown family 'qwen4'"),
        (["qwen3", "--probe", "exact-tie"], 2, "Did you mean 'exact-ties'?"),
        (["qwen3", "--level", "rooter"], 2, "Did you mean 'router'?"),
        (["qwen3", "--dtype", "float16"], 2, "unknown dtype 'float16'"),
        (["qwen3", "--config", "tinny"], 4, "Did you mean 'tiny'?"),
        (["qwen3", "--config", "published"], 2, "--layer-only"),
        (["qwen3", "--candidate", "none.py:Block"], 4, "none.py"),
        (["gpt_oss", "--layer-only", "--config", "tiny"], 2, "gpt_oss"),
        (["new-adapter", "--level", "mo"], 2, "Did you mean 'moe'?"),
        (["qwen3", "--porbe", "k-1"], 2, "unknown option '--porbe'"),
    ],
)
def test_what_the_caller_got_wrong(args: list[str], code: int, said: str, capsys: Capture) -> None:
    assert main(["compare-hf", *args]) == code
    printed = capsys.readouterr()
    assert printed.out == "" and said in printed.err
    assert "Traceback" not in printed.err


def test_bare_is_help(capsys: Capture) -> None:
    assert main(["compare-hf"]) == 0
    printed = capsys.readouterr()
    assert "Usage: moectl compare-hf" in printed.out and "--list-probes" in printed.out


def test_probes_are_listed(capsys: Capture) -> None:
    assert main(["compare-hf", "--list-probes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["probes"]
    assert [probe["name"] for probe in listed] == list(PROBES)
    assert main(["compare-hf", "--list-probes"]) == 0
    assert "norm-topk-prob" in capsys.readouterr().out


def test_families_are_measured(capsys: Capture) -> None:
    assert main(["compare-hf", "--list", "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["families"]
    held = {(cell["family"], cell["level"], cell["candidate"]): cell["holds"] for cell in cells}
    assert all(held["qwen3", level, "moectl"] for level in ("model", "layer", "moe", "attention", "router"))
    for family in ("mixtral", "olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss"):
        assert held[family, "moe", "formula"] and held[family, "router", "formula"]
    assert held["mixtral", "model", "formula"] and held["olmoe", "model", "formula"]
    assert False not in held.values()
    assert all(cell["says"] for cell in cells if cell["holds"] is None)


def test_one_layer(capsys: Capture) -> None:
    assert main(["compare-hf", "qwen3", "--layer-only", "--config", "tiny", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] and document["peak_bytes"] < document["limit_bytes"]
    assert {"grad.mlp.experts.gate_up_proj", "grad.input"} <= {row["name"] for row in document["tensors"]}
    assert main(["compare-hf", "qwen3", "--layer-only", "--config", "tiny"]) == 0
    assert "tensors hold" in capsys.readouterr().out


def test_new_adapter(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare-hf", "new-adapter"]) == 0
    assert capsys.readouterr().out == "adapter.py\n"
    compile((tmp_path / "adapter.py").read_text(), "adapter.py", "exec")
    assert main(["compare-hf", "new-adapter"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["compare-hf", "new-adapter", "mine.py", "--level", "attention"]) == 0
    assert (tmp_path / "mine.py").is_file()


def test_an_interrupt_is_130_without_a_traceback() -> None:
    """Interrupted as soon as it says how far it is."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "moectl", "compare-hf", "qwen3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None and process.stdout is not None
    said = process.stderr.readline()
    assert said.startswith("comparing ")
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(60) == 130
    assert said.splitlines()[-1] == "interrupted: nothing was decided" and "Traceback" not in said
    assert process.stdout.read() == ""

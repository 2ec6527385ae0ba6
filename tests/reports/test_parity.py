"""The tables of compare-hf: nothing that differs is folded away, and everything fits its terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console, RenderableType

from moectl.parity.case import Case, Inputs
from moectl.parity.compare import Comparison, Row
from moectl.parity.contest import Contest
from moectl.parity.diagnosis.diagnose import Diagnosis, Finding
from moectl.parity.results import ProbeResult, Report, Skipped
from moectl.parity.routes import Flip
from moectl.reports.parity import parity_report, rows_table

HEADER: dict[str, Any] = {
    "candidates": ["moectl"],
    "versions": {"transformers": "5.23.0", "torch": "2.13.0", "python": "3.11", "moectl": "0.1.0"},
    "commit": "0123456789abcdef",
    "dirty": False,
    "device": "cpu",
    "seed": 0,
    "config": "tiny, random weights",
    "shape": {"layers": 3, "hidden": 32, "experts": 8, "chosen": 2, "expert size": 24},
}


def printed(view: RenderableType, width: int = 100) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False).print(view)
    return stream.getvalue()


def row(name: str, error: float = 1e-15, verdict: str = "ok", note: str = "") -> Row:
    return Row(name, (2, 12, 32), error, error, 1e-10, verdict, note)  # type: ignore[arg-type]


def result(*rows: Row, probe: str = "float64", dtype: torch.dtype = torch.float64, **fields: Any) -> ProbeResult:
    case = Case(probe, "moe", {}, {}, Inputs(), dtype)
    output = row("mlp.output")
    comparison = Comparison((*rows, output), fields.pop("ties", ()), "moe")
    return ProbeResult(probe, dtype, "moe", "moectl", (Contest(case, "moectl", comparison, **fields),))


def report(*results: ProbeResult, **fields: Any) -> Report:
    return Report("qwen3", HEADER, results, **fields)


def test_layers_share_a_line_that_shows_the_worst() -> None:
    rows = [row(f"layers.{layer}.attn.q", 10.0 ** -(14 - layer)) for layer in range(3)]
    lines = [line for line in printed(rows_table("t", rows)).splitlines() if "attn.q" in line]
    assert len(lines) == 1 and "1.0e-12" in lines[0] and lines[0].split()[-1] == "2"
    lines = [line for line in printed(rows_table("t", rows, everything=True)).splitlines() if "attn.q" in line]
    assert [line.split()[0] for line in lines] == [f"layers.{layer}.attn.q" for layer in range(3)]


def test_a_differing_layer_has_its_own_line() -> None:
    rows = [
        row(f"layers.{layer}.attn.q", 1.0 if layer == 1 else 1e-15, "differs" if layer == 1 else "ok")
        for layer in range(3)
    ]
    lines = [line.split() for line in printed(rows_table("t", rows)).splitlines() if "attn.q" in line]
    assert [line[0] for line in lines] == ["layers.*.attn.q", "layers.1.attn.q"]
    assert lines[1][-1] == "differs"


def test_probes_that_hold_share_a_line_and_failures_do_not() -> None:
    good = [result(probe="k-1", dtype=dtype) for dtype in (torch.float64, torch.float32)]
    bad = result(
        row("mlp.weights", 0.5, "differs", "0.6 where the reference has 0.1"), probe="k-1", dtype=torch.bfloat16
    )
    text = printed(parity_report(report(*good, bad)))
    lines = [line.split() for line in text.splitlines() if line.startswith("k-1 ")]
    assert lines[0][1:3] == ["f64", "f32"] and lines[0][-1] == "ok"
    assert lines[1][1] == "bf16" and "differs: mlp.weights" in " ".join(lines[1])
    assert "First divergent tensor: mlp.weights (probe k-1, bfloat16, moe, moectl): max abs error 5.0e-01" in text
    assert "0.6 where the reference has 0.1" in text
    everything = printed(parity_report(report(*good, bad), everything=True))
    assert len([line for line in everything.splitlines() if line.startswith("k-1 ")]) == 3


def test_the_table_is_of_the_first_probe_that_fails() -> None:
    bad = result(row("mlp.weights", 0.5, "differs"), probe="k-1")
    assert "Probe k-1: moe in float64, moectl" in printed(parity_report(report(result(), bad)))
    assert "Probe float64: moe in float64, moectl" in printed(parity_report(report(result())))


def test_verdict_diagnosis_and_asides() -> None:
    finding = Finding(("MOE016", "MOE011"), "norm_topk_prob ignored", "all 24 tokens", "mlp.weights", ("x",))
    bad = result(row("mlp.weights", 0.5, "differs"))
    flip = Flip(1, 7, 3e-4, (0, 1), (0, 2), True)
    low = result(probe="bfloat16", dtype=torch.bfloat16, flips=(flip, flip._replace(layer=2)))
    absent = Row("rope.cos", (2, 12, 8), None, None, None, "not compared", "the candidate shows no such tensor")
    skipped = Skipped("compiled", torch.float32, "moe", "moectl", "there is no C++ compiler")
    made = report(
        bad, low, result(absent, probe="eval"), skipped=(skipped,), diagnosis=Diagnosis((finding,), "more", 3, ())
    )
    text = printed(parity_report(made), width=200)
    assert "MOE016 MOE011 norm_topk_prob ignored" in text
    assert "moectl explain MOE016\n" in text and "moectl explain MOE011\n" in text
    assert "first in mlp.weights; all 24 tokens" in text and "not explained: more" in text
    assert "not applicable: compiled (moe; moectl): there is no C++ compiler" in text
    assert "not compared (moectl, eval): rope.cos: the candidate shows no such tensor" in text
    assert "route flips in bfloat16 (moe, moectl): 1 in layer 1, 1 in layer 2; margin up to 3.0e-04" in text
    assert "1 of 3 probes do not hold: float64." in text
    good = printed(parity_report(report(result())), width=200)
    assert "The probe holds: 1 case, 1 tensor; worst error over tolerance 1e-05 in float64." in good
    assert "Diagnosis" not in good


def test_an_output_that_was_not_compared_is_said() -> None:
    empty = result()
    silent = replace(
        empty, contests=(replace(empty.contests[0], comparison=Comparison((row("mlp.weights"),), (), "moe")),)
    )
    text = printed(parity_report(report(silent)), width=200)
    assert "moectl shows no mlp.output: its output was not compared." in text
    assert "not compared: mlp.output" in text


def test_nothing_compared_is_said() -> None:
    skipped = (Skipped("compiled", torch.float32, "moe", "moectl", "there is no C++ compiler"),)
    text = printed(parity_report(report(skipped=skipped)), width=200)
    assert "not applicable: compiled (moe; moectl)" in text and "Nothing was compared" in text


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_line_is_longer_than_the_terminal(width: int) -> None:
    rows = [row(f"grad.model.layers.{layer}.post_attention_layernorm.weight") for layer in range(3)]
    text = printed(parity_report(report(result(*rows))), width)
    assert max(map(len, text.splitlines())) <= width
    assert "grad.model.layers.*.post_attention_layernorm" in text or width < 100

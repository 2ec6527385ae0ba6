"""The benchmark scripts run, say what they should, and compare what agrees. No time is asserted."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY_LAYER = ["--shapes", "24x16x8x4x2", "24x16x8x4x1", "24x16x8x4x2:gelu", "--rounds", "2"]
TINY_STEP = ["--batch-size", "2", "--block-size", "16", "--vocabulary", "32", "--experts", "4", "--rounds", "2"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_layers_agree_with_float64_to_rounding(run: Any) -> None:
    rows = json.loads(run("moe_layer.py", *TINY_LAYER, "--dtype", "float64", "--json"))["rows"]
    assert [row["variant"] for row in rows] == 3 * ["dense", "moectl", "moectl, plain", "HF eager"]
    for row in rows:
        assert row["forward_ratio"]["median"] > 0 and row["forward_backward_ratio"]["median"] > 0
        if row["variant"] != "dense":
            assert row["flips"] == 0
            # Hugging Face's router is float32 inside, so its weights are good to 1e-7 only.
            tolerance = 1e-6 if row["variant"].startswith("HF") else 1e-14
            assert row["max_error_output"] < tolerance and row["max_error_grad"] < tolerance


@pytest.mark.parametrize(
    ("script", "arguments", "rows"),
    [
        ("moe_layer.py", TINY_LAYER, 18),
        ("training_throughput.py", TINY_STEP, 7),
        ("diagnosis.py", ["--only", "moe-gate-and-up-swapped"], 2),
    ],
)
def test_the_table_is_printed_and_the_docstring_holds_one(
    run: Any, script: str, arguments: list[str], rows: int
) -> None:
    lines = [line for line in run(script, *arguments).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + rows
    assert len({line.count("|") for line in lines}) == 1
    docstring = ast.get_docstring(ast.parse((BENCHMARKS / script).read_text())) or ""
    assert lines[0] in docstring and lines[1] in docstring


def test_throughput_is_compared_at_equal_flops(run: Any) -> None:
    rows = {row["model"]: row for row in json.loads(run("training_throughput.py", *TINY_STEP, "--json"))["rows"]}
    assert {name for name, row in rows.items() if row["partner"] == "dense, 2F"} == {"dense, 2F", "top2"}
    assert rows["dense"]["throughput_ratio"]["median"] == 1.0
    assert rows["top1"]["parameters"] == rows["top2"]["parameters"] > rows["dense, 2F"]["parameters"]


def test_a_shape_that_is_none_is_refused(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("moe_layer.py", "--shapes", "2048x768")
    assert stopped.value.code == 2
    assert "'2048x768' is not a shape" in capsys.readouterr().err


def test_variants_take_turns_and_slow_ones_leave_early() -> None:
    from interleaved import Timed, measure

    calls: list[str] = []
    variants = {name: Timed(lambda name=name: calls.append(name)) for name in ("a", "b")}
    seconds = measure(variants, rounds=4, warmup=1)
    assert calls == ["a", "b"] * 5
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4}

    calls.clear()
    seconds = measure(variants, rounds=9, warmup=1, max_seconds=0.0)
    assert calls == ["a", "b"] * 4
    assert len(seconds["a"]) == 3


def test_ratios_are_taken_within_a_round() -> None:
    from interleaved import ratio

    halved = ratio([1.0, 10.0, 100.0], [2.0, 20.0, 200.0, 1.0])
    assert (halved.low, halved.median, halved.high) == (0.5, 0.5, 0.5)
    assert str(ratio([3.0], [2.0])) == "1.50 (1.50-1.50)"

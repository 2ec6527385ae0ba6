"""What ``moectl train`` says when a run has ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from moectl.cli.train import _report, progress_note
from moectl.walk.train import RunOutcome


def outcome(**metrics: float) -> RunOutcome:
    return RunOutcome("run-a", Path("run-a"), "interrupted", "SIGINT", 7, 700, metrics)


def test_a_run_that_was_never_evaluated_has_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    _report(outcome(**{"train/lm_loss": 3.0}))
    said = capsys.readouterr()
    assert said.out == ""
    assert "run-a: interrupted at step 7" in said.err and "next: moectl train --resume run-a" in said.err


def test_an_evaluated_one_has(capsys: pytest.CaptureFixture[str]) -> None:
    _report(outcome(**{"eval/lm_loss": 3.0, "eval/perplexity": 20.1, "eval/math/lm_loss": 2.5}))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run-a · held-out language-model loss"
    rows = [line.split() for line in lines[3:]]
    assert rows == [["all", "3", "20.1", "–"], ["math", "2.5", "–", "–"]]


def test_balance_is_that_of_the_worst_layer_beside_its_two_references(capsys: pytest.CaptureFixture[str]) -> None:
    """What running counts cost stands with it, and nothing where they cost nothing."""
    values = {"train/lm_loss": 3.0, "train/tokens_per_second": 10.0, "balance/worst": 1.237, "balance/worst_layer": 3.0}
    values |= {"balance/collapse_value": 8.0, "balance/running_deviation": 0.0123}
    said = "balance 1.24 (layer 3, the worst; 1 balanced, 8 collapsed; running counts off by 0.01)"
    assert said in progress_note(values)
    _report(outcome(**values))
    assert f"routing: {said}" in capsys.readouterr().err
    exact = progress_note({**values, "balance/running_deviation": 1e-16})
    assert "balance 1.24 (layer 3, the worst; 1 balanced, 8 collapsed)" in exact

"""What candidates are held against: the question as the reference is asked it, once, and bfloat16's bounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moectl.parity.case import Case, Level, Reroute
from moectl.parity.compare import compare_tensor, largest
from moectl.parity.contest import contest
from moectl.parity.families import config_of
from moectl.parity.own import Own
from moectl.parity.probes import PROBES, Bench
from moectl.parity.standard import Standards, kind_of, question_of
from moectl.parity.tape import Tape
from moectl.parity.tolerance import bfloat16_ulp

LEVELS: tuple[Level, ...] = ("model", "layer", "moe", "attention", "router")


class Counted:
    """The reference, counted."""

    def __init__(self, subject: Any) -> None:
        self.subject, self.name, self.runs = subject, subject.name, 0

    def run(self, case: Case, reroute: Reroute | None = None) -> Tape:
        self.runs += 1
        return self.subject.run(case, reroute)


def bench(level: Level = "model", dtype: torch.dtype = torch.float64, seed: int = 0) -> Bench:
    return Bench("qwen3", level, config_of("qwen3", "tiny"), seed, dtype)


def test_questions_that_are_the_same_are_asked_once() -> None:
    standards, made = Standards("qwen3"), bench()
    standards.subject = counted = Counted(standards.subject)
    base = standards.standard(made.case("float64"))
    for name in ("eval", "non-contiguous"):
        (case,) = PROBES[name].build(made)
        assert standards.standard(case) is base
    assert counted.runs == 1
    for case in (*PROBES["chunked-prefill"].build(made), *PROBES["cached-decoding"].build(made)):
        assert torch.equal(standards.standard(case).tape["logits"], base.tape["logits"])
    assert counted.runs == 2, "without gradients it is another question, for all chunks the same"
    (trained,) = PROBES["train"].build(made)
    assert standards.standard(trained) is not base
    assert standards.standard(made.case("float64", made.inputs(length=11))) is not base
    assert standards.standard(made.case("float64", weights=dict(Bench.weights(bench())))) is not base


def test_as_it_is_differs_from_lifted() -> None:
    standards, case = Standards("qwen3"), bench().case("anchor")
    off = (standards.standard(case, lifted=False).tape["logits"] - standards.standard(case).tape["logits"]).abs().max()
    assert 1e-9 < float(off) < 1e-5


def test_the_question_is_in_one_plain_piece() -> None:
    (case,) = PROBES["non-contiguous"].build(bench())
    asked = question_of(replace(case, compiled=True, inputs=case.inputs._replace(chunks=(6, 6))))
    assert asked.inputs.chunks is None and not asked.compiled
    assert asked.inputs.input_ids is not None and asked.inputs.input_ids.is_contiguous()
    assert case.inputs.input_ids is not None and not case.inputs.input_ids.is_contiguous()


@pytest.mark.parametrize("level", LEVELS)
def test_bfloat16_bounds_are_the_references_own_error(level: Level) -> None:
    """Against the truth the reference is within its own bound, at a third of it or at the floor of two units."""
    made = bench(level, torch.bfloat16)
    case = made.case("bfloat16")
    standard = Standards("qwen3").standard(case)
    assert standard.bounds is not None and standard.reference is not None
    assert set(standard.bounds) == set(standard.tape)
    for name, bound in standard.bounds.items():
        row = compare_tensor(name, standard.tape[name], standard.reference[name], case, bounds=standard.bounds)
        assert row.ok, row
        scale = largest(name, standard.tape[name], case)
        assert bound >= 2 * bfloat16_ulp(scale)
        assert bound < 0.2 * scale or name.endswith(("chosen", "rope.sin")), (
            "a bound of the tensor's own size sees nothing"
        )
    assert standard.tape["grad.input"].dtype == torch.float64


def test_the_truth_takes_the_references_choice() -> None:
    """Over seeds, bfloat16 chooses otherwise than float64 somewhere; the truth follows it."""
    differ = 0
    for seed in range(8):
        made = bench("model", torch.bfloat16, seed)
        standards, case = Standards("qwen3"), made.case("bfloat16")
        standard = standards.standard(case)
        assert standard.reference is not None
        exact = replace(case, dtype=torch.float64, weights={n: t.double() for n, t in case.weights.items()})
        for layer in range(3):
            name = f"layers.{layer}.mlp.chosen"
            assert torch.equal(standard.tape[name], standard.reference[name])
            differ += int((standards.standard(exact).tape[name] != standard.tape[name]).any())
    assert differ > 0


@pytest.mark.parametrize("level", LEVELS)
def test_own_code_holds_in_bfloat16(level: Level) -> None:
    flips = 0
    for seed in range(6):
        case = bench(level, torch.bfloat16, seed).case("bfloat16")
        outcome = contest(case, Own("qwen3"), Standards("qwen3").standard(case))
        assert outcome.ok, outcome.comparison
        flips += len(outcome.flips)
    if level == "model":
        assert flips > 0, "flips happen, and are counted"


class Rough:
    """Own code whose tensors are moved by a part of their size."""

    def __init__(self, part: float) -> None:
        self.own, self.part, self.name = Own("qwen3"), part, "rough"

    def run(self, case: Case, reroute: Reroute | None = None) -> Tape:
        made = Tape()
        for name, tensor in self.own.run(case, reroute).items():
            moved = tensor if tensor.dtype == torch.bool else tensor * (1 + self.part)
            made.record(name, moved)
        return made


def test_a_tenth_is_seen_in_bfloat16() -> None:
    case = bench("moe", torch.bfloat16).case("bfloat16")
    standard = Standards("qwen3").standard(case)
    outcome = contest(case, Rough(0.1), standard)
    assert outcome.comparison is not None
    held = [row.name for row in outcome.comparison.rows if row.ok and row.name != "mlp.chosen"]
    assert held == [] and not outcome.ok


def test_kinds_share_a_bound() -> None:
    assert kind_of("layers.2.attn.q") == kind_of("layers.11.attn.q") == "attn.q"
    assert kind_of("grad.input") == kind_of("grad.lm_head.weight") == "grad"
    assert kind_of("logits") == "logits"

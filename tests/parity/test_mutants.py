"""Both examples pass as they are; every mistake planted in them is caught, at its tensor, and called by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moectl.parity.candidate.side import load_candidate
from moectl.parity.case import Case, Inputs, Level
from moectl.parity.compare import compare
from moectl.parity.diagnosis.diagnose import diagnose, equivalent_here
from moectl.parity.diagnosis.low_precision import missing_casts
from moectl.parity.families import config_of, formula_of, random_weights
from moectl.parity.hugging_face import HuggingFace
from moectl.parity.hypotheses import HYPOTHESES
from moectl.parity.hypotheses.detached import BACKWARD
from tests.parity.cases import case
from tests.parity.judging import bfloat16_case, cases_and_answers, judge, judge_in_bfloat16
from tests.parity.mutants import CANDIDATES, CLASSES, MUTANTS, Mutant

LEVELS: tuple[Level, ...] = ("router", "moe", "attention", "layer", "model")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("style", ["modulelist", "fused"])
def test_the_example_agrees_with_hugging_face_forward_and_backward(style: str, level: Level) -> None:
    spec = f"{CANDIDATES / style}_style.py:{CLASSES[style][level]}"
    candidate = load_candidate(spec, family="qwen3", level=level)
    assert not candidate.extra_parameters and not candidate.missing and not candidate.problems
    asked = case("qwen3", level)
    comparison = compare(HuggingFace("qwen3").run(asked), candidate.run(asked), asked)
    assert comparison.ok, comparison.first
    names = {row.name for row in comparison.rows if row.verdict == "ok"}
    assert any(name.startswith("grad.") for name in names)
    cases, answers = cases_and_answers(level, {})
    for each, answer in zip(cases, answers, strict=True):
        assert compare(answer, candidate.run(each), each).ok
    nothing = diagnose(candidate, "qwen3", cases[:1])
    assert nothing.findings == () and nothing.unexplained is None


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if not m.equivalent], ids=lambda mutant: mutant.id)
def test_the_mistake_is_caught_and_called_by_its_name(mutant: Mutant, tmp_path: Path) -> None:
    judgement = judge(mutant, tmp_path)
    assert judgement.first == mutant.first
    diagnosis = judgement.diagnosis
    assert diagnosis is not None
    assert judgement.named == mutant.named, diagnosis
    if mutant.named:
        assert len(diagnosis.findings) == 1 and diagnosis.unexplained is None
        codes = {code for h in (*HYPOTHESES, *BACKWARD) if h.name in mutant.named for code in h.codes}
        assert codes <= set(diagnosis.findings[0].codes)
    else:  # no hypothesis makes this mistake: none is blamed, and what is known is said
        assert diagnosis.unexplained is not None and mutant.first in diagnosis.unexplained


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.equivalent], ids=lambda mutant: mutant.id)
def test_what_changes_nothing_here_is_equivalent(mutant: Mutant, tmp_path: Path) -> None:
    assert judge(mutant, tmp_path).first == ""
    cases, _ = cases_and_answers(mutant.level, mutant.config)
    if mutant.equivalent != "casts":
        assert mutant.equivalent in equivalent_here("qwen3", cases)
        without, _ = cases_and_answers(mutant.level, {})
        changed = dict(mutant.config) or {"norm_topk_prob": False}
        others = without if mutant.config else cases_and_answers(mutant.level, changed)[0]
        assert mutant.equivalent not in equivalent_here("qwen3", others)


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.in_bfloat16], ids=lambda mutant: mutant.id)
def test_a_missing_cast_is_told_by_its_bits(mutant: Mutant, tmp_path: Path) -> None:
    (finding,) = judge_in_bfloat16(mutant, tmp_path)
    assert " ".join((*finding.hypotheses, finding.tensor)) == mutant.in_bfloat16
    assert "bit for bit" in finding.evidence


@pytest.mark.parametrize("level", ["router", "moe", "attention", "layer"])
def test_no_cast_is_missed_in_the_examples_or_in_hugging_face(level: Level) -> None:
    asked = bfloat16_case(level)
    for style in CLASSES:
        spec = f"{CANDIDATES / style}_style.py:{CLASSES[style][level]}"
        assert missing_casts(load_candidate(spec, family="qwen3", level=level), "qwen3", asked) == ()
    assert missing_casts(HuggingFace("qwen3"), "qwen3", asked) == ()


def test_the_mutants_are_many_and_in_both_styles() -> None:
    ids = [mutant.id for mutant in MUTANTS]
    assert len(ids) == len(set(ids)) >= 100
    named = {name for mutant in MUTANTS for name in mutant.named}
    assert named <= {h.name for h in (*HYPOTHESES, *BACKWARD)} | {"biases", "shared-expert", "frozen"}
    assert len(named) >= 30
    for style in CLASSES:
        assert {m.level for m in MUTANTS if m.style == style} == set(LEVELS)


def test_two_mistakes_at_once_are_both_named(tmp_path: Path) -> None:
    """One in attention and one in the experts, of a block."""
    edits = {m.mistake: m.edits for m in MUTANTS if m.style == "modulelist"}
    planted = edits["key/value heads tiled"] + edits["gate and up swapped"]
    judgement = judge(Mutant("two", "modulelist", "layer", planted, "attn.heads", frozenset()), tmp_path)
    assert judgement.first == "attn.heads"
    assert judgement.named == {"kv-order", "gate-up-swapped"}
    assert judgement.diagnosis is not None and judgement.diagnosis.unexplained is None
    assert [finding.tensor for finding in judgement.diagnosis.findings] == ["attn.heads", "mlp.expert_outputs"]


def test_a_bias_beside_another_mistake(tmp_path: Path) -> None:
    edits = (("hidden, bias=False", "hidden, bias=True"), ("q = self.q_norm(q)\n", "q = q * 1.0\n"))
    judgement = judge(Mutant("two", "modulelist", "attention", edits, "attn.q_rotated", frozenset()), tmp_path)
    assert judgement.named == {"biases", "qk-norm-missing"}


def test_a_parameter_that_does_nothing_is_not_blamed(tmp_path: Path) -> None:
    swapped = next(m for m in MUTANTS if m.id == "fused-moe-gate-and-up-swapped")
    unused = (
        "self.num_experts = config.num_experts",
        "self.num_experts = config.num_experts\n        self.shared_scale = nn.Parameter(torch.ones(3))",
    )
    judgement = judge(Mutant("unused", "fused", "moe", (*swapped.edits, unused), "", frozenset()), tmp_path)
    assert judgement.named == {"gate-up-swapped"}


def test_a_block_in_float32(tmp_path: Path) -> None:
    """Diagnosis holds to float32's tolerance too, where the candidate was run in it."""
    config = config_of("qwen3", "tiny")
    weights = random_weights(formula_of("qwen3", config), "moe", seed=0, dtype=torch.float32)
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    asked = Case("float32", "moe", config, weights, Inputs(hidden=hidden), torch.float32, gradients=False)
    mutant = next(m for m in MUTANTS if m.id == "fused-moe-gate-and-up-swapped")
    candidate = load_candidate(mutant.write(tmp_path), family="qwen3", level="moe")
    assert [f.hypotheses for f in diagnose(candidate, "qwen3", [asked]).findings] == [("gate-up-swapped",)]


def test_what_comes_before_does_not_change_what_comes_after(tmp_path: Path) -> None:
    """Tables that are handed to an attention are in the dtype of its case, also when it had another one before."""
    candidate = load_candidate(f"{CANDIDATES}/fused_style.py:GroupedQueryAttention", family="qwen3", level="attention")
    asked = case("qwen3", "attention")
    answer = HuggingFace("qwen3").run(asked)
    assert compare(answer, candidate.run(asked), asked).ok
    candidate.run(bfloat16_case("attention"))
    assert compare(answer, candidate.run(asked), asked).ok


def test_slots_are_not_taken_for_experts_where_all_are_chosen(tmp_path: Path) -> None:
    """With k = E a mask over slots has the shape of one over experts; this block is right."""
    source = Mutant("", "modulelist", "moe", (), "", frozenset()).source()
    loop = "token, slot = torch.where(indices == e)"
    masked = "mine = indices == e\n            token = torch.where(mine.any(-1))[0]"
    weight = "expert(x[token]) * weights[token, slot].unsqueeze(-1)"
    summed = "(weights * mine).sum(-1, keepdim=True)[token] * expert(x[token])"
    routing = "router_logits, weights, indices = self.router(x)"
    inline = (
        "router_logits = self.router.gate(x)\n"
        "        weights, indices = router_logits.softmax(-1).topk(self.router.top_k, dim=-1)\n"
        "        weights = weights / weights.sum(-1, keepdim=True)"
    )
    assert loop in source and routing in source and weight in source
    file = tmp_path / "inline.py"
    file.write_text(source.replace(loop, masked).replace(weight, summed).replace(routing, inline), encoding="utf-8")
    candidate = load_candidate(f"{file}:MoEBlock", family="qwen3", level="moe")
    for chosen in (2, 8):
        asked = case("qwen3", "moe", {"num_experts_per_tok": chosen})
        comparison = compare(HuggingFace("qwen3").run(asked), candidate.run(asked), asked)
        assert comparison.ok, comparison.first

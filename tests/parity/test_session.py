"""Whole comparisons: everything held, one number moved, sides that fail, and what the report says of it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.cli.compare_hf import conclude
from moectl.cli.output import to_jsonable
from moectl.errors import CheckError, ConfigError, MoectlError
from moectl.parity.case import Case, Level, Reroute, Unsupported
from moectl.parity.compare import compare
from moectl.parity.contest import Contest, contest
from moectl.parity.families import config_of
from moectl.parity.own import Own
from moectl.parity.probes import PROBES, Bench
from moectl.parity.reference import FormulaSubject
from moectl.parity.results import ProbeResult, Report
from moectl.parity.session import Request, compare_hf
from moectl.parity.standard import Standard, Standards
from moectl.parity.tape import Tape, model_order

LEVELS: tuple[Level, ...] = ("model", "layer", "moe", "attention", "router")
HEADER = {"candidates": ["moved"], "versions": {}}


@cache
def base(level: Level) -> tuple[Case, Standard, Tape]:
    case = Bench("qwen3", level, config_of("qwen3", "tiny")).case("float64")
    return case, Standards("qwen3").standard(case), Own("qwen3").run(case)


NAMES = [(level, name) for level in LEVELS for name in sorted(base(level)[1].tape, key=model_order)]


class Moved:
    """Our own code, with one number of one tensor moved; a moved choice is another expert for one token."""

    def __init__(self, name: str, by: float = 1e-6) -> None:
        self.own, self.name, self.tensor, self.by = Own("qwen3"), "moved", name, by

    def run(self, case: Case, reroute: Reroute | None = None) -> Tape:
        return moved(self.own.run(case, reroute), self.tensor, self.by)


def moved(tape: Tape, name: str, by: float = 1e-6) -> Tape:
    made = Tape()
    for key, tensor in tape.items():
        if key == name and tensor.dtype == torch.bool:
            tensor = tensor.clone()
            tensor[3] = tensor[3].roll(1)
        elif key == name:
            tensor = tensor.contiguous().clone()
            tensor.view(-1)[tensor.numel() // 2] += by
        made.record(key, tensor)
    return made


def report_of(*contests: Contest) -> Report:
    level = contests[0].case.level
    return Report("qwen3", HEADER, (ProbeResult("float64", torch.float64, level, "moved", contests),))


@pytest.mark.parametrize(("level", "name"), NAMES, ids=[f"{level}-{name}" for level, name in NAMES])
def test_a_millionth_in_any_one_tensor_is_exit_code_3(level: Level, name: str) -> None:
    case, standard, tape = base(level)
    comparison = compare(standard.tape, moved(tape, name), case)
    report = report_of(Contest(case, "moved", comparison))
    assert not report.ok and report.to_json()["ok"] is False
    assert report.first is not None and report.first[1].name == name
    with pytest.raises(CheckError, match=f"{name} is the first tensor that does") as raised:
        conclude(report)
    assert raised.value.exit_code == 3


@pytest.mark.parametrize("level", LEVELS)
def test_unmoved_everything_is_compared_and_holds(level: Level) -> None:
    case, standard, tape = base(level)
    comparison = compare(standard.tape, tape, case)
    assert comparison.ok and comparison.compared == len(standard.tape)
    conclude(report_of(Contest(case, "own", comparison)))


def test_a_moved_tensor_through_a_whole_session() -> None:
    request = Request("qwen3", dtypes=("float64",), probes=("float64", "one-token"), level="moe")
    report = compare_hf(request, subjects=[Moved("mlp.routed")])
    assert not report.ok and [result.ok for result in report.results] == [False, False]
    assert report.first is not None and report.first[1].name == "mlp.routed"
    assert report.diagnosis is not None and report.diagnosis.findings == ()
    assert "mlp.routed" in report.diagnosis.unexplained


def test_a_known_mistake_is_named() -> None:
    def ignored(formula: Any) -> Any:
        from dataclasses import replace

        return replace(formula, router=replace(formula.router, norm_topk=not formula.router.norm_topk))

    side = FormulaSubject("qwen3", change=ignored, name="mistaken")
    report = compare_hf(Request("qwen3", dtypes=("float64",), probes=("float64",), level="moe"), subjects=[side])
    document = json.loads(json.dumps(to_jsonable(report.to_json())))
    assert document["ok"] is False
    assert "MOE016" in document["diagnosis"][0]["codes"]
    assert document["first_divergent"]["name"] == "mlp.weights"


def test_all_levels_hold_and_the_document_has_its_keys() -> None:
    seen: list[tuple[float, float, str]] = []
    probes = ("float64", "float32", "bfloat16", "anchor", "exact-ties")
    report = compare_hf(Request("qwen3", probes=probes), progress=lambda *args: seen.append(args))
    assert report.ok and report.diagnosis is None and report.first is None
    document = json.loads(json.dumps(to_jsonable(report.to_json()), allow_nan=False))
    assert document["ok"] is True and document["family"] == "qwen3"
    assert set(document["versions"]) >= {"moectl", "torch", "transformers", "python"}
    assert document["commit"] and document["seed"] == 0
    keys = {"name", "max_abs", "max_rel", "tolerance", "ok", "probe", "dtype", "verdict"}
    assert all(keys <= set(row) for row in document["tensors"])
    assert {probe["name"] for probe in document["probes"]} == set(probes)
    assert {level["level"] for level in document["probes"]} == set(LEVELS)
    assert document["diagnosis"] == []
    assert document["ties"] and all(tie["margin"] <= 1e-5 for tie in document["ties"])
    assert all({"probe", "dtype", "layer", "token", "margin"} <= set(flip) for flip in document["route_flips"])
    assert all("tie" in row["reason"] for row in document["not_compared"]), "qwen3 shows every tensor"
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] == len(report.results)
    assert document["worst_ratio"]["float64"] < 0.1 and document["worst_ratio"]["float32"] < 1


class Deaf:
    """Own code that takes no routes."""

    def __init__(self) -> None:
        self.own, self.name = Own("qwen3"), "deaf"

    def run(self, case: Case, reroute: Reroute | None = None) -> Tape:
        if reroute is not None:
            raise Unsupported("it takes no routes")
        return self.own.run(case)


@pytest.mark.parametrize("level", ["model", "moe"])
def test_after_a_tie_without_routes_the_rest_is_not_compared(level: Level) -> None:
    case = next(PROBES["exact-ties"].build(Bench("qwen3", level, config_of("qwen3", "tiny"))))
    standard = Standards("qwen3").standard(case)
    held, deaf = contest(case, Own("qwen3"), standard), contest(case, Deaf(), standard)
    assert held.comparison is not None and deaf.comparison is not None
    assert held.ok and deaf.ok and deaf.comparison.ties == held.comparison.ties != ()
    assert deaf.comparison.compared < held.comparison.compared
    verdicts = {row.name: row.verdict for row in deaf.comparison.rows}
    assert verdicts["grad.input"] == "not compared"
    assert {row.name: row.verdict for row in held.comparison.rows}["grad.input"] == "ok"


@pytest.mark.parametrize("level", ["model", "moe"])
def test_ties_hide_no_error_elsewhere(level: Level) -> None:
    """In the tied case too, a moved number is seen: before the tie, and behind it."""
    case = next(PROBES["exact-ties"].build(Bench("qwen3", level, config_of("qwen3", "tiny"))))
    standard = Standards("qwen3").standard(case)
    at = "layers.0." if level == "model" else ""
    behind = "layers.1.attn.q" if level == "model" else "grad.input"
    for name in (f"{at}mlp.router_logits", f"{at}mlp.expert_outputs", behind):
        outcome = contest(case, Moved(name), standard)
        assert outcome.comparison is not None and outcome.comparison.first is not None
        assert outcome.comparison.first.name == name


class Failing:
    """Fails on some cases, or on all."""

    def __init__(self, on: tuple[str, ...] = ()) -> None:
        self.own, self.name, self.on = Own("qwen3"), "failing", on

    def run(self, case: Case, reroute: Reroute | None = None) -> Tape:
        if not self.on or case.probe in self.on:
            raise MoectlError("it cannot do one token", "Teach it.")
        return self.own.run(case, reroute)


def test_a_side_that_fails_somewhere_does_not_hold() -> None:
    request = Request("qwen3", dtypes=("float64",), probes=("float64", "one-token"), level="moe")
    report = compare_hf(request, subjects=[Failing(("one-token",))])
    assert [result.ok for result in report.results] == [True, False] and not report.ok
    assert report.to_json()["probes"][1]["error"] == {"message": "it cannot do one token", "hint": "Teach it."}
    with pytest.raises(CheckError, match="could not be compared whole"):
        conclude(report)


def test_a_side_that_fails_everywhere_is_told_once() -> None:
    with pytest.raises(MoectlError, match="it cannot do one token"):
        compare_hf(Request("qwen3", probes=("float64", "one-token"), level="moe"), subjects=[Failing()])


def test_nothing_compared_is_not_ok() -> None:
    assert not Report("qwen3", HEADER, ()).ok
    case, standard, _ = base("moe")
    silent = Contest(case, "silent", compare(standard.tape, Tape(), case))
    assert not report_of(silent).ok


def test_one_case_in_many_decides() -> None:
    """Good cases beside it change nothing, whatever their order."""
    case, standard, tape = base("moe")
    good = Contest(case, "own", compare(standard.tape, tape, case))
    bad = Contest(case, "own", compare(standard.tape, moved(tape, "mlp.output"), case))
    for contests in ((good, bad), (bad, good), (good, bad, good)):
        assert not report_of(*contests).ok
    assert report_of(good, good).ok
    assert not report_of(good, Contest(case, "own", failure=MoectlError("no"))).ok


def test_problems_of_the_candidate_count() -> None:
    case, standard, tape = base("moe")
    held = report_of(Contest(case, "own", compare(standard.tape, tape, case)))
    problem = {"code": "MOE062", "title": "changes its input", "evidence": "x", "hint": "y", "fails": True}
    from dataclasses import replace

    assert held.ok and not replace(held, problems=(problem,)).ok
    assert replace(held, problems=({**problem, "fails": False},)).ok


def test_families_have_two_sides_and_say_what_they_have_not() -> None:
    report = compare_hf(Request("gpt_oss", dtypes=("float64",), probes=("float64", "k-1", "compiled", "eval")))
    assert report.ok and {result.candidate for result in report.results} == {"moectl's formula"}
    reasons = {(each.probe, each.reason) for each in report.skipped}
    assert any("bias" in reason for _, reason in reasons)
    assert ("eval", "it asks about code, and this is a formula") in reasons
    report = compare_hf(Request("mixtral", dtypes=("float64",), probes=("float64",), level="moe"))
    assert report.ok and [result.candidate for result in report.results] == [
        "moectl (grouped experts)",
        "moectl's formula",
    ]


def test_what_takes_long_is_asked_of_the_largest_component_that_there_is() -> None:
    """Compiled: the whole decoder of qwen3; of a family whose decoder moectl has not, its MoE layer."""
    for family, level in (("qwen3", "model"), ("deepseek_v3", "moe")):
        report = compare_hf(Request(family, probes=("compiled",)))
        assert report.ok and [result.level for result in report.results] == [level]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"family": "qwen4"}, "unknown family 'qwen4'"),
        ({"probes": ("paddin",)}, "unknown probe 'paddin'"),
        ({"level": "mow"}, "unknown level 'mow'"),
        ({"family": "deepseek_v3", "level": "model"}, "unknown level 'model'"),
        ({"dtypes": ("float8",)}, "unknown dtype 'float8'"),
        ({"config": "published"}, "30.53 billion parameters"),
        ({"probes": ("bfloat16",), "dtypes": ("float64",)}, "no probe is left"),
        ({"probes": ("documents",), "level": "router"}, "no probe is left"),
    ],
)
def test_what_the_caller_got_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        compare_hf(Request(**{"family": "qwen3", **fields}))
    assert said in raised.value.message and raised.value.hint


@pytest.mark.parametrize(
    ("example", "patch", "code"),
    [
        ("fused_style.py:FusedMoE", ("logits, dim=-1, dtype=torch.float32)", "logits, dim=-1)"), "MOE027"),
        ("modulelist_style.py:DecoderBlock", ("        x = x.float()\n", ""), "MOE026"),
        ("modulelist_style.py:MoEModel", ("        x = x.float()\n", ""), "MOE026"),
        ("modulelist_style.py:MoEModel", None, None),
    ],
)
def test_a_missing_cast_makes_the_comparison_fail(
    example: str, patch: tuple[str, str] | None, code: str | None, tmp_path: Path
) -> None:
    """Within every bound of every dtype: only the bits tell."""
    name, _, cls = example.partition(":")
    text = (Path(__file__).parent / "candidates" / name).read_text(encoding="utf-8")
    assert patch is None or patch[0] in text
    file = tmp_path / name
    file.write_text(text if patch is None else text.replace(*patch), encoding="utf-8")
    request = Request("qwen3", candidate=f"{file}:{cls}", probes=("float64", "bfloat16"))
    report = compare_hf(request)
    assert not report.broken
    assert [problem["code"] for problem in report.problems] == ([code] if code else [])
    assert report.ok is (code is None)

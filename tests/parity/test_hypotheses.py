"""Every hypothesis is a real mistake: it has a name and known codes, and makes the reference compute something else."""

from __future__ import annotations

import pytest
import torch

from moectl import catalogue
from moectl.parity.diagnosis.diagnose import diagnose
from moectl.parity.diagnosis.trials import Bench
from moectl.parity.hypotheses import HYPOTHESES, NOTHING, Hypothesis, Variant, hypotheses_at
from moectl.parity.hypotheses.detached import BACKWARD
from moectl.parity.hypotheses.kinds import LEVELS, attention, experts, router
from tests.parity.planted import OUTPUTS, Planted, cases_of

#: Those that find their own number in what the candidate shows: planted here with one.
FITTED: dict[str, Variant] = {
    "experts-permuted": experts("", permutation=(1, 2, 0, 3, 4, 5, 7, 6)),
    "capacity": experts("", capacity=2, capacity_order="tokens"),
    "window": attention("", window=4),
}
#: What cannot be told from another: hypotheses that are one mistake in the tiny config, whatever is shown.
SAME = {"norm-topk": {"norm-topk", "norm-all"}, "norm-all": {"norm-topk", "norm-all"}}
#: Mistakes of other families, of inputs that the separating cases have not, or without effect on Qwen3-MoE.
ELSEWHERE = {
    "bias-weighs", "router-scaling", "router-groups", "shared-missing", "documents-ignored", "rope-restarts",
    "softmax-after-topk", "capacity-off-by-one",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def variants_of(hypothesis: Hypothesis, bench: Bench) -> list[Variant]:
    if hypothesis.name in FITTED:
        return [FITTED[hypothesis.name]]
    return list(hypothesis.variants(bench.look(NOTHING)))


def test_names_are_unique_and_codes_are_in_the_catalogue() -> None:
    names = [hypothesis.name for hypothesis in (*HYPOTHESES, *BACKWARD)]
    assert len(names) == len(set(names))
    for hypothesis in (*HYPOTHESES, *BACKWARD):
        assert hypothesis.codes, hypothesis.name
        for code in hypothesis.codes:
            assert catalogue.entry(code).code == code


@pytest.mark.parametrize("hypothesis", [h for h in HYPOTHESES if h.name not in ELSEWHERE], ids=lambda h: h.name)
def test_a_candidate_that_makes_the_mistake_is_called_by_its_name(hypothesis: Hypothesis) -> None:
    """Each variant, in a candidate that shows all, and (from its output alone) in one that shows nothing else."""
    level = LEVELS[hypothesis.component][0]
    if hypothesis.component == "router":
        level = "moe"
    if hypothesis.name == "tied":
        level = "model"
    cases = cases_of(level)
    bench = Bench("qwen3", cases, [Planted("qwen3", NOTHING).run(case) for case in cases])
    variants = variants_of(hypothesis, bench)
    assert variants
    for variant in variants[:: max(1, len(variants) // 4)]:
        shows = [None, OUTPUTS] if hypothesis.name not in ("rope-offset", "rope-cut") else [None]
        for shown in shows:
            diagnosis = diagnose(Planted("qwen3", variant, shown), "qwen3", cases[:1])
            named = [set(finding.hypotheses) for finding in diagnosis.findings]
            assert named == [SAME.get(hypothesis.name, {hypothesis.name})], (variant.label, diagnosis)
            assert diagnosis.unexplained is None


def test_positions_shifted_alike_cannot_be_seen_in_the_output() -> None:
    """RoPE is relative: only tables or rotated queries show it."""
    cases = cases_of("attention")
    assert diagnose(Planted("qwen3", attention("", rope_offset=37), OUTPUTS), "qwen3", cases[:1]).findings == ()


def test_theta_is_read_off_the_rotated_queries() -> None:
    cases = cases_of("attention")
    strange = attention("", rope_theta=31_415.0)
    without_tables = ("q", "k", "v", "q_rotated", "k_rotated", "heads", "output")
    (finding,) = diagnose(Planted("qwen3", strange, without_tables), "qwen3", cases[:1]).findings
    assert finding.codes == ("MOE020",) and "31415" in finding.evidence


@pytest.mark.parametrize(
    ("family", "name", "variant"),
    [
        ("deepseek_v3", "bias-weighs", router("", bias_weighs=True)),
        ("deepseek_v3", "router-scaling", router("", scaling=1.0)),
        ("deepseek_v3", "router-groups", router("", groups=1, groups_kept=1)),
        ("qwen2_moe", "shared-missing", experts("", shared="none")),
        ("gpt_oss", "gate-up-interleaved", experts("", gate_up="gate_first")),
        ("mixtral", "norm-topk", router("", norm_topk=False)),
        ("olmoe", "weights-not-applied", experts("", applied="none")),
    ],
)
def test_other_families_are_diagnosed_by_the_same_data(family: str, name: str, variant: Variant) -> None:
    cases = cases_of("moe", family)
    (finding,) = diagnose(Planted(family, variant), family, cases[:1]).findings
    assert name in finding.hypotheses


@pytest.mark.parametrize("shows", [None, OUTPUTS])
def test_any_scale_of_the_router_logits_is_read_off(shows: tuple[str, ...] | None) -> None:
    """From the logits where they are shown, else from the weights that the output must have been made with."""
    strange = router("", logit_scale=0.37)
    (finding,) = diagnose(Planted("qwen3", strange, shows), "qwen3", cases_of("moe")[:1]).findings
    assert finding.codes == ("MOE104",) and "0.37" in finding.evidence


def test_the_window_is_read_off_in_a_whole_model() -> None:
    (finding,) = diagnose(
        Planted("qwen3", attention("", window=6), ("logits",)), "qwen3", cases_of("model")[:1]
    ).findings
    assert finding.codes == ("MOE103",) and "the 5 before it" in finding.evidence


def test_only_hypotheses_on_what_is_compared_are_tried() -> None:
    assert {h.component for h in hypotheses_at("router")} == {"router"}
    assert {h.component for h in hypotheses_at("moe")} == {"router", "experts"}
    assert set(hypotheses_at("model")) == set(HYPOTHESES)

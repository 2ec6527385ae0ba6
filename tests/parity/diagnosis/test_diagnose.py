"""One finding per mistake, stacks of them, and no name for what none explains."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moectl.parity.case import Case, Level, Reroute
from moectl.parity.diagnosis.diagnose import Diagnosis, diagnose, equivalent_here
from moectl.parity.hypotheses import NOTHING, Variant
from moectl.parity.hypotheses.kinds import attention, experts, router, whole
from moectl.parity.reference import FormulaSubject
from moectl.parity.tape import Tape
from tests.parity.cases import case
from tests.parity.planted import OUTPUTS, Planted, cases_of

TILED, SWAPPED = attention("", kv_repeat="tiled"), experts("", gate_up="up_first")
RAW, TIED_IN = router("", norm_topk=False), whole("", residual_mlp="none")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def of(mistake: Variant, level: Level, shows: tuple[str, ...] | None = None) -> Diagnosis:
    return diagnose(Planted("qwen3", mistake, shows), "qwen3", cases_of(level)[:1])


def names(diagnosis: Diagnosis) -> list[set[str]]:
    return [set(finding.hypotheses) for finding in diagnosis.findings]


def test_nothing_is_found_where_nothing_differs() -> None:
    diagnosis = of(NOTHING, "layer")
    assert diagnosis == Diagnosis((), None, 0, ())


def test_evidence_says_what_was_seen() -> None:
    (finding,) = of(RAW, "moe", OUTPUTS).findings
    assert finding.codes == ("MOE016", "MOE011") and finding.tensor == "mlp.output"
    assert "candidate = reference × Σ topk, all 22 tokens" in finding.evidence
    assert "gives all 4 tensors of 4 cases" in finding.evidence  # the one that was asked, and three that separate


def test_mistakes_in_two_components_are_stacked() -> None:
    diagnosis = of(TILED.then(SWAPPED), "layer")
    assert names(diagnosis) == [{"kv-order"}, {"gate-up-swapped"}] and diagnosis.unexplained is None
    assert [finding.tensor for finding in diagnosis.findings] == ["attn.heads", "mlp.expert_outputs"]


def test_three_mistakes_are_stacked() -> None:
    diagnosis = of(TILED.then(SWAPPED).then(TIED_IN), "layer")
    assert names(diagnosis) == [{"kv-order"}, {"gate-up-swapped"}, {"residual"}] and diagnosis.unexplained is None


def test_two_mistakes_behind_one_tensor_are_found_together() -> None:
    """A block that shows its output alone, with the weights and the experts wrong: neither gives it by itself."""
    diagnosis = of(RAW.then(SWAPPED), "moe", OUTPUTS)
    found = set.union(*names(diagnosis))
    assert diagnosis.unexplained is None
    assert "gate-up-swapped" in found and found & {"norm-topk", "norm-all"} and len(diagnosis.findings) == 2


class Noisy:
    """Something that no hypothesis is: the block's output, and a little of its input."""

    name = "noisy"

    def run(self, case: Case, reroute: Reroute | None = None) -> Tape:
        shown = Tape()
        for name, tensor in FormulaSubject("qwen3").run(case).items():
            wrong = name == "mlp.output"
            shown.record(name, tensor + 0.01 * self.hidden(case, tensor) if wrong else tensor)
        return shown

    def hidden(self, case: Case, like: Tensor) -> Tensor:
        assert case.inputs.hidden is not None
        return case.inputs.hidden.reshape(like.shape)


def test_what_nothing_explains_gets_no_name_but_the_facts() -> None:
    diagnosis = diagnose(Noisy(), "qwen3", cases_of("moe")[:1])
    assert diagnosis.findings == () and diagnosis.unexplained is not None
    assert "mlp.output is the first tensor that differs" in diagnosis.unexplained
    assert "mlp.expert_outputs, mlp.routed agree" in diagnosis.unexplained
    assert "is not made of the reference's expert outputs" in diagnosis.unexplained
    assert "known ways gives it" in diagnosis.unexplained


def test_a_known_mistake_beside_an_unknown_one_is_not_blamed_for_it() -> None:
    class Both(Noisy):
        def run(self, case: Case, reroute: Reroute | None = None) -> Tape:
            shown = Tape()
            for name, tensor in Planted("qwen3", RAW, OUTPUTS).run(case).items():
                shown.record(name, tensor + 0.01 * self.hidden(case, tensor))
            return shown

    diagnosis = diagnose(Both(), "qwen3", cases_of("moe")[:1])
    assert diagnosis.findings == () and diagnosis.unexplained is not None


def test_a_mistake_that_explains_one_case_alone_is_not_named() -> None:
    class Sometimes(Noisy):
        def run(self, case: Case, reroute: Reroute | None = None) -> Tape:
            assert case.inputs.hidden is not None
            mistake = SWAPPED if len(case.inputs.hidden) == 2 else NOTHING
            return Planted("qwen3", mistake).run(case)

    diagnosis = diagnose(Sometimes(), "qwen3", cases_of("moe")[:1])
    assert diagnosis.findings == () and diagnosis.unexplained is not None


class Backward:
    """Right forward; its gradients as ``wrong`` makes them."""

    name = "backward"

    def __init__(self, wrong: Callable[[str, Tensor], Tensor]) -> None:
        self.wrong = wrong

    def run(self, case: Case, reroute: Reroute | None = None) -> Tape:
        shown = Tape()
        for name, tensor in FormulaSubject("qwen3").run(case).items():
            shown.record(name, self.wrong(name, tensor) if name.startswith("grad.") else tensor)
        return shown


def of_gradients(wrong: Callable[[str, Tensor], Tensor], level: Level = "moe") -> Diagnosis:
    return diagnose(Backward(wrong), "qwen3", [case("qwen3", level)])


def test_right_gradients_are_not_accused() -> None:
    for level in ("router", "moe", "attention", "layer", "model"):
        assert of_gradients(lambda name, tensor: tensor, level) == Diagnosis((), None, 0, ())


def test_gradients_that_nothing_explains_are_told_as_facts() -> None:
    def wrong(name: str, tensor: Tensor) -> Tensor:
        return {"grad.input": tensor * 2, "grad.experts.down_proj": tensor + 1}.get(name, tensor)

    diagnosis = of_gradients(wrong)
    assert diagnosis.findings == () and diagnosis.unexplained is not None and diagnosis.tried > 3
    assert "grad.input is 2 times the reference's, grad.experts.down_proj differs" in diagnosis.unexplained
    assert "grad.gate.weight" in diagnosis.unexplained.partition("differs;")[2].partition(" agree")[0]


def test_a_frozen_gate_is_a_router_without_gradient() -> None:
    (finding,) = of_gradients(lambda name, tensor: tensor * (name != "grad.gate.weight")).findings
    assert finding.codes == ("MOE032", "MOE095", "MOE059") and finding.tensor == "grad.gate.weight"
    assert "gate.weight is exactly zero, and every other gradient, the input's too" in finding.evidence


def test_frozen_experts_are_counted() -> None:
    def wrong(name: str, tensor: Tensor) -> Tensor:
        if name.startswith("grad.experts."):
            tensor = tensor.clone()
            tensor[[1, 5]] = 0.0
        return tensor

    (finding,) = of_gradients(wrong).findings
    assert finding.hypotheses == ("frozen",) and finding.codes == ("MOE095", "MOE059")
    assert "experts.gate_up_proj[1, 5], experts.down_proj[1, 5]" in finding.evidence


def test_an_input_without_gradient_is_no_frozen_weight() -> None:
    diagnosis = of_gradients(lambda name, tensor: tensor * (name != "grad.input"))
    (finding,) = diagnosis.findings
    assert finding.hypotheses == ("experts-cut",) and "the block's input detached" in finding.evidence


def test_a_weight_without_gradient_beside_another_difference_is_not_called_frozen() -> None:
    def wrong(name: str, tensor: Tensor) -> Tensor:
        return {"grad.input": tensor * 2, "grad.gate.weight": tensor * 0}.get(name, tensor)

    diagnosis = of_gradients(wrong)
    assert diagnosis.findings == () and diagnosis.unexplained is not None
    assert "grad.gate.weight is exactly zero" in diagnosis.unexplained


def test_equivalence_depends_on_the_configuration() -> None:
    assert "softmax-after-topk" in equivalent_here("qwen3", cases_of("moe"))
    assert "softmax-after-topk" not in equivalent_here("qwen3", cases_of("moe", norm_topk_prob=False))
    assert "norm-all" in equivalent_here("qwen3", cases_of("moe", norm_topk_prob=False))
    assert "kv-order" in equivalent_here("qwen3", cases_of("attention", num_key_value_heads=4))
    assert "kv-order" not in equivalent_here("qwen3", cases_of("attention"))


def test_the_report_is_plain_data() -> None:
    document = json.loads(json.dumps(of(SWAPPED, "moe").to_json()))
    (finding,) = document["findings"]
    assert finding["code"] == "MOE007" and finding["codes"] == ["MOE007"] and document["unexplained"] is None
    assert document["tried"] > 50 and "softmax-after-topk" in document["equivalent"]

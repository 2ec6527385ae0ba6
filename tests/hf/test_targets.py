"""Which plain family can say which model, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest

from moectl.errors import ConfigError
from moectl.hf.export import plan_export
from moectl.hf.export_facts import Facts, facts_of
from moectl.hf.targets import TARGETS, extra_parameters, reasons, target
from tests.hf.export_models import model_of


def facts(*args: Any, **kwargs: Any) -> Facts:
    return facts_of(model_of(*args, **kwargs))


# Base, router, layers, and what is chosen: the smallest family that computes the same.
CHOICES = [
    ("llama", "top1", "all", "mixtral"),
    ("llama", "top2", "all", "mixtral"),
    ("llama", "top1", "last:2", "qwen2_moe"),
    ("llama", "switch", "all", "qwen2_moe"),
    ("llama", {"name": "topk", "norm_topk_prob": False}, "all", "qwen2_moe"),
    ("llama", "sigmoid", "last:2", "glm4_moe"),
    ("llama", "sigmoid", "1", "own"),
    ("mistral", "top2", "all", "mixtral"),
    ("qwen2", "top1", "all", "qwen2_moe"),
    ("qwen2", "sigmoid", "all", "glm4_moe"),
    ("qwen3", "top1", "1", "qwen3_moe"),
    ("qwen3", "switch", "all", "qwen3_moe"),
    ("qwen3", "sigmoid", "last:1", "glm4_moe"),
    ("decoder", "top2", "all", "qwen3_moe"),
    ("decoder", "noisy-topk", "1", "qwen3_moe"),
    ("gpt2", "top1", "all", "own"),
    ("qwen3", {"name": "top1", "logit_clamp": 3.0}, "all", "own"),
]


@pytest.mark.parametrize(("base", "router", "layers", "family"), CHOICES)
def test_the_smallest_exact_family_is_chosen(base: str, router: Any, layers: str, family: str) -> None:
    plan = plan_export(model_of(base, router, layers))
    assert plan.family == family
    assert plan.refused.keys() == {name for name in TARGETS if reasons(TARGETS[name], plan.facts)}
    if plan.target is not None:
        assert plan.extra == min([plan.extra, *plan.others.values()])


# Base, changes of the model, family, and words of the one reason.
REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("qwen3", {}, "mixtral", r"norms queries and keys \(q/k norm\), the family's does not"),
    ("qwen3", {}, "qwen2_moe", r"norms queries and keys \(q/k norm\), the family's does not"),
    ("llama", {}, "qwen3_moe", "an RMSNorm is never the identity"),
    ("llama", {"layers": "1"}, "mixtral", "2 of 3 layers are dense"),
    ("llama", {"router": "switch"}, "mixtral", "plain probabilities, which the family divides"),
    ("llama", {"router": "sigmoid"}, "mixtral", "by a sigmoid, the family by a softmax without a bias"),
    ("llama", {"router": "top2"}, "glm4_moe", "by a softmax, the family by a sigmoid$"),
    ("llama", {"router": "sigmoid", "layers": "1"}, "glm4_moe", "dense layers lie between"),
    ("qwen2", {}, "mixtral", "projections have biases, the family's have none"),
    ("llama", {"attention_bias": True}, "qwen2_moe", "attention output has a bias"),
    ("mistral", {"sliding_window": 5, "router": "sigmoid"}, "glm4_moe", "3 of 3 layers look back 5 tokens only"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        "mixtral",
        "2 of 3 layers look back 6 tokens only",
    ),
    ("llama", {"router": {"name": "top1", "logit_clamp": 2.0}}, "qwen2_moe", "clamped to ±2"),
    ("llama", {"router": {"name": "sigmoid", "n_group": 2}}, "glm4_moe", "1 of 2 groups of experts"),
    ("gpt2", {}, "qwen2_moe", "^the model is a GPT-2"),
    ("llama", {"moe": {"n_shared_experts": 1}}, "mixtral", "the model has shared experts, the family has none"),
]


@pytest.mark.parametrize(("base", "changes", "family", "words"), REFUSED)
def test_a_family_that_cannot_is_refused_with_the_reason(
    base: str, changes: dict[str, Any], family: str, words: str
) -> None:
    model = model_of(base, **changes)
    found = reasons(TARGETS[family], facts_of(model))
    with pytest.raises(ConfigError) as raised:
        plan_export(model, family=family)
    for reason in found:
        assert reason in raised.value.message
    assert any(_matches(words, reason) for reason in found), found


def _matches(words: str, reason: str) -> bool:
    import re

    return re.search(words, reason) is not None


def test_the_hint_names_a_family_that_can() -> None:
    with pytest.raises(ConfigError) as raised:
        plan_export(model_of("llama", layers="1"), family="mixtral")
    assert raised.value.hint is not None and raised.value.hint.startswith("--family qwen2_moe can")
    with pytest.raises(ConfigError) as raised:
        plan_export(model_of("gpt2"), family="mixtral")
    assert raised.value.hint is not None and "--family own" in raised.value.hint


def test_an_unknown_family_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown export family 'mixtrall'") as raised:
        target("mixtrall")
    assert raised.value.hint is not None and raised.value.hint.startswith("Did you mean 'mixtral'?")


@pytest.mark.parametrize("router", ["expert-choice", "expert-choice-threshold"])
def test_routers_that_are_no_token_choice_are_said_by_nothing(router: str) -> None:
    for family in ("auto", "own", "qwen3_moe"):
        with pytest.raises(ConfigError, match="its tokens do not choose|is code that is not") as raised:
            plan_export(model_of("qwen3", router), family=family)
        assert raised.value.hint is not None and "--format moectl" in raised.value.hint


def test_capacity_outside_of_training_is_said_by_nothing() -> None:
    with pytest.raises(ConfigError, match="layer 0 limits its experts' capacity outside of training"):
        facts("llama", moe={"capacity": {"factor": 1.0, "in_eval": True}})
    assert facts("llama", moe={"capacity": {"factor": 1.0}}).num_experts == 4


def test_experts_that_are_still_being_opened_are_said_by_nothing() -> None:
    router = {"name": "top1", "new_experts": 1, "opening_steps": 5}
    model = model_of("llama", router)
    with pytest.raises(ConfigError, match=r"last 1 experts are still being opened \(step 0 of 5\)"):
        facts_of(model)
    for layer in model.moe_layers().values():
        layer.router.opened_steps += 5
    assert facts_of(model).router.name == "top1"


def test_a_dense_model_has_nothing_to_export() -> None:
    from moectl.hf.language_model import HFLanguageModel
    from tests.hf.tiny_models import tiny

    with pytest.raises(ConfigError, match="the model is dense"):
        facts_of(HFLanguageModel(tiny("llama")))


def test_a_window_as_wide_as_the_positions_is_none() -> None:
    assert facts("mistral", sliding_window=64).window is None  # 64 positions
    assert facts("mistral", sliding_window=63).window == 63


def test_what_a_form_adds_is_counted() -> None:
    """Mixtral's replicated layers, Qwen2-MoE's shared experts of zeros: as many as the files have more."""
    from moectl.hf.export_weights import export_tensors

    model = model_of("llama", "top1", "1", moe={"expert_intermediate_size": 48})
    own = sum(tensor.numel() for tensor in export_tensors(model, facts_of(model), None).values())
    for name, replicate in (("mixtral", True), ("qwen2_moe", False)):
        form = TARGETS[name]
        tensors = export_tensors(model, facts_of(model), form, replicate_dense=replicate)
        found = sum(tensor.numel() for tensor in tensors.values())
        assert found - own == extra_parameters(form, facts_of(model), replicate_dense=replicate)


def test_dense_layers_of_another_size_cannot_be_replicated() -> None:
    small = model_of("llama", "top1", "1", moe={"expert_intermediate_size": 16})
    found = reasons(TARGETS["mixtral"], facts_of(small), replicate_dense=True)
    assert found == ["dense MLPs have 48 neurons and experts 16: as experts they would have to be of one size"]

"""``check_router``: what a plug-in's own test calls, and what it leaves behind."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.errors import ConfigError, NotFoundError
from moectl.plugins import BUILT_IN
from moectl.routers import RouterOptionError
from moectl.routers.expert_choice import ExpertChoiceRouter
from moectl.routers.topk import TopKRouter
from moectl.testing import RouterCheckError, check_router, run_checks, runner
from moectl.testing.lifecycle_checks import compiled
from moectl.testing.subject import Subject
from tests.testing.mistakes import GOOD, MISTAKES


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_router_passes(name: str) -> None:
    report = check_router(name)
    says = {check.name: check.says for check in report.checks}
    non_causal = report.options == {} and name == "expert-choice"
    assert says["causality"].startswith("non-causal, as declared: in" if non_causal else "causal, as declared")


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("topk", {"num_experts": 5, "hidden_size": 7}, {"top_k": 5}),
        ("topk", {}, {"top_k": 1, "norm_topk_prob": False, "expert_dropout": 0.3, "random_routing": 0.2}),
        ("sigmoid", {"num_experts": 16}, {"n_group": 4, "topk_group": 2}),
        ("noisy-topk", {"num_experts": 2, "hidden_size": 1}, {}),
    ],
)
def test_options_and_sizes_reach_the_router(name: str, size: dict[str, int], options: dict[str, Any]) -> None:
    report = check_router(name, **size, **options)
    experts, hidden = size.get("num_experts", 8), size.get("hidden_size", 64)
    assert (report.num_experts, report.hidden_size, report.options) == (experts, hidden, options)
    shapes = next(check.says for check in report.checks if check.name == "shapes")
    assert f"router_* [64, {experts}]" in shapes


def test_a_class_is_checked_as_its_name_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(runner.CHECKS, "compile")
    by_name, by_class = run_checks("topk", top_k=3), run_checks(TopKRouter, top_k=3)
    assert by_class.router == "TopKRouter"
    assert by_class.checks == by_name.checks
    assert run_checks(ExpertChoiceRouter).ok


def test_a_router_that_must_not_be_trained_says_so_and_passes() -> None:
    report = check_router("topk", top_k=1)  # renormalised over one expert: a constant weight
    gradient = next(check for check in report.checks if check.name == "gradient")
    assert gradient.status == "skipped"
    assert "refused for training: with top_k=1" in gradient.says


def test_failure_is_an_assertion_with_every_failed_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(runner.CHECKS, "compile")
    (tmp_path / "mine.py").write_text(MISTAKES["mean over padding too"].source())
    with pytest.raises(AssertionError) as caught:
        check_router(f"{tmp_path}/mine.py:Mine")
    assert isinstance(caught.value, RouterCheckError)
    assert caught.value.exit_code == 3
    text = str(caught.value)
    assert f"mine.py:Mine' fails 3 of {len(runner.CHECKS) + 1} checks:" in text
    for name in ("padding", "decode", "causality"):
        assert f"\n  {name}: " in text


def test_what_the_caller_got_wrong_is_no_failed_check(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(GOOD)
    with pytest.raises(ConfigError, match="unknown router 'topp'"):
        run_checks("topp")
    with pytest.raises(NotFoundError):
        run_checks(f"{tmp_path}/none.py:Mine")
    with pytest.raises(ConfigError, match="unknown class"):
        run_checks(f"{tmp_path}/mine.py:Mien")
    with pytest.raises(RouterOptionError, match="unknown option 'topk'"):
        run_checks("topk", topk=2)
    with pytest.raises(RouterOptionError, match="unknown option 'topk'") as caught:
        run_checks(TopKRouter, topk=2)
    assert "top_k" in str(caught.value.hint)
    for router in ("topk", TopKRouter):
        with pytest.raises(ValueError, match="top_k is 9, but there are 8 experts"):
            run_checks(router, top_k=9)


def test_nothing_is_left_behind() -> None:
    torch.manual_seed(5)
    state, level, filters = torch.get_rng_state(), logging.root.manager.disable, list(warnings.filters)
    with torch.no_grad():
        check_router("topk")
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.root.manager.disable == level
    assert warnings.filters == filters


def test_more_routers_than_a_compiler_cache_holds() -> None:
    """Each router is one more specialisation of ``Router.forward``, and torch gives up at a handful."""
    with torch._dynamo.config.patch(recompile_limit=4):  # one router needs two modes, with and without a mask
        for experts in (2, 3, 4):
            subject = Subject("topk", hidden_size=4, num_experts=experts, options={})
            assert compiled(subject).startswith("one graph")

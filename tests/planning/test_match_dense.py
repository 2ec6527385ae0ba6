"""Experts that equal the dense model: every way that is offered, once set, does."""

from __future__ import annotations

from typing import Any

import pytest

from moectl.config.loading import load_config
from moectl.models.config import decoder_config
from moectl.models.decoder import Decoder
from moectl.planning.anatomy import Anatomy, anatomy
from moectl.planning.match_dense import match_dense

LENGTH = 127


def planned(*sets: str) -> tuple[Anatomy, Anatomy, Any]:
    """The model of a config, its dense parent, and the config."""
    config = load_config(None, sets=sets)
    dense = decoder_config(config.model, vocab_size=512, eos_token_id=0)
    return anatomy(dense.with_moe(config.moe), LENGTH), anatomy(dense, LENGTH), config


@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["moe.router=top2"],
        ["moe.router={name: topk, top_k: 4}", "moe.num_experts=16"],
        ["moe.router=top2", "moe.n_shared_experts=2"],
        ["moe.expert_intermediate_size=64"],
        ["model.intermediate_size=250", "moe.router=top2", "moe.num_experts=4"],
        ["moe.router=switch", "moe.expert_intermediate_size=128"],
    ],
    ids=str,
)
def test_what_is_offered_is_equal_once_it_is_set(sets: list[str]) -> None:
    """To the gate, and to half a column of an expert where the dense size does not divide."""
    model, dense, config = planned(*sets)
    matches = match_dense(model, router=config.moe.router_name, n_shared=config.moe.n_shared_experts)
    assert matches
    for match in matches:
        matched, _, again = planned(*sets, *match.sets)
        assert matched.moe is not None
        assert (matched.moe.size, matched.moe.top_k) == (match.size, match.top_k)
        assert matched.moe.num_experts == match.num_experts
        for layer in Decoder(matched.config).moe_layers().values():
            assert layer.router.training_problem() is None
        columns = (matched.moe.top_k + again.moe.n_shared_experts) * matched.moe.size
        assert match.columns == columns / dense.config.intermediate_size
        active = matched.flops.total - matched.flops.router
        slack = 6 * 128 * 4 * (matched.moe.top_k + again.moe.n_shared_experts) / 2
        assert active == pytest.approx(dense.flops.total, abs=0 if match.columns == 1 else slack)


def test_a_model_that_matches_already_comes_first_and_needs_nothing() -> None:
    model, _, _ = planned()
    first = match_dense(model, router="top1")[0]
    assert first.sets == () and first.columns == 1


def test_a_granularity_is_kept_to() -> None:
    model, _, _ = planned()
    (only,) = match_dense(model, router="top1", granularity=4)
    assert (only.size, only.top_k, only.num_experts) == (64, 4, 32)
    assert only.sets == (
        "moe.expert_intermediate_size=64",
        "moe.router={name: topk, top_k: 4}",
        "moe.num_experts=32",
    )
    assert match_dense(model, router="top1", granularity=3) == []  # 256 columns do not divide by 3


def test_a_router_with_a_top_k_keeps_its_other_options() -> None:
    model, _, _ = planned("moe.router={name: topk, top_k: 2}", "moe.expert_intermediate_size=64")
    ways = {match.sets for match in match_dense(model, router="topk")}
    assert ("moe.router.top_k=4",) in ways
    assert ("moe.expert_intermediate_size=128",) in ways


def test_exact_ways_come_before_rounded_ones() -> None:
    model, _, _ = planned("model.intermediate_size=250", "moe.router={name: topk, top_k: 4}")
    errors = [abs(match.columns - 1) > 0 for match in match_dense(model, router="topk")]
    assert errors == sorted(errors)

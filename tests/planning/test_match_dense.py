"""Experts that equal the dense model: every way that is offered, once set, does."""

from __future__ import annotations

from typing import Any

import pytest

from moectl.config.loading import load_config
from moectl.models.config import decoder_config
from moectl.models.decoder import Decoder
from moectl.moe.filling import check_layer
from moectl.planning.anatomy import Anatomy, anatomy
from moectl.planning.match_dense import Matching, match_dense

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
        ["moe.router={name: expert-choice, top_k: 2, capacity_factor: 2.0}"],
        ["moe.router={name: expert-choice, top_k: 2}", "moe.n_shared_experts=1"],
        ["moe.router={name: expert-choice, top_k: 4, capacity_factor: 0.5}", "moe.expert_intermediate_size=64"],
        ["moe.init=split", "moe.granularity=4", "moe.router={name: topk, top_k: 4, noise_std: 0}"],
        [
            *("moe.init=split", "moe.granularity=4", "moe.n_shared_experts=1", "moe.num_experts=12"),
            "moe.router={name: topk, top_k: 3}",
        ],
    ],
    ids=str,
)
def test_what_is_offered_is_equal_once_it_is_set(sets: list[str]) -> None:
    """To the gate, and to half a column of an expert where the dense size does not divide."""
    model, dense, config = planned(*sets)
    matches = match_dense(model, config.moe)
    assert matches
    for match in matches:
        matched, _, again = planned(*sets, *match.sets)
        assert matched.moe is not None
        assert (matched.moe.size, matched.moe.top_k) == (match.size, match.top_k)
        assert matched.moe.num_experts == match.num_experts
        for layer in Decoder(matched.config).moe_layers().values():
            assert layer.router.training_problem() is None
            assert layer.router.token_choice == model.moe.token_choice
            start = again.moe.model_copy(update={"init": "random"}) if again.moe.init == "auto" else again.moe
            check_layer(layer, start, dense.config.intermediate_size)
        columns = (matched.moe.per_token + again.moe.n_shared_experts) * matched.moe.size
        assert match.columns == columns / dense.config.intermediate_size
        active = matched.flops.total - matched.flops.router
        slack = 6 * 128 * 4 * (matched.moe.per_token + again.moe.n_shared_experts) / 2
        assert active == pytest.approx(dense.flops.total, abs=0 if match.columns == 1 else slack)


def test_a_model_that_matches_already_comes_first_and_needs_nothing() -> None:
    model, _, config = planned()
    first = match_dense(model, config.moe)[0]
    assert first.sets == () and first.columns == 1


def test_a_granularity_is_kept_to() -> None:
    model, _, config = planned()
    (only,) = match_dense(model, config.moe, Matching(4))
    assert (only.size, only.top_k, only.num_experts) == (64, 4, 32)
    assert only.sets == (
        "moe.expert_intermediate_size=64",
        "moe.router={name: topk, top_k: 4}",
        "moe.num_experts=32",
    )
    assert match_dense(model, config.moe, Matching(3)) == []  # 256 columns do not divide by 3


def test_a_router_with_a_top_k_keeps_its_other_options() -> None:
    model, _, config = planned("moe.router={name: topk, top_k: 2}", "moe.expert_intermediate_size=64")
    ways = {match.sets for match in match_dense(model, config.moe)}
    assert ("moe.router.top_k=4",) in ways
    assert ("moe.expert_intermediate_size=128",) in ways


def test_exact_ways_come_before_rounded_ones() -> None:
    model, _, config = planned("model.intermediate_size=250", "moe.router={name: topk, top_k: 4}")
    errors = [abs(match.columns - 1) > 0 for match in match_dense(model, config.moe)]
    assert errors == sorted(errors)


def test_parts_stay_parts() -> None:
    """``init: split`` takes no size but a granularity, and as many experts as whole groups have."""
    model, _, config = planned("moe.init=split", "moe.granularity=4", "moe.router={name: topk, top_k: 4}")
    ways = {match.sets for match in match_dense(model, config.moe)}
    assert () in ways
    assert ("moe.granularity=2", "moe.router.top_k=2", "moe.num_experts=4") in ways
    assert not any("expert_intermediate_size" in text for sets in ways for text in sets)


@pytest.mark.parametrize("init", ["auto", "copy"])
def test_copies_of_a_trained_base_become_parts(init: str) -> None:
    """A copy has the MLP's size: another size is the parts'."""
    model, dense, config = planned("moe.router=top2", f"moe.init={init}")
    ways = {match.sets for match in match_dense(model, config.moe, Matching(trained=True))}
    assert ("moe.router=top1",) in ways
    assert ("moe.init=split", "moe.granularity=2", "moe.num_experts=16") in ways
    assert not any("expert_intermediate_size" in text for sets in ways for text in sets)
    for sets in ways:
        matched, _, again = planned("moe.router=top2", f"moe.init={init}", *sets)
        start = again.moe.model_copy(update={"init": "copy"}) if again.moe.init == "auto" else again.moe
        for layer in Decoder(matched.config).moe_layers().values():
            check_layer(layer, start, dense.config.intermediate_size)


def test_experts_that_choose_keep_choosing() -> None:
    """As many tokens as four a token, by k = 2 and a factor of 2: a quarter of the columns each."""
    model, dense, config = planned("moe.router={name: expert-choice, top_k: 2, capacity_factor: 2.0}")
    assert model.moe is not None and model.moe.per_token == 4
    ways = {match.sets: match for match in match_dense(model, config.moe)}
    assert ways["moe.expert_intermediate_size=64",].columns == 1
    assert model.flops.experts == 4 * dense.flops.mlp
    one, _, config = planned("moe.router={name: expert-choice, top_k: 2}", "moe.expert_intermediate_size=256")
    assert ("moe.router.top_k=1",) in {match.sets for match in match_dense(one, config.moe)}

"""More experts and the same function, proven in float64 for every router that can, and refused for the others."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.config.schema import MoEConfig
from moectl.errors import ConfigError
from moectl.models.decoder import CAPACITY_OPTIONS
from moectl.models.growth import append, changes, multiply
from moectl.moe import GatedExperts, MLPExperts, MoELayer
from moectl.moe.capacity import Capacity
from moectl.routers import build_router
from moectl.training.schedules import refuse_unfit

FLOAT64 = 1e-12  # two products deep, values of order one, another order of addition
GROWING = [
    {"name": "top1"},
    {"name": "top2"},
    {"name": "topk", "top_k": 3},
    {"name": "topk", "top_k": 2, "norm_topk_prob": False},
    {"name": "topk", "top_k": 1},
    {"name": "switch"},
    {"name": "noisy-topk"},
    {"name": "sigmoid", "routed_scaling_factor": 1.5},
    {"name": "sigmoid", "norm_topk_prob": False},
    {"name": "topk", "top_k": 2, "logit_clamp": 0.5},
]
NO_NOISE = {"noise_std": 0.0}
CAPACITIES = [
    {"factor": 0.6, "in_eval": True, "overflow": overflow, "fill": fill}
    for overflow in ("drop", "next-best")
    for fill in ("position", "probability")
]


def layer_of(
    router: dict[str, object], kind: type = GatedExperts, *, experts: int = 5, **changes: Any
) -> tuple[MoELayer, MoEConfig]:
    moe = MoEConfig(router=router, num_experts=experts, init="random", expert_intermediate_size=12, **changes)
    torch.manual_seed(0)
    gate = build_router(moe.router_name, hidden_size=6, num_experts=experts, **moe.router_options)
    capacity = None if moe.capacity is None else Capacity(**moe.capacity.model_dump(include=CAPACITY_OPTIONS))
    layer = MoELayer(gate, kind(experts, 6, 12, backend="loop"), None, capacity).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        for name, buffer in layer.router.named_buffers():
            if name == "expert_bias":
                buffer.copy_(torch.linspace(-1.5, -0.9, experts))  # below what a new expert starts with
    return layer, moe


def tokens() -> torch.Tensor:
    return torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("router", GROWING, ids=str)
@pytest.mark.parametrize("kind", [GatedExperts, MLPExperts])
@pytest.mark.parametrize("times", [2, 3])
def test_multiplied_experts_keep_the_function(router: dict[str, object], kind: type, times: int) -> None:
    layer, moe = layer_of(router, kind)
    before, chosen = layer(tokens()), layer.router(tokens()).topk_indices
    weight = layer.router.weight.clone()
    grown = multiply({0: layer}, moe, times)
    torch.testing.assert_close(layer(tokens()), before, rtol=0, atol=FLOAT64)
    assert layer.experts.num_experts == layer.router.num_experts == grown.num_experts == 5 * times
    assert torch.equal(layer.router.weight, weight.repeat_interleave(times, 0))
    again = layer.router(tokens()).topk_indices // times
    assert torch.equal(again.sort(1).values[:, :: again.shape[1] // chosen.shape[1]], chosen.sort(1).values)


def test_each_copy_weighs_its_share() -> None:
    layer, moe = layer_of({"name": "topk", "top_k": 2})
    old = layer.router(tokens())
    multiply({0: layer}, moe, 3)
    new = layer.router(tokens())
    assert new.topk_weights.shape == (50, 6)
    torch.testing.assert_close(new.topk_weights, old.topk_weights.repeat_interleave(3, 1) / 3, rtol=0, atol=1e-14)


@pytest.mark.parametrize("router", [{"name": "top2"}, {"name": "topk", "top_k": 1}, {"name": "sigmoid"}], ids=str)
@pytest.mark.parametrize("kind", [GatedExperts, MLPExperts])
def test_parts_keep_the_function_and_the_cost(router: dict[str, object], kind: type) -> None:
    layer, moe = layer_of(router, kind)
    before, per_token = layer(tokens()), layer.router.top_k * 12
    numbers = sum(
        parameter.numel() for name, parameter in layer.experts.named_parameters() if "down_proj_bias" not in name
    )
    grown = multiply({0: layer}, moe, 4, parts=True)
    torch.testing.assert_close(layer(tokens()), before, rtol=0, atol=FLOAT64)
    assert layer.router.top_k * layer.experts.intermediate_size == per_token
    assert grown.expert_intermediate_size == layer.experts.intermediate_size == 3
    assert numbers == sum(p.numel() for name, p in layer.experts.named_parameters() if "down_proj_bias" not in name)


@pytest.mark.parametrize("router", GROWING, ids=str)
@pytest.mark.parametrize("kind", [GatedExperts, MLPExperts])
def test_added_experts_are_never_chosen_at_first(router: dict[str, object], kind: type) -> None:
    """Not one bit of the output changes, in training mode neither (without noise), and no weight of the old ones."""
    quiet = {"noise_std": 0.0} if router["name"] not in ("sigmoid", "noisy-topk") else {}
    layer, moe = layer_of({**router, **quiet}, kind)
    huge = 1e3 * tokens()  # logits of some thousands: no offset would do
    for x in (tokens(), huge):
        grown_layer = copy.deepcopy(layer)
        before, old = layer(x), layer.router(x)
        grown = append({0: grown_layer}, moe, 7, generator=torch.Generator().manual_seed(0))
        assert torch.equal(grown_layer(x), before)
        new = grown_layer.router(x)
        assert int(new.topk_indices.max()) < 5
        assert torch.equal(new.topk_weights, old.topk_weights)
        assert not new.router_probs_clean[:, 5:].any()
        assert new.router_logits.isfinite().all()
        assert grown.num_experts == 12
        if quiet:
            grown_layer.train()
            torch.testing.assert_close(grown_layer(x), before, rtol=0, atol=1e-9)


def test_added_experts_are_noisy_copies_that_open_step_by_step() -> None:
    layer, moe = layer_of({"name": "top1", "noise_std": 0.0})
    old = layer.experts.down_proj.clone()
    append({0: layer}, moe, 7, noise=0.01, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer.experts.down_proj[:5], old)
    added = layer.experts.down_proj[5:] - old[torch.arange(7) % 5]
    assert added.std().item() == pytest.approx(0.01 * old.std().item(), rel=0.2)
    rows = layer.router.weight[5:] - layer.router.weight[torch.arange(7) % 5]
    assert rows.std().item() == pytest.approx(0.01 * layer.router.weight[:5].std().item(), rel=0.4)
    layer.train().requires_grad_(False)
    shares = []
    for _ in range(201):
        out = layer.router(tokens())
        shares.append(out.router_probs[:, 5:].sum().item())
        layer.router.end_step(torch.ones(12), tokens=50)
    assert shares[0] == 0.0
    assert all(later > earlier for earlier, later in pairwise(shares))
    assert shares[200] == pytest.approx(float(torch.softmax(out.router_logits, -1)[:, 5:].sum()), rel=1e-9)
    assert (out.topk_indices >= 5).any()


def test_growth_after_growth() -> None:
    layer, moe = layer_of({"name": "top2"})
    before = layer(tokens())
    moe = append({0: layer}, moe, 3)
    torch.testing.assert_close(layer(tokens()), before, rtol=0, atol=FLOAT64)
    with pytest.raises(ConfigError, match="still opening its last 3 new experts"):
        append({0: copy.deepcopy(layer)}, moe, 2)
    moe = multiply({0: layer}, moe, 2)
    torch.testing.assert_close(layer(tokens()), before, rtol=0, atol=FLOAT64)
    for _ in range(200):
        layer.router.train().end_step(torch.ones(16), tokens=50)
    opened = layer.eval()(tokens())
    moe = append({0: layer}, moe, 1)
    torch.testing.assert_close(layer(tokens()), opened, rtol=0, atol=FLOAT64)
    assert (moe.num_experts, moe.router["new_experts"], layer.experts.num_experts) == (17, 1, 17)


@pytest.mark.parametrize("capacity", CAPACITIES, ids=str)
@pytest.mark.parametrize("router", ["top1", "switch", "top2", "sigmoid"])
@pytest.mark.parametrize("times", [0, 2, 4])
def test_a_capacity_leaves_the_same_tokens_room(capacity: dict[str, Any], router: str, times: int) -> None:
    """Three added experts, or so many times as many: with more experts for as many places each has less room."""
    layer, moe = layer_of({"name": router}, capacity=capacity)
    before = layer(tokens())
    assert layer.dropped is not None
    dropped = layer.dropped.clone()
    assert dropped.any(), "the capacity does nothing"
    if times and layer.router.top_k == 1 and capacity["overflow"] == "next-best":
        with pytest.raises(ConfigError, match="would take the tokens for which it has no room"):
            multiply({0: layer}, moe, times)
        return
    grown = multiply({0: layer}, moe, times) if times else append({0: layer}, moe, 3)
    torch.testing.assert_close(layer(tokens()), before, rtol=0, atol=FLOAT64)
    chosen = times if times and layer.router.top_k > 1 else 1
    assert int(layer.dropped.sum()) == chosen * int(dropped.sum())
    assert grown.capacity is not None and layer.capacity is not None
    assert grown.capacity.factor == layer.capacity.factor


def test_every_capacity_factor_follows() -> None:
    layer, moe = layer_of({"name": "top1"}, capacity={"factor": 1.25, "dynamic": True, "max_factor": 2.0})
    grown = append({0: layer}, moe, 15)
    assert grown.capacity is not None
    assert (grown.capacity.factor, grown.capacity.min_factor, grown.capacity.max_factor) == (5.0, 4.4, 8.0)
    assert any("moe.capacity.factor is 5 now, not 1.25" in line for line in changes(moe, grown))
    schedule = {"capacity_factor": [[0, 2.0], [0.5, 1.25]]}
    layer, moe = layer_of({"name": "top1"}, capacity=1.25, schedule=schedule)
    grown = multiply({0: layer}, moe, 4)
    assert grown.schedule.capacity_factor is not None
    assert grown.schedule.capacity_factor.points == ((0.0, 8.0), (0.5, 5.0))
    other, moe = layer_of({"name": "top1"}, capacity={"factor": 1.25, "overflow": "next-best"})
    assert multiply({0: other}, moe, 4).capacity == moe.capacity, "as much room in all"
    assert other.capacity == Capacity(1.25, overflow="next-best")
    pair, moe = layer_of({"name": "top2"}, capacity=1.25)
    assert multiply({0: pair}, moe, 4).capacity == moe.capacity, "k is four times as large: there is as much room"
    assert pair.capacity == Capacity(1.25)


@pytest.mark.parametrize("experts", [5, 6], ids=["E=5", "E=D"])
@pytest.mark.parametrize("times", [0, 2])
def test_learned_noise_is_inherited(experts: int, times: int) -> None:
    """``W_noise`` is [D, E]: its experts are columns, where it is square too. New experts have their sources'."""
    layer, moe = layer_of({"name": "noisy-topk"}, experts=experts)
    learned = layer.router.noise.weight.detach().clone()
    assert learned.shape == (6, experts)
    multiply({0: layer}, moe, times) if times else append({0: layer}, moe, 3)
    expected = learned.repeat_interleave(times, 1) if times else torch.cat([learned, learned[:, :3]], 1)
    assert torch.equal(layer.router.noise.weight, expected)


def test_what_cannot_be_inherited_is_said(tmp_path: Path) -> None:
    """A gate of our own whose second matrix is as wide as two experts each."""
    code = """
from moectl.moe.token_choice import NoisySoftmaxRouter
from torch import nn
import torch
class Odd(NoisySoftmaxRouter):
    def __init__(self, config, *, hidden_size, num_experts):
        super().__init__(config, hidden_size=hidden_size, num_experts=num_experts)
        self.other = nn.Parameter(torch.zeros(2 * num_experts))
    def combine_weights(self, noisy_TE, probs_TE, indices_TK):
        return probs_TE.gather(1, indices_TK)
"""
    (tmp_path / "odd.py").write_text(code)
    layer, moe = layer_of({"name": f"{tmp_path / 'odd.py'}:Odd"})
    for grow in (lambda: multiply({0: layer}, moe, 2), lambda: append({0: layer}, moe, 2)):
        with pytest.raises(ConfigError, match="cannot be grown: what becomes of its 'other' with more experts"):
            grow()
    assert layer.experts.num_experts == 5


def trained(layer: MoELayer, steps: int = 60) -> None:
    """By AdamW towards random targets, its noise annealed long ago."""
    layer.train()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    target = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(tokens()) - target).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("router", [{"name": "top2"}, {"name": "sigmoid"}, {"name": "top1"}, {"name": "expert-choice"}])
def test_copies_part(router: dict[str, object]) -> None:
    """Where nothing draws: by noise that cancels, or, where one copy is visited, by the gate's gradient."""
    quiet = NO_NOISE if router["name"].startswith("top") else {}
    layer, moe = layer_of({**router, **quiet})
    before = layer(tokens())
    multiply({0: layer}, moe, 2, noise=1e-3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(tokens()), before, rtol=0, atol=FLOAT64)
    trained(layer)
    for parameter in (layer.router.weight, layer.experts.gate_up_proj, layer.experts.down_proj):
        assert (parameter[0::2] - parameter[1::2]).abs().max() > 1e-4


def test_copies_without_noise_do_not_part() -> None:
    """What the noise is for."""
    layer, moe = layer_of({"name": "top2", **NO_NOISE})
    multiply({0: layer}, moe, 2, noise=0.0)
    trained(layer, 5)
    assert torch.equal(layer.experts.down_proj[0::2], layer.experts.down_proj[1::2])


def test_noise_of_copies_cancels_and_is_as_large_as_it_says() -> None:
    layer, moe = layer_of({"name": "top2"})
    old = layer.experts.down_proj.detach().clone()
    multiply({0: layer}, moe, 4, noise=0.01, generator=torch.Generator().manual_seed(0))
    apart = (layer.experts.down_proj.detach() - old.repeat_interleave(4, 0)).unflatten(0, (5, 4))
    assert apart.sum(1).abs().max() < 1e-14
    # Four that cancel have three quarters of the variance; 1,440 draws.
    assert apart.std().item() == pytest.approx(0.01 * old.std().item() * 0.75**0.5, rel=0.1)


def test_scheduled_numbers_of_experts_follow() -> None:
    schedule = {"top_k": [[0, 4], [0.5, 2]]}
    layer, moe = layer_of({"name": "topk", "top_k": 2}, schedule=schedule)
    layer.train().router.set_top_k(4)  # as the schedule has it in training: not what a token keeps
    grown = multiply({0: layer}, moe, 2)
    assert grown.router["top_k"] == 4 == layer.eval().router.top_k
    assert grown.schedule.top_k is not None and grown.schedule.top_k.points == ((0.0, 8.0), (0.5, 4.0))
    assert changes(moe, grown) == ("moe.schedule.top_k ends at 4 now, not 2",)
    refuse_unfit(grown.schedule, {0: layer})
    one, moe = layer_of({"name": "topk", "top_k": 1, "norm_topk_prob": False}, schedule={"top_k": [[0, 4], [0.5, 1]]})
    grown = multiply({0: one}, moe, 2)
    assert grown.schedule.top_k is None and one.router.top_k == 1
    assert changes(moe, grown) == ("moe.schedule.top_k is gone: a token keeps one expert",)
    kept, moe = layer_of({"name": "topk", "top_k": 2}, schedule=schedule)
    assert append({0: kept}, moe, 2).schedule == moe.schedule


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_that_choose_take_as_many_tokens_each(top_k: int) -> None:
    layer, moe = layer_of({"name": "expert-choice", "top_k": top_k, "capacity_factor": 1.5})
    before = layer(tokens())
    grown = multiply({0: layer}, moe, 3)
    torch.testing.assert_close(layer(tokens()), before, rtol=0, atol=FLOAT64)
    assert grown.router["top_k"] == 3 * top_k


def test_a_grown_layer_learns() -> None:
    layer, moe = layer_of({"name": "topk", "top_k": 2})
    multiply({0: layer}, moe, 2)
    layer.train()(tokens()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_what_cannot_be_grown_is_said() -> None:
    grouped, moe = layer_of({"name": "sigmoid", "n_group": 2, "topk_group": 1}, experts=4)
    with pytest.raises(ConfigError, match="chooses groups"):
        multiply({0: grouped}, moe, 2)
    with pytest.raises(ConfigError, match="cannot keep new experts closed"):
        append({0: grouped}, moe, 2)
    threshold, moe = layer_of({"name": "expert-choice-threshold"})
    before = copy.deepcopy(threshold.state_dict())
    with pytest.raises(ConfigError, match="do not divide among 2 copies"):
        multiply({0: threshold}, moe, 2)
    with pytest.raises(ConfigError, match="cannot keep new experts closed"):
        append({0: threshold}, moe, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in threshold.state_dict().items())
    single, moe = layer_of({"name": "top1"})
    with pytest.raises(ConfigError, match="do not divide among 2 copies") as error:
        multiply({0: single}, moe, 2, parts=True)
    assert "parts need all copies to be chosen" in str(error.value.hint)
    pair, moe = layer_of({"name": "top2"})
    with pytest.raises(ConfigError, match="12 neurons do not divide into 5 parts"):
        multiply({0: pair}, moe, 5, parts=True)
    with pytest.raises(ConfigError, match="Give 2|multiplied by 1"):
        multiply({0: pair}, moe, 1)
    with pytest.raises(ConfigError, match="0 experts cannot be added"):
        append({0: pair}, moe, 0)
    with pytest.raises(ConfigError, match="no experts to grow"):
        multiply({}, moe, 2)


def test_options_of_new_experts_are_checked() -> None:
    with pytest.raises(ValueError, match="opening_steps = 5 has no effect"):
        build_router("top1", hidden_size=6, num_experts=4, opening_steps=5)
    with pytest.raises(ValueError, match="expert_dropout and new_experts"):
        build_router("top1", hidden_size=6, num_experts=4, new_experts=1, expert_dropout=0.1)
    with pytest.raises(ValueError, match="top_k is 3, but 2 of 4 experts are new"):
        build_router("topk", hidden_size=6, num_experts=4, top_k=3, new_experts=2)

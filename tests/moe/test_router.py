"""The base class of every router: what it takes, sees to and leaves alone, and the tie-breaking top-k.

A small router written here, not one of the built-ins, so that the contract is seen from a plug-in's side.
"""

from __future__ import annotations

import copy
import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moectl.errors import ConfigError, NotFoundError
from moectl.moe import Router, RouterConfig, RouterOutput
from moectl.moe.contract import RouterError
from moectl.moe.router import at_least_float32, entropy, flatten_mask, stable_topk
from moectl.training.state import load_model_strict

D, E, K = 8, 5, 2


class SecondSlotOnlyWhenSure(Router):
    """Top-2, the second slot used only where its logit is positive: a router with a keep-mask of its own."""

    class Config(RouterConfig):
        top_k: int = 2

    seen: tuple[torch.dtype, tuple[int, ...], bool]

    def route(self, x_TD: Tensor, mask_T: Tensor | None) -> RouterOutput:
        self.seen = (x_TD.dtype, tuple(x_TD.shape), torch.is_autocast_enabled(x_TD.device.type))
        logits = self.logits(x_TD)
        probs = logits.softmax(-1)
        indices = stable_topk(logits, self.top_k)
        keep = torch.ones_like(indices, dtype=torch.bool)
        keep[:, 1] = logits.gather(1, indices)[:, 1] > 0
        weights = probs.gather(1, indices) * keep
        return RouterOutput(indices, weights, logits, probs, probs, entropy(probs), keep)


def plugin(top_k: int = K) -> SecondSlotOnlyWhenSure:
    torch.manual_seed(0)
    return SecondSlotOnlyWhenSure(SecondSlotOnlyWhenSure.Config(top_k=top_k), hidden_size=D, num_experts=E)


class Balanced(SecondSlotOnlyWhenSure):
    """With state of its own and of a part of it: a bias, a threshold, a counter."""

    bias: Tensor

    def __init__(self, config: RouterConfig, *, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, hidden_size=hidden_size, num_experts=num_experts)
        self.register_buffer("bias", torch.full((num_experts,), 1 / 3))
        self.register_buffer("count", torch.tensor(7))
        self.part = nn.BatchNorm1d(num_experts)


def balanced() -> Balanced:
    return Balanced(Balanced.Config(), hidden_size=D, num_experts=E)


# --- what forward takes, and refuses


@pytest.mark.parametrize("shape", [(D,), (2, 3, 4, D), (3, D + 1), (0, D - 1)])
def test_other_shapes_are_refused_by_name(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
        plugin()(torch.zeros(shape))


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(4),
        torch.ones(4, dtype=torch.int64),
        torch.ones(3, dtype=torch.bool),
        torch.ones(2, 2, dtype=torch.bool),
    ],
    ids=["float", "int", "short", "wrong-rank"],
)
def test_other_masks_are_refused(mask: Tensor) -> None:
    with pytest.raises(ValueError, match="token_mask must be bool of shape"):
        plugin()(torch.zeros(4, D), mask)


def test_top_k_must_fit() -> None:
    for wrong in (0, E + 1):
        with pytest.raises(ValueError, match=f"top_k is {wrong}"):
            plugin(wrong)


def test_gate_is_e_by_d_small_and_without_bias() -> None:
    torch.manual_seed(0)
    router = SecondSlotOnlyWhenSure(SecondSlotOnlyWhenSure.Config(), hidden_size=400, num_experts=50)
    assert {name: tuple(p.shape) for name, p in router.named_parameters()} == {"weight": (50, 400)}
    # 20,000 draws: 5 % is ten standard errors of the standard deviation.
    assert router.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_logits_are_x_times_gate_transposed() -> None:
    router, x = plugin().double(), torch.randn(4, D, dtype=torch.float64)
    slow = torch.tensor([[float(row @ gate) for gate in router.weight.detach()] for row in x], dtype=torch.float64)
    torch.testing.assert_close(router(x).router_logits, slow, rtol=0, atol=1e-14)


# --- arithmetic in float32, or float64


def test_autocast_is_off_inside_a_routers_own_code_and_on_again_after() -> None:
    router = plugin()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        router(torch.randn(2, 3, D, dtype=torch.bfloat16))
        assert torch.is_autocast_enabled("cpu")
    assert router.seen == (torch.float32, (6, D), False)


def test_at_least_float32() -> None:
    lifted = {
        dtype: at_least_float32(torch.ones(1, dtype=dtype)).dtype
        for dtype in (torch.half, torch.float32, torch.float64)
    }
    assert lifted == {torch.half: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    x = torch.ones(1)
    assert at_least_float32(x) is x, "no copy where none is needed"


# --- padding


def test_padding_and_a_routers_own_unused_slots_both_count() -> None:
    router, x = plugin(), torch.randn(30, D)
    mask = torch.arange(30) % 3 > 0
    own = router(x).keep
    assert own is not None
    assert own[mask][:, 1].any()
    assert not own[mask][:, 1].all()
    assert not own[~mask][:, 1].all()
    both = router(x, mask)
    assert torch.equal(both.keep, own & mask[:, None])
    assert not both.topk_weights[~both.keep].any()


# --- ties and extremes

scores = st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), max_size=8)


@given(scores, st.integers(1, 6), st.sampled_from([torch.float32, torch.float64]))
def test_ties_go_to_the_lowest_index(rows: list[list[int]], k: int, dtype: torch.dtype) -> None:
    chosen = stable_topk(torch.tensor(rows, dtype=dtype).reshape(-1, 6), k)
    assert chosen.tolist() == [sorted(range(6), key=lambda expert: (-row[expert], expert))[:k] for row in rows]


@pytest.mark.parametrize("k", [1, 2, 7, 300])
def test_ties_at_sizes_where_an_unstable_sort_shows(k: int) -> None:
    assert torch.equal(stable_topk(torch.zeros(4, 300), k), torch.arange(k).expand(4, k))


def test_k_equal_one_is_the_head_of_every_larger_k() -> None:
    tied = torch.randint(0, 3, (200, 6)).float()
    for k in range(2, 7):
        assert torch.equal(stable_topk(tied, 1), stable_topk(tied, k)[:, :1])


@pytest.mark.parametrize("k", [1, 2])
def test_nan_scores_give_legal_indices(k: int) -> None:
    chosen = stable_topk(torch.tensor([[0.0, math.nan, 1.0], [math.nan] * 3]), k)
    assert ((chosen >= 0) & (chosen < 3)).all()


def test_entropy_by_hand() -> None:
    probs = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25] * 4, [0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([0.0, math.log(4), math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(entropy(probs), expected, rtol=0, atol=1e-15)


def test_flatten_mask() -> None:
    mask = torch.tensor([[True, False], [False, True]])
    flat = flatten_mask(mask, torch.zeros(2, 2, D))
    assert flat is not None
    assert flat.tolist() == [True, False, False, True]
    assert flatten_mask(None, torch.zeros(2, D)) is None


# --- experts per token


def test_scheduled_top_k_counts_in_training_only() -> None:
    router, x = plugin(), torch.randn(6, D)
    router.set_top_k(4)
    assert router(x).topk_indices.shape == (6, 4)
    assert router.top_k == router.slots == 4
    assert router.eval()(x).topk_indices.shape == (6, K)
    assert router.top_k == K
    router.train().set_top_k(3)
    assert router(x).topk_indices.shape == (6, 3)


@pytest.mark.parametrize("wrong", [0, -1, E + 1])
def test_a_scheduled_top_k_must_fit_too(wrong: int) -> None:
    router = plugin()
    with pytest.raises(ValueError, match=f"top_k is {wrong}"):
        router.set_top_k(wrong)
    assert router.top_k == K


class WithoutChoice(SecondSlotOnlyWhenSure):
    class Config(RouterConfig):
        pass


class OnlyTwo(SecondSlotOnlyWhenSure):
    class Config(RouterConfig):
        top_k: Literal[2] = 2


@pytest.mark.parametrize("cls", [WithoutChoice, OnlyTwo])
def test_a_top_k_that_is_no_option_cannot_be_scheduled(cls: type[Router]) -> None:
    router = cls(cls.Config(), hidden_size=D, num_experts=E)
    router.label = "router 'mine'"
    with pytest.raises(ConfigError, match="router 'mine' does not let top_k be chosen"):
        router.set_top_k(2)
    assert router.top_k == (2 if cls is OnlyTwo else 1)


def test_no_noise_to_schedule() -> None:
    router = plugin()
    router.label = "layer 3's router 'mine'"
    with pytest.raises(ConfigError, match="layer 3's router 'mine' has no noise to schedule"):
        router.set_noise_std(0.1)


# --- errors of a route() of somebody else's


class Broken(SecondSlotOnlyWhenSure):
    error: Exception

    def route(self, x_TD: Tensor, mask_T: Tensor | None) -> RouterOutput:
        raise self.error


def broken(error: Exception) -> Broken:
    router = Broken(Broken.Config(), hidden_size=D, num_experts=E)
    router.error = error
    return router


def test_whatever_route_raises_names_the_router() -> None:
    error = KeyError("speed")
    router = broken(error)
    with pytest.raises(RouterError, match=r"^Broken: route\(\) raised KeyError: 'speed'$") as caught:
        router(torch.zeros(2, D))
    assert caught.value.__cause__ is error
    router.label = "layer 3's router 'mine'"
    with pytest.raises(RouterError, match="^layer 3's router 'mine': "):
        router(torch.zeros(2, D))


@pytest.mark.parametrize("error", [NotFoundError("no table"), RouterError("my own words"), torch.OutOfMemoryError()])
def test_errors_made_for_users_and_torchs_own_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        broken(error)(torch.zeros(2, D))
    assert caught.value is error


def test_checkpointing_may_stop_a_recomputation_inside_of_route() -> None:
    """It does so by raising; made an error of the router, it would end the run."""
    router, x = plugin(), torch.randn(6, D)
    grads = []
    for early_stop in (True, False):
        out = checkpoint(router, x, use_reentrant=False, early_stop=early_stop)
        grads.append(torch.autograd.grad(out.router_probs.square().sum() + out.topk_weights.sum(), router.weight))
    assert torch.equal(grads[0][0], grads[1][0])


# --- state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_floating_point_buffers_keep_their_dtype_and_value(dtype: torch.dtype) -> None:
    """1/3 is none of bfloat16's numbers: there and back would show."""
    model = nn.Sequential(balanced())
    model.to(dtype)
    router = model[0]
    assert router.weight.dtype == dtype
    assert router.bias.dtype == router.part.running_mean.dtype == torch.float32
    assert torch.equal(router.bias, torch.full((E,), 1 / 3))
    assert router.count.dtype == torch.int64
    assert router.state_dict()["bias"].dtype == torch.float32


def test_buffers_move_with_the_model() -> None:
    moved = balanced().to("meta", torch.bfloat16)
    assert moved.bias.device.type == "meta"
    assert moved.bias.dtype == torch.float32
    filled = moved.to_empty(device="cpu")
    assert filled.bias.device.type == filled.weight.device.type == "cpu"
    assert filled.bias.dtype == torch.float32


def test_assigning_weights_in_low_precision_leaves_buffers_in_float32() -> None:
    low = {
        name: value.to(torch.bfloat16) if value.is_floating_point() else value
        for name, value in balanced().state_dict().items()
    }
    model = nn.ModuleDict({"router": balanced()})
    model.load_state_dict({f"router.{name}": value for name, value in low.items()}, assign=True)
    router = model["router"]
    assert router.weight.dtype == torch.bfloat16
    assert router.bias.dtype == router.part.running_var.dtype == torch.float32


def test_a_buffer_that_a_router_registered_in_low_precision_loads_again_and_again() -> None:
    """Loading must not change the dtype: what is saved after it would not fit the router's own code."""

    class Low(SecondSlotOnlyWhenSure):
        def __init__(self, config: RouterConfig, *, hidden_size: int, num_experts: int) -> None:
            super().__init__(config, hidden_size=hidden_size, num_experts=num_experts)
            self.register_buffer("bias", torch.full((num_experts,), 1 / 3, dtype=torch.bfloat16))
            self.register_buffer("sum", torch.zeros(num_experts, dtype=torch.float64))

    def fresh() -> nn.Module:
        return nn.ModuleDict({"router": Low(Low.Config(), hidden_size=D, num_experts=E)})

    saved = fresh().state_dict()
    for assign in (False, True):
        for _ in range(2):  # strict: another dtype than the model's own is refused
            model = fresh()
            if not assign:
                load_model_strict(model, saved)
            model.load_state_dict(saved, assign=assign)
            saved = model.state_dict()
    assert saved["router.bias"].dtype == torch.bfloat16 and saved["router.sum"].dtype == torch.float64


def test_a_router_can_be_copied() -> None:
    router = balanced()
    router(torch.randn(3, D))
    router.set_top_k(3)
    twin = copy.deepcopy(router)
    assert torch.equal(twin(torch.ones(2, D)).topk_indices, router(torch.ones(2, D)).topk_indices)
    twin.set_top_k(1)
    assert router.top_k == 3


# --- what training asks


def test_a_zero_gate_and_a_single_expert_must_not_be_trained() -> None:
    router = plugin()
    assert router.training_problem() is None
    with torch.no_grad():
        router.weight.zero_()
    assert "zero" in (router.training_problem() or "")
    single = SecondSlotOnlyWhenSure(SecondSlotOnlyWhenSure.Config(top_k=1), hidden_size=D, num_experts=1)
    assert "one expert" in (single.training_problem() or "")


def test_a_rule_without_a_gate_needs_none() -> None:
    router = plugin()
    router.learns = False
    with torch.no_grad():
        router.weight.zero_()
    assert router.training_problem() is None


def test_a_router_can_be_printed_with_its_options() -> None:
    assert f"hidden_size={D}, num_experts={E}, top_k=2" in repr(plugin())

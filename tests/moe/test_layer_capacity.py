"""The layer with a capacity: against a loop over tokens, in both modes, recomputed, and compiled."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from moectl.errors import ConfigError
from moectl.moe import MoELayer, RouterOutput
from moectl.moe.capacity import FILLS, OVERFLOWS, Capacity
from moectl.moe.dispatch import Dispatch
from moectl.routers import build_router
from tests.moe.reference import (
    HIDDEN,
    ROUTERS,
    Case,
    apply_limit,
    capacity_by_hand,
    decide_in_python,
    gradients,
    limit_by_hand,
    make_experts,
    make_layer,
    mixture_by_token,
    tokens,
)

FLOAT64 = 1e-12  # values of order one, a few products deep, another order of addition

CAPACITIES = [Capacity(0.6, overflow, fill) for overflow in OVERFLOWS for fill in FILLS]


def limited_in_python(layer: MoELayer, router: str, x_TD: Tensor, real: list[bool]) -> tuple[RouterOutput, list[int]]:
    """The decision after capacity, one assignment at a time, with the graph of weights and probabilities."""
    assert layer.capacity is not None
    routing = decide_in_python(layer, router, x_TD, real)
    routing = routing._replace(router_probs=(x_TD @ layer.router.weight.t()).softmax(-1))
    k, num_experts = layer.router.top_k, layer.router.num_experts
    keep = [[here] * k for here in real]
    case = Case(num_experts, k, routing.topk_indices.tolist(), keep, 0)
    limit = capacity_by_hand(str(layer.capacity.factor), k, sum(real), num_experts)
    limited = limit_by_hand(case, routing.router_probs.tolist(), limit, layer.capacity.overflow, layer.capacity.fill)
    return apply_limit(routing, limited), limited.dropped


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("capacity", CAPACITIES, ids=str)
@given(
    router=st.sampled_from(ROUTERS),
    experts=st.integers(1, 6),
    real=st.lists(st.booleans(), max_size=10),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_layer_with_capacity_equals_the_loop_over_tokens(
    capacity: Capacity,
    backend: str,
    router: str,
    experts: int,
    real: list[bool],
    masked: bool,
    seed: int,
    data: st.DataObject,
) -> None:
    """Output, losses of assignments, and every gradient: that of a substitute's weight included."""
    k = data.draw(st.integers(1, experts)) if router.startswith("topk") else 1
    layer = make_layer(router, experts, k, backend=backend, seed=seed)
    layer.capacity = capacity
    x = tokens(len(real), seed=seed).requires_grad_()
    mask = torch.tensor(real, dtype=torch.bool) if masked else None
    here = real if masked else [True] * len(real)

    def fast() -> Tensor:
        return layer(x, mask)

    def slow() -> Tensor:
        return mixture_by_token(x, limited_in_python(layer, router, x, here)[0], layer.experts)

    torch.testing.assert_close(fast(), slow(), rtol=0, atol=FLOAT64)
    assert layer.dropped is not None
    assert layer.dropped.tolist() == limited_in_python(layer, router, x, here)[1]
    leaves = (x, *layer.parameters())
    for mine, reference in zip(gradients(fast, *leaves), gradients(slow, *leaves), strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=10 * FLOAT64)


@pytest.mark.parametrize("capacity", CAPACITIES, ids=str)
@given(real=st.lists(st.booleans(), max_size=12), router=st.sampled_from(ROUTERS))
def test_padding_neither_takes_room_nor_makes_any(capacity: Capacity, real: list[bool], router: str) -> None:
    layer, x = make_layer(router), tokens(len(real))
    layer.capacity = capacity
    mask = torch.tensor(real, dtype=torch.bool)
    x[~mask] = math.nan
    padded = layer(x, mask)
    dropped = layer.dropped
    torch.testing.assert_close(padded[mask], layer(x[mask]), rtol=0, atol=FLOAT64)
    assert dropped is not None
    assert layer.dropped is not None
    assert torch.equal(dropped, layer.dropped)
    assert not padded[~mask].any()


def test_capacity_holds_in_training_only_unless_asked() -> None:
    layer, x = make_layer(), tokens(24)
    free = layer(x)
    assert layer.dropped is None
    layer.capacity = Capacity(0.5)
    limited = layer(x)
    assert layer.dropped is not None
    assert int(layer.dropped.sum()) >= 24, "at most half of 48 assignments found room"
    assert not torch.equal(limited, free)
    layer.eval()
    assert torch.equal(layer(x), free)
    assert layer.dropped is None, "of this call, not of an earlier one"
    layer.capacity = Capacity(0.5, in_eval=True)
    assert torch.equal(layer(x), limited)
    assert layer.dropped is not None


def test_the_routing_kept_is_the_routers_own() -> None:
    """The load-balancing loss counts what was chosen, before capacity."""
    layer, x = make_layer(), tokens(24)
    layer(x)
    before = layer.routing
    layer.capacity = Capacity(0.5, "next-best")
    layer(x)
    assert before is not None
    assert layer.routing is not None
    assert torch.equal(layer.routing.topk_indices, before.topk_indices)
    assert torch.equal(layer.routing.topk_weights, before.topk_weights)
    assert layer.routing.keep is None


def test_a_token_without_room_keeps_the_shared_experts_alone() -> None:
    layer, x = make_layer("top1", 2), tokens(6)
    layer.shared_experts = nn.Linear(HIDDEN, HIDDEN).double()
    with torch.no_grad():
        layer.router.weight.zero_()  # all tie: expert 0
    layer.capacity = Capacity(1.0)
    out = layer(x)
    assert torch.equal(out[3:], layer.shared_experts(x)[3:])
    assert not torch.equal(out[:3], layer.shared_experts(x)[:3])


def test_causality_is_the_routers_and_the_capacitys() -> None:
    layer = make_layer()
    assert layer.causal
    layer.capacity = Capacity(1.0)
    assert layer.causal
    layer.capacity = Capacity(1.0, fill="probability")
    assert not layer.causal
    layer.capacity = None
    layer.router.causal = False
    assert not layer.causal


def test_capacity_is_refused_where_tokens_do_not_choose() -> None:
    router = make_layer().router
    router.token_choice = False
    router.label = "router 'mine'"
    with pytest.raises(ConfigError, match="^router 'mine' takes no capacity") as error:
        MoELayer(router, make_experts("gated", 4), capacity=Capacity(1.0))
    assert error.value.hint is not None
    layer = MoELayer(router, make_experts("gated", 4))
    with pytest.raises(ConfigError, match="^router 'mine' takes no capacity"):
        layer.capacity = Capacity(1.0)
    layer.capacity = None


# --- recomputed, and compiled


@pytest.mark.parametrize("capacity", [None, *CAPACITIES], ids=str)
@pytest.mark.parametrize("router", ["top1", "switch", "topk"])
def test_activation_checkpointing_replays_the_same_route(router: str, capacity: Capacity | None) -> None:
    """Noise and capacity included: the plan of the recomputation is that of the first pass, field by field."""
    torch.manual_seed(0)
    gate = build_router(router, hidden_size=HIDDEN, num_experts=4, noise_std=1.0).double()
    layer, x = MoELayer(gate, make_experts("gated", 4), capacity=capacity), tokens(24).requires_grad_()
    plans: list[Dispatch] = []
    layer.experts.register_forward_pre_hook(lambda _, inputs: plans.append(inputs[1]))
    random = [torch.randn(3)]
    out = checkpoint(layer, x, use_reentrant=False)
    routing = layer.routing
    random.append(torch.randn(3))  # the recomputation must not take its noise from here
    out.square().sum().backward()
    first, again = plans
    for one, other in zip(first, again, strict=True):
        assert one is other is None or torch.equal(one, other)
    assert routing is not None
    assert not torch.equal(routing.router_probs, routing.router_probs_clean), "without noise nothing is tested"


@pytest.mark.parametrize("capacity", [None, *CAPACITIES], ids=str)
def test_the_compiled_layer_is_one_graph_for_all_token_counts(capacity: Capacity | None) -> None:
    """Forward and backward. The first size compiles as it is, the second for any size, and then none: 20 sizes."""
    layer = make_layer().train()
    layer.capacity = capacity
    graphs = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    for count in range(3, 23):
        x = tokens(count, seed=count).requires_grad_()
        leaves = (x, *layer.parameters())
        mine, dropped = compiled(x), layer.dropped
        expected = layer(x)
        assert dropped is layer.dropped is None or torch.equal(dropped, layer.dropped)
        torch.testing.assert_close(mine, expected, rtol=0, atol=FLOAT64)
        references = gradients(lambda out=expected: out, *leaves)
        for gradient, reference in zip(gradients(lambda out=mine: out, *leaves), references, strict=True):
            torch.testing.assert_close(gradient, reference, rtol=0, atol=10 * FLOAT64)
    assert graphs.frame_count == 2


def test_another_capacity_factor_compiles_nothing_anew() -> None:
    """A schedule moves it at every step."""
    layer, x = make_layer().train(), tokens(24)
    graphs = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    lost = []
    for factor in (0.5, 0.55, 0.7, 0.9, 1.0, 3.0):
        layer.capacity = Capacity(factor)
        compiled(x)
        assert layer.dropped is not None
        lost.append(int(layer.dropped.sum()))
    assert lost == sorted(lost, reverse=True)
    assert lost[0] > lost[-1] == 0
    assert graphs.frame_count == 1

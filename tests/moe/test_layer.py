"""The whole layer against a loop over tokens, forward and backward, and what must not change its output."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moectl.moe import MoELayer, Router, RouterConfig, RouterOutput
from moectl.moe.experts import BACKENDS
from moectl.moe.losses import load_balancing_loss, router_z_loss
from moectl.moe.router import entropy
from moectl.routers import build_router
from tests.moe.reference import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    ROUTERS,
    decide_in_python,
    gradients,
    make_experts,
    make_layer,
    mixture_by_token,
    tokens,
)

FLOAT64 = 1e-12  # values of order one, a few products deep, another order of addition


# --- the whole layer against the definition


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    router=st.sampled_from(ROUTERS),
    kind=st.sampled_from(sorted(EXPERTS)),
    experts=st.integers(1, 6),
    real=st.lists(st.booleans(), max_size=10),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_layer_equals_the_loop_over_tokens(
    backend: str, router: str, kind: str, experts: int, real: list[bool], masked: bool, seed: int, data: st.DataObject
) -> None:
    """Output, and the gradients of input, gate and every expert matrix: zeros where a token or expert has no part."""
    k = data.draw(st.integers(1, experts)) if router.startswith("topk") else 1
    layer = make_layer(router, experts, k, kind=kind, backend=backend, seed=seed)
    x = tokens(len(real), seed=seed).requires_grad_()
    mask = torch.tensor(real, dtype=torch.bool) if masked else None

    def fast() -> Tensor:
        return layer(x, mask)

    def slow() -> Tensor:
        routing = decide_in_python(layer, router, x, real if masked else [True] * len(real))
        return mixture_by_token(x, routing, layer.experts)

    torch.testing.assert_close(fast(), slow(), rtol=0, atol=FLOAT64)
    leaves = (x, *layer.parameters())
    for mine, reference in zip(gradients(fast, *leaves), gradients(slow, *leaves), strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=10 * FLOAT64)
    if masked:
        padding = ~torch.tensor(real, dtype=torch.bool)
        assert not fast()[padding].any()
        assert not gradients(fast, x)[0][padding].any()


def test_every_gate_row_and_expert_gets_a_gradient_where_tokens_come() -> None:
    """The comparison above would also hold between two layers that learn nothing."""
    for router in ROUTERS:
        layer = make_layer(router)
        layer(tokens(64)).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, (router, name)
            assert parameter.grad.flatten(1).any(1).all(), (router, name)


class Fixed(Router):
    """Goes where it is told; the weights are smooth in the gate. For checks by finite differences."""

    class Config(RouterConfig):
        top_k: int = 2

    indices: Tensor

    def route(self, x_TD: Tensor, mask_T: Tensor | None) -> RouterOutput:
        logits = self.logits(x_TD)
        probs = logits.softmax(-1)
        return RouterOutput(self.indices, probs.gather(1, self.indices), logits, probs, probs, entropy(probs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_of_the_whole_layer(backend: str, kind: str, masked: bool) -> None:
    """Finite differences in every input and parameter, the route held fixed; expert 1 is empty."""
    torch.manual_seed(0)
    router = Fixed(Fixed.Config(), hidden_size=HIDDEN, num_experts=3).double()
    router.indices = torch.tensor([[0, 2], [2, 0], [2, 0]])
    layer = MoELayer(router, make_experts(kind, 3, backend=backend))
    names = [name for name, _ in layer.named_parameters()]
    mask = torch.tensor([True, False, True]) if masked else None

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, mask))

    assert torch.autograd.gradcheck(run, (tokens(3).requires_grad_(), *layer.parameters()))


# --- invariances


@given(st.integers(0, 12), st.sampled_from(ROUTERS), st.randoms(use_true_random=False))
def test_permuting_tokens_permutes_outputs(number: int, router: str, random: object) -> None:
    layer, x = make_layer(router), tokens(number)
    order = list(range(number))
    random.shuffle(order)  # type: ignore[attr-defined]
    torch.testing.assert_close(layer(x[order]), layer(x)[order], rtol=0, atol=FLOAT64)


@given(st.permutations(range(5)), st.sampled_from(ROUTERS), st.sampled_from(sorted(EXPERTS)))
def test_permuting_experts_changes_nothing(order: list[int], router: str, kind: str) -> None:
    """Gate rows and expert matrices moved together: outputs, gradients and losses stay, counts move along."""
    layer, x = make_layer(router, 5, 3, kind=kind), tokens(11)
    moved = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.copy_(parameter[order].clone())
    torch.testing.assert_close(moved(x), layer(x), rtol=0, atol=FLOAT64)
    mine = gradients(lambda: moved(x), *moved.parameters())
    theirs = gradients(lambda: layer(x), *layer.parameters())
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other[order], rtol=0, atol=10 * FLOAT64)
    ours, other = moved.routing, layer.routing
    assert ours is not None
    assert other is not None
    assert torch.equal(torch.tensor(order)[ours.topk_indices], other.topk_indices)
    for loss in (router_z_loss(ours.router_logits) - router_z_loss(other.router_logits),
                 load_balancing_loss(ours.router_probs, ours.topk_indices, 5)
                 - load_balancing_loss(other.router_probs, other.topk_indices, 5)):  # fmt: skip
        assert abs(loss.item()) < FLOAT64


def test_no_token_sees_another() -> None:
    """The full Jacobian is block-diagonal: each output depends on its own token alone."""
    layer, x = make_layer(), tokens(5)
    jacobian = torch.autograd.functional.jacobian(layer, x)
    for out_token in range(5):
        for in_token in range(5):
            assert bool(jacobian[out_token, :, in_token].any()) == (out_token == in_token)


@given(st.lists(st.booleans(), max_size=12), st.sampled_from(ROUTERS))
def test_real_tokens_do_not_notice_padding(real: list[bool], router: str) -> None:
    layer, x = make_layer(router), tokens(len(real))
    mask = torch.tensor(real, dtype=torch.bool)
    torch.testing.assert_close(layer(x, mask)[mask], layer(x[mask]), rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_garbage_in_padding_reaches_neither_output_nor_any_gradient(backend: str) -> None:
    """``full`` is left out: by its definition it runs padding through every expert, as a dense MLP would."""
    layer, x = make_layer(backend=backend), tokens(4)
    clean = layer(x, torch.tensor([True, False, True, True]))
    x[1] = math.nan
    x.requires_grad_()
    out = layer(x, torch.tensor([True, False, True, True]))
    assert torch.equal(out, clean)
    routing = layer.routing
    assert routing is not None
    balance = load_balancing_loss(routing.router_probs, routing.topk_indices, 4, layer.token_mask, routing.keep)
    (out.sum() + balance + router_z_loss(routing.router_logits, layer.token_mask)).backward()
    for parameter in (x, *layer.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_a_nan_token_is_not_healed_and_harms_no_other() -> None:
    layer, x = make_layer(), tokens(3)
    clean = layer(x)
    x[1] = math.nan
    out = layer(x)
    assert out[1].isnan().all()
    torch.testing.assert_close(out[[0, 2]], clean[[0, 2]], rtol=0, atol=FLOAT64)


def test_k_equal_e_with_raw_weights_is_the_dense_mixture() -> None:
    layer, x = make_layer("topk-raw", 3, 3), tokens(7)
    probs = (x @ layer.router.weight.t()).softmax(-1)
    dense = sum(probs[:, [expert]] * layer.experts.one(expert, x) for expert in range(3))
    torch.testing.assert_close(layer(x), dense, rtol=0, atol=FLOAT64)


def test_equal_experts_make_the_router_irrelevant() -> None:
    """Weights that sum to one over copies of one network give that network: what upcycling rests on."""
    for router in ("top1", "topk"):
        layer, x = make_layer(router), tokens(9)
        with torch.no_grad():
            for parameter in layer.experts.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter).clone())
        torch.testing.assert_close(layer(x), layer.experts.one(0, x), rtol=0, atol=FLOAT64)


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.sampled_from(ROUTERS), st.integers(0, 1000))
def test_a_token_does_not_notice_the_rest_of_the_batch(stay: list[bool], router: str, seed: int) -> None:
    """Any part of a batch, alone, gives the same rows, routes and gradients: without capacity nobody competes."""
    layer, x = make_layer(router), tokens(len(stay), seed=seed)
    part = torch.tensor(stay)
    whole = layer(x)[part]
    assert layer.routing is not None
    routes = layer.routing.topk_indices[part]
    torch.testing.assert_close(layer(x[part]), whole, rtol=0, atol=FLOAT64)
    assert torch.equal(layer.routing.topk_indices, routes)
    alone, among = x[part].clone().requires_grad_(), x.clone().requires_grad_()
    gradient = gradients(lambda: layer(among)[part], among)[0]
    torch.testing.assert_close(gradients(lambda: layer(alone), alone)[0], gradient[part], rtol=0, atol=10 * FLOAT64)
    assert not gradient[~part].any()


# --- a drop-in for an MLP


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4), (0,), (2, 0)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer, x = make_layer(), tokens(*shape)
    out = layer(x)
    assert out.shape == x.shape
    torch.testing.assert_close(out.reshape(-1, HIDDEN), layer(x.reshape(-1, HIDDEN)), rtol=0, atol=0)


def test_a_transposed_input_is_read_by_its_shape() -> None:
    layer, x = make_layer(), tokens(3, 2)
    assert torch.equal(layer(x.transpose(0, 1)), layer(x.transpose(0, 1).contiguous()))


def test_masks_have_the_inputs_shape() -> None:
    layer, x = make_layer(), tokens(2, 3)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert torch.equal(layer(x, mask), layer(x.reshape(6, HIDDEN), mask.reshape(6)).reshape(2, 3, HIDDEN))
    with pytest.raises(ValueError, match=r"token_mask must be bool of shape \(2, 3\)"):
        layer(x, mask.reshape(6))


def test_wrong_hidden_size_is_refused() -> None:
    with pytest.raises(ValueError, match=str(HIDDEN)):
        make_layer()(torch.zeros(3, HIDDEN + 1, dtype=torch.float64))


@pytest.mark.parametrize(("experts", "hidden"), [(3, HIDDEN), (4, HIDDEN + 2)])
def test_router_and_experts_must_fit(experts: int, hidden: int) -> None:
    router = build_router("top1", hidden_size=hidden, num_experts=experts)
    with pytest.raises(ValueError, match="the experts have"):
        MoELayer(router, make_experts("gated", 4))


def test_shared_experts_see_every_token_and_are_added() -> None:
    layer, x = make_layer(), tokens(2, 3)
    routed = layer(x)
    layer.shared_experts = nn.Linear(HIDDEN, HIDDEN).double()
    assert torch.equal(layer(x), routed + layer.shared_experts(x))
    # Padding is routed nowhere, but a shared expert is an ordinary module: it sees what a dense MLP would.
    masked = layer(x, torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(masked, layer.shared_experts(x))


def test_routing_and_mask_of_the_last_call_are_kept_with_their_graph() -> None:
    layer = make_layer()
    assert layer.routing is None
    layer(tokens(5))
    layer(tokens(2, 2), torch.tensor([[True, False], [True, True]]))
    assert layer.routing is not None
    assert layer.routing.router_probs.shape == (4, 4)
    assert layer.routing.router_probs.requires_grad
    assert layer.token_mask is not None
    assert layer.token_mask.tolist() == [True, False, True, True]
    layer(tokens(3))
    assert layer.token_mask is None


def test_parameter_names() -> None:
    layer = make_layer()
    assert [name for name, _ in layer.named_parameters()] == [
        "router.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
    ]


def by_deepcopy(layer: MoELayer) -> MoELayer:
    return copy.deepcopy(layer)


def by_pickle(layer: MoELayer) -> MoELayer:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [by_deepcopy, by_pickle])
def test_a_layer_that_has_run_can_be_copied(duplicate: Callable[[MoELayer], MoELayer]) -> None:
    """torch refuses to copy a tensor that has a graph, and the last routing has one."""
    layer, x = make_layer(), tokens(4)
    before = layer(x)
    routing = layer.routing
    other = duplicate(layer)
    assert other.routing is None
    assert layer.routing is routing, "the original keeps its own"
    assert torch.equal(other(x), before)
    assert other.router.weight is not layer.router.weight


# --- precision and recomputation


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("router", ROUTERS)
def test_autocast_keeps_the_route_and_comes_close(backend: str, router: str) -> None:
    """The decision is bit-equal; experts round to 8 bits, so outputs agree to 3 % of the largest."""
    layer, x = make_layer(router, backend=backend).float(), tokens(40).float()
    exact = layer(x)
    chosen = layer.routing
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)
        nothing = layer(x[:0])
    assert low.dtype == nothing.dtype == torch.bfloat16
    assert chosen is not None
    layer(x)
    assert layer.routing is not None
    assert torch.equal(layer.routing.topk_indices, chosen.topk_indices)
    torch.testing.assert_close(low.float(), exact, rtol=0, atol=0.03 * exact.detach().abs().max().item())
    low.float().square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


def test_a_bfloat16_layer_returns_bfloat16() -> None:
    layer = make_layer().bfloat16()
    out = layer(tokens(5).bfloat16())
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.router.weight.grad is not None
    assert layer.router.weight.grad.dtype == torch.bfloat16


def test_activation_checkpointing_changes_no_gradient_and_keeps_the_noise() -> None:
    """Recomputed with the same noise, so with the same route; the routing kept from the first pass has its graph."""
    torch.manual_seed(0)
    router = build_router("topk", hidden_size=HIDDEN, num_experts=4, top_k=2, noise_std=1.0).double()
    layer, x = MoELayer(router, make_experts("gated", 4)), tokens(12).requires_grad_()

    def step(recompute: bool) -> list[Tensor]:
        torch.manual_seed(1)
        out = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        assert layer.routing is not None
        loss = out.square().sum() + load_balancing_loss(layer.routing.router_probs, layer.routing.topk_indices, 4)
        return [loss, *torch.autograd.grad(loss, (x, *layer.parameters()))]

    for plain, recomputed in zip(step(False), step(True), strict=True):
        assert torch.equal(plain, recomputed)


def test_the_same_input_gives_the_same_bits() -> None:
    layer, x = make_layer().float(), tokens(50).float()
    assert torch.equal(layer(x), layer(x))


def test_intermediate_size_is_the_experts_own() -> None:
    assert make_layer().experts.intermediate_size == INTERMEDIATE

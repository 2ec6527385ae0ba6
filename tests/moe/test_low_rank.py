"""Low-rank adapters of stacked experts: an unchanged start, the right sum, every backend, gradients, merging."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from moectl.moe import MoELayer
from moectl.moe.backends import BACKENDS
from moectl.moe.experts import Experts, GatedExperts, MLPExperts
from moectl.moe.low_rank import LowRank, adapt, adapters_of, merge
from moectl.routers import build_router

E, D, F, R = 4, 12, 20, 3
KINDS = {"gated": GatedExperts, "plain": MLPExperts}


def some_experts(kind: str, dtype: torch.dtype = torch.float64) -> Experts:
    torch.manual_seed(0)
    experts = KINDS[kind](E, D, F).to(dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


def layer_of(experts: Experts) -> MoELayer:
    torch.manual_seed(1)
    return MoELayer(build_router("topk", hidden_size=D, num_experts=E, top_k=2).double(), experts).eval()


def some_adapted(kind: str) -> Experts:
    experts = some_experts(kind)
    adapt(experts, R, 0.7)
    torch.manual_seed(2)
    for adapter in adapters_of(experts).values():
        nn.init.normal_(adapter.lora_B, std=0.3)
    return experts


def plain_with(experts: Experts) -> dict[str, Tensor]:
    """Adapted weights by the definition, expert by expert."""
    chains = experts.parametrizations
    found = {}
    for name, adapter in adapters_of(experts).items():
        base = chains[name].original  # type: ignore[index,union-attr]
        found[name] = torch.stack([base[e] + 0.7 * adapter.lora_B[e] @ adapter.lora_A[e] for e in range(E)])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapters_change_no_bit(kind: str, dtype: torch.dtype) -> None:
    experts = some_experts(kind, dtype)
    before = {name: parameter.clone() for name, parameter in experts.named_parameters()}
    adapt(experts, R, 0.7)
    assert all(torch.equal(getattr(experts, name), value) for name, value in before.items())
    for adapter in adapters_of(experts).values():
        assert adapter.lora_A.dtype == dtype and bool(adapter.lora_A.any()) and not bool(adapter.lora_B.any())


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapters_alone_train_and_are_counted_by_hand(kind: str) -> None:
    experts = some_experts(kind)
    adapt(experts, R, 0.7)
    trained = {name: p.numel() for name, p in experts.named_parameters() if p.requires_grad}
    up = 2 * F if kind == "gated" else F
    assert sum(trained.values()) == E * R * ((up + D) + (D + F))
    assert all("lora_" in name for name in trained)
    with pytest.raises(ValueError, match="adapters already"):
        adapt(experts, R, 0.7)


@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_has_factors_of_its_own(kind: str) -> None:
    experts = some_adapted(kind)
    for name, weight in plain_with(experts).items():
        torch.testing.assert_close(getattr(experts, name), weight, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_backend_takes_them_forward_and_backward(kind: str, backend: str) -> None:
    """Against experts that have the adapted weights as plain tensors with a graph."""
    adapted = layer_of(some_adapted(kind))
    adapted.experts.backend = backend
    adapted.experts.accumulate_gradients_in_place()  # as the trainer asks for; adapted weights take the ordinary way
    plain = layer_of(some_experts(kind))
    plain.experts.backend = backend
    with torch.no_grad():
        for name, weight in plain_with(adapted.experts).items():
            getattr(plain.experts, name).copy_(weight)
    torch.manual_seed(3)
    x_TD, wanted_TD = torch.randn(2, 40, D, dtype=torch.float64)
    for layer in (adapted, plain):
        ((layer(x_TD) - wanted_TD) ** 2).sum().backward()
    torch.testing.assert_close(adapted(x_TD), plain(x_TD), rtol=0, atol=1e-12)
    for name, adapter in adapters_of(adapted.experts).items():
        grad = getattr(plain.experts, name).grad
        assert grad is not None and adapter.lora_A.grad is not None and adapter.lora_B.grad is not None
        grad_A = 0.7 * adapter.lora_B.detach().transpose(1, 2) @ grad
        grad_B = 0.7 * grad @ adapter.lora_A.detach().transpose(1, 2)
        torch.testing.assert_close(adapter.lora_A.grad, grad_A, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(adapter.lora_B.grad, grad_B, rtol=1e-10, atol=1e-11)
        assert float(grad_A.abs().max()) > 1e-3
    assert adapted.router.weight.grad is not None and plain.router.weight.grad is not None
    torch.testing.assert_close(adapted.router.weight.grad, plain.router.weight.grad, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_keeps_every_bit_and_leaves_copies_alone(kind: str) -> None:
    layer = layer_of(some_adapted(kind))
    x_TD = torch.randn(30, D, dtype=torch.float64)
    before = layer(x_TD)
    other = copy.deepcopy(layer)
    merge(other.experts)
    assert type(other.experts) is KINDS[kind] and not adapters_of(other.experts)
    assert torch.equal(other(x_TD), before)
    assert adapters_of(layer.experts) and torch.equal(layer(x_TD), before)  # a deep copy shares its class
    assert set(other.experts.state_dict()) == set(some_experts(kind).state_dict())
    merge(other.experts)  # nothing is left to merge
    assert torch.equal(other(x_TD), before)


def test_adapters_are_exact_under_autocast() -> None:
    adapter = LowRank(torch.randn(E, D, F), R, 0.5)
    nn.init.normal_(adapter.lora_B, std=1e-3)
    weight = torch.randn(E, D, F)
    exact = adapter(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(adapter(weight), exact)


def test_first_factors_are_drawn_as_torch_draws_a_linear_layer() -> None:
    torch.manual_seed(0)
    adapter = LowRank(torch.empty(64, 5, 50), 8, 1.0)
    linear = nn.Linear(50, 64 * 8, bias=False).weight
    bound = 1 / 50**0.5
    assert float(adapter.lora_A.detach().abs().max()) <= bound
    # The standard deviation of 25,600 uniform numbers scatters by 0.3 %: 2 % is far outside.
    assert float(adapter.lora_A.detach().std()) == pytest.approx(float(linear.detach().std()), rel=0.02)

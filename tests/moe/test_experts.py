"""What one expert computes, and that every backend computes the same, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from moectl.errors import MoectlError
from moectl.moe import Experts, GatedExperts, MLPExperts, RouterOutput, register_backend
from moectl.moe.dispatch import Dispatch, dispatch
from moectl.moe.experts import BACKENDS
from tests.moe.reference import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    Case,
    by_hand,
    cases,
    expert_on_token,
    gradients,
    make_experts,
    mixture_by_token,
)

FLOAT64 = 1e-12  # two products deep, values of order one, another order of addition
kinds = st.sampled_from(sorted(EXPERTS))


def tokens(number: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_parameters_have_the_stacked_layout_of_hugging_face() -> None:
    gated = {name: tuple(p.shape) for name, p in GatedExperts(3, HIDDEN, INTERMEDIATE).named_parameters()}
    assert gated == {"gate_up_proj": (3, 2 * INTERMEDIATE, HIDDEN), "down_proj": (3, HIDDEN, INTERMEDIATE)}
    plain = {name: tuple(p.shape) for name, p in MLPExperts(3, HIDDEN, INTERMEDIATE).named_parameters()}
    assert plain == {
        "up_proj": (3, INTERMEDIATE, HIDDEN),
        "up_proj_bias": (3, INTERMEDIATE),
        "down_proj": (3, HIDDEN, INTERMEDIATE),
        "down_proj_bias": (3, HIDDEN),
    }


@pytest.mark.parametrize("kind", EXPERTS)
def test_one_expert_is_the_network_that_its_matrices_say(kind: str) -> None:
    experts, x = make_experts(kind, 3), tokens(4)
    for expert in range(3):
        slow = torch.stack([expert_on_token(experts, expert, row) for row in x])
        torch.testing.assert_close(experts.one(expert, x), slow, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(), kind=kinds)
def test_backend_equals_the_loop_over_tokens(backend: str, case: Case, kind: str) -> None:
    """Outputs, and the gradients of input, combine weights and every expert matrix."""
    experts = make_experts(kind, case.num_experts, case.seed, backend)
    x = tokens(case.num_tokens, case.seed).requires_grad_()
    fixed = case.routing()
    weights = fixed.topk_weights.clone().requires_grad_()

    def routing() -> RouterOutput:
        return by_hand(fixed.topk_indices, weights, case.num_experts, fixed.keep)

    def fast() -> torch.Tensor:
        return experts(x, dispatch(routing()))

    def slow() -> torch.Tensor:
        return mixture_by_token(x, routing(), experts)

    torch.testing.assert_close(fast(), slow(), rtol=0, atol=FLOAT64)
    leaves = (x, weights, *experts.parameters())
    for mine, reference in zip(gradients(fast, *leaves), gradients(slow, *leaves), strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("indices", [[[1], [1], [3]], []], ids=["some-empty", "no-tokens"])
def test_empty_experts_get_zero_gradients(
    backend: str, kind: str, indices: list[list[int]], poisoned_memory: None
) -> None:
    """Zeros and not None, from every backend: an optimizer or a gradient reduction sees the same parameters."""
    experts = make_experts(kind, 4, backend=backend)
    chosen = torch.tensor(indices, dtype=torch.int64).reshape(-1, 1)
    plan = dispatch(by_hand(chosen, torch.ones_like(chosen, dtype=torch.float64), 4))
    out = experts(tokens(len(chosen)), plan)
    assert out.shape == (len(chosen), HIDDEN)
    out.sum().backward()
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        reached = parameter.grad.flatten(1).any(1).tolist()
        assert reached == [expert in chosen for expert in range(4)], name


@pytest.mark.parametrize("kind", EXPERTS)
def test_float32_backends_agree_to_rounding(kind: str) -> None:
    """2⁻²⁴ per operation, sums of 64 and 48 terms of order one: within 1e-5 of the largest value."""
    torch.manual_seed(0)
    experts = EXPERTS[kind](4, 64, 48)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    x = torch.randn(40, 64, requires_grad=True)
    plan = dispatch(by_hand(torch.randint(0, 4, (40, 2)), torch.ones(40, 2), 4))
    results = {}
    for backend in BACKENDS:
        experts.backend = backend
        results[backend] = [experts(x, plan), *gradients(lambda: experts(x, plan), x, *experts.parameters())]
    for backend in ("grouped", "full"):
        for mine, reference in zip(results[backend], results["loop"], strict=True):
            torch.testing.assert_close(mine, reference, rtol=0, atol=1e-5 * reference.detach().abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", EXPERTS)
def test_autocast_output_is_bfloat16_and_close(backend: str, kind: str) -> None:
    """bfloat16 keeps 8 bits; two products and an activation deep, 3 % of the largest value covers the rounding."""
    experts = make_experts(kind, 3, backend=backend).float()
    x = tokens(20).float()
    plan = dispatch(by_hand(torch.randint(0, 3, (20, 1)), torch.ones(20, 1), 3))
    exact = experts(x, plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = experts(x, plan)
        none = experts(x[:0], dispatch(by_hand(torch.zeros(0, 1, dtype=torch.int64), torch.ones(0, 1), 3)))
    assert low.dtype == none.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, rtol=0, atol=0.03 * exact.detach().abs().max().item())


@pytest.mark.parametrize(("hidden", "intermediate"), [(6, 5), (17, 23), (64, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_full_backend_rounds_exactly_as_the_dense_mlp(hidden: int, intermediate: int, dtype: torch.dtype) -> None:
    """Bit for bit, whichever expert it is: the zero difference after upcycling rests on this."""
    torch.manual_seed(0)
    gate, up, down = (
        torch.randn(intermediate, hidden),
        torch.randn(intermediate, hidden),
        torch.randn(hidden, intermediate),
    )
    experts = GatedExperts(5, hidden, intermediate, backend="full")
    experts.load_state_dict({"gate_up_proj": torch.cat([gate, up]).repeat(5, 1, 1), "down_proj": down.repeat(5, 1, 1)})
    experts.to(dtype)
    gate, up, down, x = (tensor.to(dtype) for tensor in (gate, up, down, torch.randn(33, hidden)))
    plan = dispatch(by_hand(torch.randint(0, 5, (33, 1)), torch.ones(33, 1), 5))
    dense = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    assert torch.equal(experts(x, plan), dense)


def test_backward_of_the_grouped_backend_is_exact_calculus() -> None:
    experts = make_experts("gated", 3)
    plan = dispatch(by_hand(torch.tensor([[0, 2], [2, 0], [2, 0]]), torch.ones(3, 2, dtype=torch.float64), 3))
    x = tokens(3).requires_grad_()

    def run(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        parameters = {"gate_up_proj": gate_up, "down_proj": down}
        return torch.func.functional_call(experts, parameters, (x, plan))

    assert torch.autograd.gradcheck(run, (x, *experts.parameters()))


def test_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(MoectlError, match="groupd") as error:
        GatedExperts(2, 4, 4, backend="groupd")
    assert error.value.exit_code == 2
    assert "grouped" in (error.value.hint or "")


def test_register_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, backend in list(BACKENDS.items()):
        monkeypatch.setitem(BACKENDS, name, backend)
    with pytest.raises(ValueError, match="registered already"):
        register_backend("loop", BACKENDS["loop"])

    def doubled(experts: Experts, x_TD: torch.Tensor, plan: Dispatch) -> torch.Tensor:
        return 2 * BACKENDS["loop"](experts, x_TD, plan)

    monkeypatch.delitem(BACKENDS, "doubled", raising=False)
    register_backend("doubled", doubled)
    experts = make_experts("gated", 2, backend="doubled")
    plan = dispatch(by_hand(torch.tensor([[0], [1]]), torch.ones(2, 1), 2))
    twice = experts(tokens(2), plan)
    experts.backend = "loop"
    assert torch.equal(twice, 2 * experts(tokens(2), plan))
    del BACKENDS["doubled"]


@pytest.mark.parametrize("kind", EXPERTS)
def test_reset_parameters(kind: str) -> None:
    """Normal weights of the given scale (2,000 draws and more: 10 % is over 6 standard errors), zero biases."""
    torch.manual_seed(0)
    experts = EXPERTS[kind](4, 32, 32)
    experts.reset_parameters(std=0.3, down_std=0.01)
    for name, parameter in experts.named_parameters():
        if "bias" in name:
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(0.01 if name == "down_proj" else 0.3, rel=0.1)
            assert abs(parameter.mean().item()) < 0.1 * parameter.std().item()
    for expert in range(1, 4):
        assert not torch.equal(experts.down_proj[0], experts.down_proj[expert])

"""moectl-conditional from the outside: installed, built by name, compared token by token with its equations."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch
from torch import Tensor

from moectl.moe import GatedExperts, MoELayer
from moectl.routers import build_router
from moectl.testing import check_router
from moectl_conditional import ConditionalRouter

torch.set_num_threads(1)
D, E, F, T = 6, 5, 7, 64
EXACT = {"rtol": 0, "atol": 1e-12}  # float64, sums of a few dozen terms of size one


def layer(backend: str = "grouped", **options: object) -> MoELayer:
    torch.manual_seed(0)
    router = build_router("conditional", hidden_size=D, num_experts=E, **options)
    made = MoELayer(router, GatedExperts(E, D, F, backend=backend)).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return made


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def expert(experts: GatedExperts, number: int, x: Tensor) -> Tensor:
    gate, up = experts.gate_up_proj[number].chunk(2)
    return experts.down_proj[number] @ (torch.nn.functional.silu(gate @ x) * (up @ x))


def by_the_equations(made: MoELayer, x: Tensor, top_k: int, normalise: bool) -> Tensor:
    """One token after the other, in plain words of the module's docstring."""
    rows = []
    for token in x:
        logits = made.router.weight @ token
        dense = 1 / (1 + torch.exp(-logits[0]))
        if dense >= 0.5:
            rows.append(dense * expert(made.experts, 0, token))
            continue
        shares = torch.exp(logits[1:]) / torch.exp(logits[1:]).sum()
        chosen = sorted(range(E - 1), key=lambda e: -float(shares[e]))[:top_k]
        total = sum(shares[e] for e in chosen) if normalise else 1.0
        rows.append((1 - dense) * sum(shares[e] / total * expert(made.experts, e + 1, token) for e in chosen))
    return torch.stack(rows)


def test_entry_point_is_installed() -> None:
    (point,) = [point for point in metadata.entry_points(group="moectl.routers") if point.name == "conditional"]
    assert point.dist is not None
    assert point.dist.name == "moectl-conditional"
    assert point.load() is ConditionalRouter


def test_holds_to_the_router_contract() -> None:
    check_router("conditional")


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize(("top_k", "normalise"), [(1, False), (2, True), (2, False), (4, True)])
def test_output_and_gradients_are_the_equations(backend: str, top_k: int, normalise: bool) -> None:
    made, x = layer(backend, top_k=top_k, norm_topk_prob=normalise), tokens()
    mine, theirs = made(x), by_the_equations(made, x, top_k, normalise)
    dense = made.routing.topk_indices[:, 0] == 0
    assert 0.2 < dense.double().mean() < 0.8, "both branches are compared"
    torch.testing.assert_close(mine, theirs, **EXACT)

    upstream = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    inputs = (x, *made.parameters())
    got = torch.autograd.grad((mine * upstream).sum(), inputs)
    expected = torch.autograd.grad((theirs * upstream).sum(), inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)  # sums over 64 tokens more
        assert other.any()


def test_dense_tokens_use_one_slot_and_the_others_all() -> None:
    made = layer(top_k=3)
    out = made.router(tokens())
    dense = out.topk_indices[:, 0] == 0
    assert torch.equal(out.keep.sum(1), torch.where(dense, 1, 3))
    assert bool((out.topk_indices[~dense] >= 1).all())
    assert not out.topk_weights[~out.keep].any()
    torch.testing.assert_close(out.topk_weights.sum(1), torch.where(dense, *_both(out.router_probs[:, 0])), **EXACT)


def _both(dense: Tensor) -> tuple[Tensor, Tensor]:
    return dense, 1 - dense


def test_probabilities_are_a_distribution_with_the_dense_share_first() -> None:
    made, x = layer(), tokens()
    out = made.router(x)
    torch.testing.assert_close(out.router_probs.sum(1), torch.ones(T, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(out.router_probs[:, 0], torch.sigmoid(x @ made.router.weight[0]), **EXACT)


def test_a_token_without_preference_goes_dense() -> None:
    out = layer().router(torch.zeros(1, D, dtype=torch.float64))
    assert out.topk_indices[0, 0] == 0
    assert out.keep.tolist() == [[True, False]]
    assert float(out.topk_weights[0, 0]) == 0.5


def test_the_gate_learns_which_tokens_need_the_experts() -> None:
    """Frozen experts; the dense MLP is right for one half of the tokens, expert 3 for the other."""
    torch.manual_seed(0)
    made = MoELayer(build_router("conditional", hidden_size=D, num_experts=E), GatedExperts(E, D, 32))
    made.experts.reset_parameters(std=0.5)
    x = torch.randn(512, D)
    easy = x[:, 0] > 0
    target = torch.where(easy[:, None], made.experts.one(0, x), made.experts.one(3, x)).detach()
    optimizer = torch.optim.Adam(made.router.parameters(), lr=3e-2)
    start = (made(x) - target).square().mean().item()
    for _ in range(150):
        optimizer.zero_grad()
        (made(x) - target).square().mean().backward()
        assert made.router.weight.grad.isfinite().all()
        optimizer.step()
    out = made.router(x)
    right = (out.topk_indices[:, 0] == torch.where(easy, 0, 3)).float().mean()
    assert (made(x) - target).square().mean().item() < 0.1 * start
    assert float(right) > 0.9  # chance: half of the easy, an eighth of the others


def test_later_tokens_change_nothing_before_them() -> None:
    made, x = layer(), tokens().detach()
    changed = x.clone()
    changed[40:] += 3.0
    torch.testing.assert_close(made(changed)[:40], made(x)[:40], **EXACT)


def test_padding_is_routed_nowhere() -> None:
    made, x = layer(), tokens().detach()
    mask = torch.arange(T) < 50
    assert not made(x, mask)[50:].any()
    torch.testing.assert_close(made(x, mask)[:50], made(x)[:50], **EXACT)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_k": 5}, "4 experts beside the dense MLP"),
        ({"top_k": 0}, "top_k"),
        ({"norm_topk": False}, "Did you mean 'norm_topk_prob'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        build_router("conditional", hidden_size=D, num_experts=E, **options)
    assert says in f"{caught.value} {getattr(caught.value, 'hint', '')}"


def test_a_constant_share_is_refused_for_training() -> None:
    assert "constant 1" in layer(top_k=1).router.training_problem()
    assert layer(top_k=1, norm_topk_prob=False).router.training_problem() is None
    assert layer().router.training_problem() is None


def test_a_schedule_cannot_ask_for_more_experts_than_there_are() -> None:
    router = layer().router
    router.set_top_k(4)
    assert router.top_k == 4
    with pytest.raises(ValueError, match="beside the dense MLP"):
        router.set_top_k(5)

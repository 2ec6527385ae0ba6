"""moectl-hierarchical from the outside: installed, built by name, compared token by token with its equations."""

from __future__ import annotations

import itertools
import math
from importlib import metadata

import pytest
import torch
from torch import Tensor

from moectl.moe import GatedExperts, MoELayer
from moectl.routers import build_router
from moectl.testing import check_router
from moectl_hierarchical import HierarchicalRouter

torch.set_num_threads(1)
D, E, F, T = 6, 12, 7, 64
EXACT = {"rtol": 0, "atol": 1e-12}  # float64, sums of a few dozen terms of size one


def layer(backend: str = "grouped", **options: object) -> MoELayer:
    torch.manual_seed(0)
    router = build_router("hierarchical", hidden_size=D, num_experts=E, **{"n_group": 3, **options})
    made = MoELayer(router, GatedExperts(E, D, F, backend=backend)).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return made


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def expert(experts: GatedExperts, number: int, x: Tensor) -> Tensor:
    gate, up = experts.gate_up_proj[number].chunk(2)
    return experts.down_proj[number] @ (torch.nn.functional.silu(gate @ x) * (up @ x))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Equations 3 and 5 of Shazeer et al. without noise: a softmax over the k largest, 0 elsewhere."""
    best = sorted(range(len(logits)), key=lambda index: -float(logits[index]))[:k]
    masked = torch.full_like(logits, -math.inf)
    masked = masked.scatter(0, torch.tensor(best), logits[best])
    return masked.softmax(0)


def by_the_equations(made: MoELayer, x: Tensor, groups: int, per_group: int, normalize: str) -> Tensor:
    """Equation 12 of appendix B, one token after the other, over all groups and all their experts."""
    router, size = made.router, E // 3
    rows = []
    for token in x:
        primary, secondary = router.group_weight @ token, (router.weight @ token).view(3, size)
        kept_primary, kept = keep_top_k(primary, groups), [keep_top_k(logits, per_group) for logits in secondary]
        paper = {(i, j): kept_primary[i] * kept[i][j] for i, j in itertools.product(range(3), range(size))}
        product = {(i, j): primary.softmax(0)[i] * secondary[i].softmax(0)[j] for i, j in paper}
        chosen = [key for key, gate in paper.items() if float(gate) > 0]
        assert len(chosen) == groups * per_group
        total = sum(product[key] for key in chosen)
        gates = {
            "levels": paper,
            "chosen": {key: product[key] / total for key in chosen},
            "none": {key: product[key] for key in chosen},
        }[normalize]
        rows.append(sum(gates[i, j] * expert(made.experts, i * size + j, token) for i, j in chosen))
    return torch.stack(rows)


def test_entry_point_is_installed() -> None:
    (point,) = [point for point in metadata.entry_points(group="moectl.routers") if point.name == "hierarchical"]
    assert point.dist is not None
    assert point.dist.name == "moectl-hierarchical"
    assert point.load() is HierarchicalRouter


def test_holds_to_the_router_contract() -> None:
    check_router("hierarchical")


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("normalize", ["levels", "chosen", "none"])
@pytest.mark.parametrize(("groups", "per_group"), [(2, 2), (1, 1), (2, 1), (1, 3), (3, 4)])
def test_output_and_gradients_are_the_equations(backend: str, normalize: str, groups: int, per_group: int) -> None:
    made, x = layer(backend, top_k=groups * per_group, topk_group=groups, normalize=normalize), tokens()
    mine, theirs = made(x), by_the_equations(made, x, groups, per_group, normalize)
    torch.testing.assert_close(mine, theirs, **EXACT)

    upstream = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    inputs = (x, *made.parameters())
    got = torch.autograd.grad((mine * upstream).sum(), inputs)
    expected = torch.autograd.grad((theirs * upstream).sum(), inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)  # sums over 64 tokens more


@pytest.mark.parametrize("normalize", ["levels", "chosen", "none"])
def test_both_gates_learn(normalize: str) -> None:
    made = layer(normalize=normalize)
    assert made.router.training_problem() is None
    made(tokens()).square().sum().backward()
    assert made.router.group_weight.grad.any(1).all()
    assert made.router.weight.grad.any(1).all()


@pytest.mark.parametrize(
    ("options", "gate"),
    [
        ({"topk_group": 1, "top_k": 2, "normalize": "levels"}, "group_weight"),
        ({"topk_group": 1, "top_k": 2, "normalize": "chosen"}, "group_weight"),
        ({"topk_group": 2, "top_k": 2, "normalize": "levels"}, "weight"),
    ],
)
def test_a_gate_without_gradient_is_refused_for_training(options: dict[str, object], gate: str) -> None:
    """The refusal is true: that gate's gradient is zero but for rounding, and the other's is not."""
    made = layer(**options)
    assert "constant 1" in made.router.training_problem()
    made(tokens()).square().sum().backward()
    grads = {"group_weight": made.router.group_weight.grad, "weight": made.router.weight.grad}
    assert float(grads.pop(gate).abs().max()) < 1e-11
    assert float(grads.popitem()[1].abs().max()) > 1e-3


def test_a_zero_gate_at_either_level_is_refused_for_training() -> None:
    for name in ("group_weight", "weight"):
        router = layer().router
        torch.nn.init.zeros_(getattr(router, name))
        assert "all zeros" in router.training_problem()


def test_one_expert_per_group_trains_when_weights_are_normalised_over_all_chosen() -> None:
    assert layer(top_k=2, normalize="chosen").router.training_problem() is None
    assert layer(top_k=1, topk_group=1, normalize="none").router.training_problem() is None


def test_probabilities_are_the_product_of_both_softmaxes() -> None:
    made, x = layer(), tokens()
    out = made.router(x)
    product = (x @ made.router.group_weight.T).softmax(1)[..., None] * (x @ made.router.weight.T).view(T, 3, 4).softmax(
        2
    )
    torch.testing.assert_close(out.router_probs, product.flatten(1), **EXACT)
    torch.testing.assert_close(out.router_probs.sum(1), torch.ones(T, dtype=torch.float64), **EXACT)
    logits = (x @ made.router.group_weight.T).repeat_interleave(4, dim=1) + x @ made.router.weight.T
    torch.testing.assert_close(out.router_logits, logits, **EXACT)
    torch.testing.assert_close(out.topk_weights.sum(1), torch.ones(T, dtype=torch.float64), **EXACT)


def test_slots_come_best_first_and_from_the_chosen_groups_alone() -> None:
    """Even where every probability outside one group has underflowed to zero."""
    made = layer()
    with torch.no_grad():
        made.router.group_weight *= 1e4
    out = made.router(tokens())
    assert bool(((out.topk_indices // 4).sort(1).values.diff(dim=1) == 0).sum(1).eq(2).all()), "two groups, two each"
    assert bool((out.router_probs.gather(1, out.topk_indices).diff(dim=1) <= 0).all())
    assert bool(out.topk_weights.isfinite().all())


@pytest.mark.parametrize(("experts", "groups"), [(4, 2), (6, 3), (8, 4), (12, 4), (16, 4), (64, 8)])
def test_default_number_of_groups(experts: int, groups: int) -> None:
    assert build_router("hierarchical", hidden_size=D, num_experts=experts).group_weight.shape == (groups, D)


def test_training_fits_a_task() -> None:
    torch.manual_seed(0)
    made = MoELayer(build_router("hierarchical", hidden_size=D, num_experts=8), GatedExperts(8, D, 16))
    x = torch.randn(256, D)
    target = torch.sin(3 * x)
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    before = (made(x) - target).square().mean().item()
    for _ in range(100):
        optimizer.zero_grad()
        (made(x) - target).square().mean().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in made.parameters())
        optimizer.step()
    assert (made(x) - target).square().mean().item() < 0.5 * before


def test_later_tokens_change_nothing_before_them() -> None:
    made, x = layer(), tokens().detach()
    changed = x.clone()
    changed[40:] += 3.0
    torch.testing.assert_close(made(changed)[:40], made(x)[:40], **EXACT)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_group": 5}, "do not make 5 groups"),
        ({"n_group": 12}, "two or more experts each"),
        ({"topk_group": 4}, "there are 3 groups"),
        ({"top_k": 3}, "a multiple of 2"),
        ({"top_k": 10}, "at most 8"),
        ({"normalize": "level"}, "normalize"),
        ({"n_groups": 3}, "Did you mean 'n_group'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        layer(**options)
    assert says in f"{caught.value} {getattr(caught.value, 'hint', '')}"


def test_prime_numbers_of_experts_have_no_groups() -> None:
    with pytest.raises(ValueError, match="two or more experts each"):
        build_router("hierarchical", hidden_size=D, num_experts=7)


def test_a_schedule_keeps_to_whole_groups() -> None:
    router = layer().router
    router.set_top_k(8)
    assert router(tokens()).topk_indices.shape == (T, 8)
    with pytest.raises(ValueError, match="a multiple of 2"):
        router.set_top_k(5)

"""moectl-soft-moe from the outside: the layer against the paper's equations, the router for what it says it is."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch
from torch import Tensor

from moectl.moe import GatedExperts, MoELayer
from moectl.routers import build_router
from moectl.testing import check_router
from moectl_soft_moe import SoftMoELayer, SoftMoERouter

torch.set_num_threads(1)
B, S, D, E, F = 3, 10, 6, 4, 7
EXACT = {"rtol": 0, "atol": 1e-12}  # float64, sums of a few dozen terms of size one


def layer(**options: object) -> SoftMoELayer:
    torch.manual_seed(0)
    router = build_router("soft-moe", hidden_size=D, num_experts=E, **options)
    made = SoftMoELayer(router, GatedExperts(E, D, F)).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, mean=0.5, std=0.7)
    return made


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(B, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def expert(experts: GatedExperts, number: int, x: Tensor) -> Tensor:
    gate, up = experts.gate_up_proj[number].chunk(2)
    return experts.down_proj[number] @ (torch.nn.functional.silu(gate @ x) * (up @ x))


def phi(router: SoftMoERouter) -> list[list[Tensor]]:
    """Slot by slot: ``phi(router)[e][p]`` is the ``[D]`` vector of slot p of expert e."""
    extra = [] if router.extra_slots is None else router.extra_slots.unbind(1)
    return [[row[e] for row in (router.weight, *extra)] for e in range(E)]


def by_the_equations(made: SoftMoELayer, sequence: Tensor) -> Tensor:
    """The paper's equations, normalised or not, for one sequence ``[S, D]``, sums written out."""
    slots = phi(made.router)
    num_slots = len(slots[0])
    logits = {}
    for i, token in enumerate(sequence):
        for e in range(E):
            for p in range(num_slots):
                vector = slots[e][p]
                if made.router.scale is not None:
                    token_n = token / (token @ token + 1e-6).sqrt()
                    vector = made.router.scale * vector / (vector @ vector + 1e-6).sqrt()
                    logits[i, e, p] = token_n @ vector
                else:
                    logits[i, e, p] = token @ vector
    exp = {key: torch.exp(value) for key, value in logits.items()}
    every = range(len(sequence))
    rows: list[Tensor] = [torch.zeros(D, dtype=torch.float64) for _ in every]
    for e in range(E):
        for p in range(num_slots):
            total = sum(exp[i, e, p] for i in every)
            outputs = expert(made.experts, e, sum(exp[i, e, p] / total * sequence[i] for i in every))
            for i in every:
                over_slots = sum(exp[i, f, q] for f in range(E) for q in range(num_slots))
                rows[i] = rows[i] + exp[i, e, p] / over_slots * outputs
    return torch.stack(rows)


def test_entry_point_is_installed() -> None:
    (point,) = [point for point in metadata.entry_points(group="moectl.routers") if point.name == "soft-moe"]
    assert point.dist is not None
    assert point.dist.name == "moectl-soft-moe"
    assert point.load() is SoftMoERouter


def test_router_holds_to_the_router_contract() -> None:
    check_router("soft-moe")
    check_router("soft-moe", slots_per_expert=3, normalize=False)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("slots_per_expert", [1, 3])
def test_layer_computes_the_papers_equations(normalize: bool, slots_per_expert: int) -> None:
    made, x = layer(normalize=normalize, slots_per_expert=slots_per_expert), tokens()
    mine = made(x)
    theirs = torch.stack([by_the_equations(made, sequence) for sequence in x])
    torch.testing.assert_close(mine, theirs, **EXACT)

    upstream = torch.randn(B, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    inputs = (x, *made.parameters())
    got = torch.autograd.grad((mine * upstream).sum(), inputs)
    expected = torch.autograd.grad((theirs * upstream).sum(), inputs)
    assert len(inputs) == 4 + (slots_per_expert > 1) + normalize
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)  # sums over 30 tokens and 12 slots more
        assert other.any()


@pytest.mark.parametrize("normalize", [True, False])
def test_padding_enters_no_slot(normalize: bool) -> None:
    """A padded sequence comes out as it does without its padding, whatever that holds; padding alone as zeros."""
    made, x = layer(normalize=normalize, slots_per_expert=2), tokens().detach()
    mask = torch.arange(S) < torch.tensor([[S], [6], [0]])
    y = made(x.masked_fill(~mask[..., None], float("nan")), mask)
    torch.testing.assert_close(y[0], made(x)[0], **EXACT)
    torch.testing.assert_close(y[1, :6], made(x[1:2, :6])[0], **EXACT)
    assert not y[1, 6:].any()
    assert not y[2].any()


def test_gradients_stay_finite_under_padding() -> None:
    made = layer()
    mask = torch.arange(S) < torch.tensor([[S], [6], [0]])
    x = tokens().detach().masked_fill(~mask[..., None], float("nan")).requires_grad_()
    made(x, mask).square().sum().backward()
    for parameter in made.parameters():
        assert parameter.grad.isfinite().all()
    assert x.grad[mask].isfinite().all()
    assert not x.grad[~mask].any()


def test_sequences_of_a_batch_do_not_mix() -> None:
    made, x = layer(), tokens().detach()
    torch.testing.assert_close(made(x)[1:2], made(x[1:2]), **EXACT)


def test_layer_is_not_causal_and_says_so() -> None:
    made, x = layer(), tokens().detach()
    changed = x.clone()
    changed[:, -1] += 3.0
    assert float((made(changed) - made(x))[:, : S - 1].abs().max()) > 1e-3
    assert made.causal is False
    assert made.router.causal is False
    assert made.router.token_choice is False
    assert made.router.default_lb_coef == 0.0


def test_low_precision_mixes_in_float32() -> None:
    """bfloat16 weights and tokens: within bfloat16's rounding (2⁻⁸ relative) of float32; under autocast likewise."""
    made, x = layer(slots_per_expert=2).to(torch.bfloat16), tokens().detach().to(torch.bfloat16)
    low, exact = made(x), layer(slots_per_expert=2).float()
    exact.load_state_dict({name: value.float() for name, value in made.state_dict().items()})
    expected = exact(x.float())
    assert low.dtype == torch.bfloat16
    size = float(expected.abs().max())
    assert float((low.float() - expected).abs().max()) < 2**-6 * size
    assert torch.equal(exact(x), expected.to(torch.bfloat16)), "tokens alone in bfloat16 are rounded at the end only"
    with torch.autocast("cpu", torch.bfloat16):
        cast = exact(x.float())
    assert float((cast.float() - expected).abs().max()) < 2**-6 * size


def test_layer_trains() -> None:
    torch.manual_seed(0)
    made = SoftMoELayer(build_router("soft-moe", hidden_size=D, num_experts=E), GatedExperts(E, D, 16))
    x = torch.randn(8, S, D)
    target = x.mean(dim=1, keepdim=True) * torch.sin(x)  # needs the other tokens
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    before = (made(x) - target).square().mean().item()
    for _ in range(200):
        optimizer.zero_grad()
        (made(x) - target).square().mean().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in made.parameters())
        optimizer.step()
    assert (made(x) - target).square().mean().item() < 0.7 * before


@pytest.mark.parametrize("slots_per_expert", [1, 3])
def test_in_the_usual_layer_it_is_a_dense_mixture_on_the_token_itself(slots_per_expert: int) -> None:
    """What its docstring admits: combine weights summed over an expert's slots, on ``f_e(x_t)``, no slot anywhere."""
    soft, x = layer(slots_per_expert=slots_per_expert), tokens()
    made = MoELayer(soft.router, soft.experts)
    flat = x.reshape(-1, D)
    combine = soft.router.slot_logits(flat).flatten(1).softmax(1).view(-1, E, slots_per_expert).sum(2)
    theirs = torch.stack(
        [sum(combine[t, e] * expert(soft.experts, e, token) for e in range(E)) for t, token in enumerate(flat)]
    ).view_as(x)
    mine = made(x)
    torch.testing.assert_close(mine, theirs, **EXACT)
    assert float((mine - soft(x)).abs().max()) > 1e-3, "and it is not Soft MoE"
    mine.square().sum().backward()
    for parameter in made.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


def test_training_the_dense_mixture_under_this_name_is_refused() -> None:
    assert "SoftMoELayer" in layer().router.training_problem()


def test_router_and_experts_must_agree() -> None:
    router = build_router("soft-moe", hidden_size=D, num_experts=E)
    with pytest.raises(ValueError, match=r"\(4, 6\).*\(5, 6\)"):
        SoftMoELayer(router, GatedExperts(E + 1, D, F))
    with pytest.raises(ValueError, match=r"must be \[B, S, D\]"):
        layer()(tokens()[0])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"slots_per_expert": 0}, "slots_per_expert"),
        ({"slots": 2}, "unknown option 'slots'"),
        ({"top_k": 2}, "does not let top_k be chosen"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        build_router("soft-moe", hidden_size=D, num_experts=E, **options)
    assert says in f"{caught.value} {getattr(caught.value, 'hint', '')}"

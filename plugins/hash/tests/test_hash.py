"""moectl-hash from the outside: installed, built by name, both keys compared token by token with their rules."""

from __future__ import annotations

import copy
from importlib import metadata

import pytest
import torch
from torch import Tensor, nn

from moectl.moe import GatedExperts, MoELayer
from moectl.routers import build_router
from moectl.testing import check_router
from moectl_hash import HashRouter, follow_token_ids, hash_ids

torch.set_num_threads(1)
D, E, F, T, V = 6, 4, 7, 64, 1000
EXACT = {"rtol": 0, "atol": 1e-12}  # float64, sums of a few dozen terms of size one
PRIME = 2**31 - 1


def layer(backend: str = "grouped", **options: object) -> MoELayer:
    torch.manual_seed(0)
    router = build_router("hash", hidden_size=D, num_experts=E, **options)
    made = MoELayer(router, GatedExperts(E, D, F, backend=backend)).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return made


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def ids(seed: int = 3) -> Tensor:
    return torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(seed))


def expert(experts: GatedExperts, number: int, x: Tensor) -> Tensor:
    gate, up = experts.gate_up_proj[number].chunk(2)
    return experts.down_proj[number] @ (torch.nn.functional.silu(gate @ x) * (up @ x))


class Tiny(nn.Module):
    """Embedding, two layers with hash routers, as a model has them."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D).double()
        self.layers = nn.ModuleList(layer(**options) for _ in range(2))

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        for moe in self.layers:
            x = x + moe(x)
        return x


def test_entry_point_is_installed() -> None:
    (point,) = [point for point in metadata.entry_points(group="moectl.routers") if point.name == "hash"]
    assert point.dist is not None
    assert point.dist.name == "moectl-hash"
    assert point.load() is HashRouter


def test_holds_to_the_router_contract() -> None:
    check_router("hash")


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("key", ["hidden", "token"])
def test_output_and_gradients_are_those_of_the_hashed_expert_alone(backend: str, key: str) -> None:
    made, x, token_ids = layer(backend, key=key), tokens(), ids()
    made.router.token_ids = token_ids
    bias = made.router.expert_bias.copy_(torch.tensor([0.5, -0.25, 0.0, 1.0]))
    numbers = (
        [max(range(E), key=lambda e: float(made.router.weight[e] @ token + bias[e])) for token in x.detach()]
        if key == "hidden"
        else hash_ids(token_ids, E).tolist()
    )
    assert set(numbers) == set(range(E))
    mine = made(x)
    theirs = torch.stack([expert(made.experts, number, token) for number, token in zip(numbers, x, strict=True)])
    torch.testing.assert_close(mine, theirs, **EXACT)

    upstream = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    inputs = (x, *made.experts.parameters())
    got = torch.autograd.grad((mine * upstream).sum(), inputs)
    expected = torch.autograd.grad((theirs * upstream).sum(), inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)  # sums over 64 tokens more
        assert other.any()


@pytest.mark.parametrize("seed", [0, 7])
def test_hash_of_ids_is_the_universal_hash(seed: int) -> None:
    """In Python's own integers, which cannot overflow; at the largest ids too."""
    import random

    draw = random.Random(seed)
    a, b = draw.randrange(1, PRIME), draw.randrange(PRIME)
    some = [0, 1, 2, 49_999, 250_000, PRIME - 1]
    assert hash_ids(torch.tensor(some), 8, seed).tolist() == [(a * number + b) % PRIME % 8 for number in some]


def test_ids_spread_evenly_and_seeds_differ() -> None:
    """A universal hash of 50,000 ids into 8: each bucket within 5 standard deviations of 6,250."""
    counts = torch.bincount(hash_ids(torch.arange(50_000), 8, 0), minlength=8)
    assert float((counts - 6250).abs().max()) < 5 * (50_000 * (1 / 8) * (7 / 8)) ** 0.5
    agree = (hash_ids(torch.arange(50_000), 8, 0) == hash_ids(torch.arange(50_000), 8, 1)).float().mean()
    assert 0.05 < float(agree) < 0.25, "two independent hashes agree on one id in eight"


def test_it_learns_nothing_and_lets_no_loss_through() -> None:
    made, x = layer(), tokens()
    router = made.router
    assert router.learns is False
    assert router.default_lb_coef == 0.0
    assert [name for name, parameter in router.named_parameters() if parameter.requires_grad] == []
    out = router(x)
    for name in ("topk_weights", "router_logits", "router_probs", "router_probs_clean", "entropy"):
        assert not getattr(out, name).requires_grad, name
    assert torch.equal(out.topk_weights, torch.ones(T, 1, dtype=torch.float64))
    assert torch.equal(out.router_probs.argmax(1), out.topk_indices[:, 0])
    assert not out.entropy.any()


def test_the_bias_moves_against_the_load_by_its_rate_alone() -> None:
    router = layer(balance_rate=0.25).router
    router.after_step(torch.tensor([10, 30, 20, 20]))
    assert router.expert_bias.tolist() == [0.25, -0.25, 0.0, 0.0]
    router.eval()(tokens())
    router.train()(tokens())
    assert router.expert_bias.tolist() == [0.25, -0.25, 0.0, 0.0]
    token = layer(key="token").router
    token.after_step(torch.tensor([10, 30, 20, 20]))
    assert not token.expert_bias.any()


def with_common_direction(seed: int) -> Tensor:
    """Hidden states as trained models have them: one direction in common, three times as large as what differs."""
    common = 3 * torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    return common + tokens(seed).detach()


def test_the_bias_takes_a_common_direction_out() -> None:
    """Largest share of four experts: nearly all without, below 0.4 after 300 steps; in eval, on new tokens."""
    shares = {}
    for rate in (0.0, 0.05):
        router = layer(balance_rate=rate).router
        for step in range(300):
            router.after_step(torch.bincount(router(with_common_direction(step)).topk_indices.flatten(), minlength=E))
        fresh = torch.cat([with_common_direction(1000 + seed) for seed in range(20)])
        shares[rate] = float(torch.bincount(router.eval()(fresh).topk_indices.flatten(), minlength=E).max()) / len(
            fresh
        )
    assert shares[0.0] > 0.9
    assert shares[0.05] < 0.4


def test_calibration_does_the_same_at_once_and_ignores_padding() -> None:
    router, x = layer().router, torch.cat([with_common_direction(seed) for seed in range(20)])
    mask = torch.arange(len(x)) < 1000
    router.calibrate(x.masked_fill(~mask[:, None], float("nan")), mask)
    centred = (x[:1000] @ router.weight.T).mean(0)
    torch.testing.assert_close(router.expert_bias.double(), -centred, rtol=0, atol=1e-5)  # float32 means of size 10
    assert float(torch.bincount(router(x).topk_indices.flatten(), minlength=E).max()) < 0.5 * len(x)


def test_may_be_trained_although_its_weight_is_constant() -> None:
    assert layer().router.training_problem() is None
    assert build_router("hash", hidden_size=D, num_experts=1).training_problem() is None
    router = layer().router
    torch.nn.init.zeros_(router.weight)
    assert "all zeros" in router.training_problem()


def test_the_experts_train_and_the_projection_stays() -> None:
    torch.manual_seed(0)
    made = MoELayer(build_router("hash", hidden_size=D, num_experts=E), GatedExperts(E, D, 16))
    frozen = made.router.weight.detach().clone()
    x = torch.randn(256, D)
    target = torch.sin(3 * x)
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    before = (made(x) - target).square().mean().item()
    for _ in range(100):
        optimizer.zero_grad()
        (made(x) - target).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in made.experts.parameters())
        optimizer.step()
    assert (made(x) - target).square().mean().item() < 0.6 * before
    assert torch.equal(made.router.weight, frozen)


def test_the_same_hidden_state_always_meets_the_same_expert() -> None:
    """Locality: a hidden state and one very near it share their expert."""
    made, x = layer(), tokens().detach()
    chosen = made.router(x).topk_indices
    assert torch.equal(made.router(torch.cat([x, x]))[0][:T], chosen)
    assert torch.equal(made.router(x + 1e-9).topk_indices, chosen)


def test_a_token_keeps_its_expert_in_every_context_and_layer_with_the_key_token() -> None:
    model = Tiny(key="token")
    follow_token_ids(model, model.embed)
    token_ids = ids().view(4, 16)
    model(token_ids)
    for moe in model.layers:
        assert torch.equal(moe.routing.topk_indices[:, 0], hash_ids(token_ids, E).view(-1))
    model(token_ids.flip(1)[:, :5])
    for moe in model.layers:
        assert torch.equal(moe.routing.topk_indices[:, 0], hash_ids(token_ids.flip(1)[:, :5], E).reshape(-1))


def test_followed_ids_reach_copies_and_no_longer_after_removal() -> None:
    model = Tiny(key="token")
    handle = follow_token_ids(model, model.embed)
    model(ids(3))
    twin = copy.deepcopy(model)
    assert twin.layers[0].router.token_ids is None
    twin(ids(4))
    assert torch.equal(twin.layers[0].router.token_ids, ids(4))
    assert torch.equal(model.layers[0].router.token_ids, ids(3))
    handle.remove()
    model(ids(5))
    assert torch.equal(model.layers[0].router.token_ids, ids(3))


def test_without_ids_the_key_token_says_what_is_missing() -> None:
    router = layer(key="token").router
    assert "follow_token_ids" in router.training_problem()
    with pytest.raises(ValueError, match="no token ids were handed over"):
        router(tokens())
    router.token_ids = ids()[:5]
    with pytest.raises(ValueError, match="5 token ids were handed over, but 64 tokens"):
        router(tokens())
    model = Tiny(key="token")
    follow_token_ids(model, model.embed)
    assert model.layers[0].router.training_problem() is None


def test_padding_is_routed_nowhere() -> None:
    made, x = layer(), tokens().detach()
    mask = torch.arange(T) < 50
    assert not made(x, mask)[50:].any()
    torch.testing.assert_close(made(x, mask)[:50], made(x)[:50], **EXACT)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"key": "position"}, "key"),
        ({"seed": -1}, "seed"),
        ({"sead": 1}, "Did you mean 'seed'"),
        ({"top_k": 2}, "does not let top_k be chosen"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        build_router("hash", hidden_size=D, num_experts=E, **options)
    assert says in f"{caught.value} {getattr(caught.value, 'hint', '')}"

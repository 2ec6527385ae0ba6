"""What routers share whose tokens choose: the clamp, and what chance does in training and never in eval."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from moectl.moe import Router
from moectl.moe.token_choice import FEW_EXPERTS, TokenChoiceOptions, softmax_of_few
from moectl.routers import build_router

D, E, T = 8, 6, 400
NOISY = ["top1", "switch", "top2", "topk"]
ALL = [*NOISY, "noisy-topk", "sigmoid"]


def router(name: str, gate_std: float = 1.0, **options: float) -> Router:
    torch.manual_seed(0)
    made = build_router(name, hidden_size=D, num_experts=E, **options)
    torch.nn.init.normal_(made.weight, std=gate_std)
    return made


def tokens(number: int = T) -> Tensor:
    return torch.randn(number, D, generator=torch.Generator().manual_seed(1))


# --- the clamp


@pytest.mark.parametrize("name", ALL)
def test_clamp_bounds_what_chooses_and_weighs_but_not_what_the_z_loss_sees(name: str) -> None:
    """Clamping the gate's own logits by hand, in a router whose gate is the identity, gives the same."""
    bound = 0.7
    clamped = build_router(name, hidden_size=E, num_experts=E, logit_clamp=bound).eval()
    plain = build_router(name, hidden_size=E, num_experts=E).eval()
    with torch.no_grad():
        clamped.weight.copy_(torch.eye(E))
        plain.weight.copy_(torch.eye(E))
    logits = torch.randn(50, E, generator=torch.Generator().manual_seed(2))
    out, by_hand = clamped(logits), plain(logits.clamp(-bound, bound))
    assert torch.equal(out.router_logits, logits)
    for field in ("topk_indices", "topk_weights", "router_probs", "router_probs_clean", "entropy"):
        assert torch.equal(getattr(out, field), getattr(by_hand, field)), field
    assert not torch.equal(out.topk_indices, plain(logits).topk_indices), "the clamp changed no choice"


def test_beyond_the_clamp_only_the_z_loss_pulls() -> None:
    made = router("topk", gate_std=10.0, logit_clamp=1.0, noise_std=0.0, top_k=E)
    x = tokens(20).requires_grad_()
    out = made(x)
    assert (out.router_logits.abs() > 1.0).all(1).any()
    beyond = (out.router_logits.abs() > 1.0).all(1)
    (grad,) = torch.autograd.grad(out.topk_weights.square().sum(), x, retain_graph=True)
    assert not grad[beyond].any()
    (grad,) = torch.autograd.grad(out.router_logits.logsumexp(1).square().sum(), x)
    assert grad[beyond].any(1).all()


# --- expert dropout


@pytest.mark.parametrize("name", ALL)
def test_a_dropped_expert_takes_nobody_in_that_call(name: str) -> None:
    """Half of six experts: some calls close two, some five; whoever is open is used as if the rest were not there."""
    made, x = router(name, expert_dropout=0.5), tokens()
    open_experts = [set(made(x).topk_indices.flatten().tolist()) for _ in range(60)]
    sizes = {len(experts) for experts in open_experts}
    assert min(sizes) >= made.top_k
    assert len(sizes) > 2
    assert set.union(*open_experts) == set(range(E))
    assert {len(set(made.eval()(x).topk_indices.flatten().tolist())) for _ in range(3)} == {E}, "never in eval"


def test_expert_dropout_closes_with_its_probability_and_leaves_k() -> None:
    """3,000 calls: a binomial share within 5 standard errors (0.0087) of 0.35."""
    made = router("topk", expert_dropout=0.35, noise_std=0.0, top_k=1)
    torch.manual_seed(3)
    closed = torch.stack([made.explore(torch.zeros(1, E))[0] == -math.inf for _ in range(3000)])
    share = closed.double().mean(0)
    # At least one stays: all six would close in 0.35^6 = 0.2 % of the calls.
    assert ((share - 0.35).abs() < 0.045).all()
    assert closed.sum(1).max() == E - 1
    assert ((closed.double().T.corrcoef() - torch.eye(E)).abs() < 0.1).all(), "experts close independently"


@pytest.mark.parametrize("k", [1, 3, E])
def test_at_least_k_experts_stay_open(k: int) -> None:
    made = router("topk", expert_dropout=0.99, top_k=k)
    for _ in range(50):
        open_E = made.explore(torch.zeros(2, E)) > -math.inf
        assert int(open_E[0].sum()) >= k
        assert torch.equal(open_E[0], open_E[1]), "for the whole call, not per token"
        assert all(len(set(row)) == k for row in made(tokens(5)).topk_indices.tolist())


def test_the_best_of_the_open_experts_is_chosen_and_weighs_what_it_did() -> None:
    made, x = router("switch", expert_dropout=0.5, noise_std=0.0), tokens()
    out = made(x)
    open_experts = sorted(set(out.topk_indices.flatten().tolist()))
    assert 0 < len(open_experts) < E
    best = out.router_logits[:, open_experts].argmax(1)
    assert torch.equal(out.topk_indices[:, 0], torch.tensor(open_experts)[best])
    assert torch.equal(out.topk_weights, softmax_of_few(out.router_logits).gather(1, out.topk_indices))


# --- random routing


@pytest.mark.parametrize("name", ALL)
def test_random_routing_sends_its_share_of_tokens_anywhere(name: str) -> None:
    """Of 4,000 tokens that would all choose the same experts, 30 % go to uniformly random distinct ones."""
    made = build_router(name, hidden_size=E, num_experts=E, random_routing=0.3)
    with torch.no_grad():
        made.weight.copy_(torch.eye(E) * 30)  # far above any noise
    if name in NOISY:
        made.set_noise_std(0.0)
    number, k = 4000, made.top_k
    x = torch.tensor([1.0, 0.9, -0.5, -0.6, -0.7, -0.8]).expand(number, E)
    torch.manual_seed(4)
    indices = made(x).topk_indices
    assert all(len(set(row)) == k for row in indices.tolist())
    assert ((indices >= 0) & (indices < E)).all()
    counts = torch.bincount(indices.flatten(), minlength=E).double() / number
    expected = torch.full((E,), 0.3 * k / E, dtype=torch.float64)
    expected[:k] += 0.7
    # The standard error of such a share is 0.008 at most: five of them.
    assert (counts - expected).abs().max() < 0.04
    assert torch.equal(made.eval()(x).topk_indices, torch.arange(k).expand(number, k)), "never in eval"


def test_random_routing_of_everything_still_weighs_by_the_gate() -> None:
    made, x = router("topk", random_routing=1.0, noise_std=0.0, top_k=2), tokens()
    out = made(x)
    chosen = out.router_logits.gather(1, out.topk_indices)
    torch.testing.assert_close(out.topk_weights, chosen.softmax(1))
    assert not torch.equal(out.topk_indices, made(x).topk_indices)


def test_random_experts_are_open_ones() -> None:
    made = router("topk", random_routing=0.5, expert_dropout=0.5, top_k=1)
    seen = [set(made(tokens()).topk_indices.flatten().tolist()) for _ in range(20)]
    assert any(len(experts) < E for experts in seen)


@pytest.mark.parametrize(
    "wrong",
    [{"expert_dropout": 1.0}, {"expert_dropout": -0.1}, {"random_routing": 1.1}, {"random_routing": -0.1},
     {"logit_clamp": 0.0}, {"logit_clamp": -1.0}, {"logit_clamp": math.inf}, {"expert_drop": 0.1}],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TokenChoiceOptions.model_validate(wrong)


# --- annealed noise in a router


@pytest.mark.parametrize("name", NOISY)
def test_noise_moves_with_optimizer_steps_only(name: str) -> None:
    made = router(name)
    made.set_schedule(40)
    assert {"noise.step", "noise.anneal_steps"} <= made.state_dict().keys()
    for _ in range(4):  # four micro-batches, one step
        made(tokens(3))
    assert made.state_dict()["noise.step"] == 0
    made.after_step(torch.ones(E))
    assert made.state_dict()["noise.step"] == 1
    made.to(torch.bfloat16)
    assert made.state_dict()["noise.step"].dtype == torch.int64, "a counter in bfloat16 would stall at 256"


@pytest.mark.parametrize("name", [*NOISY, "noisy-topk"])
def test_noise_is_in_the_choice_and_the_probs_but_never_in_logits_clean_probs_or_entropy(name: str) -> None:
    options = {} if name == "noisy-topk" else {"noise_std": 5.0}
    made, x = router(name, **options), tokens(50)
    still = made.eval()(x)
    out = made.train()(x)
    assert torch.equal(out.router_logits, still.router_logits)
    assert torch.equal(out.router_probs_clean, still.router_probs_clean)
    assert torch.equal(out.entropy, still.entropy)
    torch.testing.assert_close(still.router_probs_clean, still.router_logits.softmax(-1))
    assert not torch.equal(out.router_probs, out.router_probs_clean)
    assert not torch.equal(out.topk_indices, still.topk_indices)
    # The choice is of the noisy scores: the chosen are the most probable after noise, best first.
    best_first = out.router_probs.sort(1, descending=True).values[:, : made.top_k]
    torch.testing.assert_close(out.router_probs.gather(1, out.topk_indices), best_first)


@pytest.mark.parametrize("name", NOISY)
def test_a_schedules_noise_reaches_the_router(name: str) -> None:
    made, x = router(name, noise_std=0.0), tokens(50)
    still = made(x)
    made.set_noise_std(5.0)
    assert not torch.equal(made(x).topk_indices, still.topk_indices)
    made.set_noise_std(0.0)
    assert torch.equal(made(x).router_probs, still.router_probs)


def test_another_noise_does_not_recompile() -> None:
    made = router("topk")
    torch._dynamo.reset()
    frames = CompileCounter()
    compiled = torch.compile(made, fullgraph=True, backend=frames)
    for std in (0.4, 0.3, 0.2, 0.1, 0.0):
        made.set_noise_std(std)
        compiled(tokens(12))
    assert frames.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("experts", [1, 8, FEW_EXPERTS, FEW_EXPERTS + 1])
def test_the_softmax_by_columns_is_the_softmax(experts: int, dtype: torch.dtype) -> None:
    """Sums in another order: two units in the last place, forward and backward; rows of -inf and of size stay exact."""
    logits = (10 * torch.randn(33, experts, dtype=dtype)).requires_grad_()
    with torch.no_grad():
        logits[0, 0] += 1000
        logits[1, 1:] = -torch.inf
    given, eps = torch.randn(33, experts, dtype=dtype), torch.finfo(dtype).eps
    ours, theirs = softmax_of_few(logits), torch.softmax(logits, dim=-1)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, theirs, rtol=4 * eps, atol=eps)
    grads = [torch.autograd.grad(probs, logits, given)[0] for probs in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e2 * eps, atol=4 * eps)

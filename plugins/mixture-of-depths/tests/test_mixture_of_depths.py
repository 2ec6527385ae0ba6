"""moectl-mixture-of-depths from the outside: installed, built by name, compared token by token with its equations."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch
from torch import Tensor

from moectl.moe import GatedExperts, MoELayer
from moectl.routers import build_router
from moectl.testing import check_router
from moectl_mixture_of_depths import MixtureOfDepthsRouter

torch.set_num_threads(1)
D, E, F, T = 6, 4, 7, 64
NAME = "mixture-of-depths"
EXACT = {"rtol": 0, "atol": 1e-12}  # float64, sums of a few dozen terms of size one


def layer(backend: str = "grouped", **options: object) -> MoELayer:
    torch.manual_seed(0)
    router = build_router(NAME, hidden_size=D, num_experts=E, **options)
    made = MoELayer(router, GatedExperts(E, D, F, backend=backend)).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return made


def tokens(seed: int = 1, number: int = T) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, D, dtype=torch.float64, generator=generator, requires_grad=True)


def expert(experts: GatedExperts, number: int, x: Tensor) -> Tensor:
    gate, up = experts.gate_up_proj[number].chunk(2)
    return experts.down_proj[number] @ (torch.nn.functional.silu(gate @ x) * (up @ x))


def by_the_equations(made: MoELayer, x: Tensor, top_k: int) -> Tensor:
    """One token after the other: skipped, or its best experts weighted by probability and by the depth gate."""
    rows = []
    for token in x:
        score = made.router.depth_weight @ token
        if float(score) <= float(made.router.threshold):
            rows.append(0 * token)
            continue
        logits = made.router.weight @ token
        probs = torch.exp(logits) / torch.exp(logits).sum()
        chosen = sorted(range(E), key=lambda e: -float(probs[e]))[:top_k]
        rows.append(sum(probs[e] * expert(made.experts, e, token) for e in chosen) / (1 + torch.exp(-score)))
    return torch.stack(rows)


def test_entry_point_is_installed() -> None:
    (point,) = [point for point in metadata.entry_points(group="moectl.routers") if point.name == NAME]
    assert point.dist is not None
    assert point.dist.name == "moectl-mixture-of-depths"
    assert point.load() is MixtureOfDepthsRouter


def test_holds_to_the_router_contract() -> None:
    check_router(NAME)


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize(("top_k", "threshold"), [(1, 0.0), (2, 0.5), (4, -1.0), (1, 1e6)])
def test_output_and_gradients_are_the_equations(backend: str, top_k: int, threshold: float) -> None:
    made, x = layer(backend, top_k=top_k), tokens()
    made.router.threshold.fill_(threshold)
    mine, theirs = made(x), by_the_equations(made, x, top_k)
    torch.testing.assert_close(mine, theirs, **EXACT)
    skipped = ~made.routing.keep[:, 0]
    assert bool(skipped.all()) if threshold == 1e6 else 0.1 < float(skipped.double().mean()) < 0.9
    assert torch.equal(mine[skipped], torch.zeros_like(mine[skipped]))

    upstream = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    inputs = (x, *made.parameters())
    got = torch.autograd.grad((mine * upstream).sum(), inputs)
    expected = torch.autograd.grad((theirs * upstream).sum(), inputs, allow_unused=True)
    for one, other, whose in zip(got, expected, inputs, strict=True):
        other = torch.zeros_like(whose) if other is None else other  # the loop never met an expert
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)  # sums over 64 tokens more
        assert bool(other.any()) is (threshold != 1e6)


@pytest.mark.parametrize("share", [0.125, 0.5, 0.75])
def test_with_the_threshold_at_the_percentile_it_is_the_papers_choice(share: float) -> None:
    """Equation 1 processes the ``C = share · S`` tokens of the largest score; so does this, calibrated on them."""
    made, x = layer(token_share=share), tokens()
    made.router.calibrate(x)
    scores = x @ made.router.depth_weight
    expected = torch.zeros(T, dtype=torch.bool)
    expected[sorted(range(T), key=lambda t: -float(scores[t]))[: int(share * T)]] = True
    assert torch.equal(made.router(x).keep[:, 0], expected)


def test_calibration_ignores_padding() -> None:
    made, x = layer(), tokens().detach()
    mask = torch.arange(T) < 20
    garbage = x.masked_fill(~mask[:, None], float("nan"))
    made.router.calibrate(garbage, mask)
    assert int(made.router(garbage, mask).keep.sum()) == 10
    before = made.router.threshold.clone()
    made.router.calibrate(garbage, torch.zeros(T, dtype=torch.bool))
    assert torch.equal(made.router.threshold, before)


@pytest.mark.parametrize(("share", "top_k"), [(0.125, 1), (0.5, 2), (0.9, 1)])
def test_the_threshold_finds_the_wanted_share(share: float, top_k: int) -> None:
    """From all tokens of some 1.7 standard deviations of score, within 3 % of the tokens after 300 steps."""
    router = layer(token_share=share, top_k=top_k).router
    for step in range(300):
        out = router(tokens(seed=step, number=512))
        load = torch.bincount(out.topk_indices[out.keep], minlength=E)
        router.step_tokens = 512
        router.after_step(load)
    kept = router.eval()(tokens(seed=999, number=20_000)).keep[:, 0]
    assert abs(float(kept.double().mean()) - share) < 0.03
    assert router.threshold.dtype == torch.float32


def test_one_step_moves_the_threshold_by_rate_times_excess() -> None:
    router = layer(token_share=0.25, top_k=2, calibration_rate=0.5).router
    router.step_tokens = 100
    router.after_step(torch.tensor([40, 60, 30, 20]))  # 150 assignments by 2: 75 of 100 tokens
    assert float(router.threshold) == pytest.approx(0.5 * (0.75 - 0.25), abs=1e-7)
    router.step_tokens = 0  # nothing real in the step: nothing to learn from
    router.after_step(torch.zeros(E, dtype=torch.int64))
    assert float(router.threshold) == pytest.approx(0.25, abs=1e-7)


@pytest.mark.parametrize("hidden_size", [64, 1024])
def test_half_the_tokens_pass_at_first_with_scores_of_unit_size(hidden_size: int) -> None:
    """For normed input of any width, so that one calibration rate does for all."""
    torch.manual_seed(0)
    router = build_router(NAME, hidden_size=hidden_size, num_experts=E)
    x = torch.randn(4000, hidden_size)
    assert 0.75 < (x @ router.depth_weight).std().item() < 1.25  # of a draw of 64: ± 9 % (one standard deviation)
    assert abs(router(x).keep.float().mean().item() - 0.5) < 0.05


def test_forward_leaves_the_threshold_alone() -> None:
    made = layer()
    before = made.router.threshold.clone()
    made.train()(tokens())
    made.eval()(tokens())
    assert torch.equal(made.router.threshold, before)


def test_the_threshold_survives_casts_and_files() -> None:
    router = layer().router
    router.threshold.fill_(0.1234567)
    router.to(torch.bfloat16)
    assert router.threshold.dtype == torch.float32
    fresh = layer().router
    fresh.load_state_dict(router.state_dict())
    assert float(fresh.threshold) == pytest.approx(0.1234567, abs=1e-7)


def test_both_gates_learn_whom_to_process_and_where() -> None:
    """Frozen experts; one half of the tokens needs expert 2, the other half nothing at all."""
    torch.manual_seed(0)
    made = MoELayer(build_router(NAME, hidden_size=D, num_experts=E), GatedExperts(E, D, 16))
    made.experts.reset_parameters(std=0.5)
    x = torch.randn(256, D)
    needy = x[:, 0] > 0
    target = torch.where(needy[:, None], made.experts.one(2, x), torch.zeros(())).detach()
    optimizer = torch.optim.Adam(made.router.parameters(), lr=3e-2)
    before = (made(x) - target).square().mean().item()
    for _ in range(200):
        optimizer.zero_grad()
        (made(x) - target).square().mean().backward()
        for parameter in made.router.parameters():
            assert parameter.grad.isfinite().all()
            assert parameter.grad.any()
        optimizer.step()
        made.router.step_tokens = len(x)
        routing = made.routing
        made.router.after_step(torch.bincount(routing.topk_indices[routing.keep], minlength=E))
    out = made.router(x)
    kept = out.keep[:, 0].float()
    assert (made(x) - target).square().mean().item() < 0.3 * before
    assert kept[needy].mean().item() > 0.75
    assert kept[~needy].mean().item() < 0.25
    assert (out.topk_indices[needy] == 2).float().mean().item() > 0.8  # chance: a quarter


def test_a_zero_depth_gate_is_refused_for_training() -> None:
    router = layer().router
    assert router.training_problem() is None
    torch.nn.init.zeros_(router.depth_weight)
    assert "depth gate" in router.training_problem()


def test_later_tokens_change_nothing_before_them() -> None:
    """What the paper's choice over the sequence cannot do."""
    made, x = layer(), tokens().detach()
    changed = x.clone()
    changed[40:] += 3.0
    torch.testing.assert_close(made(changed)[:40], made(x)[:40], **EXACT)


def test_skipped_and_padded_tokens_count_nowhere() -> None:
    made, x = layer(), tokens().detach()
    mask = torch.arange(T) < 50
    y, out = made(x, mask), made.routing
    assert not y[50:].any()
    assert not out.keep[50:].any()
    torch.testing.assert_close(y[:50], made(x)[:50], **EXACT)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"token_share": 0.0}, "token_share"),
        ({"token_share": 1.5}, "token_share"),
        ({"calibration_rate": float("inf")}, "calibration_rate"),
        ({"top_k": 5}, "4 experts"),
        ({"token_shar": 0.5}, "Did you mean 'token_share'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        build_router(NAME, hidden_size=D, num_experts=E, **options)
    assert says in f"{caught.value} {getattr(caught.value, 'hint', '')}"

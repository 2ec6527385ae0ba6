"""The router contract: what holds for every router, the noise, and the tie-breaking top-k.

A small router written here, not one of the built-ins, so that the contract is seen from a plug-in's side.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moectl.moe import Router, RouterConfig, RouterOutput
from moectl.moe.router import AnnealedNoise, NoiseOptions, at_least_float32, entropy, flatten_mask, stable_topk
from moectl.routers import build_router

D, E, K = 8, 5, 2


class SecondSlotOnlyWhenSure(Router):
    """Top-2, the second slot used only where its logit is positive: a router with a keep-mask of its own."""

    class Config(RouterConfig):
        top_k: int = 2

    seen: tuple[torch.dtype, tuple[int, ...], bool]

    def route(self, x_TD: Tensor, mask_T: Tensor | None) -> RouterOutput:
        self.seen = (x_TD.dtype, tuple(x_TD.shape), torch.is_autocast_enabled(x_TD.device.type))
        logits = self.logits(x_TD)
        probs = logits.softmax(-1)
        indices = stable_topk(logits, self.top_k)
        keep = torch.ones_like(indices, dtype=torch.bool)
        keep[:, 1] = logits.gather(1, indices)[:, 1] > 0
        weights = probs.gather(1, indices) * keep
        return RouterOutput(indices, weights, logits, probs, probs, entropy(probs), keep)


def plugin(top_k: int = K) -> SecondSlotOnlyWhenSure:
    torch.manual_seed(0)
    return SecondSlotOnlyWhenSure(SecondSlotOnlyWhenSure.Config(top_k=top_k), hidden_size=D, num_experts=E)


BUILT_IN = {
    "top1": {},
    "switch": {},
    "top2": {},
    "topk": {"top_k": 3},
    "topk-raw": {"top_k": 3, "norm_topk_prob": False},
    "topk-all": {"top_k": E},
}


def built_in(key: str, **options: object) -> Router:
    torch.manual_seed(0)
    return build_router(key.split("-")[0], hidden_size=D, num_experts=E, **{**BUILT_IN[key], **options})


# --- what forward takes, and refuses


@pytest.mark.parametrize("shape", [(D,), (2, 3, 4, D), (3, D + 1), (0, D - 1)])
def test_other_shapes_are_refused_by_name(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
        plugin()(torch.zeros(shape))


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(4),
        torch.ones(4, dtype=torch.int64),
        torch.ones(3, dtype=torch.bool),
        torch.ones(2, 2, dtype=torch.bool),
    ],
    ids=["float", "int", "short", "wrong-rank"],
)
def test_other_masks_are_refused(mask: Tensor) -> None:
    with pytest.raises(ValueError, match="token_mask must be bool of shape"):
        plugin()(torch.zeros(4, D), mask)


@pytest.mark.parametrize("key", BUILT_IN)
def test_batch_and_sequence_are_flattened(key: str) -> None:
    router, x = built_in(key).eval(), torch.randn(2, 3, D)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    for batched, flat in zip(router(x, mask), router(x.reshape(6, D), mask.reshape(6)), strict=True):
        assert torch.equal(batched, flat)


@pytest.mark.parametrize("key", BUILT_IN)
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_shapes_and_dtypes_of_the_output(key: str, num_tokens: int) -> None:
    router = built_in(key)
    out = router(torch.randn(num_tokens, D))
    assert out.topk_indices.shape == out.topk_weights.shape == (num_tokens, router.top_k)
    assert out.topk_indices.dtype == torch.int64
    for field in (out.router_logits, out.router_probs, out.router_probs_clean):
        assert field.shape == (num_tokens, E)
        assert field.dtype == torch.float32
    assert out.entropy.shape == (num_tokens,)
    assert out.keep is None
    ones = torch.ones(num_tokens)
    torch.testing.assert_close(out.router_probs.sum(1), ones)
    torch.testing.assert_close(out.router_probs_clean.sum(1), ones)
    assert all(len(set(row)) == router.top_k for row in out.topk_indices.tolist()), "an expert chosen twice"


def test_top_k_must_fit() -> None:
    for wrong in (0, E + 1):
        with pytest.raises(ValueError, match=f"top_k is {wrong}"):
            plugin(wrong)


def test_gate_is_e_by_d_small_and_without_bias() -> None:
    torch.manual_seed(0)
    router = build_router("top1", hidden_size=400, num_experts=50)
    assert {name: tuple(p.shape) for name, p in router.named_parameters()} == {"weight": (50, 400)}
    # 20,000 draws: 5 % is ten standard errors of the standard deviation.
    assert router.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_logits_are_x_times_gate_transposed() -> None:
    router, x = built_in("top1").double(), torch.randn(4, D, dtype=torch.float64)
    slow = torch.tensor([[float(row @ gate) for gate in router.weight.detach()] for row in x], dtype=torch.float64)
    torch.testing.assert_close(router(x).router_logits, slow, rtol=0, atol=1e-14)


# --- arithmetic in float32, or float64


@pytest.mark.parametrize("key", BUILT_IN)
def test_autocast_changes_no_bit(key: str) -> None:
    router, x = built_in(key).eval(), torch.randn(9, D)
    exact = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = router(x)
    for one, other in zip(exact[:-1], under[:-1], strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype


def test_autocast_is_off_inside_a_routers_own_code_and_on_again_after() -> None:
    router = plugin()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        router(torch.randn(2, 3, D, dtype=torch.bfloat16))
        assert torch.is_autocast_enabled("cpu")
    assert router.seen == (torch.float32, (6, D), False)


@pytest.mark.parametrize("key", BUILT_IN)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision_input_is_lifted_first(key: str, low: torch.dtype) -> None:
    """A bfloat16 model: gate and input are bfloat16, the product is taken in float32."""
    router, x = built_in(key).to(low).eval(), torch.randn(9, D).to(low)
    out = router(x)
    expected = x.float() @ router.weight.detach().float().t()
    torch.testing.assert_close(out.router_logits, expected, rtol=0, atol=1e-6)
    assert out.topk_weights.dtype == out.router_probs.dtype == out.entropy.dtype == torch.float32


@pytest.mark.parametrize("key", BUILT_IN)
def test_float64_stays_float64_with_a_float32_gate(key: str) -> None:
    out = built_in(key).eval()(torch.randn(3, D, dtype=torch.float64))
    for field in (out.topk_weights, out.router_logits, out.router_probs, out.router_probs_clean, out.entropy):
        assert field.dtype == torch.float64
    assert (out.router_probs.sum(1) - 1).abs().max() < 1e-15


def test_at_least_float32() -> None:
    lifted = {
        dtype: at_least_float32(torch.ones(1, dtype=dtype)).dtype
        for dtype in (torch.half, torch.float32, torch.float64)
    }
    assert lifted == {torch.half: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    x = torch.ones(1)
    assert at_least_float32(x) is x, "no copy where none is needed"


# --- padding


@given(st.lists(st.booleans(), max_size=12), st.sampled_from(sorted(BUILT_IN)))
def test_padding_is_routed_nowhere_and_leaves_real_tokens_alone(real: list[bool], key: str) -> None:
    router, x = built_in(key).eval(), torch.randn(len(real), D)
    mask = torch.tensor(real, dtype=torch.bool)
    out, without = router(x, mask), router(x)
    assert out.keep is not None
    assert out.keep.tolist() == [[is_real] * router.top_k for is_real in real]
    assert not out.topk_weights[~mask].any()
    assert ((out.topk_indices >= 0) & (out.topk_indices < E)).all()
    assert torch.equal(out.topk_indices[mask], without.topk_indices[mask])
    assert torch.equal(out.topk_weights[mask], without.topk_weights[mask])


def test_padding_and_a_routers_own_unused_slots_both_count() -> None:
    router, x = plugin(), torch.randn(30, D)
    mask = torch.arange(30) % 3 > 0
    own = router(x).keep
    assert own is not None
    assert own[mask][:, 1].any()
    assert not own[mask][:, 1].all()
    assert not own[~mask][:, 1].all()
    both = router(x, mask)
    assert torch.equal(both.keep, own & mask[:, None])
    assert not both.topk_weights[~both.keep].any()


@pytest.mark.parametrize("key", BUILT_IN)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e38])
def test_garbage_in_padding_reaches_no_gradient(key: str, garbage: float) -> None:
    """Attention over nothing leaves NaN in padded rows; NaN · 0 is NaN, so masking the weights is not enough."""
    router = built_in(key, noise_std=0.1)
    x = torch.randn(4, D)
    x[1] = garbage
    x.requires_grad_()
    out = router(x, torch.tensor([True, False, True, True]))
    (out.topk_weights.sum() + out.router_probs.square().sum() + out.router_logits.square().sum()).backward()
    assert router.weight.grad is not None
    assert router.weight.grad.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert not x.grad[1].any()


def test_a_nan_token_stays_alone() -> None:
    """Nothing is healed: the token's own weights are NaN, its indices are still legal, its neighbours unharmed."""
    router, x = built_in("topk").eval(), torch.randn(3, D)
    clean = router(x)
    x[1] = math.nan
    out = router(x)
    assert out.topk_weights[1].isnan().all()
    assert ((out.topk_indices >= 0) & (out.topk_indices < E)).all()
    for before, after in zip(clean[:-1], out[:-1], strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])


# --- ties and extremes

scores = st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), max_size=8)


@given(scores, st.integers(1, 6), st.sampled_from([torch.float32, torch.float64]))
def test_ties_go_to_the_lowest_index(rows: list[list[int]], k: int, dtype: torch.dtype) -> None:
    chosen = stable_topk(torch.tensor(rows, dtype=dtype).reshape(-1, 6), k)
    assert chosen.tolist() == [sorted(range(6), key=lambda expert: (-row[expert], expert))[:k] for row in rows]


@pytest.mark.parametrize("k", [1, 2, 7, 300])
def test_ties_at_sizes_where_an_unstable_sort_shows(k: int) -> None:
    assert torch.equal(stable_topk(torch.zeros(4, 300), k), torch.arange(k).expand(4, k))


def test_k_equal_one_is_the_head_of_every_larger_k() -> None:
    tied = torch.randint(0, 3, (200, 6)).float()
    for k in range(2, 7):
        assert torch.equal(stable_topk(tied, 1), stable_topk(tied, k)[:, :1])


@pytest.mark.parametrize("k", [1, 2])
def test_nan_scores_give_legal_indices(k: int) -> None:
    chosen = stable_topk(torch.tensor([[0.0, math.nan, 1.0], [math.nan] * 3]), k)
    assert ((chosen >= 0) & (chosen < 3)).all()


@pytest.mark.parametrize("key", BUILT_IN)
@pytest.mark.parametrize("size", [0.0, 80.0, 1e4, 1e30])
def test_extreme_and_equal_logits_stay_finite(key: str, size: float) -> None:
    router = built_in(key).eval()
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = torch.linspace(-size, size, E)
    x = torch.zeros(3, D)
    x[:, 0] = 1.0
    x.requires_grad_()
    out = router(x)
    for field in out[:-1]:
        assert field.isfinite().all()
    if size == 0:
        assert out.topk_indices.tolist() == [list(range(router.top_k))] * 3
    else:
        assert out.topk_indices.tolist() == [[E - 1 - slot for slot in range(router.top_k)]] * 3
    (out.topk_weights.sum() + out.router_probs.square().sum()).backward()
    assert router.weight.grad is not None
    assert router.weight.grad.isfinite().all()


def test_entropy_by_hand() -> None:
    probs = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25] * 4, [0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([0.0, math.log(4), math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(entropy(probs), expected, rtol=0, atol=1e-15)


# --- noise


def noisy(std: float = 0.1, fraction: float = 0.25) -> AnnealedNoise:
    return AnnealedNoise(std, fraction)


def test_noise_is_at_full_strength_until_a_schedule_is_set() -> None:
    noise = noisy()
    for _ in range(1000):
        noise.advance()
    assert noise.scale().item() == pytest.approx(0.1)


@pytest.mark.parametrize(("fraction", "total"), [(0.25, 40), (0.5, 7), (1.0, 10), (0.25, 3), (0.0, 10)])
def test_noise_falls_linearly_to_zero_and_stays_there(fraction: float, total: int) -> None:
    noise = noisy(0.2, fraction)
    noise.set_schedule(total)
    end = math.ceil(fraction * total)
    for step in range(total):
        expected = 0.2 * max(0.0, 1 - step / end) if end else 0.0
        assert noise.scale().item() == pytest.approx(expected, abs=1e-7)
        noise.advance()
    assert noise.scale().item() == 0.0


def test_noise_is_gaussian_of_the_present_scale() -> None:
    """100,000 draws: the mean within 5 standard errors of 0, the deviation within 2 %, the tails a normal's."""
    torch.manual_seed(0)
    noise = noisy(0.5, 1.0)
    noise.set_schedule(4)
    noise.advance()  # scale 0.375
    drawn = noise(torch.full((100_000,), 3.0, dtype=torch.float64)) - 3.0
    assert abs(drawn.mean().item()) < 5 * 0.375 / math.sqrt(100_000)
    assert drawn.std().item() == pytest.approx(0.375, rel=0.02)
    assert (drawn.abs() > 0.75).double().mean().item() == pytest.approx(0.0455, abs=0.004)


def test_no_noise_in_eval_or_at_std_zero() -> None:
    logits = torch.randn(3, 4)
    assert noisy().eval()(logits) is logits
    assert noisy(0.0)(logits) is logits
    assert not torch.equal(noisy()(logits), logits)


def test_the_step_counter_is_state() -> None:
    noise = noisy()
    noise.set_schedule(80)
    for _ in range(5):
        noise.advance()
    other = noisy()
    other.load_state_dict(noise.state_dict())
    assert other.step.item() == 5
    assert other.scale().item() == noise.scale().item() == pytest.approx(0.1 * (1 - 5 / 20))


@pytest.mark.parametrize("key", BUILT_IN)
def test_router_noise_moves_with_optimizer_steps_only(key: str) -> None:
    router = built_in(key)
    router.set_schedule(40)
    assert {"noise.step", "noise.anneal_steps"} <= router.state_dict().keys()
    for _ in range(4):  # four micro-batches, one step
        router(torch.randn(3, D))
    assert router.state_dict()["noise.step"] == 0
    router.after_step(torch.ones(E))
    assert router.state_dict()["noise.step"] == 1
    router.to(torch.bfloat16)
    assert router.state_dict()["noise.step"].dtype == torch.int64, "a counter in bfloat16 would stall at 256"


@pytest.mark.parametrize("key", BUILT_IN)
def test_noise_is_in_the_choice_and_the_probs_but_never_in_logits_clean_probs_or_entropy(key: str) -> None:
    router, x = built_in(key, noise_std=5.0), torch.randn(50, D)
    still = router.eval()(x)
    out = router.train()(x)
    assert torch.equal(out.router_logits, still.router_logits)
    assert torch.equal(out.router_probs_clean, still.router_probs_clean)
    assert torch.equal(out.entropy, still.entropy)
    torch.testing.assert_close(still.router_probs_clean, still.router_logits.softmax(-1))
    assert not torch.equal(out.router_probs, out.router_probs_clean)
    assert not torch.equal(out.topk_indices, still.topk_indices)
    # The choice is of the noisy scores: the chosen are the most probable after noise, best first.
    best_first = out.router_probs.sort(1, descending=True).values[:, : router.top_k]
    torch.testing.assert_close(out.router_probs.gather(1, out.topk_indices), best_first)


def test_noise_carries_no_gradient_of_its_own_but_logits_do() -> None:
    noise, logits = noisy(), torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(noise(logits).sum(), logits)
    assert torch.equal(grad, torch.ones(3, 4))


@pytest.mark.parametrize(
    "wrong",
    [{"noise_std": -0.1}, {"noise_std": math.nan}, {"noise_std": math.inf}, {"noise_anneal_fraction": 1.5},
     {"noise_anneal_fraction": -0.1}, {"noise_sdt": 0.1}, {"noise_std": "loud"}],
    ids=str,
)  # fmt: skip
def test_wrong_noise_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NoiseOptions.model_validate(wrong)


def test_options_are_frozen_and_read_yaml_numbers() -> None:
    options = NoiseOptions.model_validate({"noise_std": "3e-4"})  # YAML hands 3e-4 over as a string
    assert options.noise_std == 3e-4
    with pytest.raises(ValueError, match="frozen"):
        options.noise_std = 0.5  # type: ignore[misc]


# --- training guards and defaults


@pytest.mark.parametrize("key", BUILT_IN)
def test_a_zero_gate_must_not_be_trained(key: str) -> None:
    router = built_in(key)
    assert router.training_problem() is None
    with torch.no_grad():
        router.weight.zero_()
    assert "zero" in (router.training_problem() or "")
    assert router(torch.randn(3, D)).topk_weights.isfinite().all(), "but it still runs"


@pytest.mark.parametrize("key", BUILT_IN)
def test_built_in_routers_are_causal_as_declared(key: str) -> None:
    """A token's route is bit-equal whatever follows it."""
    router, x = built_in(key).eval(), torch.randn(9, D)
    assert router.causal
    changed = torch.cat([x[:5], torch.randn(4, D)])
    for before, after in zip(router(x)[:-1], router(changed)[:-1], strict=True):
        assert torch.equal(before[:5], after[:5])


def test_flatten_mask() -> None:
    mask = torch.tensor([[True, False], [False, True]])
    flat = flatten_mask(mask, torch.zeros(2, 2, D))
    assert flat is not None
    assert flat.tolist() == [True, False, False, True]
    assert flatten_mask(None, torch.zeros(2, D)) is None


def test_the_gate_can_be_printed_with_its_options() -> None:
    assert "norm_topk_prob=True" in repr(built_in("topk"))

"""What holds for every built-in router: the contract, and the whole layer against a loop over tokens in float64."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moectl.moe import GatedExperts, MoELayer, Router, RouterOutput
from moectl.plugins import BUILT_IN
from tests.moe.reference import expert_on_token
from tests.routers.reference import CASES, NOISY, TOKENS_CHOOSE, E, make, route_by_token

D, F, T = 8, 5, 13
MASK = [token % 4 != 2 for token in range(T)]
QUIET = [key for key in CASES if key not in NOISY]

# Of the largest entry of each tensor. float32: about thirty roundings of 6e-8 on values of order one.
# bfloat16: a rounding is 4e-3, and some ten of them lie between input and gradient.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 4e-2}


def tokens(number: int = T, seed: int = 1) -> Tensor:
    return torch.randn(number, D, generator=torch.Generator().manual_seed(seed))


def make_layer(key: str, backend: str = "grouped", dtype: torch.dtype = torch.float32) -> MoELayer:
    layer = MoELayer(make(key, D), GatedExperts(E, D, F, backend=backend))
    for parameter in layer.experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.to(dtype)


def used(out: RouterOutput) -> list[dict[int, float]]:
    """Token -> {expert: weight}, slots in use only."""
    keep = torch.ones_like(out.topk_indices, dtype=torch.bool) if out.keep is None else out.keep
    rows = zip(out.topk_indices.tolist(), out.topk_weights.tolist(), keep.tolist(), strict=True)
    return [{e: w for e, w, k in zip(*row, strict=True) if k} for row in rows]


def test_every_built_in_router_is_among_the_cases() -> None:
    assert {name for name, _ in CASES.values()} == set(BUILT_IN)


# --- the layer against a loop over tokens


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("backend", ["loop", "grouped", "full"])
@pytest.mark.parametrize("key", CASES)
def test_layer_equals_a_loop_over_tokens(key: str, backend: str, dtype: torch.dtype) -> None:
    """In training mode, with padding and noise: the output, and the gradient of input, gate, noise and every expert."""
    layer = make_layer(key, backend, dtype)
    exact = copy.deepcopy(layer).double()
    x = tokens().to(dtype).requires_grad_()
    x_exact = x.detach().double().requires_grad_()
    upstream = (torch.arange(T * D).reshape(T, D) % 13 - 6.0) / 4  # exact in bfloat16

    torch.manual_seed(5)
    out = layer(x, torch.tensor(MASK))
    out.backward(upstream.to(dtype))
    torch.manual_seed(5)
    chosen = route_by_token(exact.router, key, x_exact, MASK, torch.randn(T, E).double())
    rows = [
        sum((w * expert_on_token(exact.experts, e, x_D) for e, w in experts.items()), x_D * 0.0)
        for experts, x_D in zip(chosen, x_exact, strict=True)
    ]
    torch.stack(rows).backward(upstream.double())

    assert layer.routing is not None
    assert [set(row) for row in used(layer.routing)] == [set(row) for row in chosen], "other experts were chosen"
    _close(out, torch.stack(rows), dtype, "output")
    _close(x.grad, x_exact.grad, dtype, "input")
    for (name, ours), theirs in zip(layer.named_parameters(), exact.parameters(), strict=True):
        _close(ours.grad, theirs.grad, dtype, name)


def _close(ours: Tensor | None, exact: Tensor | None, dtype: torch.dtype, what: str) -> None:
    assert ours is not None and exact is not None, f"{what} got no gradient"
    assert exact.abs().max() > 0, f"{what}: nothing to compare"
    error = (ours.double() - exact).abs().max() / exact.abs().max()
    assert error < TOLERANCES[dtype], f"{what}: off by {error:.1e}"


@pytest.mark.parametrize("key", CASES)
def test_weights_and_their_order_equal_the_definition_in_eval(key: str) -> None:
    """In float64, to rounding; best expert first where tokens choose."""
    router, x = make(key, D).double().eval(), tokens(40).double()
    real = [token % 5 != 3 for token in range(40)]
    out = router(x, torch.tensor(real))
    expected = route_by_token(router, key, x, real, torch.zeros(40, E))
    for mine, theirs in zip(used(out), expected, strict=True):
        assert list(mine) == list(theirs)
        assert list(mine.values()) == pytest.approx([float(weight.detach()) for weight in theirs.values()], abs=1e-14)


@pytest.mark.parametrize(
    ("key", "training"),
    # Under noise each call draws its own; what experts choose does depend on the rest.
    [(key, mode) for key in CASES for mode in (True, False) if key != "expert-choice" and not (mode and key in NOISY)],
)
def test_a_tokens_output_does_not_depend_on_the_rest_of_the_batch(key: str, training: bool) -> None:
    """Alone, first, last, among strangers: the same experts, the same output.

    Not bit for bit: a product over another number of rows may add in another order (1e-6 of the largest).
    """
    layer, x = make_layer(key).train(training), tokens(30)
    whole = layer(x)
    for rows in ([7], [29, 7], [7, *range(20, 30)], [*range(8)]):
        part = layer(x[rows])
        assert layer.routing is not None
        torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-6 * float(whole.abs().max()))


# --- the contract: shapes, dtypes, autocast


@pytest.mark.parametrize("key", CASES)
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_shapes_and_dtypes(key: str, num_tokens: int) -> None:
    router = make(key, D)
    out = router(tokens(num_tokens))
    assert out.topk_indices.shape == out.topk_weights.shape == (num_tokens, router.slots)
    assert router.slots == (E if key.startswith("expert-choice") else router.top_k)
    assert out.topk_indices.dtype == torch.int64
    for field in (out.topk_weights, out.router_logits, out.router_probs, out.router_probs_clean, out.entropy):
        assert field.dtype == torch.float32
        assert field.isfinite().all()
    for probs in (out.router_probs, out.router_probs_clean):
        torch.testing.assert_close(probs.sum(1), torch.ones(num_tokens))
    assert (out.keep is None) == (key in TOKENS_CHOOSE)
    assert all(len(set(row)) == router.slots for row in out.topk_indices.tolist()), "an expert chosen twice"
    assert ((out.topk_indices >= 0) & (out.topk_indices < E)).all()


@pytest.mark.parametrize("key", CASES)
def test_nothing_real_at_all(key: str) -> None:
    router = make(key, D)
    out = router(tokens(4), torch.zeros(4, dtype=torch.bool))
    assert used(out) == [{}] * 4
    assert out.topk_weights.isfinite().all()
    router.after_step(torch.zeros(E, dtype=torch.int64))
    assert all(buffer.isfinite().all() for buffer in router.buffers())
    assert all(weights.isfinite().all() for weights in router(tokens(4))[1:6])


@pytest.mark.parametrize("key", QUIET)
def test_batch_and_sequence_are_flattened(key: str) -> None:
    router, x = make(key, D), tokens(6)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    for batched, flat in zip(router(x.reshape(2, 3, D), mask), router(x, mask.reshape(6)), strict=True):
        assert torch.equal(batched, flat)


@pytest.mark.parametrize("key", CASES)
def test_autocast_changes_no_bit(key: str) -> None:
    router, x = make(key, D).eval(), tokens()
    exact = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = router(x)
    assert_same(exact, under)


@pytest.mark.parametrize("key", CASES)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_a_model_in_low_precision_is_routed_in_float32(key: str, low: torch.dtype, training: bool) -> None:
    """Gate and input are bfloat16; from there on it is what a float32 router makes of the same numbers."""
    router, x = make(key, D).to(low).train(training), tokens().to(low)
    wide = copy.deepcopy(router).float()
    torch.manual_seed(3)
    out = router(x)
    torch.manual_seed(3)
    assert_same(out, wide(x.float()))
    assert out.topk_weights.dtype == torch.float32


@pytest.mark.parametrize("key", CASES)
def test_float64_stays_float64_with_a_float32_gate(key: str) -> None:
    out = make(key, D).eval()(tokens().double())
    for field in (out.topk_weights, out.router_logits, out.router_probs, out.router_probs_clean, out.entropy):
        assert field.dtype == torch.float64
    assert (out.router_probs.sum(1) - 1).abs().max() < 1e-15


# --- padding, extremes, ties


@given(st.lists(st.booleans(), max_size=12), st.sampled_from(sorted(TOKENS_CHOOSE)))
def test_padding_is_routed_nowhere_and_leaves_real_tokens_alone(real: list[bool], key: str) -> None:
    router, x = make(key, D).eval(), tokens(len(real))
    mask = torch.tensor(real, dtype=torch.bool)
    out, without = router(x, mask), router(x)
    assert out.keep is not None
    assert out.keep.tolist() == [[is_real] * router.top_k for is_real in real]
    assert not out.topk_weights[~mask].any()
    assert torch.equal(out.topk_indices[mask], without.topk_indices[mask])
    assert torch.equal(out.topk_weights[mask], without.topk_weights[mask])


@pytest.mark.parametrize("key", CASES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e38])
def test_garbage_in_padding_reaches_no_gradient(key: str, garbage: float) -> None:
    """Attention over nothing leaves NaN in padded rows; NaN · 0 is NaN, so masking the weights is not enough."""
    router, x = make(key, D), tokens(4)
    x[1] = garbage
    x.requires_grad_()
    out = router(x, torch.tensor([True, False, True, True]))
    (out.topk_weights.sum() + out.router_probs.square().sum() + out.router_logits.square().sum()).backward()
    for tensor in (*router.parameters(), x):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert x.grad is not None
    assert not x.grad[1].any()


@pytest.mark.parametrize("key", TOKENS_CHOOSE)
def test_a_nan_token_stays_alone(key: str) -> None:
    """Nothing is healed: the token's own scores are NaN, its indices are still legal, its neighbours unharmed."""
    router, x = make(key, D).eval(), tokens(3)
    clean = router(x)
    x[1] = math.nan
    out = router(x)
    assert out.router_probs[1].isnan().all()
    assert ((out.topk_indices >= 0) & (out.topk_indices < E)).all()
    for before, after in zip(clean[:-1], out[:-1], strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])


@pytest.mark.parametrize("key", CASES)
@pytest.mark.parametrize("size", [0.0, 80.0, -80.0, 1e4, 1e30])
def test_extreme_and_equal_logits_stay_finite_and_reproducible(key: str, size: float) -> None:
    router = make(key, D).eval()
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = torch.linspace(-size, size, E)
        for name, buffer in router.named_buffers():
            if name == "expert_bias":
                buffer.zero_()
    x = torch.zeros(3, D)
    x[:, 0] = 1.0
    x.requires_grad_()
    out = router(x)
    for field in out[:6]:
        assert field.isfinite().all()
    assert_same(out, router(x))
    if size == 0.0 and key in TOKENS_CHOOSE:
        assert out.topk_indices.tolist() == [list(range(router.top_k))] * 3, "ties go to the lowest index"
    (out.topk_weights.sum() + out.router_probs.square().sum()).backward()
    assert router.weight.grad is not None
    assert router.weight.grad.isfinite().all()


@pytest.mark.parametrize("key", [key for key in CASES if key.startswith("sigmoid")])
def test_all_logits_at_minus_80_still_weigh_as_defined(key: str) -> None:
    """Every σ is 2e-35 there: an ε in the denominator would make the weights vanish."""
    router = make(key, D).eval()
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = -80.0
    x = torch.zeros(2, D)
    x[:, 0] = 1.0
    out = router(x)
    torch.testing.assert_close(out.router_probs, torch.full((2, E), 1 / E))
    if "raw" not in key:
        scale = router.config.model_dump()["routed_scaling_factor"]
        torch.testing.assert_close(out.topk_weights, torch.full_like(out.topk_weights, scale / router.top_k))


# --- state, mode, replay


@pytest.mark.parametrize("key", CASES)
def test_eval_is_deterministic_and_training_moves_nothing_before_the_step(key: str) -> None:
    router, x = make(key, D), tokens()
    state = copy.deepcopy(router.state_dict())
    assert_same(router.eval()(x), router.eval()(x))
    for _ in range(3):  # three micro-batches
        router.train()(x)
    assert all(torch.equal(state[name], value) for name, value in router.state_dict().items())


@pytest.mark.parametrize("key", CASES)
def test_state_makes_the_round_trip(key: str) -> None:
    """Through a file, into a fresh router: the same state, the same routes, and the same next step."""
    router, x = make(key, D), tokens()
    router.set_schedule(20)
    _one_step(router, x)
    file = io.BytesIO()
    torch.save(router.state_dict(), file)
    file.seek(0)
    other = make(key, D, seed=9)
    other.load_state_dict(torch.load(file))
    for _ in range(2):
        assert_same(router.eval()(x), other.eval()(x))
        assert all(torch.equal(router.state_dict()[name], value) for name, value in other.state_dict().items())
        _one_step(router, x)
        _one_step(other, x)


@pytest.mark.parametrize("key", CASES)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_floating_point_state_stays_float32_through_casts(key: str, cast: torch.dtype) -> None:
    layer = make_layer(key)
    before = {name: value.clone() for name, value in layer.router.named_buffers()}
    layer.to(cast)
    assert layer.router.weight.dtype == cast
    for name, buffer in layer.router.named_buffers():
        assert buffer.dtype in (torch.float32, torch.int64)
        assert torch.equal(buffer, before[name]), "not even rounded on the way"


@pytest.mark.parametrize("key", CASES)
def test_checkpointing_replays_the_same_experts_and_moves_state_once(key: str) -> None:
    """Non-reentrant activation checkpointing runs the layer twice: same noise, same ids, same gradients, same step."""
    plain, replayed = make_layer(key), make_layer(key)
    seen: list[Tensor] = []
    replayed.router.register_forward_hook(lambda module, args, out: seen.append(out.topk_indices.clone()))
    grads = []
    for layer in (plain, replayed):
        x = tokens().requires_grad_()
        torch.manual_seed(11)
        out = layer(x) if layer is plain else checkpoint(layer, x, use_reentrant=False, early_stop=False)
        torch.manual_seed(99)  # the generator moves on between forward and backward
        out.square().sum().backward()
        layer.router.after_step(torch.arange(E) * 3)
        grads.append([x.grad, *(p.grad for p in layer.parameters())])
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    ours, theirs = plain.router.state_dict(), replayed.router.state_dict()
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-7) for name in ours)


@pytest.mark.parametrize("key", CASES)
def test_declared_causality_is_true(key: str) -> None:
    """A token's route is bit-equal whatever follows it, in training and in eval; expert choice says it is not."""
    router, x = make(key, D), tokens(30)
    changed = torch.cat([x[:15], 3 * tokens(15, seed=8)])
    same = []
    for training in (True, False):
        outs = []
        for batch in (x, changed):
            torch.manual_seed(2)
            outs.append(router.train(training)(batch))
        same.append(all(a is None or torch.equal(a[:15], b[:15]) for a, b in zip(*outs, strict=True)))
    assert same == [router.causal] * 2


COMPILED = [*NOISY, "switch", "topk-clamp", "sigmoid-groups", "sigmoid-raw", "expert-choice", "expert-choice-threshold"]


@pytest.mark.parametrize("key", COMPILED)
@pytest.mark.parametrize("training", [True, False])
def test_compiles_into_one_graph(key: str, training: bool) -> None:
    """With and without padding, forward and backward, state included."""
    plain, router = (make(key, D).train(training) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    for number, mask in ((5, None), (9, torch.arange(9) % 3 > 0)):
        grads = []
        for module in (plain, compiled):
            x = tokens(number).requires_grad_()
            torch.manual_seed(4)
            out = module(x, mask)
            loss = out.topk_weights.square().sum() + out.router_probs.square().sum()
            grads.append((out, *torch.autograd.grad(loss, (x, module.weight))))
        (one, *theirs), (other, *ours) = grads
        assert_same(one, other, atol=1e-6)  # another order of a few additions
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(plain.buffers(), router.buffers(), strict=True))


@pytest.mark.parametrize("key", CASES)
def test_a_zero_gate_and_a_single_expert_must_not_be_trained(key: str) -> None:
    router = make(key, D)
    assert router.training_problem() is None
    with torch.no_grad():
        router.weight.zero_()
    assert "zero" in (router.training_problem() or "")
    assert router(tokens(3)).topk_weights.isfinite().all(), "but it still runs"


def _one_step(router: Router, x: Tensor) -> None:
    torch.manual_seed(6)
    out = router.train()(x)
    keep = torch.ones_like(out.topk_indices, dtype=torch.bool) if out.keep is None else out.keep
    router.after_step(torch.bincount(out.topk_indices[keep], minlength=E))


def assert_same(one: RouterOutput, other: RouterOutput, atol: float = 0.0) -> None:
    for field, mine, theirs in zip(one._fields, one, other, strict=True):
        assert (mine is None) == (theirs is None), field
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=atol, msg=lambda text, name=field: f"{name}: {text}")

"""Auxiliary losses against hand-worked values and Python loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moectl.config.schema import BALANCE_LOSS_NAMES
from moectl.moe.losses import (
    BALANCE_LOSSES,
    LayerLoad,
    cv_squared_loss,
    entropy_loss,
    layer_load,
    load_balancing_loss,
    masked_mean,
    merged,
    router_z_loss,
)
from moectl.moe.types import RouterOutput
from tests.moe.reference import Case, by_hand, cases

FLOAT64 = 1e-12


def uniform(tokens: int, experts: int) -> Tensor:
    return torch.full((tokens, experts), 1 / experts, dtype=torch.float64)


def all_balanced(experts: int, k: int) -> Tensor:
    """Every expert exactly k times among E tokens."""
    return torch.tensor([[(token + slot) % experts for slot in range(k)] for token in range(experts)])


def collapsed(tokens: int, experts: int, onto: list[int]) -> tuple[Tensor, Tensor]:
    """All tokens on the same k experts, which share all probability."""
    probs = torch.zeros(tokens, experts, dtype=torch.float64)
    probs[:, onto] = 1 / len(onto)
    return probs, torch.tensor(onto).expand(tokens, -1)


def balance_in_python(probs: Tensor, indices: Tensor, experts: int, mask: list[bool], keep: list[list[bool]]) -> float:
    """``E · Σ_e f_e · P_e``, counted one slot at a time."""
    chosen = [0] * experts
    mean = [0.0] * experts
    for token, is_real in enumerate(mask):
        if not is_real:
            continue
        for slot, expert in enumerate(indices[token].tolist()):
            chosen[expert] += keep[token][slot]
        for expert in range(experts):
            mean[expert] += float(probs[token, expert]) / sum(mask)
    total = sum(chosen)
    return experts * sum(count / total * p for count, p in zip(chosen, mean, strict=True)) if total else 0.0


# --- the values that everybody should know by heart


@pytest.mark.parametrize("experts", [1, 2, 3, 8])
def test_perfect_balance_is_one_for_every_k(experts: int) -> None:
    for k in range(1, experts + 1):
        loss = load_balancing_loss(uniform(experts, experts), all_balanced(experts, k), experts)
        assert loss.item() == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize(("experts", "k"), [(2, 1), (8, 1), (8, 2), (8, 8), (6, 4)])
def test_collapse_is_e_over_k(experts: int, k: int) -> None:
    probs, indices = collapsed(10, experts, list(range(k)))
    assert load_balancing_loss(probs, indices, experts).item() == pytest.approx(experts / k, abs=1e-14)


def test_by_hand() -> None:
    """Three tokens, three experts, top-2: f = (1/2, 1/3, 1/6), P = (0.5, 0.3, 0.2), 3·(1/4 + 1/10 + 1/30) = 1.15."""
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.4, 0.2, 0.4]], dtype=torch.float64)
    indices = torch.tensor([[0, 1], [0, 1], [0, 2]])
    assert load_balancing_loss(probs, indices, 3).item() == pytest.approx(1.15, abs=1e-14)


def test_uniform_probabilities_score_one_whatever_the_choice() -> None:
    """So that 1.0 alone does not prove balance."""
    _, indices = collapsed(5, 4, [2])
    assert load_balancing_loss(uniform(5, 4), indices, 4).item() == pytest.approx(1.0, abs=1e-14)


def test_one_is_a_reference_and_not_a_lower_bound() -> None:
    """Tokens chosen against the probabilities: f = (1, 0), P = (0.1, 0.9), 2 · 0.1 = 0.2."""
    probs = torch.tensor([[0.1, 0.9]], dtype=torch.float64)
    assert load_balancing_loss(probs, torch.tensor([[0]]), 2).item() == pytest.approx(0.2, abs=1e-14)


def test_four_collapsed_layers_look_balanced_when_pooled() -> None:
    """Why it is taken per layer: each layer's own value is E/k = 4, that of all their tokens together is 1."""
    layers = [collapsed(16, 8, [2 * layer, 2 * layer + 1]) for layer in range(4)]
    each = [load_balancing_loss(probs, indices, 8).item() for probs, indices in layers]
    assert each == pytest.approx([4.0] * 4, abs=1e-14)
    pooled = load_balancing_loss(torch.cat([p for p, _ in layers]), torch.cat([i for _, i in layers]), 8)
    assert pooled.item() == pytest.approx(1.0, abs=1e-14)


# --- against the loop, with padding and unused slots


@st.composite
def balance_cases(draw: st.DrawFn) -> tuple[Case, list[bool]]:
    case = draw(cases())
    return case, draw(st.lists(st.booleans(), min_size=case.num_tokens, max_size=case.num_tokens))


@given(balance_cases(), st.booleans())
def test_balance_equals_the_loop(drawn: tuple[Case, list[bool]], masked: bool) -> None:
    case, real = drawn
    routing = case.routing()
    probs = torch.randn(case.num_tokens, case.num_experts, dtype=torch.float64).softmax(-1)
    mask = torch.tensor(real, dtype=torch.bool) if masked else None
    loss = load_balancing_loss(probs, routing.topk_indices, case.num_experts, mask, routing.keep)
    expected = balance_in_python(
        probs,
        routing.topk_indices,
        case.num_experts,
        real if masked else [True] * case.num_tokens,
        case.keep or [[True] * case.top_k] * case.num_tokens,
    )
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, abs=FLOAT64)


@given(st.lists(st.booleans(), max_size=15))
def test_padding_counts_nowhere(real: list[bool]) -> None:
    """A padded batch scores what its real tokens score alone, whatever stands in the padding."""
    mask = torch.tensor(real, dtype=torch.bool)
    logits = torch.randn(len(real), 4, dtype=torch.float64)
    logits[~mask] = math.nan
    indices = torch.randint(0, 4, (len(real), 2))
    with_padding = load_balancing_loss(logits.softmax(-1), indices, 4, mask)
    alone = load_balancing_loss(logits[mask].softmax(-1), indices[mask], 4)
    assert with_padding.item() == pytest.approx(alone.item(), abs=FLOAT64)
    z, z_alone = router_z_loss(logits, mask), router_z_loss(logits[mask])
    assert z.item() == pytest.approx(z_alone.item(), abs=FLOAT64)


def test_masks_of_a_batch_may_be_two_dimensional() -> None:
    probs, indices = torch.rand(6, 3).softmax(-1), torch.randint(0, 3, (6, 1))
    mask = torch.tensor([[True, False, True], [True, True, False]])
    assert load_balancing_loss(probs, indices, 3, mask) == load_balancing_loss(probs, indices, 3, mask.reshape(-1))
    assert router_z_loss(probs, mask) == router_z_loss(probs, mask.reshape(-1))


def test_padding_gets_no_gradient() -> None:
    mask = torch.tensor([True, False, True])
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    (
        load_balancing_loss(logits.softmax(-1), torch.tensor([[0], [1], [0]]), 4, mask) + router_z_loss(logits, mask)
    ).backward()
    assert logits.grad is not None
    assert not logits.grad[1].any()
    assert logits.grad[[0, 2]].all()


@pytest.mark.parametrize("tokens", [0, 4], ids=["no-tokens", "only-padding"])
def test_nothing_real_is_zero_with_zero_gradients(tokens: int) -> None:
    logits = torch.randn(tokens, 3, requires_grad=True)
    mask = torch.zeros(tokens, dtype=torch.bool) if tokens else None
    indices = torch.zeros(tokens, 2, dtype=torch.int64)
    probs = logits.softmax(-1)
    loss = load_balancing_loss(probs, indices, 3, mask) + router_z_loss(logits, mask)
    loss = loss + cv_squared_loss(probs, indices, 3, mask) + entropy_loss(probs, mask)
    assert loss.item() == 0.0
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


# --- counts of the global batch


def test_counts_from_elsewhere_replace_the_shares() -> None:
    """Running counts of a step: f = (3, 1)/4 with P = (0.2, 0.8) is 2·(0.15 + 0.2) = 0.7."""
    probs = torch.tensor([[0.2, 0.8]], dtype=torch.float64)
    loss = load_balancing_loss(probs, torch.tensor([[1]]), 2, counts=torch.tensor([3, 1]))
    assert loss.item() == pytest.approx(0.7, abs=1e-14)


def test_global_scope_is_the_sum_over_micro_batches_when_counts_are_global() -> None:
    """With f fixed, the loss is linear in P: however the batch is cut, the weighted parts give the whole."""
    probs, indices = torch.randn(12, 5, dtype=torch.float64).softmax(-1), torch.randint(0, 5, (12, 2))
    whole = load_balancing_loss(probs, indices, 5)
    counts = torch.bincount(indices.flatten(), minlength=5)
    for cut in ([12], [1, 11], [4, 4, 4], [5, 7]):
        parts = zip(probs.split(cut), indices.split(cut), strict=True)
        total = sum(len(p) / 12 * load_balancing_loss(p, i, 5, counts=counts).item() for p, i in parts)
        assert total == pytest.approx(whole.item(), abs=1e-13)


def test_micro_scope_punishes_a_router_that_separates_domains() -> None:
    """Each micro-batch one domain on its own expert: 2.0 within each, 1.0 over the whole batch."""
    halves = [collapsed(8, 2, [0]), collapsed(8, 2, [1])]
    assert [load_balancing_loss(p, i, 2).item() for p, i in halves] == [2.0, 2.0]
    both = load_balancing_loss(torch.cat([p for p, _ in halves]), torch.cat([i for _, i in halves]), 2)
    assert both.item() == 1.0


# --- gradients


def test_gradient_goes_through_probabilities_alone() -> None:
    """dL/dP_e of one token is E·f_e/T: the shares are constants."""
    probs = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0], [0], [0], [2]])
    (grad,) = torch.autograd.grad(load_balancing_loss(probs, indices, 3), probs)
    expected = torch.tensor([3 * 0.75 / 4, 0.0, 3 * 0.25 / 4], dtype=torch.float64).expand(4, 3)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-15)


def test_descending_the_loss_balances() -> None:
    """Plain gradient descent on this loss alone takes a gate from 98 % on one of four experts to even shares."""
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    x[:, 0] = 1.0
    gate = 0.3 * torch.randn(8, 4)
    gate[0, 0] = 3.0
    gate.requires_grad_()

    def busiest() -> float:
        return float((x @ gate).argmax(1).bincount(minlength=4).max()) / 256

    assert busiest() > 0.95
    for _ in range(60):
        logits = x @ gate
        (grad,) = torch.autograd.grad(load_balancing_loss(logits.softmax(-1), logits.argmax(1, keepdim=True), 4), gate)
        with torch.no_grad():
            gate -= 0.3 * grad
    assert busiest() < 0.3


# --- squared coefficients of variation


def variation_in_python(values: list[float]) -> float:
    """Population variance over squared mean; 0 where all is zero."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2 if mean else 0.0


@given(balance_cases(), st.booleans())
def test_cv_squared_equals_the_loop(drawn: tuple[Case, list[bool]], masked: bool) -> None:
    case, drawn_real = drawn
    real = drawn_real if masked else [True] * case.num_tokens
    routing = case.routing()
    probs = torch.randn(case.num_tokens, case.num_experts, dtype=torch.float64).softmax(-1)
    mask = torch.tensor(real, dtype=torch.bool) if masked else None
    keep = case.keep or [[True] * case.top_k] * case.num_tokens
    importance, load = [0.0] * case.num_experts, [0.0] * case.num_experts
    for token, is_real in enumerate(real):
        for slot, expert in enumerate(case.chosen[token]):
            load[expert] += is_real and keep[token][slot]
        for expert in range(case.num_experts):
            importance[expert] += is_real * float(probs[token, expert])
    loss = cv_squared_loss(probs, routing.topk_indices, case.num_experts, mask, routing.keep)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(variation_in_python(importance) + variation_in_python(load), abs=FLOAT64)


@pytest.mark.parametrize(("experts", "k"), [(2, 1), (8, 1), (8, 2), (8, 8), (6, 4)])
def test_cv_squared_is_zero_when_balanced_and_twice_e_over_k_less_one_at_collapse(experts: int, k: int) -> None:
    balanced = cv_squared_loss(uniform(experts, experts), all_balanced(experts, k), experts)
    assert balanced.item() == pytest.approx(0.0, abs=1e-14)
    probs, indices = collapsed(10, experts, list(range(k)))
    assert cv_squared_loss(probs, indices, experts).item() == pytest.approx(2 * (experts / k - 1), abs=1e-13)


def test_cv_squared_pushes_as_importance_does_and_twice_as_switch() -> None:
    """d CV²(P) + 2 · d Switch, seen from the logits (a softmax knows no common shift of its probabilities)."""
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 0], [1, 2], [0, 3]])
    probs = logits.softmax(-1)
    mean = probs.mean(0)
    importance = ((mean - 0.25) / 0.25).square().mean()
    by_hand_grad = torch.autograd.grad(
        importance + 2 * load_balancing_loss(probs, indices, 4), logits, retain_graph=True
    )
    grad = torch.autograd.grad(cv_squared_loss(probs, indices, 4), logits)
    torch.testing.assert_close(grad[0], by_hand_grad[0], rtol=0, atol=1e-14)


def test_cv_squared_keeps_its_digits_near_balance() -> None:
    """Shares of 1/4 ± 1e-5 in float32: 1.6e-9, where E·Σx² - 1 would leave rounding of 1e-7."""
    probs = torch.tensor([[0.25 + 1e-5, 0.25 - 1e-5, 0.25 + 1e-5, 0.25 - 1e-5]])
    loss = cv_squared_loss(probs, torch.tensor([[0, 1, 2, 3]]), 4)
    assert loss.item() == pytest.approx(1.6e-9, rel=0.01)


# --- entropy


@given(st.integers(0, 6), st.integers(1, 5))
def test_entropy_loss_equals_the_loop(tokens: int, experts: int) -> None:
    probs = torch.randn(tokens, experts, dtype=torch.float64).softmax(-1)
    mask = torch.rand(tokens) < 0.6
    rows = [row for row, real in zip(probs.tolist(), mask.tolist(), strict=True) if real]
    expected = sum(p * math.log(p) for row in rows for p in row) / max(len(rows), 1)
    probs[~mask] = math.nan
    assert entropy_loss(probs, mask).item() == pytest.approx(expected, abs=FLOAT64)


def test_entropy_loss_at_its_marks() -> None:
    """-ln E when uniform, -ln k when k experts share all, 0 when every token is sure, balanced or not."""
    assert entropy_loss(uniform(3, 8)).item() == pytest.approx(-math.log(8), abs=1e-14)
    assert entropy_loss(collapsed(3, 8, [1, 4])[0]).item() == pytest.approx(-math.log(2), abs=1e-14)
    assert entropy_loss(torch.eye(4)).item() == 0.0


def test_descending_the_entropy_loss_widens() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(entropy_loss(logits.softmax(-1)), logits)
    assert grad[0, 0] > 0 > grad[0, 2]


@pytest.mark.parametrize("loss", ["entropy", "switch", "cv2"])
def test_probabilities_that_underflow_leave_finite_gradients(loss: str) -> None:
    """Logits of ±80 in float32: a probability of exactly 0, whose logarithm has an infinite slope."""
    logits = torch.tensor([[80.0, -80.0, 0.0]], requires_grad=True)
    probs = logits.softmax(-1)
    assert probs[0, 1] == 0.0
    value = entropy_loss(probs) if loss == "entropy" else BALANCE_LOSSES[loss].of(layer_load(route(probs, [[0]])))
    value.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


# --- the registry, and the loads that it judges


def route(probs: Tensor, chosen: list[list[int]], keep: list[list[bool]] | None = None) -> RouterOutput:
    routing = by_hand(
        torch.tensor(chosen), torch.ones(len(chosen), len(chosen[0])), probs.shape[1], keep and torch.tensor(keep)
    )
    return routing._replace(router_probs=probs, router_probs_clean=probs)


def test_every_loss_that_a_config_can_name_is_there() -> None:
    assert set(BALANCE_LOSSES) == set(BALANCE_LOSS_NAMES)


@pytest.mark.parametrize("name", BALANCE_LOSSES)
@pytest.mark.parametrize(("experts", "k"), [(2, 1), (8, 2), (6, 4), (4, 4)])
def test_balanced_and_collapse_values_are_reached(name: str, experts: int, k: int) -> None:
    loss = BALANCE_LOSSES[name]
    balanced = layer_load(route(uniform(experts, experts), all_balanced(experts, k).tolist()))
    assert loss.of(merged(balanced)).item() == pytest.approx(loss.balanced(experts, k), abs=1e-13)
    probs, indices = collapsed(10, experts, list(range(k)))
    worst = layer_load(route(probs, indices.tolist()))
    assert loss.of(merged(worst)).item() == pytest.approx(loss.collapse(experts, k), abs=1e-13)
    assert loss.balanced(experts, k) <= loss.collapse(experts, k)


@given(balance_cases(), st.booleans())
def test_the_load_of_a_layer_gives_the_public_losses(drawn: tuple[Case, list[bool]], masked: bool) -> None:
    case, real = drawn
    probs = torch.randn(case.num_tokens, case.num_experts, dtype=torch.float64).softmax(-1)
    mask = torch.tensor(real, dtype=torch.bool) if masked else None
    routing = case.routing()._replace(router_probs=probs, router_probs_clean=probs)
    load = merged(layer_load(routing, mask))
    arguments = (probs, routing.topk_indices, case.num_experts, mask, routing.keep)
    expected = {
        "switch": load_balancing_loss(*arguments),
        "cv2": cv_squared_loss(*arguments),
        "entropy": entropy_loss(probs, mask),
    }
    assert int(load.tokens) == (sum(real) if masked else case.num_tokens)
    for name, value in expected.items():
        assert BALANCE_LOSSES[name].of(load).item() == pytest.approx(value.item(), abs=FLOAT64)


def test_entropy_is_that_of_the_noise_free_distribution_and_the_others_see_the_noise() -> None:
    noisy, clean = uniform(3, 4), collapsed(3, 4, [0, 1])[0]
    load = merged(layer_load(route(noisy, [[0], [1], [2]])._replace(router_probs_clean=clean)))
    assert BALANCE_LOSSES["entropy"].of(load).item() == pytest.approx(-math.log(2), abs=1e-14)
    assert load.probs.tolist() == [0.25] * 4


def test_groups_are_rows_of_the_batch_each_on_its_own() -> None:
    """Three rows of four tokens with padding: as three calls, and merged as one."""
    probs = torch.randn(12, 5, dtype=torch.float64).softmax(-1)
    chosen, mask = torch.randint(0, 5, (12, 2)), torch.tensor([True] * 4 + [True, True, False, False] + [False] * 4)
    probs[~mask] = math.nan
    rows = layer_load(route(probs, chosen.tolist()), mask, groups=3)
    assert rows.tokens.tolist() == [4, 2, 0]
    for row in range(3):
        part = slice(4 * row, 4 * row + 4)
        alone = merged(layer_load(route(probs[part], chosen[part].tolist()), mask[part]))
        assert torch.equal(rows.counts[row], alone.counts)
        torch.testing.assert_close(rows.probs[row], alone.probs, rtol=0, atol=1e-15)
        torch.testing.assert_close(rows.entropy[row], alone.entropy, rtol=0, atol=1e-15)
    whole = merged(layer_load(route(probs, chosen.tolist()), mask))
    for ours, theirs in zip(merged(rows)[:4], whole[:4], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)


def test_a_part_of_a_step_differentiates_its_own_part_of_the_whole() -> None:
    """With the whole step's counts and mean probabilities, the parts' gradients add up to that of one batch."""
    indices = torch.randint(0, 5, (12, 2), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    for name, loss in BALANCE_LOSSES.items():
        whole = merged(layer_load(route(logits.softmax(-1), indices.tolist())))
        (expected,) = torch.autograd.grad(loss.of(whole), logits, retain_graph=True)
        grads, total = torch.zeros_like(logits), 0.0
        for part in (slice(0, 1), slice(1, 8), slice(8, 12)):
            here = merged(layer_load(route(logits[part].softmax(-1), indices[part].tolist())))
            share = int(here.tokens) / 12
            value = share * loss.of(here._replace(counts=whole.counts, pooled=whole.probs.detach()))
            grads += torch.autograd.grad(value, logits)[0]
            total += value.item()
        assert total == pytest.approx(loss.of(whole).item(), abs=1e-14), name
        torch.testing.assert_close(grads, expected, rtol=0, atol=1e-15, msg=name)


def test_no_tokens_are_no_load() -> None:
    load = LayerLoad(*(torch.zeros(shape) for shape in ((3,), (3,), (), ())))
    assert [BALANCE_LOSSES[name].of(load).item() for name in BALANCE_LOSSES] == [0.0, 0.0, 0.0]


# --- z-loss


@given(st.integers(0, 6), st.integers(1, 5))
def test_z_loss_equals_the_loop(tokens: int, experts: int) -> None:
    logits = torch.randn(tokens, experts, dtype=torch.float64)
    squares = [math.log(sum(math.exp(value) for value in row)) ** 2 for row in logits.tolist()]
    expected = sum(squares) / tokens if tokens else 0.0
    assert router_z_loss(logits).item() == pytest.approx(expected, abs=FLOAT64)


def test_z_loss_by_hand() -> None:
    """Zero logits over E experts: ln(E)²."""
    assert router_z_loss(torch.zeros(3, 8, dtype=torch.float64)).item() == pytest.approx(math.log(8) ** 2, abs=1e-14)


def test_z_loss_survives_logits_that_overflow_exp() -> None:
    assert router_z_loss(torch.tensor([[1000.0, 0.0]])).item() == 1e6


def test_losses_run_in_float32_on_low_precision_input() -> None:
    """In bfloat16 the mean of 1,000 equal numbers would not even be that number."""
    probs = torch.full((1000, 3), 1 / 3).bfloat16()
    loss = load_balancing_loss(probs, torch.zeros(1000, 1, dtype=torch.int64), 3)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(3 * probs[0, 0].item(), rel=1e-6)
    cv2 = cv_squared_loss(probs, torch.zeros(1000, 1, dtype=torch.int64), 3)
    assert cv2.dtype == torch.float32
    assert cv2.item() == pytest.approx(2.0, rel=1e-6)
    wide = entropy_loss(probs)
    p = probs[0, 0].item()
    assert wide.dtype == torch.float32
    assert wide.item() == pytest.approx(3 * p * math.log(p), rel=1e-6)
    z = router_z_loss(torch.full((1000, 3), 0.3).bfloat16())
    assert z.dtype == torch.float32
    assert z.item() == pytest.approx((0.30078125 + math.log(3)) ** 2, rel=1e-6)  # 0.3 in bfloat16 is 0.30078125


def test_masked_mean_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [math.nan, math.inf]])
    assert masked_mean(values, torch.tensor([True, True, False])).tolist() == [2.0, 3.0]
    assert masked_mean(values[:2, 0], None).item() == 2.0
    assert masked_mean(values, torch.zeros(3, dtype=torch.bool)).tolist() == [0.0, 0.0]
    assert masked_mean(values, torch.tensor([1, 1, 0])).tolist() == [2.0, 3.0], "an attention mask of ints"
    assert masked_mean(torch.tensor([1.0, math.nan]), None).isnan(), "NaN in real tokens is not healed"
